"""The rounded twin rounds each op once, keeps what is not arithmetic, and predicts what a precision costs."""

import copy

import pytest
import torch
import transformers
from torch import nn

from numerics_suite.engine.rounded_reference import run_rounded
from numerics_suite.engine.true_fp64 import run_true_fp64
from numerics_suite.observations.roundoff import rms

LOWER = (torch.bfloat16, torch.float16)


def tiny(name, attention, dtype):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, name.split("For")[0] + "Config")(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=[1, 2],
        attention_bias=True,
    )  # fmt: skip
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        drawn = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + noise / 10
        parameter.data = drawn.to(dtype)
    return model


def padded_batch():
    ids = torch.randint(3, 160, (4, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(4):
        ids[row, : 3 * row] = mask[row, : 3 * row] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.arange(4), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def kernel_ratio(model, batch, **autocast):
    real = batch["attention_mask"].bool()
    want = run_true_fp64(model, batch).outputs["logits"][real]
    rounded = run_rounded(model, batch, **autocast)
    assert rounded.left_out == ()
    with torch.no_grad(), torch.autocast("cpu", enabled=bool(autocast), dtype=autocast.get("autocast")):
        got = model(**batch).logits[real].double()
    return rms(got - want) / rms(rounded.outputs["logits"][real] - want)


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["GlmForCausalLM", "Glm4ForCausalLM"])
def test_kernel_ratio_of_a_clean_model(name, attention, dtype):
    assert 0.9 < kernel_ratio(tiny(name, attention, dtype), padded_batch()) < 1.2


@pytest.mark.parametrize("dtype", LOWER)
def test_kernel_ratio_under_autocast(dtype):
    assert 0.9 < kernel_ratio(tiny("Glm4ForCausalLM", "eager", torch.float32), padded_batch(), autocast=dtype) < 1.2


def test_kernel_ratio_in_float32_shows_the_accumulation():
    assert 1.5 < kernel_ratio(tiny("Glm4ForCausalLM", "eager", torch.float32), padded_batch()) < 8


@pytest.mark.parametrize("dtype", LOWER)
def test_kernel_ratio_shows_a_poor_kernel(dtype, monkeypatch):
    """The control: a product that accumulates in the lower float stands outside."""
    model, batch = tiny("Glm4ForCausalLM", "eager", dtype), padded_batch()
    real, exact = batch["attention_mask"].bool(), nn.functional.linear
    want = run_true_fp64(model, batch).outputs["logits"][real]
    inherent = rms(run_rounded(model, batch).outputs["logits"][real] - want)

    def poor(value, weight, bias=None):
        total = torch.zeros((*value.shape[:-1], weight.shape[0]), dtype=value.dtype)
        for start in range(0, weight.shape[1], 4):
            total = total + exact(value[..., start : start + 4], weight[:, start : start + 4])
        return total if bias is None else total + bias

    monkeypatch.setattr(nn.functional, "linear", poor)
    with torch.no_grad():
        assert rms(model(**batch).logits[real].double() - want) / inherent > 1.5


@pytest.mark.parametrize("dtype", LOWER)
def test_gradients_are_as_far_off_as_the_kernels_make_them(dtype):
    model, batch = tiny("Glm4ForCausalLM", "eager", dtype), padded_batch()
    want = run_true_fp64(model, batch, gradients=True).gradients
    rounded = run_rounded(model, batch, gradients=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**batch).loss.backward()
    got = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    assert rounded.gradients.keys() == want.keys() == got.keys()
    ratios = sorted(rms(got[name] - want[name]) / rms(rounded.gradients[name] - want[name]) for name in want)
    assert 0.9 < ratios[len(ratios) // 2] < 1.1
    assert ratios[0] > 0.4
    assert ratios[-1] < 2.5


class Program(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.weight = nn.Parameter((torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).bfloat16())
        self.body = body

    def forward(self):
        return self.body(self.weight)


def rounded(body):
    return run_rounded(Program(body), {}, call=lambda model, _: model())


def test_each_op_is_rounded_exactly_once():
    def by_hand(weight):
        wide = weight.detach().double()
        product = (wide @ wide).bfloat16().double()
        third = (wide / 3).bfloat16().double()
        return (product + third).bfloat16().double().exp().float().double()

    run = rounded(lambda w: (w @ w + w / 3).float().exp())
    assert torch.equal(run.outputs["output"], by_hand(Program(None).weight))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda w: w.t()[1:].reshape(-1), id="view"),
        pytest.param(lambda w: torch.cat([w, w.flip(0)]).masked_fill(w.repeat(2, 1) > 0, -3.0), id="move"),
        pytest.param(lambda w: w.clone().index_fill_(0, torch.tensor([1]), 0.1), id="in-place"),
        pytest.param(lambda w: w.float().topk(3).values.to(torch.float16), id="cast"),
        pytest.param(lambda w: torch.nan_to_num(w * float("inf")), id="nan_to_num"),
        pytest.param(lambda w: w.view(torch.int16).view(torch.bfloat16), id="bits"),
        pytest.param(lambda w: w[w.argmax(1)] + 0, id="integers"),
        pytest.param(lambda w: torch.where(w > 0, w, 0.1), id="where"),
        pytest.param(lambda w: w.div(2).add_(0), id="powers-of-two"),
    ],
)
def test_what_needs_no_rounding_gives_the_same_bits(body):
    run, plain = rounded(body), body(Program(body).weight.detach())
    assert torch.equal(run.outputs["output"], plain.double())
    assert run.left_out == ()


