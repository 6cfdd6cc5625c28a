"""How a check is asked: judged over all batches, shrunk when it fails, and never silently empty."""

from __future__ import annotations

import dataclasses
import math

import pytest

from numerics_suite.core.errors import CheckError
from numerics_suite.core.records import Budget, Cell, CheckResult, Measurement
from numerics_suite.judgement.verdicts import judge, within
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.driver import ask
from numerics_suite.suite.endings import NO_BATCH, TIME_LIMIT, ending
from numerics_suite.suite.session import SuiteSession

CELL = Cell(subject="s", precision="bf16", attn="sdpa", device="cpu", task="causal-lm")


def measured(value, name="m"):
    return Measurement(name=name, value=value, unit="ratio")


def budget(limit, name="m"):
    return {name: Budget(check="c", measurement=name, limit=limit, cause="unknown", title="", reason="")}


@pytest.mark.parametrize(
    ("value", "limit", "passes"),
    [(1, 1, True), (1.1, 1, False), (math.nan, 1, False), (0, 0, True), (math.inf, 1, False)],
)
def test_a_limit_of_zero_is_a_limit_and_nan_is_never_within(value, limit, passes):
    assert within(value, limit) is passes
    assert (judge("c", [measured(value)], budget(limit)) == []) is passes


def test_nothing_measured_is_an_error_and_not_a_pass():
    with pytest.raises(CheckError):
        judge("c", [measured(0, "no budget of this name")], budget(1))


def test_the_worst_breach_comes_first():
    table = budget(1) | budget(1, "n")
    breaches = judge("c", [measured(2), measured(math.nan, "n")], table)
    assert [breach.measurement.name for breach in breaches] == ["n", "m"]


def result(status):
    return CheckResult(check="load.finite", cell=CELL, status=status)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["passed", "skipped"], 0),
        (["passed", "failed", "error"], 1),
        (["passed", "error"], 3),
        (["skipped"], 5),
        ([], 5),
        (["accepted"], 0),
    ],
)
def test_exit_status_of_the_contract(statuses, expected):
    assert ending([result(status) for status in statuses]).status == expected


def test_a_time_limit_and_a_broken_accept_entry_are_not_green():
    late = [result("passed"), dataclasses.replace(result("skipped"), reason=TIME_LIMIT)]
    assert ending(late).status == 5
    assert ending(late, allow_partial=True).status == 0
    assert ending([result("passed")], broken=True).status == 1


def test_a_module_without_a_batch_is_not_green_unless_it_is_a_finding():
    unasked = dataclasses.replace(result("skipped"), reason=NO_BATCH)
    assert ending([result("passed"), unasked]).status == 5
    assert ending([result("failed"), unasked]).status == 1


def test_an_interrupted_run_is_neither_green_nor_a_finding():
    found = ending([result("failed")], interrupted=True)
    assert (found.status, found.verdict, found.complete) == (2, "error", False)


@pytest.fixture
def context():
    settings = Settings(subjects=("fixture:glm-tiny",), precision=("fp32",), attn=("sdpa",))
    session = SuiteSession(settings)
    return session.context(session.plan.cells[0])


def drawn(context, seed):
    from numerics_suite.core.registry import CheckSpec

    seen = []

    def look(_evidence, batch):
        seen.append(batch.drawn)
        yield Measurement(name="non-finite", value=0, unit="elements")

    ask(CheckSpec(id="forward.finite", function=look, batches=True), context, seed=seed, max_examples=10)
    return seen


def test_same_seed_same_batches_another_seed_others(context):
    assert drawn(context, 0) == drawn(context, 0)
    assert drawn(context, 0) != drawn(context, 1)
    assert len(drawn(context, 0)) == 10


def test_a_failing_batch_is_shrunk_to_the_smallest_that_fails(context):
    from numerics_suite.core.registry import CheckSpec

    def long_rows_fail(_evidence, batch):
        bad = batch.tensors["input_ids"].shape[1] >= 5
        yield Measurement(name="non-finite", value=int(bad), unit="elements")

    outcome = ask(
        CheckSpec(id="forward.finite", function=long_rows_fail, batches=True), context, seed=0, max_examples=20
    )
    assert outcome.breaches
    assert tuple(outcome.batch.tensors["input_ids"].shape) == (1, 5)
