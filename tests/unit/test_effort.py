"""How many batches a cell is examined on, and how large they are."""

from __future__ import annotations

import pytest

from numerics_suite.checks.forward import batch, cache, causal, padding
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import CheckSpec, check_ids, get_check
from numerics_suite.engine.cell_batches import MOST_ADDED
from numerics_suite.inputs.effort import SMALL_MODEL, Effort
from numerics_suite.inputs.strategies import CONTENTS, long_row, planned_batches
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.settings.table import BY_NAME
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.driver import ask
from numerics_suite.suite.effort import effort_of
from numerics_suite.suite.session import SuiteSession

SPACE = InputSpace(vocab_size=100, pad_id=0, special_ids=(0, 7, 9))


def test_a_small_model_is_drawn_for_as_before_and_a_large_one_has_planned_batches() -> None:
    assert Effort().plan(SMALL_MODEL).drawn == 10
    assert Effort().plan(SMALL_MODEL).planned is None
    large = Effort().plan(SMALL_MODEL + 1)
    assert (large.drawn, large.planned, large.training, large.gradient) == (0, (4, 24), (4, 32), (4, 16))


def test_what_somebody_asked_for_wins() -> None:
    asked = Effort(examples=3).plan(10**9)
    assert (asked.drawn, asked.planned, asked.training) == (3, None, (4, 32))
    sized = Effort(rows=2, length=128).plan(10**9)
    assert (sized.planned, sized.training, sized.gradient) == ((2, 128), (2, 128), None)
    assert Effort(name="thorough", length=7).plan(1).planned == (4, 7)


def test_more_effort_is_more_batches() -> None:
    for parameters in (1, 10**9):
        tokens = [
            plan.drawn * 250 + (plan.planned[0] * plan.planned[1] if plan.planned else 0)
            for plan in (Effort(name=name).plan(parameters) for name in ("quick", "standard", "thorough"))
        ]
        assert tokens == sorted(set(tokens))


def test_the_options_that_win_are_those_that_somebody_set() -> None:
    assert effort_of(Settings()) == Effort()
    assert effort_of(Settings(max_examples=3)).examples == 3
    assert effort_of(Settings(max_examples=10, origins={"max_examples": "command line"})).examples == 10
    assert BY_NAME["effort"].default == "standard"


def test_planned_batches_are_those_of_their_seed_and_hold_every_kind_of_row() -> None:
    plain, padded, odd = planned_batches(SPACE, rows=4, length=16, seed=3)
    again = planned_batches(SPACE, rows=4, length=16, seed=3)
    assert [each.drawn for each in again] == [plain.drawn, padded.drawn, odd.drawn]
    assert planned_batches(SPACE, rows=4, length=16, seed=4)[0].drawn != plain.drawn
    assert bool(plain.tensors["attention_mask"].all())
    mask = padded.tensors["attention_mask"]
    assert mask.sum(1).tolist() == [16, 8, 12, 1]
    assert bool(mask[:, -1].all())  # on the left
    assert all(kind in plain.drawn for kind in CONTENTS)
    assert (plain.laws_apply, padded.laws_apply, odd.laws_apply) == (True, True, False)
    assert int((odd.tensors["input_ids"] == 0)[0].sum()) == 1


def test_a_long_row_is_as_long_as_the_config_and_a_constant_allow() -> None:
    whole = long_row(SPACE, 500, heads=4, seed=0)
    assert whole is not None
    assert whole.tensors["input_ids"].shape == (1, 500)
    bounded = long_row(SPACE, 10**6, heads=16, seed=0)
    assert bounded is not None
    assert bounded.tensors["input_ids"].shape == (1, 2048)  # 16 heads × 4,096² numbers are 2 GiB in float64
    assert long_row(SPACE, 64, heads=4, seed=0) is None


def test_planned_batches_leave_room_for_what_any_law_adds() -> None:
    assert max(get_check(name).adds for name in check_ids() if name.startswith(("forward.", "inputs."))) == MOST_ADDED


def context_at(effort: str, **changes: object):
    settings = Settings(
        subjects=("fixture:glm-tiny",), precision=("fp32",), attn=("eager",), device="cpu", effort=effort, **changes
    )
    session = SuiteSession(settings)
    return session.context(session.plan.cells[0])


def test_a_planned_batch_that_fails_is_looked_at_alone_and_made_smaller() -> None:
    context, seen = context_at("quick"), []

    def long_rows_fail(_evidence, batch):
        seen.append(batch.drawn)
        bad = batch.tensors["input_ids"].shape[1] >= 5
        yield Measurement(name="true", value=int(bad), unit="ratio")
        yield Measurement(name="rounded", value=0, unit="ratio")

    outcome = ask(CheckSpec(id="forward.causal", function=long_rows_fail, batches=True), context, seed=0)
    assert seen[0] == context.planned_batches[0].drawn
    assert context.planned_batches[1].drawn not in seen
    assert tuple(outcome.batch.tensors["input_ids"].shape) == (1, 5)


def test_a_planned_batch_that_fails_stands_where_no_smaller_one_does() -> None:
    context = context_at("quick")
    planned = context.planned_batches[1]

    def one_fails(_evidence, batch):
        yield Measurement(name="true", value=int(batch.drawn == planned.drawn), unit="ratio")
        yield Measurement(name="rounded", value=0, unit="ratio")

    outcome = ask(CheckSpec(id="forward.causal", function=one_fails, batches=True), context, seed=0)
    assert outcome.breaches
    assert outcome.batch is planned


@pytest.mark.parametrize("law", [batch.batch, cache.cache, causal.causal, padding.padding], ids=lambda law: law.id)
def test_every_law_is_asked_of_the_planned_batches(law: CheckSpec) -> None:
    outcome = ask(law, context_at("quick"), seed=0)
    assert outcome.examples == 2
    assert outcome.worst["rounded"].value > 0
