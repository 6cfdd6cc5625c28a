"""The true fp64 twin is float64 throughout, obeys the laws, leaves the model alone and owns up to what it cannot lift."""

import copy

import pytest
import torch
import transformers
from torch import nn

from numerics_suite.engine import true_fp64 as module_under_test
from numerics_suite.engine.true_fp64 import run_true_fp64, true_fp64
from numerics_suite.observations.roundoff import (
    largest_difference,
    relative_error,
    rms,
    rms_difference,
    rms_error_in_roundoffs,
)

EXACT = 1e-13
FAMILIES = ("GlmForCausalLM", "Glm4ForCausalLM", "Glm4ForSequenceClassification")
LAYOUTS = [(name, attention) for name in FAMILIES for attention in ("eager", "sdpa")]


def tiny(name, attention="eager", dtype=torch.bfloat16):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, name.split("For")[0] + "Config")(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=[1, 2],
        attention_bias=True,
    )  # fmt: skip
    config.num_labels = 3
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        drawn = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + noise / 10
        parameter.data = drawn.to(dtype)  # the buffers stay in float32, as from_pretrained leaves them
    return model


def padded_batch(*, sequence_labels=False):
    ids = torch.randint(3, 160, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(3):
        ids[row, : 3 * row] = mask[row, : 3 * row] = 0
    labels = torch.arange(3) if sequence_labels else ids.masked_fill(mask == 0, -100)
    if not sequence_labels:  # the first real token is predicted from padding, a row that attends to nothing
        labels[torch.arange(3), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_double_is_no_reference():
    """Why the mode exists: the float64 minimum of the mask overflows in the hard-coded float32 softmax."""
    model = tiny("Glm4ForCausalLM").double()
    with torch.no_grad():
        assert model(**padded_batch()).logits.isnan().any()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "attention"), LAYOUTS)
def test_padding_changes_nothing(name, attention, stream):
    model, batch = tiny(name, attention), padded_batch()
    with torch.no_grad(), true_fp64(model, stream=stream) as session:
        together = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[2:]
        alone = model(batch["input_ids"][2:, 6:], attention_mask=batch["attention_mask"][2:, 6:]).logits
    assert together.dtype is torch.float64
    assert relative_error(together[:, 6:] if together.dim() == 3 else together, alone) < EXACT
    assert session.left_out == ()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "attention"), [layout for layout in LAYOUTS if "Causal" in layout[0]])
def test_decoding_with_a_cache_is_the_full_forward(name, attention, stream):
    model, batch = tiny(name, attention), padded_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad(), true_fp64(model, stream=stream) as session:
        full = model(ids, attention_mask=mask).logits
        first = model(ids[:, :10], attention_mask=mask[:, :10], use_cache=True)
        second = model(ids[:, 10:], attention_mask=mask, past_key_values=first.past_key_values)
    assert relative_error(torch.cat([first.logits, second.logits], 1)[mask.bool()], full[mask.bool()]) < EXACT
    assert session.left_out == ()


@pytest.mark.parametrize(("name", "attention"), LAYOUTS)
def test_streaming_gives_the_same_outputs_and_gradients(name, attention):
    model, batch = tiny(name, attention), padded_batch(sequence_labels="Sequence" in name)
    whole = run_true_fp64(model, batch, gradients=True, stream=False)
    streamed = run_true_fp64(model, batch, gradients=True, stream=True)
    assert whole.left_out == streamed.left_out == ()
    assert whole.outputs.keys() == streamed.outputs.keys() >= {"loss", "logits"}
    assert whole.gradients.keys() == streamed.gradients.keys() == dict(model.named_parameters()).keys()
    for got, want in ((streamed.outputs, whole.outputs), (streamed.gradients, whole.gradients)):
        assert max(relative_error(got[key], want[key]) for key in want) < EXACT
        assert all(value.dtype is torch.float64 for value in got.values())