def test_in_place_ops_reach_the_storage_that_a_view_shares():
    def body(weight):
        base = torch.zeros(8, 8, dtype=torch.bfloat16)
        base[2:4].add_(weight[2:4]).div_(3)
        base.view(-1)[:8].copy_(weight[0])
        return base

    run, plain = rounded(body), body(Program(body).weight.detach())
    assert torch.equal(run.outputs["output"], plain.double())


def test_random_ops_draw_the_same_numbers():
    def body(weight):
        torch.manual_seed(5)
        return nn.functional.dropout(torch.ones(8, 8, dtype=weight.dtype), 0.5) + torch.rand(8, 8).bfloat16()

    assert torch.equal(rounded(body).outputs["output"], body(Program(body).weight).double())


def test_dtype_of_a_result_follows_the_program_not_the_cache():
    """Type promotion depends on scalars and 0-d tensors, so the same op has more than one answer."""
    body = lambda w: {  # noqa: E731
        "zero": w * torch.tensor(2.0), "scalar": w * 0.1, "wide": w * torch.ones(8), "integer": w.long() / 3,
    }  # fmt: skip
    plain = Program(body)()
    dtypes = {name: value.dtype for name, value in plain.items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    for _ in range(2):
        model, kept = Program(body), {}
        model.register_forward_hook(lambda _module, _args, output, kept=kept: kept.update(output))
        run_rounded(model, {}, call=lambda model, _: model())
        assert {name: value.dtype for name, value in kept.items()} == dtypes


def test_overflow_is_the_precisions_own():
    run = rounded(lambda w: (w.half().abs() + 1) * 6e4)
    assert run.outputs["output"].isinf().any()


def test_a_foreign_kernel_is_said():
    @torch.library.custom_op("numerics_suite_tests::half", mutates_args=())
    def half(value: torch.Tensor) -> torch.Tensor:
        return value / 2

    assert rounded(half).left_out == ("(root): numerics_suite_tests.half.default",)


def test_the_model_is_left_as_it_was():
    model, batch = tiny("Glm4ForCausalLM", "eager", torch.bfloat16), padded_batch()
    model.train()
    model(**batch).loss.backward()
    parameters = {name: (id(p), p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())

    def call(model, batch):
        model.extra = 1
        output = model(**batch)
        output.loss.backward()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_rounded(model, batch, gradients=True, call=call)
    assert model.training
    assert not hasattr(model, "extra")
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert id(parameter) == parameters[name][0]
        assert parameter.grad is parameters[name][1]
        assert torch.equal(parameter.grad, parameters[name][2])
