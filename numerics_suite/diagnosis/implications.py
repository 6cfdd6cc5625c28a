"""Which break of a law implies another one's, by mathematics; what was measured of both decides whether it does here.

Every law compares two runs of one function, so a function that gives two answers to one input breaks each by as much. Rows whose
tokens see later ones see the padding behind them, the next row of a pack, and other tokens in one pass than step by step. A batch
whose rows see each other has other losses in parts. A model that breaks a law is not its definition, nor what an implementation
that keeps the law computes: there both findings must name one module. Whatever else a cell shows stays a root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numerics_suite.checks.forward.deterministic import MOVED
from numerics_suite.core.records import CheckResult, Finding

AS_MUCH = 10.0
"""A law is broken by as much as answers move by themselves up to this factor: maxima over other elements, and gradients of them."""

ROUNDING = (
    *("forward.attention", "forward.batch", "forward.cache", "forward.causal", "forward.packing", "forward.padding"),
    *("inputs.ids-dtype", "reference.end-to-end", "reference.gradient", "train.finite"),
)
"""Checks in which a module that rounds too much shows too."""

PIPELINE, POOLING, ORACLE = "inputs.pipeline", "forward.pooling", "reference.oracle"
TRAINS_IN_PARTS = ("train.accumulation", "train.trainer")
OF_BITS, ANSWERS = "differing", ("answers",)
BEYOND_ROUNDING = frozenset(
    {
        *("padding-moves", "label-count", "accumulation", "label-smoothing", "padding-free"),
        *("reentrant-checkpointing", "non-reentrant-checkpointing", "clipping"),
    }
)
"""Relative measurements of `inputs.pipeline` and `train.trainer`, which are taken in float64 or judged far beyond rounding."""

EXACT = frozenset({"integer-disagreement", "disagreement", "logits-changed", "wrong-rows", OF_BITS})
"""Measurements that count what is not the same: any movement breaks them, however small. Of a save and load it is the answers alone."""

ROUNDED = frozenset({"rounded", "excess", "median-excess"})
"""Measurements of rounding over whole passes."""

NARROW = frozenset({"low-precision-section", "kernel-accuracy"})
NOT_FINITE = frozenset(
    {
        *("overflow", "underflow", "invalid-operation", "fully-masked-row"),
        *("uninitialised-parameters", "uninitialised-buffer", "corrupt-weights"),
    }
)

Pair = Callable[[Finding, Finding], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Implication:
    """One law, and what its break implies.

    Attributes:
        of: its check; "" for any.
        follows: checks that it breaks; none for any.
        where: what must hold of the root's finding and the other's.
    """

    of: str
    follows: tuple[str, ...]
    where: Pair

    def __call__(self, root: CheckResult, result: CheckResult) -> bool:
        """Whether the result follows from the root."""
        assert root.finding is not None
        assert result.finding is not None
        named = self.of in {"", root.check} and (not self.follows or result.check in self.follows)
        return named and self.where(root.finding, result.finding)


def first_cause(root_candidates: Sequence[CheckResult], result: CheckResult) -> CheckResult | None:
    """The result that implies this one, by the first implication that does; None where it is a root."""
    for implication in IMPLICATIONS:
        for root in root_candidates:
            if root.id != result.id and implication(root, result):
                return root
    return None


def _measurement(finding: Finding) -> str:
    return str(finding.evidence.get("measurement", ""))


def _number(finding: Finding, name: str) -> float | None:
    """A number of the evidence; one that is not finite may have been read back as a word."""
    try:
        return float(finding.evidence[name])
    except (KeyError, TypeError, ValueError):
        return None


def _is_exact(finding: Finding) -> bool:
    """Whether it is a break in true fp64, in which no rounding has a part, or one that is far beyond rounding."""
    return _measurement(finding).startswith("true") or _measurement(finding) in BEYOND_ROUNDING


def _moved_so_far(root: Finding, finding: Finding) -> bool:
    if _measurement(finding) in EXACT:
        return _measurement(finding) != OF_BITS or finding.parameters == ANSWERS
    measured, moved = _number(finding, "measured"), _number(root, MOVED)
    return _is_exact(finding) and measured is not None and moved is not None and measured <= AS_MUCH * moved


def _both_exact(root: Finding, finding: Finding) -> bool:
    return _is_exact(root) and _is_exact(finding)


def _at_no_other_module(root: Finding, finding: Finding) -> bool:
    return _both_exact(root, finding) and (finding.module is None or root.module in {None, finding.module})


def _of_one_module(root: Finding, finding: Finding) -> bool:
    return root.module is not None and root.module == finding.module


def _wrong_at_one_module(root: Finding, finding: Finding) -> bool:
    """What breaks a law in true fp64 in a module is not that module's definition either."""
    return _is_exact(root) and _of_one_module(root, finding)


