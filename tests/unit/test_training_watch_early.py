"""Early warnings: each is raised by its defect, once, and the figures that it is made of are what they say."""

# ruff: noqa: PT012, PT031 - a whole loop is what raises or warns

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from unit.watched_models import Decoder, ids, train

from numerics_suite import NumericsError, NumericsWarning, watch
from numerics_suite.training_watch import judge
from numerics_suite.training_watch.alarms import Reading
from numerics_suite.training_watch.inputs import rounding_bits
from numerics_suite.training_watch.judge import Judge, quantile, slope
from numerics_suite.training_watch.norms import largest, samples, total_norm, update_ratio

HALF_MAX = 65504.0


def pair(seed=0, lr=1e-3):
    model = Decoder(seed)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def alarms(readings):
    it = Judge()
    return [(alarm.kind, alarm.step) for reading in readings for alarm in it.judge(reading)]


def of(name, values, **kwargs):
    return [Reading(step=step, values={name: (value,)}, **kwargs) for step, value in enumerate(values, 1)]


def test_a_learning_rate_that_replaces_the_model_is_warned_of_at_once():
    model, optimizer = pair(lr=0.5)
    with pytest.warns(NumericsWarning, match=r"step 1: one step moved the weights by"), watch(model, optimizer) as w:
        train(model, optimizer, 1)
    assert [alarm.kind for alarm in w.warnings] == ["update-ratio"]


def test_a_spike_of_the_gradient_norm_is_warned_of():
    model, optimizer = pair()
    with (
        pytest.warns(NumericsWarning, match=r"step 60: the gradient norm .* times its running 0.99 quantile") as told,
        watch(model, optimizer) as w,
    ):
        train(model, optimizer, 59)
        batch = ids(60)
        optimizer.zero_grad()
        (model(input_ids=batch, labels=batch)["loss"] * 100).backward()
        optimizer.step()
    assert len(told) == 1
    assert [alarm.kind for alarm in w.warnings] == ["gradient-norm"]


def test_logits_that_grow_towards_the_limit_of_float16_are_warned_of_before_they_overflow():
    model = Decoder().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scales = [2.0 ** (4 + step / 3) for step in range(60)]
    warned = None
    with (
        pytest.warns(NumericsWarning, match="bits below the largest number"),
        pytest.raises(NumericsError) as caught,
        watch(model, optimizer) as w,
    ):
        for step, scale in enumerate(scales, 1):
            model(input_ids=ids(0), labels=ids(0), scale=scale)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            warned = warned or (step if w.warnings else None)
    assert w.warnings[0].kind == "headroom"
    assert warned < caught.value.finding.step
    assert caught.value.finding.cause == "overflow"


def test_a_large_headroom_whose_trend_ends_it_is_warned_of():
    steady = [HALF_MAX / 2**5] * 40
    falling = [HALF_MAX / 2 ** (13 - step / 2.5) for step in range(20)]
    assert alarms(of("logits", steady, limit=HALF_MAX)) == []
    (found,) = alarms(of("logits", falling, limit=HALF_MAX))
    assert found[0] == "headroom"
    assert math.log2(HALF_MAX / falling[found[1] - 1]) > judge.HEADROOM_BITS


def test_bfloat16_has_the_range():
    assert alarms(of("logits", [1e4 * 2**step for step in range(40)], limit=3.4e38)) == []


class Unscalable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def scaled_steps(model, optimizer, scaler, steps, gradient):
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(gradient(model(torch.ones(2, 4))).sum()).backward()
        scaler.step(optimizer)
        scaler.update()


