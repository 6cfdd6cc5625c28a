"""The break of a law that implies another one's is the root of both; two defects stay two roots."""

from __future__ import annotations

import math

import pytest
from mutants.catalogue import MUTANTS
from mutants.driver import MutantSession, settings_of
from torch import nn
from unit.test_consequences import answered, failed, tree

from numerics_suite.core.tree import is_root
from numerics_suite.suite import driver

BY_ID = {mutant.id: mutant for mutant in MUTANTS}
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"


def of(check, cause, measurement, measured=1.0, module=None, **more):
    evidence = {"measurement": measurement, "measured": measured, **more.pop("evidence", {})}
    return failed(check, cause, module=module, evidence=evidence, **more)


CAUSAL = of("forward.causal", "future-leak", "true", module=ATTENTION)
MOVES = of("forward.deterministic", "nondeterminism", "differing", 40, evidence={"moved": 1e-3})
BATCH = of("forward.batch", "batch-leak", "true", module=MLP)
LOCAL = of("reference.local", "low-precision-section", "linear", 300.0, MLP)
COARSER = of("reference.local", "low-precision-section", "coarser", 1, MLP)
ORACLE = of("reference.oracle", "semantic-error", "true-logits", module=ATTENTION)


@pytest.mark.parametrize(
    ("root", "check", "cause", "measurement", "measured", "module", "follows"),
    [
        (CAUSAL, "forward.cache", "cache-mismatch", "true", 0.2, ATTENTION, True),
        (CAUSAL, "forward.cache", "cache-mismatch", "true", 0.2, None, True),
        (CAUSAL, "forward.cache", "cache-mismatch", "true", 0.2, MLP, False),  # seen elsewhere
        (CAUSAL, "forward.cache", "cache-mismatch", "rounded", 90.0, ATTENTION, False),  # not by mathematics
        (CAUSAL, "reference.oracle", "semantic-error", "true-logits", 0.2, ATTENTION, True),
        (CAUSAL, "reference.oracle", "semantic-error", "true-logits", 0.2, MLP, False),
        (CAUSAL, "reference.oracle", "semantic-error", "true-logits", 0.2, None, False),
        (CAUSAL, "forward.batch", "batch-leak", "true", 0.2, ATTENTION, False),
        (MOVES, "forward.batch", "batch-leak", "true", 5e-3, None, True),
        (MOVES, "forward.batch", "batch-leak", "true", 0.2, None, False),  # more than answers move by themselves
        (MOVES, "train.labels", "wrong-loss", "logits-changed", 900, None, True),
        (MOVES, "train.labels", "wrong-loss", "loss-error", 900, None, False),
        (MOVES, "load.roundtrip", "lost-weights", "differing", 1, None, False),  # tensors do not move by themselves
        (BATCH, "train.accumulation", "wrong-gradient", "true-gradient", 0.2, "model.layers.1.mlp", True),
        (BATCH, "train.labels", "wrong-loss", "loss-error", 900, None, False),
        (LOCAL, "forward.batch", "batch-leak", "rounded", 50.0, None, True),
        (LOCAL, "forward.batch", "batch-leak", "true", 0.2, None, False),
        (LOCAL, "reference.gradient", "low-precision-section", "excess", 50.0, ATTENTION, False),
        (COARSER, "train.finite", "overflow", "non-finite", 1, MLP, True),
        (COARSER, "train.finite", "overflow", "non-finite", 1, ATTENTION, False),
        (ORACLE, "forward.attention", "attention-mismatch", "true", 0.2, ATTENTION, True),
        (ORACLE, "forward.attention", "attention-mismatch", "true", 0.2, MLP, False),
    ],
)
def test_a_break_implies_another_by_what_was_measured(  # noqa: PLR0917 - a row of the table
    root, check, cause, measurement, measured, module, follows
):
    second = of(check, cause, measurement, measured, module)
    assert tree(root, second) == [None, root.id if follows else None]
    assert tree(second, root) == [root.id if follows else None, None], "whichever stands first in the plan"


def test_answers_of_a_save_and_load_move_by_themselves():
    second = of("load.roundtrip", "lost-weights", "differing", 1, parameters=("answers",))
    assert tree(second, MOVES) == [MOVES.id, None]


def test_what_is_compared_with_nan_has_its_root():
    nan = of("forward.finite", "fully-masked-row", "non-finite", 9, op="aten._softmax.default")
    for measured in (math.nan, "NaN"):
        assert tree(of("inputs.pipeline", "padding-leak", "padding-moves", measured), nan) == [nan.id, None]
    assert tree(of("inputs.pipeline", "padding-leak", "padding-moves", 0.3), nan) == [None, None]


