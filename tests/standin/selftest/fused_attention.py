"""Attention is one fused op, forward and backward, that dispatch modes see and that can be made wrong."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD = "aten._scaled_dot_product_fused_attention_overrideable.default"
BACKWARD = "aten._scaled_dot_product_fused_attention_overrideable_backward.default"


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def inputs(dtype=torch.float32, heads=4, device="standin"):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 8), (2, heads, 6, 8), (2, heads, 6, 8)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in drawn]


def run(tensors, **options):
    output = attention(*tensors, **options)
    output.float().square().sum().backward()
    return [output.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_op_runs_forward_and_backward(dtype):
    with Recorder() as recorder:
        run(inputs(dtype), is_causal=True)
    assert recorder.ops.count(FORWARD) == 1
    assert recorder.ops.count(BACKWARD) == 1
    assert not any("softmax" in op or "bmm" in op for op in recorder.ops)


def test_it_runs_in_inference_mode_and_where_a_mode_takes_ops_apart():
    class TakingApart(Recorder):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with torch.inference_mode(), TakingApart() as recorder:
        attention(*inputs())
    assert FORWARD in recorder.ops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))},
        {"attn_mask": torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0},
        {"attn_mask": torch.tensor([False, True, True, True, True]).reshape(5, 1).expand(5, 6)},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "scale", "bias", "mask", "row-without-key", "grouped"],
)
def test_it_agrees_with_the_cpu(options):
    heads = 2 if "enable_gqa" in options else 4
    expected = run(inputs(heads=heads, device="cpu"), **options)
    on_device = {name: v.to("standin") if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    with Recorder() as recorder:
        found = run(inputs(heads=heads), **on_device)
    assert FORWARD in recorder.ops
    assert BACKWARD in recorder.ops
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_a_bias_has_a_gradient():
    bias = torch.zeros(2, 4, 5, 6, device="standin", requires_grad=True)
    twin = torch.zeros(2, 4, 5, 6, requires_grad=True)
    run(inputs(), attn_mask=bias)
    run(inputs(device="cpu"), attn_mask=twin)
    torch.testing.assert_close(bias.grad.cpu(), twin.grad)


def test_float64_has_no_fused_kernel():
    with Recorder() as recorder:
        run(inputs(torch.float64))
    assert FORWARD not in recorder.ops
    query, key, value = inputs(torch.float64)
    with pytest.raises(RuntimeError, match="but found Double"):
        torch.ops.aten._scaled_dot_product_fused_attention_overrideable(query, key, value)


def test_the_math_backend_can_be_asked_for():
    with Recorder() as recorder, sdpa_kernel(SDPBackend.MATH):
        attention(*inputs())
    assert FORWARD not in recorder.ops


def test_dropout_is_drawn_on_the_device_and_repeated_backward():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    query, key, value = inputs()
    value = torch.eye(6, 8, device="standin").expand(2, 4, 6, 8).clone().requires_grad_()
    output = attention(query, key, value, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    output.sum().backward()
    # With an identity as values the output is the kept probabilities, and so the values' gradient is their sum.
    torch.testing.assert_close(value.grad[..., 0], output[..., :6].sum(-2))
    assert 0.2 < (output[..., :6] == 0).float().mean() < 0.8


def test_the_kernel_can_be_made_wrong():
    right = run(inputs())
    with torch.standin.fused_noise(0.05):
        wrong, again = run(inputs()), run(inputs())
    for a, b, c in zip(right, wrong, again, strict=True):
        assert torch.equal(b, c)
        error = ((a - b).abs() / a.abs()).max()
        assert error > 0.02
    assert ((right[0] - wrong[0]).abs() / right[0].abs()).max() <= 0.0501
    assert all(torch.equal(a, b) for a, b in zip(right, run(inputs()), strict=True))
