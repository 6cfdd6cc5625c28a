"""`check --bundle DIR`: what the watch caught, as a run of one check; on a SUBJECT, its batches are run again first."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from numerics_suite.core.errors import BadInputError, NotApplicableError
from numerics_suite.core.records import Cell, CheckResult, Finding, RunResult, Subject
from numerics_suite.devices import random_state
from numerics_suite.devices.device import resolve_device
from numerics_suite.devices.precisions import precision
from numerics_suite.diagnosis.remedy_register import remedies_of, untried
from numerics_suite.diagnosis.remedy_trials import breaks
from numerics_suite.diagnosis.root_causes import REMEDIES
from numerics_suite.diagnosis.versions_advice import borne_out_of
from numerics_suite.engine.environment import describe_run
from numerics_suite.engine.kept_step import filled, fits
from numerics_suite.engine.reproduce_step import shown
from numerics_suite.settings.tree import Settings, to_json
from numerics_suite.subjects.load import load, place
from numerics_suite.subjects.resolve import resolve_all
from numerics_suite.suite.collector import subject_facts
from numerics_suite.suite.endings import ending
from numerics_suite.suite.session import error_line
from numerics_suite.training_watch.bundle_reader import (
    Bundle,
    bad_calls,
    built_model,
    read_bundle,
    scene_of,
)
from numerics_suite.training_watch.caught_step import Start, precision_name, undisturbed
from numerics_suite.training_watch.diagnosis import CaughtContext, run_again, trained_again
from numerics_suite.training_watch.remedies import ITS_OWN_CHECK, check_of, left_untried, with_remedies_tried

if TYPE_CHECKING:
    from numerics_suite.core.records import Task
    from numerics_suite.observations.bad_value_location import Origin

CHECK = "train.finite"
"""What the watch asks in each step is what this check asks of a few."""

TASKS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}


def reopen(settings: Settings, path: Path) -> RunResult:
    """The bundle's finding as a result; with subjects, what its batches do on them.

    Args:
        settings: subjects, precision and attention; those that were not asked for are the bundle's.
        path: of the folder.

    Raises:
        BadInputError: the bundle is torn or foreign, or a subject cannot be used.
    """
    started, clock = datetime.now(tz=timezone.utc).astimezone(), time.perf_counter()
    bundle = read_bundle(path)
    subjects: tuple[Subject, ...] = ()
    if settings.subjects:
        subjects = resolve_all(
            settings.subjects,
            settings.names,
            task=_task(bundle) if settings.task == "auto" and _task(bundle) != "module" else settings.task,
            num_labels=settings.num_labels,
            trust_remote_code=settings.trust_remote_code,
            allow_pickle=settings.allow_pickle,
        )
        checks = tuple(_replayed(bundle, subject, settings) for subject in subjects)
    else:
        cell = _cell(bundle, bundle.content["model"]["class"], _task(bundle), settings)
        checks = (_failed(cell, _tried_again(bundle, cell.device) if settings.diagnose else bundle.finding),)
    return RunResult(
        command="check",
        started_at=started.isoformat(timespec="seconds"),
        duration_s=round(time.perf_counter() - clock, 3),
        verdict=ending(checks).verdict,
        environment=describe_run(_device(settings)),
        settings={**to_json(settings), "bundle": str(path)},
        subjects=tuple(subject_facts(subject) for subject in subjects),
        checks=checks,
        notes=(f"bundle: {_told(bundle)}",),
        exit_status=ending(checks).status,
    )


def _told(bundle: Bundle) -> str:
    content = bundle.content
    packages = content["environment"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"step {bundle.step}, caught {content['created_at']} with {versions}; digests hold; can be replayed: {content['replay']}"


def _device(settings: Settings) -> str:
    """Where a bundle's steps run again, under the same autocast, wherever they were caught."""
    return resolve_device(settings.device, settings.require_device)


def _task(bundle: Bundle) -> Task:
    name = bundle.content["model"]["class"]
    return next((task for suffix, task in TASKS.items() if suffix in name), "module")


def _cell(bundle: Bundle, subject: str, task: Task, settings: Settings) -> Cell:
    asked = settings.precision if settings.explicit("precision") else None
    attn = settings.attn if settings.explicit("attn") else None
    return Cell(
        subject=subject,
        precision=asked[0] if asked else _precision(bundle),
        attn=attn[0] if attn else bundle.content["model"]["attn"] or "default",
        device=_device(settings),
        task=task,
    )


def _precision(bundle: Bundle) -> str:
    """The recipe that the watched model was trained by: its dtype and its autocast sections."""
    autocast = next((dtype for call in bundle.calls for dtype in call.autocast.values()), None)
    lower = None if autocast is None else str(autocast).removeprefix("torch.")
    model = bundle.content["model"]
    return precision_name(str(model.get("trained_dtype") or model["dtype"]), lower)


def _tried_again(bundle: Bundle, device: str) -> Finding:
    """The bundle's finding; where the bundle alone can make its model, located over all the steps, and with its remedies tried."""
    try:
        model = place(built_model(bundle), device)
    except NotApplicableError as error:
        return left_untried(bundle.finding, str(error))
    try:
        start = bundle.start()
        scene = scene_of(bundle, model, () if start is None else (start,))
        _, found = reopened(bundle, model, bundle.finding)
        if found.op is None and (trained := trained_again(scene, bundle.step)) is not None:
            found = borne_out_of(_found_again(found, *trained), model)
        return with_remedies_tried(found, scene)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # An edited bundle may hold calls that its model does not take.
        return left_untried(bundle.finding, f"not tried: its steps cannot be taken again ({error_line(error)})")


