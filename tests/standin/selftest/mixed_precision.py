"""Autocast by CUDA's lists, and gradient scaling."""

import pytest
import torch
from torch import nn

LOWER = [torch.bfloat16, torch.float16]


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, device="standin", dtype=dtype)


def test_autocast_is_available():
    assert torch.amp.is_autocast_available("standin")
    assert torch.standin.get_amp_supported_dtype() == LOWER
    with torch.autocast("standin", dtype=torch.float16):
        assert torch.is_autocast_enabled("standin")
        assert torch.get_autocast_dtype("standin") is torch.float16
    assert not torch.is_autocast_enabled("standin")


def test_the_lists_are_those_of_cuda():
    def with_kernel(key):
        names = torch._C._dispatch_get_all_op_names()
        return {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}

    own = {"aten::cudnn_convolution", "aten::cudnn_convolution_transpose"}
    assert with_kernel("AutocastPrivateUse1") == with_kernel("AutocastCUDA") - own


@pytest.mark.parametrize("dtype", LOWER)
def test_products_are_in_the_lower_precision(dtype):
    linear = nn.Linear(4, 4).to("standin")
    query = ones(1, 2, 3, 4)
    with torch.autocast("standin", dtype=dtype):
        results = [
            linear(ones(2, 4)),
            ones(2, 4) @ ones(4, 2),
            torch.bmm(ones(1, 2, 3), ones(1, 3, 2)),
            torch.einsum("ab,bc->ac", ones(2, 2), ones(2, 2)),
            nn.functional.conv1d(ones(1, 2, 5), ones(2, 2, 3)),
            nn.functional.scaled_dot_product_attention(query, query, query),
        ]
        assert (ones(2, 2) * 2).dtype is torch.float32
        assert (ones(2, 2, dtype=torch.float64) @ ones(2, 2, dtype=torch.float64)).dtype is torch.float64
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
        with torch.autocast("standin", enabled=False):
            assert linear(ones(2, 4)).dtype is torch.float32
    assert {result.dtype for result in results} == {dtype}
    assert linear(ones(2, 4)).dtype is torch.float32


@pytest.mark.parametrize("dtype", LOWER)
def test_sums_and_exponentials_are_in_float32(dtype):
    x = ones(2, 4, dtype=dtype)
    with torch.autocast("standin", dtype=dtype):
        results = [
            x.softmax(-1),
            x.log_softmax(-1),
            x.exp(),
            x.pow(2),
            x.rsqrt(),
            x.sum(),
            x.cumsum(0),
            x.norm(),
            x.norm(dim=1),
            nn.functional.layer_norm(x, (4,)),
            nn.functional.cross_entropy(x, torch.tensor([1, 2], device="standin")),
            nn.functional.mse_loss(x, x),
        ]
        assert x.softmax(-1, dtype=torch.float64).dtype is torch.float64
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            nn.functional.binary_cross_entropy(x.sigmoid(), x)
    assert {result.dtype for result in results} == {torch.float32}
    assert x.softmax(-1).dtype is dtype


def test_cross_entropy_rounds_its_log_softmax_as_on_cuda():
    # PyTorch's cross entropy names the dtype of its log-softmax, so that CUDA's lists leave it in the logits' own; only
    # the mean over the labels is in float32. The CPU's lists have the whole loss in float32.
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).half().to("standin")
    labels = torch.tensor([1, 2, 3, 4], device="standin")
    with torch.autocast("standin", dtype=torch.float16):
        loss = nn.functional.cross_entropy(logits, labels)
    rounded = nn.functional.nll_loss(logits.log_softmax(-1).float(), labels)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, rounded)


def test_mixed_arguments_promote():
    with torch.autocast("standin", dtype=torch.bfloat16):
        lower, single = ones(3, dtype=torch.bfloat16), ones(3)
        assert torch.addcmul(lower, single, lower).dtype is torch.float32
        assert torch.dot(lower, lower).dtype is torch.bfloat16
        assert torch.cat([lower, single]).dtype is torch.float32


def test_a_cpu_region_does_not_reach_the_device():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ones(2, 2) @ ones(2, 2)).dtype is torch.float32


def test_a_weight_is_cast_once_in_a_region():
    weight = ones(2, 2).requires_grad_()
    with torch.autocast("standin", dtype=torch.bfloat16):
        first, second = ones(2, 2) @ weight, ones(2, 2) @ weight
    casts = {output.grad_fn.next_functions[1][0] for output in (first, second)}
    assert len(casts) == 1
    weight.data.mul_(3)
    with torch.autocast("standin", dtype=torch.bfloat16):
        assert (ones(2, 2) @ weight)[0, 0] == 6
    (first + second).sum().backward()
    assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize("overflow", [False, True])
def test_gradient_scaling(overflow):
    weight = torch.ones(3, device="standin", requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("standin", init_scale=1024.0)
    loss = (weight * (float("inf") if overflow else 1.0)).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == ([1, 1, 1] if overflow else [0, 0, 0])
    assert scaler.get_scale() == (512 if overflow else 1024)
