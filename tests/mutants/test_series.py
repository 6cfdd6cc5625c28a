"""What reports plot shows a defect where it is: the module over its limit, the step at which training broke."""

from __future__ import annotations

import math
import re

import pytest
from torch import nn

from mutants.catalogue import MUTANTS
from mutants.driver import MutantSession, answers, describe, run_mutant, settings_of
from numerics_suite.judgement.verdicts import within


def over(results) -> list[str]:
    """Modules of `reference.local` whose point is not within its limit."""
    (result,) = (result for result in results if result.check == "reference.local")
    return [
        module
        for series in result.series
        for module, value, limit in zip(series.at, series.values, series.limits, strict=True)
        if limit is not None and not within(value, limit)
    ]


@pytest.mark.parametrize("mutant_id", ["norm-without-fp32-bf16", "norm-without-fp32-fp16"])
def test_a_norm_without_its_float32_section_is_the_module_over_its_limit(mutant_id):
    (mutant,) = (mutant for mutant in MUTANTS if mutant.id == mutant_id)
    results = run_mutant(mutant, checks=["reference.local"])
    found = over(results)
    assert [module for module in found if re.fullmatch(mutant.module_pattern, module)] == found != [], describe(results)
    clean = MutantSession(settings_of(mutant.fixture, mutant.precision, mutant.attn))
    assert over(answers(clean, ["reference.local"])) == []


def test_a_curve_ends_at_the_step_that_broke():
    def breaks(model: nn.Module) -> None:
        calls = []

        def scale(_module: nn.Module, _args: object, output):
            calls.append(None)
            return output * math.inf if len(calls) == 3 else output

        model.lm_head.register_forward_hook(scale)

    session = MutantSession(settings_of("glm4-tiny", "bf16", "sdpa"), breaks)
    (result,) = answers(session, ["train.finite"])
    assert result.status == "failed", describe([result])
    assert result.finding.step == 3
    curves = {series.name: series for series in result.series}
    assert curves["loss"].at == (1, 2, 3)
    assert [math.isfinite(value) for value in curves["loss"].values] == [True, True, False]
    assert curves["gradient-norm"].at == (1, 2)
