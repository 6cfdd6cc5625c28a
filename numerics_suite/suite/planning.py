"""From settings to the plan: which checks run on which cell, and which are known to be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError, CheckError, UnsupportedError
from numerics_suite.core.records import Cell, Subject
from numerics_suite.core.registry import GROUPS, CheckSpec, get_check, own_check_ids
from numerics_suite.devices.device import default_precisions, lacks, lacks_attention, resolve_device
from numerics_suite.devices.precisions import SERVING_REASON, Precision, precision
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.fixtures import fixture_names
from numerics_suite.subjects.resolve import factory_subject, resolve_all, unsupported_subject
from numerics_suite.suite.baseline_selection import GROUP, asks_by_name, baselines_of, lacking, refuse_strangers
from numerics_suite.suite.check_selection import selected_checks
from numerics_suite.suite.data import checked_data
from numerics_suite.suite.endings import NO_BATCH
from numerics_suite.suite.extensions import load_extensions

if TYPE_CHECKING:
    from numerics_suite.baselines.store import Baselines

DEFAULT_ATTENTION = ("eager", "sdpa")
QUANTISED_REASON = "a quantised checkpoint: only load.* and forward.* apply"
NEEDS = {
    "checkpoint": "a factory has no checkpoint files",
    "token-ids": "a plain module takes no token ids",
    "head": "only for sequence classification",
    "causal": "only for causal language models",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One check of one cell, with the reason if it is known to be skipped, or to have no answer."""

    check: str
    cell: Cell
    skip: str | None = None
    error: str | None = None

    @property
    def id(self) -> str:
        """Of its entry in the results file."""
        return f"{self.check}/{self.cell.id}"

    @property
    def group(self) -> str:
        """`forward` of `forward.padding`."""
        return self.check.partition(".")[0]

    @property
    def param_id(self) -> str:
        """Id of the pytest parameter: `padding-glm4-tiny-bf16-sdpa-cpu`; the file has one group, but for other packages' checks."""
        name = self.check.partition(".")[2] if self.group in GROUPS else self.check
        return f"{name}-{self.cell.param_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuitePlan:
    """Everything that will be asked.

    Attributes:
        device: the resolved device.
        subjects: by id, in the order of the command line.
        cells: in the order in which they run.
        questions: grouped by cell.
        baselines: what the cells are compared with, None without a folder of baselines.
        data: what is taken of `--data` and how many of its labels count; empty without.
    """

    device: str
    subjects: Mapping[str, Subject]
    cells: tuple[Cell, ...]
    questions: tuple[Question, ...]
    baselines: Baselines | None = None
    data: str = ""


def make_plan(settings: Settings) -> SuitePlan:
    """Resolve subjects and device and lay out the questions.

    Raises:
        BadInputError: something that the user named cannot be used.
    """
    device = resolve_device(settings.device, settings.require_device)
    subjects, absent, ended = _subjects(settings)
    data = checked_data(settings, subjects)
    checks, baselines = _checks(settings)
    cells: list[Cell] = []
    questions: list[Question] = []
    for subject in subjects.values():
        first_of_subject = True
        for recipe, unable in _precisions(settings, device):
            for index, attn in enumerate(_attentions(settings, device, subject)):
                cell = Cell(subject=subject.id, precision=recipe.name, attn=attn, device=device, task=subject.task)
                cells.append(cell)
                for spec in checks:
                    if (spec.scope == "subject" and not first_of_subject) or (spec.scope == "precision" and index):
                        continue
                    skip = absent.get(subject.id) or unable or _reason(spec, subject, recipe)
                    if skip is None and _group(spec.id) == GROUP:
                        skip = lacking(baselines, cell, subject)
                    error = ended.get(subject.id) if skip is None else None
                    questions.append(Question(check=spec.id, cell=cell, skip=skip, error=error))
                first_of_subject = False
    if baselines is not None:
        refuse_strangers(settings, baselines, cells)
    return SuitePlan(
        device=device,
        subjects=subjects,
        cells=tuple(cells),
        questions=tuple(questions),
        baselines=baselines,
        data=data,
    )