def _replayed(bundle: Bundle, subject: Subject, settings: Settings) -> CheckResult:
    """The bad step's batches on the subject: its own finding where they go wrong, passed where they do not.

    A factory makes the module that was watched, and what that held is in the bundle.
    """
    cell = _cell(bundle, subject.id, subject.task, settings)
    started = time.perf_counter()
    dtype = precision(cell.precision).parameters
    loaded = load(subject, dtype=dtype, attn=cell.attn, device=cell.device, seed=settings.seed)
    start = bundle.start() if subject.kind == "factory" and fits(bundle.kept, loaded.model) else None
    if start is not None:
        filled(bundle.kept, loaded.model)
    own = Start(words=f"the weights of {subject.id}", calls=bad_calls(bundle), scale=bundle.scale)
    scene = scene_of(bundle, loaded.model, (start or own,))
    found = _on(subject, bundle, scene) if start is None else _of_factory(subject, bundle, scene)
    if found is not None and settings.diagnose:
        found = with_remedies_tried(found, scene)
    seconds = round(time.perf_counter() - started, 3)
    if found is None:
        return CheckResult(
            check=CHECK, cell=cell, status="passed", duration_s=seconds, measurements={"non-finite": 0.0}
        )
    return replace(_failed(cell, found), duration_s=seconds)


def reopened(bundle: Bundle, model: nn.Module, found: Finding) -> tuple[bool, Finding]:
    """Whether the finding is reproduced, and it with the fact `reopened`: what its kept steps, taken as the bundle's own script takes them, show.

    Args:
        bundle: as read.
        model: with the parameters that the folder holds; left as it is.
        found: its finding.
    """
    with undisturbed(), random_state.kept():
        again, text = shown(bundle.kept, copy.deepcopy(model))
    words = "reproduced" if again else "not reproduced"
    return again, replace(found, evidence={**found.evidence, "reopened": f"{words}: {text}"})


def _of_factory(subject: Subject, bundle: Bundle, scene: CaughtContext) -> Finding | None:
    """The finding on the module that was watched, made anew; None where it does not come about again."""
    again, found = reopened(bundle, scene.model, bundle.finding)
    if not again:
        return None
    origin, how, cause = None, "", found.cause
    if check_of(found) == ITS_OWN_CHECK and found.op is not None:
        where = trained_again(scene, bundle.step)
        origin, how, cause = where or (run_again(scene, {}, backward=True), "", found.cause)
    found = _found_again(found, origin, f"on {subject.id}{', ' if how else ''}{how}", cause)
    return borne_out_of(
        replace(found, remedies=untried(tuple(remedy.name for remedy in found.remedies), found.cause)), scene.model
    )


def _on(subject: Subject, bundle: Bundle, scene: CaughtContext) -> Finding | None:
    """The finding on another model, with none of its remedies tried yet."""
    found, trained = bundle.finding, trained_again(scene, bundle.step)
    if (
        check_of(found) != ITS_OWN_CHECK
    ):  # neither the batch's dtype nor a loss scale is a matter of where a value begins
        trained = None
        where = run_again(scene, {}, backward=True)
        if where is None and not breaks(check_of(found), scene.caught(scene.starts[0])):
            return None
    elif trained is None and (where := run_again(scene, {}, backward=True)) is None:
        return None
    origin, how, cause = trained or (where, "", found.cause)
    found = _found_again(found, origin, f"on {subject.id}{', ' if how else ''}{how}", cause)
    return borne_out_of(
        replace(found, remedies=untried(tuple(remedy.name for remedy in found.remedies), found.cause)), scene.model
    )


def _found_again(found: Finding, origin: Origin | None, how: str, cause: str) -> Finding:
    """The finding as it is reproduced, with the remedies of its cause."""
    if cause == "unknown":
        cause = found.cause
    if cause != found.cause:
        found = replace(found, cause=cause, remedies=untried((*REMEDIES.get(cause, ()), *remedies_of(cause)), cause))
    return replace(_placed(found, origin), evidence={**_placed(found, origin).evidence, "replay": how})


def _placed(found: Finding, origin: Origin | None) -> Finding:
    """The finding at another place."""
    if origin is None:
        return found
    return replace(
        found,
        module=origin.module,
        op=origin.op,
        source=origin.source,
        parameters=origin.parameters or found.parameters,
        evidence={**found.evidence, "op": origin.op},
    )


def _failed(cell: Cell, finding: Finding) -> CheckResult:
    check = check_of(finding)
    measurements = {"non-finite": 1.0} if check == CHECK else {}
    return CheckResult(check=check, cell=cell, status="failed", measurements=measurements, finding=finding)


def refuse_other_options(settings: Settings) -> None:
    """A bundle is one step of one model: what asks for a whole run is refused.

    Raises:
        BadInputError: such an option was given.
    """
    for name in ("checks", "skip", "baseline", "report", "junitxml", "data", "resume"):
        if settings.origin(name) == "command line":
            message = f"--{name} cannot go with --bundle, which asks one question"
            raise BadInputError(message)
