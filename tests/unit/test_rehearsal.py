"""The small-batch rehearsal: what is measured on the user's texts, and that each recommendation follows from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from unit.sample_run import sample_run

from numerics_suite.core.rehearsal import Rehearsal, RehearsedRun
from numerics_suite.diagnosis.recipe import MARGIN, recommend
from numerics_suite.reports.rehearsal import rehearsal_lines
from numerics_suite.reports.results import from_json, to_json
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.rehearsal import is_stable, rehearse
from numerics_suite.suite.session import SuiteSession

TEXTS = Path(__file__).resolve().parents[2] / "fixtures" / "texts.jsonl"


def run(precision="fp32", losses=(1.1, 0.8, 0.5), **changes):
    standard = RehearsedRun(
        precision=precision,
        largest_logit=0.4,
        losses=tuple(losses),
        gradient_norms=(1.9, 1.7),
        clipped_losses=tuple(losses),
        scales=(),
        skipped=0,
        stopped="",
        stopped_clipped="",
        largest_stable_lr=0.02,
        at_least=False,
    )
    return replace(standard, **changes)


def recipe(*runs, lr=5e-5):
    return {advice.setting: advice for advice in recommend(runs, lr=lr)}


def test_the_cheapest_precision_that_descends_as_far_is_recommended():
    told = recipe(run("fp32"), run("bf16", (1.1, 1.09, 1.08)), run("amp-bf16", (1.1, 0.8, 0.51)))
    assert told["precision"].value == "amp-bf16"
    assert "1.1 → 0.51; fp32 reaches 0.5" in told["precision"].because


def test_a_precision_that_stopped_is_not_recommended():
    told = recipe(run("bf16", (1.1, 0.3), stopped="loss loss is not finite at step 2"), run("fp32"))
    assert told["precision"].value == "fp32"


def test_a_learning_rate_without_a_margin_is_lowered():
    assert recipe(run())["learning rate"].value == "5e-05"
    told = recipe(run(largest_stable_lr=6e-5))["learning rate"]
    assert math.isclose(float(told.value), 6e-5 / MARGIN)
    assert "leaves no margin" in told.because


def test_clipping_is_judged_by_the_norms():
    assert "largest gradient norm is 1.9; clipped" in recipe(run())["clip"].because
    assert "guards the next batch" in recipe(run(gradient_norms=(0.2,)))["clip"].because
    assert recipe(run(stopped_clipped="loss loss is not finite at step 3"))["clip"].value == "none"


def test_the_loss_scale_that_settled_is_recommended():
    told = recipe(run("amp-fp16", scales=(32768.0, 16384.0), skipped=2))["loss scaling"]
    assert told.value == "GradScaler(init_scale=16384)"
    assert "2 of 2 steps skipped" in told.because
    assert recipe(run("amp-bf16"))["loss scaling"].value == "off"


def test_where_nothing_trains_a_lower_rate_or_nothing_is_recommended():
    rising = run("fp32", (1.0, 5.0), largest_stable_lr=1e-6)
    assert math.isclose(float(recipe(rising, lr=1e-2)["learning rate"].value), 1e-6 / MARGIN, rel_tol=0.1)
    assert (
        recommend([run("fp32", (), stopped="logits logits is not finite at step 1", largest_stable_lr=None)], lr=1)
        == ()
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Rehearsal:
    data = tmp_path_factory.mktemp("data") / "my.jsonl"
    data.write_text("\n".join(TEXTS.read_text(encoding="utf-8").splitlines()[:8]), encoding="utf-8")
    settings = Settings(
        subjects=("fixture:glm4-tiny",),
        task="sequence-classification",
        num_labels=3,
        precision=("fp32", "bf16", "fp16"),
        attn=("eager", "sdpa"),
        device="cpu",
        data=data,
        steps=10,
        lr=5e-5,
        origins={"precision": "command line"},
    )
    said = []
    (found,) = rehearse(SuiteSession(settings), said.append)
    assert said == ["rehearsal: glm4-tiny in fp32", "rehearsal: glm4-tiny in bf16"]
    return found


def test_the_texts_are_trained_on_in_each_precision_that_trains(rehearsed):
    assert [item.precision for item in rehearsed.runs] == ["fp32", "bf16"]
    assert rehearsed.attn == "sdpa"
    assert math.isclose(rehearsed.chance, math.log(3))
    for item in rehearsed.runs:
        assert len(item.losses) == 11
        assert item.losses[-1] < item.losses[0]
        assert item.largest_stable_lr > 5e-4


def test_a_bfloat16_model_loses_updates_that_float32_makes(rehearsed):
    wide, narrow = rehearsed.runs
    assert wide.losses[0] - wide.losses[-1] > 1.5 * (narrow.losses[0] - narrow.losses[-1])
    assert rehearsed.recipe[0].value == "fp32"


def test_what_is_shown_fits_80_columns_and_survives_a_results_file(rehearsed):
    lines = [line.text for line in rehearsal_lines([rehearsed])]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("   learning rate  5e-05: stable, and the largest stable one is") for line in lines)
    result = replace(sample_run(), rehearsals=(rehearsed,))
    again = from_json(json.loads(json.dumps(to_json(result))))
    assert again.rehearsals == (rehearsed,)


def test_stability_needs_a_finite_run_that_never_exploded_and_ends_lower():
    class Run:
        bad = None
        losses = (1.0, 0.5)

    assert is_stable(Run)
    Run.losses = (1.0, 2.5, 0.5)
    assert not is_stable(Run)
    Run.losses = (1.0, 1.1)
    assert not is_stable(Run)
    Run.losses, Run.bad = (1.0, 0.5), object()
    assert not is_stable(Run)
