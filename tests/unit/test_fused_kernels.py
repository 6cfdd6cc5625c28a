"""Are the formulas what the kernels of a CUDA device compute? Skipped without one.

Each op is called as the program would call it and again under the true fp64 mode, on the same numbers in bfloat16; the
kernel may differ by a few roundings. A wrong alignment, mask, window, offset or scale differs by tens of per cent.
"""

import math
from functools import partial

import pytest
import torch

from numerics_suite.engine.true_fp64 import LiftToFp64

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ATEN = torch.ops.aten
FEW_ROUNDINGS = 4 * 2**-8


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16().cuda()


def parts(queries, keys, *, heads_second=True):
    found = [draw(2, 4, queries, 64), draw(2, 4, keys, 64), draw(2, 4, keys, 64, seed=1)]
    return found if heads_second else [tensor.transpose(1, 2).contiguous() for tensor in found]


def cases():
    flash, efficient = ATEN._scaled_dot_product_flash_attention, ATEN._scaled_dot_product_efficient_attention
    cudnn = ATEN._scaled_dot_product_cudnn_attention
    mask = torch.zeros(2, 1, 32, 48, dtype=torch.bfloat16)
    mask[0, :, :, 40:] = -math.inf
    mask[1, :, 3] = -math.inf  # a query that sees no key
    mask = mask.expand(-1, 4, -1, -1)

    def biased(op, query, key, value, **kwargs):
        return op(query, key, value, mask.to(query.device), True, **kwargs)

    def plain(op, query, key, value, **kwargs):
        return op(query, key, value, None, True, **kwargs)

    def flash_below(query, key, value, **kwargs):
        options = {"is_causal": False, "return_debug_mask": False} | kwargs
        counts = {"max_q": query.shape[1], "max_k": key.shape[1]}
        offsets = {"cum_seq_q": None, "cum_seq_k": None}
        return ATEN._flash_attention_forward(query, key, value, **offsets, **counts, dropout_p=0.0, **options)

    def efficient_below(query, key, value, kind):
        return ATEN._efficient_attention_forward(
            query, key, value, None, None, None, None, None, 0.0, kind, compute_log_sumexp=True
        )

    for name, op in (("flash", flash), ("efficient", partial(plain, efficient)), ("cudnn", partial(plain, cudnn))):
        yield f"{name}", op, (32, 48), True
        yield f"{name}-scale", partial(op, scale=0.3), (32, 48), True
        yield f"{name}-causal", partial(op, is_causal=True), (32, 32), True
    yield "efficient-causal-more-keys", partial(plain, efficient, is_causal=True), (32, 48), True
    yield "efficient-mask", partial(biased, efficient), (32, 48), True
    yield "cudnn-mask", partial(biased, cudnn), (32, 48), True
    yield "flash-below-causal-more-keys", partial(flash_below, is_causal=True), (32, 48), False
    yield "flash-below-window", partial(flash_below, window_size_left=5, window_size_right=2), (32, 48), False
    yield "efficient-below-top-left", partial(efficient_below, kind=1), (32, 48), False
    yield "efficient-below-bottom-right", partial(efficient_below, kind=2), (32, 48), False


@pytest.mark.parametrize(("op", "counts", "heads_second"), [pytest.param(*rest, id=name) for name, *rest in cases()])
def test_a_kernel_computes_its_formula(op, counts, heads_second):
    inputs = parts(*counts, heads_second=heads_second)
    back = draw(*inputs[0].shape, seed=2)
    found, gradients = run(op, inputs, back)
    with LiftToFp64({}) as mode:
        want, wanted = run(op, [tensor.double() for tensor in inputs], back.double())
    assert not mode.left_out
    assert [getattr(result, "shape", result) for result in found] == [
        getattr(result, "shape", result) for result in want
    ]
    assert [getattr(result, "dtype", None) for result in found[1:2]] == [torch.float32]
    for got, right in zip((found[0], *gradients), (want[0], *wanted), strict=True):
        assert float((got.double() - right).norm() / right.norm()) < FEW_ROUNDINGS


def run(op, inputs, back):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = op(*leaves)
    results[0].backward(back)
    detached = [result.detach() if isinstance(result, torch.Tensor) else result for result in results]
    return detached, [leaf.grad for leaf in leaves]


def test_packed_sequences():
    query, key, value = draw(64, 4, 64), draw(80, 4, 64), draw(80, 4, 64, seed=1)
    offsets = [torch.tensor(edges, dtype=torch.int32).cuda() for edges in ([0, 20, 21, 64], [0, 30, 31, 80])]

    def op(query, key, value):
        return ATEN._flash_attention_forward(query, key, value, *offsets, 43, 49, 0.0, True, False)

    back = draw(*query.shape, seed=2)
    found, gradients = run(op, (query, key, value), back)
    with LiftToFp64({}):
        want, wanted = run(op, [tensor.double() for tensor in (query, key, value)], back.double())
    assert found[1].shape == want[1].shape
    for got, right in zip((found[0], *gradients), (want[0], *wanted), strict=True):
        assert float((got.double() - right).norm() / right.norm()) < FEW_ROUNDINGS
