"""Both references compute fused attention by formula: no kernel is asked, on any device, and a wrong one is named.

CUDA's ops have no kernel for the tensors of the CPU, so that a call of one here can only have been the formula.
"""

import json
import math
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from preloaded import python
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from numerics_suite.engine import attention_formula, fused_ops
from numerics_suite.engine.rounded_reference import RoundOnce
from numerics_suite.engine.true_fp64 import LiftToFp64

ATEN = torch.ops.aten
BATCH, HEADS, SIZE = 2, 4, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def parts(queries=5, keys=7, groups=2):
    """Query, key and value, `[batch, heads, tokens, size]`."""
    return [draw(BATCH, HEADS, queries, SIZE), draw(BATCH, groups, keys, SIZE), draw(BATCH, groups, keys, SIZE, seed=1)]


def definition(query, key, value, *, bias=None, seen=None, scale=None):
    """Attention as everybody writes it, and its log-sum-exp; differentiable, without a fused op."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)


def triangle(queries, keys, shift=0):
    return torch.ones(queries, keys, dtype=torch.bool).tril(shift)


def swapped(op, *args, **kwargs):
    """Call an op of the layout `[batch, tokens, heads, size]` with the other."""
    out, *rest = op(*(tensor.transpose(1, 2) for tensor in args), **kwargs)
    return out.transpose(1, 2), *rest


def flash_forward(query, key, value, **kwargs):
    options = {"is_causal": False, "return_debug_mask": False} | kwargs
    op = partial(
        ATEN._flash_attention_forward, cum_seq_q=None, cum_seq_k=None, max_q=query.shape[2], max_k=key.shape[2],
        dropout_p=0.0,
    )  # fmt: skip
    return swapped(op, query, key, value, **options)


def efficient_forward(query, key, value, bias=None, kind=0, **kwargs):
    op = partial(
        ATEN._efficient_attention_forward, bias=bias, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, dropout_p=0.0, custom_mask_type=kind, compute_log_sumexp=True,
    )  # fmt: skip
    return swapped(op, query, key, value, **kwargs)


def cpu(query, key, value, bias=None, **kwargs):
    return ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, **kwargs)


def efficient(query, key, value, bias=None, **kwargs):
    return ATEN._scaled_dot_product_efficient_attention(query, key, value, bias, True, **kwargs)


def cudnn(query, key, value, bias=None, **kwargs):
    return ATEN._scaled_dot_product_cudnn_attention(query, key, value, bias, True, **kwargs)


def other_accelerators(query, key, value, bias=None, **kwargs):
    return ATEN._scaled_dot_product_fused_attention_overrideable(query, key, value, bias, **kwargs)


TAKES_BIAS = {
    "cpu": cpu,
    "efficient": efficient,
    "cudnn": cudnn,
    "other": other_accelerators,
    "below": efficient_forward,
}
FLASH = {"flash": ATEN._scaled_dot_product_flash_attention, "flash below": flash_forward}
EVERY = TAKES_BIAS | FLASH


def cases():
    """Name, call of the op, call of the definition."""
    for name, op in EVERY.items():
        yield f"{name}-plain", op, {}, {}
        yield f"{name}-scale", partial(op, scale=0.3), {"scale": 0.3}, {}
    for name, op in TAKES_BIAS.items():
        bias = draw(BATCH, 1, 5, 7).expand(-1, HEADS, -1, -1)
        yield f"{name}-bias", partial(op, bias=bias), {"bias": bias}, {}
        masked = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~triangle(5, 7, 1), -math.inf)
        masked = masked.expand(BATCH, HEADS, -1, -1)
        yield f"{name}-mask", partial(op, bias=masked), {"bias": masked}, {}
    for name in ("cpu", "efficient", "cudnn", "other"):
        yield f"{name}-causal", partial(EVERY[name], is_causal=True), {"seen": triangle(5, 7)}, {}
    for name in FLASH:
        yield f"{name}-causal", partial(EVERY[name], is_causal=True), {"seen": triangle(5, 7, 2)}, {}
    window = triangle(5, 7, 2 + 1) & ~triangle(5, 7, 2 - 2 - 1)
    yield "flash below-window", partial(flash_forward, window_size_left=2, window_size_right=1), {"seen": window}, {}
    yield "below-top-left", partial(efficient_forward, kind=1), {"seen": triangle(5, 7)}, {}
    yield "below-bottom-right", partial(efficient_forward, kind=2), {"seen": triangle(5, 7, 2)}, {}
    yield "cpu-one-head", cpu, {}, {"groups": 1}
    yield "efficient-as-many-heads", efficient, {}, {"groups": HEADS}


CASES = pytest.mark.parametrize(("op", "defined", "shape"), [pytest.param(*rest, id=name) for name, *rest in cases()])


def with_gradients(call, inputs, dtype=torch.float64):
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = call(*leaves)[0]
    out.backward(draw(*out.shape, seed=2).to(dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


@CASES
def test_true_fp64_is_the_definition(op, defined, shape):
    inputs = parts(**shape)
    with LiftToFp64({}) as mode:
        out, gradients = with_gradients(op, inputs)
    assert not mode.left_out
    want, wanted = with_gradients(partial(definition, **defined), inputs)
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
    for got, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)


@CASES
def test_the_rounded_run_rounds_the_definition_once(op, defined, shape):
    inputs = [tensor.bfloat16() for tensor in parts(**shape)]
    defined = {**defined}
    if "bias" in defined:
        defined["bias"] = defined["bias"].bfloat16().double()
        op = partial(op.func, **op.keywords | {"bias": defined["bias"].bfloat16()})
    with RoundOnce({}) as mode:
        out, gradients = with_gradients(op, inputs, torch.bfloat16)
    assert not mode.left_out
    assert out.dtype is torch.bfloat16
    want, wanted = with_gradients(partial(definition, **defined), [tensor.double() for tensor in inputs])
    assert (out == want.bfloat16()).double().mean() > 0.99  # a tie may fall either way
    # The backward op starts from an output that is rounded, so its error is that of a few roundings.
    for got, right in zip(gradients, wanted, strict=True):
        assert got.dtype is torch.bfloat16
        assert float((got.double() - right).norm() / right.norm()) < 2**-7


def test_a_window_of_memory_efficient_attention():
    """Forward only: torch's own derivative drops the window."""
    with LiftToFp64({}):
        out = efficient_forward(*parts(), kind=1, window_size=2)[0]
    torch.testing.assert_close(out, definition(*parts(), seen=triangle(5, 7) & ~triangle(5, 7, -2))[0])


