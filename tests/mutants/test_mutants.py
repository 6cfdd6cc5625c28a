"""Is every single-place defect caught, by a check that should, at the module at fault, and is nothing else raised?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mutants import catalogue
from mutants.catalogue import MUTANTS, ORACLE, Mutant
from mutants.driver import (
    MutantSession,
    answers,
    describe,
    failures,
    is_named,
    named_module,
    release,
    run_mutant,
    settings_of,
)
from mutants.editing import NoSuchPlaceError
from numerics_suite.core.records import CheckResult
from numerics_suite.suite import driver

FAMILIES = ("glm", "glm4", "chatglm")
TASKS = ("", "-classifier")
DEFAULTS = ("fp32", "bf16", "amp-bf16")
"""Precisions in which the suite asks every check of the same fixtures anyway."""
PRECISIONS = (*DEFAULTS, "fp16")
REAL = [mutant for mutant in MUTANTS if not mutant.equivalent]
FEW = 4
"""Batches where nothing may be raised; `test_clean_model_raises_nothing_over_seeds` draws the full number."""

QUICK = {
    next(mutant.id for mutant in reversed(REAL) if check in mutant.expected_checks)
    for mutant in REAL
    for check in mutant.expected_checks
}
"""For each check one mutant that it must catch; the others are `slow`."""

MISSED = {mutant.id for mutant in REAL if not mutant.expected_checks}
"""Defects that no check sees; `docs/mutants.md` says why."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whether a batch fails is asked, not which is the smallest that does; threads would only fight over the cores."""
    monkeypatch.setattr(driver, "SHRINKS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _needs(family: str) -> None:
    if family == "glm4" and release() < (4, 51):
        pytest.skip("Glm4 appeared in transformers 4.51")


def _asked(mutant: Mutant) -> list[CheckResult]:
    """The expected checks until one fails and, where the module is to be named, until it is."""
    session = MutantSession(settings_of(mutant.fixture, mutant.precision, mutant.attn), mutant.apply)
    results: list[CheckResult] = []
    wanted = (
        *mutant.expected_checks,
        *((ORACLE,) if mutant.module_pattern and ORACLE not in mutant.expected_checks else ()),
    )
    for result in answers(session, wanted):
        results.append(result)
        if failures(results) and (mutant.module_pattern is None or is_named(mutant, named_module(results))):
            break
    return results


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=mutant.id, marks=[] if mutant.id in QUICK else pytest.mark.slow)
        for mutant in REAL
        if mutant.id not in MISSED
    ],
)
def test_defect_is_caught_and_placed(mutant: Mutant) -> None:
    _needs(mutant.family)
    try:
        results = _asked(mutant)
    except NoSuchPlaceError as error:
        pytest.skip(f"this release is written otherwise: {error}")
    if any("NoSuchPlaceError" in (result.reason or "") for result in results):
        pytest.skip("this release is written otherwise")
    caught = {result.check for result in failures(results)}
    assert caught & set(mutant.expected_checks), describe(results)
    if mutant.module_pattern is not None:
        assert is_named(mutant, named_module(results)), describe(results)


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=mutant.id, marks=pytest.mark.slow if place else [])
        for area in vars(catalogue).values()
        for place, mutant in enumerate(mutant for mutant in getattr(area, "MUTANTS", ()) if mutant.equivalent)
    ],
)
def test_equivalent_mutant_raises_nothing(mutant: Mutant) -> None:
    _needs(mutant.family)
    results = run_mutant(mutant, max_examples=FEW)
    if any("NoSuchPlaceError" in (result.reason or "") for result in results):
        pytest.skip("this release is written otherwise")
    assert not [result for result in results if result.status in {"failed", "error"}], describe(results)


@pytest.mark.parametrize("attn", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
@pytest.mark.parametrize("precision", [*(pytest.param(name, marks=pytest.mark.slow) for name in DEFAULTS), "fp16"])
@pytest.mark.parametrize("fixture", [f"{family}-tiny{task}" for family in FAMILIES for task in TASKS])
def test_clean_model_raises_nothing(fixture: str, precision: str, attn: str) -> None:
    _needs(fixture.partition("-")[0])
    results = list(answers(MutantSession(settings_of(fixture, precision, attn, max_examples=FEW))))
    assert len(results) > 20
    assert not [result for result in results if result.status in {"failed", "error"}], describe(results)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fixture", [f"{family}-tiny{task}" for family in FAMILIES for task in TASKS])
def test_clean_model_raises_nothing_over_seeds(fixture: str, seed: int) -> None:
    _needs(fixture.partition("-")[0])
    for precision in (*PRECISIONS, "fp64", "amp-fp16"):
        for attn in ("eager", "sdpa"):
            results = list(answers(MutantSession(settings_of(fixture, precision, attn, seed=seed))))
            assert not [result for result in results if result.status in {"failed", "error"}], describe(results)


def test_the_catalogue_is_what_it_says() -> None:
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS)
    assert len(REAL) >= 60
    assert {mutant.family for mutant in REAL} == set(FAMILIES)
    for mutant in MUTANTS:
        assert mutant.why, mutant.id
        assert not (mutant.equivalent and mutant.expected_checks), mutant.id


def test_a_change_stays_in_its_place() -> None:
    """A mutant changes its own model and neither the class, nor a copy's independence, nor a model loaded later."""
    import copy

    mutant = next(mutant for mutant in MUTANTS if mutant.id == "mlp-gate-and-up-swapped")
    _needs(mutant.family)
    session = MutantSession(settings_of(mutant.fixture, "fp32", "eager"), mutant.apply)
    changed = session.context(session.plan.cells[0]).model
    clean_session = MutantSession(settings_of(mutant.fixture, "fp32", "eager"))
    clean = clean_session.context(clean_session.plan.cells[0]).model
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        wrong, right = changed(ids).logits, clean(ids).logits
        again = copy.deepcopy(changed)(ids).logits
    assert not torch.equal(wrong, right)
    assert torch.equal(wrong, again)
    assert type(clean.get_submodule("model.layers.1.mlp")) is type(clean.get_submodule("model.layers.0.mlp"))