def test_a_scale_that_is_halved_again_and_again_is_warned_of_and_then_bad():
    """GradScaler skips every such step and looks calm; the loss is finite all the time."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu")
    with (
        pytest.warns(NumericsWarning, match="halved 9 times in a row") as told,
        pytest.raises(NumericsError) as caught,
        watch(model, optimizer) as w,
    ):
        scaled_steps(model, optimizer, scaler, 30, Unscalable.apply)
    assert len(told) == 1
    assert (w.warnings[0].step, caught.value.finding.step) == (10, 18)
    assert caught.value.finding.cause == "loss-scaling"
    assert caught.value.finding.evidence["loss scale"] == 0.5
    assert caught.value.finding.remedies[0].name == "tune-loss-scale"


def test_the_search_of_a_scaler_is_no_defect():
    """8 halvings from the start, then growth and single halvings for ever."""
    search = [2.0 ** (16 - step) for step in range(9)]
    later = [2.0 ** (8 + (step % 3 == 0)) for step in range(200)]
    assert alarms(of("loss scale", search + later)) == []
    assert alarms(of("loss scale", [8.0, 8.0, 4.0, 2.0, 1.0])) == []
    assert alarms(of("loss scale", [64.0, 64.0, 32.0, 16.0, 8.0, 4.0])) == [("loss-scale-halving", 6)]


def test_a_scale_that_stays_where_every_step_is_skipped_is_bad():
    readings = [
        Reading(step=step, values={"loss scale": (2.0**40 * 0.999**step,), "skipped step": (1.0,)})
        for step in range(1, 30)
    ]
    assert ("loss-scale", 17) in alarms(readings)
    assert alarms(of("skipped step", [1.0] * 16 + [0.0] + [1.0] * 16)) == []


def test_a_gradient_overflow_is_the_scalers_business():
    assert alarms(of("gradient norm", [float("inf")], scaled=True)) == []
    assert alarms(of("gradient norm", [float("inf")])) == [("gradient", 1)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heavy_tailed_but_healthy_norms_are_quiet(seed):
    """2,000 norms of a power law of index 3, each the noisiest that still has a finite variance."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(2000, generator=generator).pow(-1 / 3).tolist()
    assert alarms(of("gradient norm", norms)) == []


def test_norms_that_fell_and_return_are_quiet():
    assert alarms(of("gradient norm", [5.0] * 40 + [1e-4] * 200 + [4.0])) == []
    assert alarms(of("gradient norm", [5.0] * 240 + [400.0, 5.0, 400.0])) == [
        ("gradient-norm", 241),
        ("gradient-norm", 243),
    ]


def test_quantile_and_slope():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([], 0.5) == 0.0
    assert slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_fused_norms_see_every_kind_of_bad_value(bad):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.ones(3, 5, dtype=dtype)
        tensor[1, 2] = bad
        assert not math.isfinite(float(total_norm([torch.ones(4), tensor])))
        assert not math.isfinite(float(largest(tensor)))


def test_a_norm_beyond_float16_is_no_infinity():
    tensor = torch.full((100,), 60000.0, dtype=torch.float16)
    assert float(total_norm([tensor])) == pytest.approx(600000, rel=1e-3)


def test_norms_are_those_of_torch():
    tensors = [torch.randn(7, 3), torch.randn(5).double(), torch.randn(2, 2).bfloat16()]
    expected = torch.nn.utils.get_total_norm([tensor.double() for tensor in tensors])
    assert float(total_norm(tensors)) == pytest.approx(float(expected), rel=1e-6)
    assert total_norm([]) is None
    assert total_norm([torch.ones(3, dtype=torch.long)]) is None
    assert float(total_norm([torch.eye(3).to_sparse()])) == pytest.approx(math.sqrt(3))


def test_the_update_ratio_is_estimated_from_samples():
    weight = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    before = samples([weight])
    assert sum(map(torch.numel, before)) <= 1024
    assert float(update_ratio(before, samples([weight * 1.01]))) == pytest.approx(0.01, rel=0.01)
    assert float(update_ratio(samples([torch.zeros(4)]), samples([torch.ones(4)]))) == 0.0


def test_chance_of_rounded_ids():
    assert rounding_bits(torch.tensor([1, 2, 255, 256])) == 1
    assert rounding_bits(torch.tensor([300, 300, 302])) == 2
    assert rounding_bits(torch.tensor([151328, 151329])) == 0
    assert rounding_bits(torch.tensor([128000])) == 9