@pytest.mark.parametrize("name", EVERY)
def test_the_log_sum_exp_is_what_the_op_returns(name):
    inputs = parts()
    with LiftToFp64({}):
        lse = EVERY[name](*inputs)[1]
    want = definition(*inputs)[1]
    lse = lse.squeeze(-1) if name == "cudnn" else lse
    torch.testing.assert_close(lse[..., : want.shape[-1]], want)
    assert bool((lse[..., want.shape[-1] :] == math.inf).all())


@pytest.mark.parametrize("name", EVERY)
def test_results_have_the_shapes_and_dtypes_of_the_meta_kernels(name):
    """As torch's compiler expects them, whichever float the op is called with."""
    with RoundOnce({}):
        found = EVERY[name](*(tensor.bfloat16() for tensor in parts(groups=HEADS)))
    with FakeTensorMode():
        wanted = EVERY[name](*(torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in parts(groups=HEADS)))

    def described(results):
        return [(r.shape, r.dtype) if isinstance(r, torch.Tensor) else r for r in results]

    assert described(found) == described(wanted)


def test_outputs_lie_in_memory_as_the_kernels_leave_them():
    """A program may `view` them without a copy."""
    queries = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in parts(groups=HEADS)]
    with RoundOnce({}):
        for op in (cpu, efficient, cudnn, ATEN._scaled_dot_product_flash_attention):
            assert op(*queries)[0].stride() == queries[0].stride()


