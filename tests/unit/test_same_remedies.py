"""For one defect `check`, a watched loop and `check --bundle` name the same cause and the same remedies."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from unit import same_defects
from unit.same_defects import TABLE, Defect

from numerics_suite import NumericsError, watch
from numerics_suite.core.records import Finding
from numerics_suite.devices.arithmetic import deterministic_algorithms
from numerics_suite.devices.precisions import precision
from numerics_suite.diagnosis.versions_advice import without_newer
from numerics_suite.engine.training_loop import OPTIMIZERS
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.load import convert
from numerics_suite.suite.bundle_replay import reopen
from numerics_suite.suite.session import SuiteSession

STEPS = 6
STEPS_KEPT = 30
"""A snapshot from before the first step, and every batch since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one command says: the cause, and every remedy with its verdict, in order."""

    cause: str
    remedies: tuple[tuple[str, bool | None], ...]

    @property
    def verified(self) -> tuple[str, ...]:
        return tuple(name for name, verified in self.remedies if verified)


def told(finding: Finding) -> Told:
    return Told(cause=finding.cause, remedies=tuple((each.name, each.verified) for each in finding.remedies))


def settings_of(defect: Defect) -> Settings:
    return Settings(
        subjects=(f"factory:unit.same_defects:{defect.factory}",),
        precision=(defect.precision,),
        attn=("default",),
        checks=(defect.check,),
        device="cpu",
        optimizer=defect.optimizer,
        lr=defect.lr,
        steps=STEPS,
        origins={"precision": "command line"},
    )


def by_check(defect: Defect) -> Finding:
    session = SuiteSession(settings_of(defect))
    (question,) = session.plan.questions
    result, trace = session.answer(question)
    assert result.finding is not None, f"{result.status} {result.reason} {trace}"
    return without_newer(result.finding)  # as a run without an index to ask writes it


def by_watch(defect: Defect, folder, kept=STEPS_KEPT) -> Finding:
    """A plain loop over the factory's batch, in the recipe of the precision; memory that nobody writes to holds NaN."""
    recipe = precision(defect.precision)
    with deterministic_algorithms(fill=True):
        model, batch = getattr(same_defects, defect.factory)()
    convert(model, getattr(torch, recipe.parameters))
    optimizer = OPTIMIZERS[defect.optimizer](model.parameters(), lr=defect.lr)
    scaler = torch.amp.GradScaler("cpu", enabled=recipe.loss_scaling)
    lower = getattr(torch, recipe.autocast or "bfloat16")
    with warnings.catch_warnings(), pytest.raises(NumericsError) as error:  # noqa: PT012 - a whole loop is what raises
        warnings.simplefilter("ignore")
        with watch(model, optimizer, snapshot_every=kept, ring=STEPS_KEPT, bundle=folder):
            for _ in range(STEPS_KEPT):
                with torch.autocast("cpu", dtype=lower, enabled=recipe.autocast is not None):
                    loss = model(**batch)["loss"]
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return error.value.finding


def by_bundle(defect: Defect, folder) -> Finding:
    settings = Settings(subjects=(f"factory:unit.same_defects:{defect.factory}",), device="cpu")
    (check,) = reopen(settings, folder).checks
    assert check.finding is not None, f"{check.status} {check.reason}"
    return check.finding


def name_of(defect: Defect) -> str:
    return f"{defect.factory}-{defect.precision}-{defect.cause}"


@pytest.mark.parametrize(
    "defect",
    [
        pytest.param(each, id=name_of(each), marks=[pytest.mark.slow] if place >= 6 else [])
        for place, each in enumerate(TABLE)
    ],
)
def test_check_watch_and_bundle_agree(defect, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked = told(by_check(defect))
    watched = told(by_watch(defect, tmp_path / "b"))
    reopened = told(by_bundle(defect, tmp_path / "b"))
    assert (checked.cause, checked.verified) == (defect.cause, defect.remedies)
    assert watched == checked
    assert reopened == checked


def test_a_combination_names_the_cause_behind_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defect = next(each for each in TABLE if len(each.remedies) == 2 and each.factory == "uninitialised_head")
    remedies = {remedy.name: remedy for remedy in by_check(defect).remedies}
    assert remedies["init-head"].together == ("larger-optimizer-eps",)
    assert remedies["larger-optimizer-eps"].together == ("init-head",)
    assert "(optimizer-underflow is behind it)" in remedies["init-head"].effect


def test_enough_defects_are_compared():
    assert len({each.cause for each in TABLE}) >= 7
    assert len(TABLE) >= 10


@pytest.mark.parametrize(
    "defect",
    [each for each in TABLE if each.factory in {"uninitialised_head", "loud_activation", "masked_row", "root_of_zero"}],
    ids=name_of,
)
def test_what_goes_bad_within_the_first_step_needs_no_snapshot(defect, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watched = told(by_watch(defect, tmp_path / "b", kept=0))
    assert (watched.cause, watched.verified) == (defect.cause, defect.remedies)
    assert told(by_bundle(defect, tmp_path / "b")) == watched


def test_a_replay_under_autocast_trains(tmp_path):
    """Autocast keeps the weights that it has cast until its outermost section ends: a replay must not run on those of its first step."""
    defect = next(each for each in TABLE if each.factory == "loud_activation")
    remedies = {remedy.name: remedy for remedy in by_watch(defect, tmp_path / "b").remedies}
    first, last = (float(part) for part in re.findall(r"loss ([\d.]+) → ([\d.]+)", remedies["use-amp-bf16"].effect)[0])
    assert last < first - 0.01