def test_gradient_is_the_slope_of_the_loss():
    model, batch = tiny("Glm4ForCausalLM", dtype=torch.float32), padded_batch()
    name = "model.layers.1.mlp.gate_up_proj.weight"
    gradient = run_true_fp64(model, batch, gradients=True).gradients[name]
    parameter, step = model.get_parameter(name), 2.0**-12
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        moved.get_parameter(name).data[3, 5] = parameter.data[3, 5].double().add(sign * step)
        losses.append((run_true_fp64(moved, batch).outputs["loss"], moved.get_parameter(name).data[3, 5].double()))
    slope = (losses[0][0] - losses[1][0]) / (losses[0][1] - losses[1][1])
    assert slope.item() == pytest.approx(gradient[3, 5].item(), rel=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_tied_embeddings_get_one_whole_gradient(stream):
    model = tiny("GlmForCausalLM")
    model.lm_head.weight = model.model.embed_tokens.weight
    seen = {}
    run = run_true_fp64(model, padded_batch(), gradients=True, stream=stream, on_gradient=seen.__setitem__)
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    parts = run_true_fp64(untied, padded_batch(), gradients=True).gradients
    got = (seen if stream else run.gradients)["model.embed_tokens.weight"]
    assert relative_error(got, parts["model.embed_tokens.weight"] + parts["lm_head.weight"]) < EXACT
    assert (run.gradients == {}) is stream


def test_a_large_weight_is_multiplied_in_pieces(monkeypatch):
    model, batch = tiny("Glm4ForCausalLM"), padded_batch()
    whole = run_true_fp64(model, batch, gradients=True, stream=False)
    monkeypatch.setattr(module_under_test, "CHUNK_ELEMENTS", 1000)
    pieces = run_true_fp64(model, batch, gradients=True, stream=True)
    assert max(relative_error(pieces.gradients[key], whole.gradients[key]) for key in whole.gradients) < EXACT
    assert relative_error(pieces.outputs["logits"], whole.outputs["logits"]) < EXACT


def state_of(model):
    return [
        (id(module), dict(module.__dict__), {k: dict(v) for k, v in module.__dict__.items() if isinstance(v, dict)})
        for module in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_the_model_is_left_as_it_was(stream, fails):
    model, batch = tiny("Glm4ForCausalLM"), padded_batch()
    model.train()
    model(**batch).loss.backward()
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    gradients = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in model.named_parameters()}
    cache, default = model.config.use_cache, torch.get_default_dtype()

    def call(model, batch):
        output = model(**batch)
        model.new_attribute = 1
        model.model.rotary_emb.register_buffer("inv_freq", torch.ones(8), persistent=False)
        model.model.layers[0].register_forward_hook(lambda *_: None)
        if fails:
            raise ArithmeticError
        return output

    if fails:
        with pytest.raises(ArithmeticError):
            run_true_fp64(model, batch, gradients=True, stream=stream, call=call)
    else:
        run_true_fp64(model, batch, gradients=True, stream=stream, call=call)
    assert state_of(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
    assert (model.config.use_cache, torch.get_default_dtype()) == (cache, default)


class Odd(nn.Module):
    """Ways of computing in a lower float."""

    def __init__(self, body):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 1.3, 12).reshape(3, 4).to(torch.bfloat16))
        self.register_buffer("table", torch.linspace(0.1, 0.7, 4))
        self.scratch = torch.zeros(3, 4)
        self.body = body

    def forward(self):
        return self.body(self)