def test_a_bias_gets_its_gradient_where_it_is_asked_for():
    inputs, bias = parts(groups=HEADS), draw(BATCH, 1, 5, 7)
    for op in (efficient, other_accelerators, efficient_forward):
        leaf, right = bias.clone().requires_grad_(), bias.clone().requires_grad_()
        with LiftToFp64({}):
            op(*inputs, bias=leaf.expand(-1, HEADS, -1, -1))[0].square().sum().backward()
        definition(*inputs, bias=right)[0].square().sum().backward()
        torch.testing.assert_close(leaf.grad, right.grad)


@pytest.mark.parametrize("mode", [LiftToFp64, RoundOnce])
def test_a_query_that_sees_no_key_is_zero_as_the_kernel_has_it(mode):
    inputs = [tensor.float() for tensor in parts(queries=7)]
    mask = torch.zeros(7, 7).masked_fill(torch.arange(7)[:, None] == 3, -math.inf)
    with mode({}):
        out, gradients = with_gradients(partial(cpu, bias=mask), [tensor.double() for tensor in inputs])
    kernel, of_kernel = with_gradients(partial(cpu, bias=mask), inputs, torch.float32)
    assert bool((out[:, :, 3] == 0).all())
    assert bool((kernel[:, :, 3] == 0).all())
    for got, real in zip(gradients, of_kernel, strict=True):
        torch.testing.assert_close(got, real.double(), rtol=1e-4, atol=1e-5)


PACKED = ([0, 3, 4, 9], [0, 5, 6, 12])


def packed(op):
    """Call with the sequences one after another; then each alone."""
    query, key, value = draw(9, HEADS, SIZE), draw(12, 2, SIZE), draw(12, 2, SIZE, seed=1)
    offsets = [torch.tensor(edges, dtype=torch.int32) for edges in PACKED]

    def alone(query, key, value):
        outs = []
        for place in range(3):
            (q0, q1), (k0, k1) = (edges[place : place + 2] for edges in PACKED)
            own = [t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1])]
            seen = triangle(q1 - q0, k1 - k0, (k1 - k0) - (q1 - q0))
            outs.append(definition(*own, seen=seen)[0][0].transpose(0, 1))
        return (torch.cat(outs),)

    with LiftToFp64({}) as mode:
        found = with_gradients(partial(op, offsets=offsets), (query, key, value))
    assert not mode.left_out
    return found, with_gradients(alone, (query, key, value))


def flash_packed(query, key, value, offsets):
    out, lse, *_ = ATEN._flash_attention_forward(query, key, value, *offsets, 5, 6, 0.0, True, False)
    assert lse.shape == (HEADS, 9)
    return (out,)


def efficient_packed(query, key, value, offsets):
    own = (tensor[None] for tensor in (query, key, value))
    out, lse, *_ = ATEN._efficient_attention_forward(*own, None, *offsets, 5, 6, 0.0, 2, True)
    assert lse.shape == (3, HEADS, 32)
    return (out[0],)


@pytest.mark.parametrize("op", [flash_packed, efficient_packed])
def test_packed_sequences_do_not_see_each_other(op):
    (out, gradients), (want, wanted) = packed(op)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("name", ["cpu-causal", "efficient-bias", "flash-causal"])
def test_queries_in_pieces_are_the_same_as_at_once(name, monkeypatch):
    op, *_ = next(rest for found, *rest in cases() if found == name)
    with LiftToFp64({}):
        whole = with_gradients(op, parts())
        monkeypatch.setattr(attention_formula, "SCORES", 2 * BATCH * HEADS * 7)
        torch.testing.assert_close(with_gradients(op, parts()), whole)


def test_every_op_that_this_torch_has_is_known():
    """A new one is noticed: it would be run by its own kernel."""
    fused = {
        name.removeprefix("aten::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::_") and "attention" in name
    }
    known = {func.name().removeprefix("aten::").partition(".")[0] for func in fused_ops.FORMULAS}
    not_fused = {
        "_scaled_dot_product_attention_math",  # taken apart
        "_scaled_dot_product_attention_math_for_mps",  # MPS has no float64
        "_native_multi_head_attention", "_triton_multi_head_attention", "_triton_scaled_dot_attention",  # nn.MultiheadAttention's
        "_flash_attention_forward_no_dropout_inplace",  # serving; writes into its argument
    }  # fmt: skip
    assert fused - not_fused <= known


