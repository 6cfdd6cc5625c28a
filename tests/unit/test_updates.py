"""How much of its steps a parameter holds, which do not move at all, and what cures it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unit.test_clean_models import statuses

from numerics_suite.engine.updates import UpdateMeter, held_share, metered, stochastically_rounded
from numerics_suite.subjects.fixtures import fixture_path

CHECK = ("train.updates",)


def stepped(optimizer_of, *, dtype=torch.bfloat16, steps=4, rounding="nearest", size=4096):
    """Steps on a random gradient that stays the same; the meter and the parameters."""
    torch.manual_seed(0)
    parameter = nn.Parameter((torch.randn(size) * 0.1).to(dtype))
    gradient = torch.randn(size).to(dtype)
    optimizer, meter = optimizer_of([parameter]), UpdateMeter()
    with metered([optimizer], meter, rounding):
        for _ in range(steps):
            parameter.grad = gradient.clone()
            optimizer.step()
    return meter, parameter


def adamw(lr):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def test_float64_holds_every_step():
    meter, parameter = stepped(adamw(1e-4), dtype=torch.float64)
    gained = parameter.detach() - meter.first[id(parameter)]
    assert torch.allclose(meter.held[id(parameter)], gained, rtol=1e-9, atol=1e-15)
    assert torch.allclose(meter.held[id(parameter)], meter.sums[id(parameter)], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), fused=True),
    ],
    ids=["sgd", "amsgrad", "rmsprop", "adagrad", "fused"],
)
def test_a_step_of_a_sample_is_the_step_of_the_whole(make):
    meter, parameter = stepped(make, dtype=torch.float32)
    assert torch.allclose(meter.held[id(parameter)], meter.sums[id(parameter)], rtol=1e-3, atol=1e-7)


def test_the_share_of_usual_rates_is_above_a_roundoff_and_that_of_tiny_ones_below():
    usual = {lr: stepped(adamw(lr))[0].shares()[0] for lr in (1e-4, 1e-5)}
    assert all(share.roundoffs_lost < 1 for share in usual.values())
    lost = stepped(adamw(1e-7), size=1 << 16)[0].shares()[0]
    assert lost.share < 2**-8
    assert lost.roundoffs_lost > 1


def test_the_share_does_not_depend_on_the_number_of_steps():
    few, many = (stepped(adamw(1e-5), steps=steps, size=1 << 14)[0].shares()[0] for steps in (2, 20))
    assert few.share == pytest.approx(many.share, rel=0.2)


def test_a_norm_of_which_nothing_moves_is_too_small_a_sample():
    """64 gains of 1 lose every step of 1e-5, as they do in clean runs."""
    parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer, meter = torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.0), UpdateMeter()
    with metered([optimizer], meter, "nearest"):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    (share,) = meter.shares()
    assert share.share == 0
    assert share.roundoffs_lost < 1
    assert not meter.unmoved({"gain": parameter})


def test_no_step_says_nothing():
    assert held_share("bfloat16", 0.0, 0.0, 0.0) is None
    assert stepped(adamw(0.0))[0].shares() == ()


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_wide_steps_are_held(rounding):
    meter, parameter = stepped(adamw(1e-6), rounding=rounding, size=1 << 16, steps=8)
    assert parameter.dtype == torch.bfloat16
    assert parameter.grad is None or parameter.grad.dtype == torch.bfloat16
    gained, meant = meter.held[id(parameter)], meter.sums[id(parameter)]
    assert float((gained @ meant) / (meant @ meant)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    torch.manual_seed(0)
    value = torch.full((200_000,), 1.0 + 0.3 * torch.finfo(dtype).eps)
    found = stochastically_rounded(value, dtype).float()
    assert set(found.unique().tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
    assert float(found.mean() - 1) == pytest.approx(0.3 * torch.finfo(dtype).eps, rel=0.02)
    assert torch.equal(stochastically_rounded(found, dtype).float(), found)


def test_a_value_that_is_written_back_is_unmoved():
    parameter = nn.Parameter(torch.full((8,), 0.5))
    optimizer, meter = torch.optim.SGD([parameter], lr=0.1), UpdateMeter()
    with metered([optimizer], meter, "nearest"):
        parameter.grad = torch.ones(8)
        optimizer.step()
    assert not meter.unmoved({"weight": parameter})
    parameter.data.fill_(0.5)
    assert meter.unmoved({"weight": parameter}) == ("weight",)


@pytest.mark.parametrize(("lr", "expected"), [(6e-7, "failed: updates round away"), (1e-5, "passed")])
def test_the_check_names_what_rounds_away(lr, expected):
    found = statuses(str(fixture_path("glm4-tiny")), CHECK, "bf16", lr=lr)
    assert found["train.updates"].startswith(expected)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "amp-bf16"])
def test_wide_parameters_hold_the_smallest_steps(precision):
    assert statuses(str(fixture_path("glm-tiny-classifier")), CHECK, precision, lr=6e-7) == {"train.updates": "passed"}


@pytest.mark.parametrize("scope", ["full", "head", "last:1", "lora"])
def test_the_check_is_quiet_whatever_is_trained(scope):
    found = statuses(str(fixture_path("glm-tiny-classifier")), CHECK, "bf16", train_scope=scope)
    assert found == {"train.updates": "passed"}