def rewritten_in_float64(model, monkeypatch):
    """Run the same program with each lower float in its text replaced by float64."""
    twin = copy.deepcopy(model).double()
    default = torch.get_default_dtype()
    with monkeypatch.context() as patch:
        for name in ("float32", "float16", "bfloat16"):
            patch.setattr(torch, name, torch.float64)
        for name in ("float", "half"):
            patch.setattr(torch.Tensor, name, torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            return twin()
        finally:
            torch.set_default_dtype(default)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m: m.weight.float().softmax(-1, dtype=torch.float32).half() / 3, id="casts"),
        pytest.param(lambda m: m.table.float() * m.weight + torch.full((4,), 0.1, dtype=torch.float16), id="buffer"),
        pytest.param(lambda m: torch.zeros(3, 4).add_(m.weight).div_(3), id="in-place"),
        pytest.param(lambda m: torch.empty(3, 4, dtype=torch.bfloat16).copy_(m.weight).mul_(m.table), id="copy"),
        pytest.param(lambda m: torch.cat([m.weight, m.table[None].exp()]).t()[1:].div(7), id="view"),
        pytest.param(lambda m: torch.view_as_complex(m.weight.float().view(3, 2, 2)).exp().real / 3, id="complex"),
        pytest.param(lambda m: torch.arange(12).view(3, 4) / 7 * m.weight, id="default-dtype"),
        pytest.param(lambda m: torch.add(m.weight, 1, out=torch.empty(3, 4)).log(), id="out"),
    ],
)
def test_ops_are_lifted(body, stream, monkeypatch):
    model = Odd(body)
    with torch.no_grad():
        plain, want = model(), rewritten_in_float64(model, monkeypatch)
    run = run_true_fp64(model, {}, stream=stream, call=lambda model, _: model())
    assert run.left_out == ()
    assert run.outputs["output"].dtype is torch.float64
    assert relative_error(run.outputs["output"], want) < EXACT
    assert relative_error(plain, want) > 1e-9  # the control: in its own precision it is another number


def run_odd(body, **options):
    return run_true_fp64(Odd(body), {}, call=lambda model, _: model(), **options)


def test_inference_mode_is_lifted_too():
    def body(model):
        with torch.inference_mode():
            return nn.functional.linear(model.table, model.weight).to(torch.float16) / 3

    run = run_odd(body)
    assert run.left_out == ()
    want = torch.linspace(0.1, 0.7, 4).double() @ Odd(body).weight.detach().double().t() / 3
    assert relative_error(run.outputs["output"], want) < EXACT


def test_writing_to_lower_storage_is_written_and_said():
    model = Odd(lambda m: (m.scratch[1:].copy_(m.weight[1:] / 3), m.scratch * 1)[1])
    run = run_true_fp64(model, {}, call=lambda model, _: model())
    assert run.left_out == ("(root): aten.copy_.default",)
    assert torch.equal(run.outputs["output"].float(), model.scratch)
    assert largest_difference(model.scratch[1:], model.weight[1:].detach().double() / 3) < 1e-7


def test_a_streamed_parameter_is_never_written_to():
    model = Odd(lambda m: m.weight.mul_(2))
    with pytest.raises(RuntimeError, match="would change a parameter"):
        run_true_fp64(model, {}, stream=True, call=lambda model, _: model())
    before = model.weight.detach().clone()
    run_true_fp64(model, {}, stream=False, call=lambda model, _: model())
    assert torch.equal(model.weight, before)


def test_reading_bits_is_said():
    run = run_odd(lambda m: m.weight.view(torch.int16).double())
    assert run.left_out == ("(root): aten.view.dtype",)


def test_a_foreign_kernel_is_said():
    @torch.library.custom_op("numerics_suite_tests::third", mutates_args=())
    def third(value: torch.Tensor) -> torch.Tensor:
        return (value.float() / 3).to(value.dtype)

    run = run_odd(lambda m: third(m.weight))
    assert run.left_out == ("(root): numerics_suite_tests.third.default",)
    assert run.outputs["output"].dtype is torch.float64