@pytest.mark.parametrize("mode", [LiftToFp64, RoundOnce])
@pytest.mark.parametrize(("op", "keywords", "reason"), [
    (ATEN._scaled_dot_product_flash_attention, {"dropout_p": 0.1}, "_flash_attention.default with dropout 0.1"),
    (flash_forward, {"alibi_slopes": torch.ones(HEADS)}, "_flash_attention_forward.default with alibi_slopes"),
])  # fmt: skip
def test_what_the_formula_does_not_know_is_left_out_by_name(mode, op, keywords, reason):
    with mode({}) as active, pytest.raises(NotImplementedError):  # the CPU has no such kernel
        op(*parts(), **keywords)
    assert any(reason in entry for entry in active.left_out)


class Exhausted(TorchDispatchMode):
    """A product of float64 ends in an error."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ATEN.mm.default and args[0].dtype is torch.float64:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
], ids=["accelerator", "cpu", "cublas", "python"])  # fmt: skip
@pytest.mark.parametrize("mode", [LiftToFp64, RoundOnce])
def test_running_out_of_memory_is_no_missing_kernel(mode, error):
    factors = torch.ones(2, 2), torch.ones(2, 2)
    with Exhausted(error), mode({}) as active, pytest.raises(type(error)):
        torch.mm(*factors)
    assert not active.left_out


@pytest.mark.parametrize("mode", [LiftToFp64, RoundOnce])
def test_a_missing_kernel_is_still_left_out(mode):
    """The control."""
    factors = torch.ones(2, 2), torch.ones(2, 2)
    with Exhausted(RuntimeError("not implemented for 'Double'")), mode({}) as active:
        torch.mm(*factors)
    assert [*active.left_out] == ["backward: aten.mm.default"]


def test_scaled_dot_product_attention_comes_by_the_formula(monkeypatch):
    """Of the CPU's own choice, and of what a CUDA device does to a head whose size is not a multiple of 8."""
    seen = []
    compute = attention_formula.Attention.forward
    monkeypatch.setattr(attention_formula.Attention, "forward", lambda self: seen.append(self) or compute(self))
    query, key, value = draw(1, 2, 3, 10), draw(1, 2, 3, 10, seed=1), draw(1, 2, 3, 10, seed=2)
    with LiftToFp64({}):
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        wide = [nn.functional.pad(tensor, (0, 6)) for tensor in (query, key, value)]
        padded = ATEN._scaled_dot_product_flash_attention(*wide, scale=10**-0.5)[0][..., :10]
    assert len(seen) == 2
    torch.testing.assert_close(out, definition(query, key, value)[0])
    torch.testing.assert_close(padded, out)


def check(share, folder):
    """Run the suite with a flash kernel of the CPU that errs by `share`; its results by check and precision."""
    script = Path(__file__).with_name("noisy_flash.py")
    results = folder / "results.json"
    asked = ["--precision", "fp32,bf16", "--attn", "sdpa", "--checks", "reference.local,reference.end-to-end"]
    command = [python(), str(script), str(share), "check", "fixture:glm4-tiny", "-n", "0", "--no-diagnose"]
    done = subprocess.run([*command, *asked, "--json", str(results)], check=False, capture_output=True, text=True)
    assert results.exists(), done.stderr
    return {(row["check"], row["precision"]): row for row in json.loads(results.read_text())["checks"]}


def test_a_flash_kernel_with_five_percent_of_noise_is_found_and_named(tmp_path):
    rows = check(0.05, tmp_path)
    assert len(rows) == 4
    assert {row["status"] for row in rows.values()} == {"failed"}
    for precision in ("fp32", "bf16"):
        finding = rows["reference.local", precision]["finding"]
        assert finding["cause"] == "kernel-accuracy"
        assert finding["op"] == "aten._scaled_dot_product_flash_attention_for_cpu"
        assert finding["module"].endswith(".self_attn")
        assert finding["evidence"]["error of the fused op in roundings"] > 20


def test_the_same_kernel_without_noise_is_quiet(tmp_path):
    """The control: it is not the replacement that is found."""
    rows = check(0, tmp_path)
    assert len(rows) == 4
    assert {row["status"] for row in rows.values()} == {"passed"}
