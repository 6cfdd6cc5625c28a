"""Flex attention and FlashAttention 2 in both references; a law whose rounded run is impossible is still judged."""

import math

import pytest
import torch
import transformers
from mutants.driver import MutantSession, answers, settings_of
from torch import nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.engine import runner
from numerics_suite.engine.flash_registry import flash_attention_by_formula
from numerics_suite.engine.rounded_reference import RoundedRun, RoundOnce, run_rounded
from numerics_suite.engine.true_fp64 import LiftToFp64, run_true_fp64
from numerics_suite.observations.local_error import local_errors
from numerics_suite.observations.roundoff import rms
from numerics_suite.subjects.compat import ATTENTION_BY_FUNCTION, release

BY_FUNCTION = pytest.mark.skipif(release() < ATTENTION_BY_FUNCTION, reason="attention is a class before 4.48")


def tiny(attention, dtype=torch.bfloat16):
    config = transformers.GlmConfig(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=[1, 2],
        attention_bias=True,
    )  # fmt: skip
    built = "sdpa" if attention == "flash_attention_2" else attention
    model = transformers.GlmForCausalLM._from_config(config, attn_implementation=built).eval()
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + noise / 10).to(dtype)
    # What loading with flash-attn installed writes; without the package transformers would refuse.
    model.config._attn_implementation_internal = attention
    return model