def _checks(settings: Settings) -> tuple[list[CheckSpec], Baselines | None]:
    """The selected checks, and the baselines where any of them reads some.

    Checks of baselines are asked where there is a folder of baselines, or where they were asked for by name.
    """
    selected = selected_checks(settings)
    readers = [check for check in selected if _group(check) == GROUP]
    baselines = baselines_of(settings) if readers else None
    if readers and baselines is None and not asks_by_name(settings):
        selected = tuple(check for check in selected if check not in readers)
    load_extensions(selected, NEEDS)
    return [get_check(check) for check in selected], baselines


def _group(check: str) -> str:
    return check.partition(".")[0]


def _subjects(settings: Settings) -> tuple[dict[str, Subject], dict[str, str], dict[str, str]]:
    """Subjects by id, and the reasons for those that the installed packages cannot build, and for those that ended it."""
    sources = settings.subjects or tuple(f"fixture:{name}" for name in fixture_names())
    options: dict[str, Any] = {
        "task": settings.task,
        "num_labels": settings.num_labels,
        "layers": settings.layers,
        "trust_remote_code": settings.trust_remote_code,
        "allow_pickle": settings.allow_pickle,
        "digests": not settings.list_only,
    }
    absent: dict[str, str] = {}
    ended: dict[str, str] = {}
    try:
        return {subject.id: subject for subject in resolve_all(sources, settings.names, **options)}, absent, ended
    except CheckError:
        pass  # one of them ended the resolving from inside; which one, the next pass tells
    except UnsupportedError as error:
        if len(sources) == 1:
            raise BadInputError(str(error)) from None
    subjects: dict[str, Subject] = {}
    for index, source in enumerate(sources):
        name = settings.names[index] if index < len(settings.names) else None
        try:
            (subject,) = resolve_all((source,), (name,) if name else (), **options)
        except UnsupportedError as error:
            subject = unsupported_subject(source, name=name, task=settings.task)
            absent[subject.id] = str(error)
        except CheckError as error:
            subject = factory_subject(source, name=name)
            ended[subject.id] = str(error)
        if subject.id in subjects:
            message = f"two subjects are named '{subject.id}': give them names with --name"
            raise BadInputError(message)
        subjects[subject.id] = subject
    if len(absent) == len(subjects):
        message = "; ".join(dict.fromkeys(absent.values()))
        raise BadInputError(message)
    return subjects, absent, ended


def _precisions(settings: Settings, device: str) -> list[tuple[Precision, str | None]]:
    """Recipes with the reason where the device lacks one of the default list; a named one must be there."""
    names = settings.precision or default_precisions(device)
    found = []
    for name in dict.fromkeys(names):
        recipe = precision(name)
        reason = lacks(recipe, device)
        if reason and settings.precision and settings.explicit("precision"):
            message = f"--precision {name}: {reason}"
            raise BadInputError(message)
        found.append((recipe, reason))
    return found


def _attentions(settings: Settings, device: str, subject: Subject) -> tuple[str, ...]:
    """Attention implementations of a subject; a plain module has no switch for one."""
    if subject.task == "module":
        return ("default",)
    names = tuple(dict.fromkeys(settings.attn or DEFAULT_ATTENTION))
    for name in names:
        reason = lacks_attention(name, device)
        if reason:
            message = f"--attn {name}: {reason}"
            raise BadInputError(message)
    return names


def _reason(spec: CheckSpec, subject: Subject, recipe: Precision) -> str | None:
    """Why the check has nothing to ask of the subject at that precision, None where it may."""
    met = {
        "checkpoint": subject.path is not None,
        "token-ids": subject.task != "module",
        "head": subject.task == "sequence-classification",
        "causal": subject.task == "causal-lm",
    }
    if subject.lacks_batch and _group(spec.id) != "load":
        return NO_BATCH
    for need, reason in NEEDS.items():
        if need in spec.needs and not met[need]:
            return reason
    if subject.quantized and (spec.trains or _group(spec.id) not in {"load", "forward", GROUP}):
        return QUANTISED_REASON
    if spec.trains and not recipe.trains:
        return SERVING_REASON
    return None


def applicable_checks(subject: Subject, precision_name: str) -> tuple[str, ...]:
    """Ids of all our checks that have something to ask of the subject at that precision, whichever are selected.

    A baseline holds them as a fact about the subject, so those of other packages, which come and go, are not among them.
    """
    recipe = precision(precision_name)
    return tuple(
        check
        for check in own_check_ids()
        if _group(check) != GROUP and _reason(get_check(check), subject, recipe) is None
    )