def _implied(of: str, *follows: str) -> tuple[Implication, ...]:
    """What a broken law of answers implies, and the comparisons with another model at its own module."""
    alike = Implication(of=of, follows=("forward.attention", "reference.local", ORACLE), where=_wrong_at_one_module)
    return (Implication(of=of, follows=follows, where=_at_no_other_module), alike) if follows else (alike,)


def _is_nan(root: Finding, finding: Finding) -> bool:
    """What is compared with NaN is NaN: no number is left that could show another defect."""
    measured = _number(finding, "measured")
    nan = measured is not None and math.isnan(measured)
    return nan and root.cause in NOT_FINITE and finding.cause not in NOT_FINITE


def _in_other_words(root: Finding, finding: Finding) -> bool:
    return bool(finding.parameters) and set(finding.parameters) <= set(root.parameters)


def _pooled(_: Finding, finding: Finding) -> bool:
    return _measurement(finding) in {"true-pooled", "padding-moves"}


def _rounds(root: Finding, finding: Finding) -> bool:
    """One module that rounds too much takes every pass through it with it; a dtype that is seen at a module, what is found at that one."""
    if root.cause not in NARROW:
        return False
    if _measurement(root) == "coarser" and _of_one_module(root, finding):
        return finding.cause in NOT_FINITE | {root.cause, "wrong-input-dtype"}
    within = finding.module in {None, root.module}
    return _measurement(finding) in ROUNDED and within and finding.cause not in NOT_FINITE


def _of_unread_parameters(root: Finding, finding: Finding) -> bool:
    """A module that computes something else reads not all of its parameters."""
    within = f"{root.module}."
    return (
        _measurement(root) == "true-logits"
        and root.module is not None
        and bool(finding.parameters)
        and all(name.startswith(within) for name in finding.parameters)
    )


def _of_dead_parameters(root: Finding, finding: Finding) -> bool:
    """Answers and loss are the definition's, and the gradient that is not its own is one of those that are zero."""
    return _measurement(finding) == "true-gradient" and _in_other_words(root, finding)


def _same_loss(root: Finding, finding: Finding) -> bool:
    return root.cause == finding.cause == "wrong-loss"


def _wrong_loss(root: Finding, _: Finding) -> bool:
    return root.cause == "wrong-loss" and _measurement(root) not in EXACT


IMPLICATIONS = (
    Implication(of="", follows=(), where=_is_nan),
    Implication(of="load.complete", follows=("load.finite", "load.roundtrip"), where=_in_other_words),
    Implication(of="load.complete", follows=(ORACLE,), where=_of_one_module),
    Implication(of="forward.deterministic", follows=(), where=_moved_so_far),
    Implication(of="train.labels", follows=TRAINS_IN_PARTS, where=_wrong_loss),
    Implication(of="train.labels", follows=(ORACLE,), where=_same_loss),
    *_implied("forward.causal", "forward.cache", "forward.packing", "forward.padding", PIPELINE),
    *_implied("forward.batch", "forward.packing"),
    # Parts of a batch have other neighbours and other padding. The gradient with the largest error need not be that of the module at fault.
    Implication(of="forward.batch", follows=TRAINS_IN_PARTS, where=_both_exact),
    Implication(of="forward.padding", follows=TRAINS_IN_PARTS, where=_both_exact),
    Implication(of=POOLING, follows=("forward.padding", PIPELINE), where=_pooled),
    Implication(of=POOLING, follows=(ORACLE,), where=_of_one_module),
    *_implied("forward.padding", "forward.cache", "forward.packing", PIPELINE),
    *_implied("forward.packing"),
    Implication(of=ORACLE, follows=("forward.attention",), where=_wrong_at_one_module),
    Implication(of=ORACLE, follows=("train.grad-flow",), where=_of_unread_parameters),
    Implication(of="train.grad-flow", follows=(ORACLE,), where=_of_dead_parameters),
    Implication(of="reference.local", follows=ROUNDING, where=_rounds),
)
"""The first that holds names the root. None leads back: of two checks that imply each other, one does so for other measurements."""