def batch(*, padded=True):
    ids = torch.randint(3, 160, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(3):
            ids[row, : 2 * row] = mask[row, : 2 * row] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.arange(3), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(
    params=["flash_attention_2", pytest.param("flex_attention", marks=pytest.mark.filterwarnings("ignore"))]
)
def attention(request):
    if request.param == "flex_attention" and release() < (4, 51):
        pytest.skip("flex attention came to GLM later")
    if release() < ATTENTION_BY_FUNCTION:
        pytest.skip("attention is a class before 4.48")
    return request.param


@pytest.mark.parametrize("padded", [True, False])
def test_both_references_know_it(attention, padded):
    own, given = tiny(attention), batch(padded=padded)
    real = given["attention_mask"].bool()
    true, rounded = run_true_fp64(own, given), run_rounded(own, given)
    assert true.left_out == rounded.left_out == ()
    want = run_true_fp64(tiny("eager"), given).outputs["logits"][real]
    torch.testing.assert_close(true.outputs["logits"][real], want, rtol=1e-12, atol=1e-12)
    # One op rounded once, as sdpa's: the same inherent error to the bit.
    sdpa = run_rounded(tiny("sdpa"), given).outputs["logits"][real]
    assert rms(rounded.outputs["logits"][real] - want) == pytest.approx(rms(sdpa - want), rel=0.05)
    assert own.config._attn_implementation == attention


@BY_FUNCTION
def test_gradients_through_flash_attention_2():
    """Flex attention refuses gradients on the CPU; its rule is tested below."""
    true = run_true_fp64(tiny("flash_attention_2"), batch(), gradients=True)
    rounded = run_rounded(tiny("flash_attention_2"), batch(), gradients=True)
    want = run_true_fp64(tiny("eager"), batch(), gradients=True).gradients
    sdpa = run_rounded(tiny("sdpa"), batch(), gradients=True).gradients
    assert true.left_out == rounded.left_out == ()
    assert true.gradients.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(true.gradients[name], gradient, rtol=1e-9, atol=1e-12)
        assert rms(rounded.gradients[name] - gradient) < 2 * rms(sdpa[name] - gradient)


@BY_FUNCTION
def test_flash_attention_2_is_replaced_only_while_a_reference_runs(monkeypatch):
    """A kernel that stands for the package's, off by 5 %: the cell's own run calls it, no reference does."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    calls = []

    def kernel(module, query, key, value, attention_mask, scaling=None, **others):  # noqa: PLR0917 - transformers'
        calls.append(query.dtype)
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return 1.05 * out.transpose(1, 2), None

    monkeypatch.setitem(functions._global_mapping if hasattr(functions, "_global_mapping") else functions, "flash_attention_2", kernel)  # fmt: skip
    model, given = tiny("flash_attention_2"), batch(padded=False)
    run_true_fp64(model, given)
    run_rounded(model, given)
    assert calls == []
    errors = {error.module: error for error in local_errors(model, given)}
    assert calls == [torch.bfloat16] * 2
    assert all(errors[f"model.layers.{layer}.self_attn"].kernel_ratio > 5 for layer in range(2))
    with flash_attention_by_formula(model):
        assert functions["flash_attention_2"] is not kernel
    with pytest.raises(ZeroDivisionError), flash_attention_by_formula(model):
        raise ZeroDivisionError
    assert functions["flash_attention_2"] is kernel


@BY_FUNCTION
def test_packed_sequences_and_windows_of_flash_attention_2():
    """Positions that start again are another sequence; a window counts the query itself."""
    from numerics_suite.engine.flash_registry import registered_attention

    query, key, value = (torch.randn(1, 2, 7, 8, dtype=torch.float64) for _ in range(3))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    module = nn.Module()
    with LiftToFp64({}):
        out = registered_attention(module, query, key, value, None, position_ids=positions, sliding_window=2)[0]
    seen = torch.ones(7, 7, dtype=torch.bool).tril() & ~torch.ones(7, 7, dtype=torch.bool).tril(-2)
    seen[4:, :4] = False
    scores = (query @ key.transpose(-2, -1) / 8**0.5).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ value).transpose(1, 2))


@BY_FUNCTION
@pytest.mark.parametrize(("asked", "said"), [({"softcap": 50.0}, "softcap"), ({"dropout": 0.1}, "dropout")])
def test_what_flash_attention_2_asks_beyond_the_formula_is_named(asked, said):
    from numerics_suite.engine.flash_registry import registered_attention

    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotApplicableError, match=f"flash_attention with {said} cannot be computed in float64"):
        registered_attention(nn.Module(), query.bfloat16(), query.bfloat16(), query.bfloat16(), None, **asked)


@BY_FUNCTION
@pytest.mark.filterwarnings("ignore")
def test_local_errors_of_flex_attention_name_it():
    errors = [error for error in local_errors(tiny("flex_attention"), batch()) if error.module.endswith("self_attn")]
    assert [error.fused_op for error in errors] == ["flex_attention"] * 2
    assert all(error.left_out == () and 0.6 < error.kernel_ratio < 1.5 for error in errors)


@pytest.mark.parametrize("mode", [LiftToFp64, RoundOnce])
def test_the_rules_of_flex_attention_forward_and_backward(mode):
    """A score that is capped, biased and scaled by head, a mask, grouped heads, and a gradient through the sum."""
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import create_block_mask

    dtype = torch.float64 if mode is LiftToFp64 else torch.float32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    query, key, value, slope = draw(2, 4, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8), draw(4)
    bias = torch.randn(2, 5, 7, generator=generator)

    def score_mod(score, b, h, i, j, bias, slope):  # noqa: PLR0917 - torch's
        return 3 * torch.tanh(score / 3) + bias[b, i, j] * slope[h]

    blocks = create_block_mask(lambda _b, _h, i, j: i >= j - 2, 2, None, 5, 7, device="cpu").as_tuple()
    with mode({}) as active:
        out, lse, *_ = flex_attention(query, key, value, score_mod, blocks, 8**-0.5, {}, (bias, slope), ())
        (out.square().sum() + lse.sin().sum()).backward()
    assert not active.left_out
    assert out.dtype is dtype

    own = [tensor.detach().double().requires_grad_() for tensor in (query, key, value, slope)]
    wide = [tensor.repeat_interleave(2, dim=1) for tensor in own[1:3]]
    scores = own[0] @ wide[0].transpose(-2, -1) * 8**-0.5
    scores = 3 * torch.tanh(scores / 3) + bias.double()[:, None] * own[3][:, None, None]
    scores = scores.masked_fill(torch.arange(5)[:, None] < torch.arange(7) - 2, -math.inf)
    want, total = scores.softmax(-1) @ wide[1], scores.logsumexp(-1) / math.log(2)
    (want.square().sum() + total.sin().sum()).backward()
    exact = {"rtol": 1e-12, "atol": 1e-12} if mode is LiftToFp64 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(out.double(), want, **exact)
    torch.testing.assert_close(lse.double(), total, **exact)
    for got, right in zip((query, key, value, slope), own, strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, **exact)


def unrounded(model, given, **_):
    return RoundedRun(outputs={}, gradients=None, left_out=("model.layers.0.self_attn: aten._poor_op.default",))


LAWS = ("forward.batch", "forward.causal", "forward.padding", "forward.attention", "forward.cache")


def test_a_law_is_judged_in_true_fp64_where_there_is_no_rounded_run(monkeypatch):
    monkeypatch.setattr(runner, "run_rounded", unrounded)
    session = MutantSession(settings_of("glm4-tiny", "bf16", "sdpa", max_examples=8))
    for result in answers(session, LAWS):
        assert result.status == "passed", result
        assert result.measurements["rounded"] == 0
        assert result.reason.startswith("judged in true fp64 only: no rounded reference: ")
        assert "model.layers.0.self_attn: aten._poor_op.default" in result.reason


def test_a_law_that_breaks_in_true_fp64_is_found_without_a_rounded_run(monkeypatch):
    monkeypatch.setattr(runner, "run_rounded", unrounded)

    def leak(model):
        attend = model.model.layers[0].self_attn.forward
        monkeypatch.setattr(
            model.model.layers[0].self_attn,
            "forward",
            lambda *args, **kwargs: ((out := attend(*args, **kwargs))[0] + out[0].mean(0, keepdim=True), *out[1:]),
            raising=False,
        )

    session = MutantSession(settings_of("glm4-tiny", "bf16", "sdpa", max_examples=8), leak)
    (result,) = answers(session, ["forward.batch"])
    assert result.status == "failed"
    assert result.finding.evidence["measurement"] == "true"


def test_a_value_lost_in_the_precision_is_found_without_a_rounded_run(monkeypatch):
    monkeypatch.setattr(runner, "run_rounded", unrounded)

    def lose(model):
        """The precision alone, not true fp64, loses a value."""
        attend = model.model.layers[0].self_attn.forward

        def forward(*args, **kwargs):
            out = attend(*args, **kwargs)
            return (out[0] * math.nan if out[0].dtype is torch.bfloat16 else out[0], *out[1:])

        monkeypatch.setattr(model.model.layers[0].self_attn, "forward", forward, raising=False)

    session = MutantSession(settings_of("glm4-tiny", "bf16", "sdpa", max_examples=8), lose)
    (result,) = answers(session, ["forward.batch"])
    assert result.status == "failed"
    assert result.finding.evidence["measurement"] == "rounded"