def test_a_kernel_without_float64_runs_lower_and_is_said():
    @torch.library.custom_op("numerics_suite_tests::picky", mutates_args=())
    def picky(value: torch.Tensor) -> torch.Tensor:
        if value.dtype is torch.float64:
            message = "no kernel for Double"
            raise RuntimeError(message)
        return value / 3

    run = run_odd(lambda m: picky(m.weight))
    assert run.left_out == ("(root): numerics_suite_tests.picky.default",)
    with pytest.raises(RuntimeError, match=r"shape|size"):  # a program's own error is not swallowed
        run_odd(lambda m: m.weight @ m.weight)


def test_a_gradient_that_streaming_cannot_see_is_said():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, ids):
            return {"loss": (self.layers[0](self.embed(ids)) @ self.embed.weight.t()).square().sum()}

    model, batch = Outside(), {"ids": torch.tensor([[1, 2]])}
    assert run_true_fp64(model, batch, gradients=True, stream=False).left_out == ()
    assert any("used outside" in text for text in run_true_fp64(model, batch, gradients=True, stream=True).left_out)


def test_evaluation_mode_unless_the_call_says_otherwise():
    class Model(nn.Dropout):
        pass

    model = Model(0.5).train()
    batch = {"input": torch.ones(200)}
    assert run_true_fp64(model, batch).outputs["output"].eq(1).all()
    assert run_true_fp64(model, batch, call=lambda m, b: m.train()(**b)).outputs["output"].eq(0).any()
    assert model.training


@pytest.mark.parametrize("stream", [False, True])
def test_dropout_is_the_same_in_the_recomputation(stream):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))])

        def forward(self, value):
            return self.layers[0](value).sum()

    def run(*, stream):
        torch.manual_seed(3)
        call = lambda model, batch: model.train()(**batch)  # noqa: E731
        return run_true_fp64(holder, {"value": torch.ones(3, 4)}, gradients=True, stream=stream, call=call).gradients

    holder = Holder()
    whole, streamed = run(stream=False), run(stream=stream)
    assert max(relative_error(streamed[name], whole[name]) for name in whole) < EXACT


def test_gradients_without_a_loss_are_refused():
    with pytest.raises(ValueError, match="scalar loss"):
        run_odd(lambda m: m.weight * 1, gradients=True)


def test_mixture_of_experts_runs_eager_experts():
    if not hasattr(transformers, "Glm4MoeForCausalLM"):
        pytest.skip("this transformers has no Glm4Moe")
    config = transformers.Glm4MoeConfig(
        vocab_size=160, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1, n_group=1, topk_group=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Glm4MoeForCausalLM(config).eval().to(torch.bfloat16)
    before = getattr(config, "_experts_implementation", None)
    whole = run_true_fp64(model, padded_batch(), gradients=True, stream=False)
    streamed = run_true_fp64(model, padded_batch(), gradients=True, stream=True)
    assert whole.left_out == streamed.left_out == ()
    assert max(relative_error(streamed.gradients[key], whole.gradients[key]) for key in whole.gradients) < EXACT
    assert getattr(config, "_experts_implementation", None) == before


def test_norms_do_not_hide_what_is_not_finite():
    one, nan, inf, zero = (torch.tensor([value]) for value in (1.0, float("nan"), float("inf"), 0.0))
    assert relative_error(one, zero) == float("inf")
    assert relative_error(zero, zero) == 0.0
    assert relative_error(inf, one) == float("inf")
    assert relative_error(inf, inf) == 0.0
    for pair in ((nan, one), (one, nan), (nan, nan), (inf, one), (one, inf)):
        assert not relative_error(*pair) <= 1e300
        assert not rms_error_in_roundoffs(*pair, torch.bfloat16) <= 1e300
    assert rms(torch.tensor([3e200, 4e200], dtype=torch.float64)) == pytest.approx(3.5355339e200)
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 5), (600, 500)])
def test_the_size_of_a_difference_is_the_same_in_pieces(scale, shape):
    got, want = torch.randn(shape, dtype=torch.float64) * scale, torch.randn(shape, dtype=torch.float64)
    assert rms_difference(got, want) == pytest.approx(rms(got - want), rel=1e-15, nan_ok=True)
