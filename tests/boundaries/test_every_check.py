"""Every check can fail, every budget belongs to a check, and every name that a user reads is in the contract."""

from __future__ import annotations

import ast
import re

import pytest
from boundaries.source_tree import ROOT

from numerics_suite.core.registry import check_ids, get_check
from numerics_suite.diagnosis.remedy_words import DESCRIPTIONS
from numerics_suite.diagnosis.root_causes import LOCATED, REMEDIES
from numerics_suite.judgement.budgets import all_budgets, budgets_of
from numerics_suite.settings.choices import CAUSES as ACCEPTED_CAUSES

CHECKS = [
    "load.config",
    "load.complete",
    "load.finite",
    "load.dtype",
    "load.head-init",
    "load.roundtrip",
    "load.tied",
    "inputs.ids-dtype",
    "inputs.mask-dtype",
    "inputs.pipeline",
    "forward.finite",
    "forward.headroom",
    "forward.padding",
    "forward.packing",
    "forward.batch",
    "forward.causal",
    "forward.cache",
    "forward.attention",
    "forward.pooling",
    "forward.deterministic",
    "reference.end-to-end",
    "reference.local",
    "reference.gradient",
    "reference.oracle",
    "train.finite",
    "train.descends",
    "train.grad-flow",
    "train.checkpointing",
    "train.accumulation",
    "train.labels",
    "train.amp",
    "train.clip",
    "train.updates",
    "train.trainer",
    "baseline.semantics",
    "baseline.precision",
    "baseline.training",
    "baseline.contract",
]
"""The ids of the contract; scripts, accept entries and reports of users hold them."""

CAUSES = [
    "uninitialised-parameters",
    "bad-initialisation",
    "missing-weights",
    "lost-weights",
    "corrupt-weights",
    "untied-weights",
    "ignored-config",
    "wrong-input-dtype",
    "out-of-range-input",
    "overflow",
    "underflow",
    "invalid-operation",
    "fully-masked-row",
    "low-precision-section",
    "kernel-accuracy",
    "padding-leak",
    "batch-leak",
    "future-leak",
    "cache-mismatch",
    "wrong-positions",
    "wrong-pooling",
    "wrong-loss",
    "wrong-gradient",
    "dead-gradient",
    "optimizer-underflow",
    "loss-scaling",
    "divergence",
    "nondeterminism",
    "attention-mismatch",
    "semantic-error",
    "semantic-change",
    "rounding-change",
    "contract-change",
    "unknown",
    "ignored-dtype",
    "rounded-buffer",
    "uninitialised-buffer",
    "model-raises",
    "tokenizer-incompatible",
    "no-pad-token",
    "no-counted-labels",
    "lost-head",
    "wrong-output-shape",
    "rounded-update",
    "untrained-parameters",
    "packing-leak",
]

REMEDY_NAMES = [
    "newer-version",
    "default-input-dtypes",
    "init-head",
    "clip-grad-norm",
    "tune-loss-scale",
    "disable-amp",
    "use-amp-bf16",
    "keep-in-fp32",
    "eager-attention",
    "sdpa-attention",
    "lower-learning-rate",
    "larger-optimizer-eps",
    "reload-weights",
    "fix-padding",
    "set-pad-token",
    "fix-config",
    "pin-version",
    "cast-after-loading",
    "load-with-dtype",
    "fix-tokenizer",
    "count-labels",
    "save-head",
    "separate-rows",
    "fp32-master-weights",
    "stochastic-rounding",
    "raise-learning-rate",
    "non-reentrant-checkpointing",
    "rebuild-optimizer",
]

MUTANTS = ROOT / "tests" / "mutants"


def test_ids_are_the_contracts() -> None:
    assert set(check_ids()) <= set(CHECKS)


def test_every_check_of_the_contract_is_there() -> None:
    assert set(CHECKS) <= set(check_ids())


@pytest.mark.parametrize("check_id", check_ids())
def test_a_check_loads_and_asks_a_question(check_id: str) -> None:
    spec = get_check(check_id)
    assert spec.id == check_id
    assert "?" in spec.doc, f"the first line of its docstring is the question that it answers: {spec.doc}"


@pytest.mark.parametrize("check_id", check_ids())
def test_a_check_has_a_budget(check_id: str) -> None:
    assert budgets_of(check_id), "no measurement of it can fail"


def test_every_budget_has_its_check() -> None:
    assert {check for check, _ in all_budgets()} <= set(check_ids())


def test_located_measurements_have_a_budget() -> None:
    assert set(all_budgets()) >= LOCATED


def test_causes_are_the_contracts() -> None:
    named = {budget.cause for budget in all_budgets().values()} | set(REMEDIES)
    assert named <= set(CAUSES)
    assert list(ACCEPTED_CAUSES) == CAUSES


def test_remedies_are_the_contracts_and_are_described() -> None:
    named = {name for budget in all_budgets().values() for name in budget.remedies}
    named |= {name for names in REMEDIES.values() for name in names}
    assert named <= set(REMEDY_NAMES)
    assert set(DESCRIPTIONS) == set(REMEDY_NAMES)


def test_every_limit_has_a_reason_and_can_be_passed() -> None:
    for (check, measurement), budget in all_budgets().items():
        assert budget.limit >= 0, f"{check} {measurement}"
        assert len(budget.reason.split()) >= 8, f"{check} {measurement}: say where the limit comes from"
        assert not set(re.findall(r"{(\w+)", budget.title)) - {
            "value",
            "limit",
            "module",
            "parameters",
            "step",
            "facts",
        }


@pytest.mark.skipif(not MUTANTS.is_dir(), reason="tests/mutants is not in this checkout")
@pytest.mark.parametrize("check_id", check_ids())
def test_a_check_has_a_mutant_that_it_must_catch(check_id: str) -> None:
    """The id stands as a string in a file of `tests/mutants`, where each mutant names the check that catches it."""
    assert check_id in _strings_of_mutants()


def _strings_of_mutants() -> set[str]:
    return {
        node.value
        for path in MUTANTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