def test_unread_parameters_of_a_module_that_is_another_one():
    dead = of("train.grad-flow", "dead-gradient", "dead", 1, parameters=(f"{ATTENTION}.q_proj.bias",))
    still = of("train.updates", "untrained-parameters", "untrained", 1, parameters=(f"{ATTENTION}.q_proj.bias",))
    assert tree(ORACLE, dead, still) == [None, ORACLE.id, ORACLE.id]
    elsewhere = of("train.grad-flow", "dead-gradient", "dead", 1, parameters=(f"{MLP}.up.weight",))
    assert tree(ORACLE, elsewhere) == [None, None]


def test_the_gradient_of_dead_parameters_is_not_the_definitions():
    names = {"parameters": (f"{ATTENTION}.k_proj.weight",)}
    dead = of("train.grad-flow", "dead-gradient", "dead", 1, ATTENTION, **names)
    gradient = of("reference.oracle", "wrong-gradient", "true-gradient", module=ATTENTION, **names)
    assert tree(gradient, dead) == [dead.id, None]
    other = of("reference.oracle", "wrong-gradient", "true-gradient", module=MLP, parameters=(f"{MLP}.up.weight",))
    assert tree(other, dead) == [None, None]


def test_the_loss_is_not_the_definitions_either():
    labels = of("train.labels", "wrong-loss", "loss-error", 900)
    assert tree(of("reference.oracle", "wrong-loss", "true-loss", 0.1, "lm_head"), labels) == [labels.id, None]
    assert tree(ORACLE, labels) == [None, None]


def test_one_follows_from_what_follows():
    cache = of("forward.cache", "cache-mismatch", "true", 5e-3, ATTENTION)
    causal = of("forward.causal", "future-leak", "true", 5e-3, ATTENTION)
    assert tree(causal, cache, MOVES) == [MOVES.id, MOVES.id, None]


def test_another_cell_implies_nothing():
    other = of("forward.cache", "cache-mismatch", "true", 0.2, ATTENTION, precision="bf16")
    assert tree(CAUSAL, other) == [None, None]


def changed(*names):
    """A patch that applies these mutants of one cell, and that cell."""
    mutants = [BY_ID[name] for name in names]
    ((fixture, attn),) = {(each.fixture, each.attn) for each in mutants}

    def patch(model):
        for mutant in mutants:
            mutant.apply(model)

    return fixture, attn, patch


def roots_of(checks, fixture, attn, patch):
    """The roots of a changed model, by check, with the modules that they name."""
    session = MutantSession(settings_of(fixture, "fp32", attn, checks, max_examples=3), patch)
    return {each.check: each.finding.module for each in answered(session).checks if is_root(each)}


@pytest.fixture(autouse=True)
def no_shrinking(monkeypatch):
    """Whether a batch fails is asked, not which is the smallest that does."""
    monkeypatch.setattr(driver, "SHRINKS", 0)


ANSWERS = ("forward.causal", "forward.cache", "forward.attention", "reference.oracle")


def test_one_mask_breaks_four_checks_and_is_one_root():
    assert roots_of(ANSWERS, *changed("mask-causal-one-late")) == {"forward.causal": ATTENTION}


def test_a_leak_and_another_activation_in_an_earlier_block_are_two_roots():
    fixture, attn, leak = changed("mask-causal-one-late")

    def both(model):
        leak(model)
        model.model.layers[0].mlp.activation_fn = nn.GELU()

    assert roots_of(ANSWERS, fixture, attn, both) == {"forward.causal": ATTENTION, "reference.oracle": MLP}


def test_rows_that_see_each_other_and_a_summed_loss_are_two_roots():
    """Both break what is trained in parts, which then is a consequence of one of them."""
    checks = ("forward.batch", "train.labels", "train.accumulation")
    roots = roots_of(checks, *changed("norm-over-batch", "loss-sum-for-mean"))
    assert set(roots) == {"forward.batch", "train.labels"}


def test_a_leak_is_more_than_sums_without_an_order_and_stays_a_root():
    fixture, attn, leak = changed("mask-causal-one-late")
    noise = BY_ID["sum-without-an-order"]
    assert noise.fixture == fixture

    def both(model):
        leak(model)
        noise.apply(model)

    checks = ("inputs.mask-dtype", "forward.causal", "forward.deterministic")
    assert set(roots_of(checks, fixture, attn, both)) == {"forward.causal", "forward.deterministic"}
