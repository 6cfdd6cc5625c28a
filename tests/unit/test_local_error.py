"""Local error is the constant of the program, a rounding too many shows in one module; headroom sees the largest."""

import gc
import math

import pytest
import torch
import transformers
from torch import nn

from numerics_suite.engine.true_fp64 import run_true_fp64
from numerics_suite.observations.headroom import headroom
from numerics_suite.observations.local_error import first_over, local_errors

LOWER = (torch.bfloat16, torch.float16)
CONSTANTS = {
    "Embedding": (0, 0), "RotaryEmbedding": (0.25, 0.45), "RMSNorm": (0.5, 0.7), "Linear": (0.35, 0.5),
    "SiLUActivation": (0.35, 0.5), "SiLU": (0.35, 0.5), "MLP": (0.85, 1.15), "Attention": (0.6, 1.3),
    "DecoderLayer": (0.8, 2.6),
}  # fmt: skip
"""Class, without the family → what DESIGN.md's constants and the layer they are measured in leave room for."""


def tiny(name="Glm4ForCausalLM", attention="eager", dtype=torch.bfloat16):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, name.split("For")[0] + "Config")(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=[1, 2],
        attention_bias=True,
    )  # fmt: skip
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        drawn = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else noise / 10 + ("norm" in key)
        parameter.data = drawn.to(dtype)
    return model


def padded_batch(length=33):
    ids = torch.randint(3, 160, (4, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(4):
        ids[row, : 3 * row] = mask[row, : 3 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def family_free(name):
    return name.removeprefix("Glm4").removeprefix("Glm").replace("SdpaAttention", "Attention")  # as 4.46 calls it


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["GlmForCausalLM", "Glm4ForCausalLM"])
def test_a_clean_model_shows_the_constants_of_its_program(name, attention, dtype):
    errors = local_errors(tiny(name, attention, dtype), padded_batch())
    assert {family_free(error.class_name) for error in errors} >= {"RMSNorm", "Linear", "MLP", "Attention"}
    for error in errors:
        low, high = CONSTANTS[family_free(error.class_name)]
        assert low <= error.rms_roundoffs <= high, error
        assert error.rms_roundoffs <= error.max_roundoffs
        assert error.dtype == str(dtype).removeprefix("torch.")
        assert error.left_out == ()


def test_every_module_below_the_list_of_blocks_is_measured():
    model = tiny()
    measured = {error.module for error in local_errors(model, padded_batch())}
    called = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert measured == called - {"", "model"}


def test_a_norm_without_its_float32_section_is_the_first_over(monkeypatch):
    model = tiny()
    norm = model.model.layers[1].input_layernorm

    def low(value):
        return norm.weight * (value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    monkeypatch.setattr(norm, "forward", low, raising=False)
    errors = local_errors(model, padded_batch())
    found = first_over(errors, lambda error: 0.72 if "Norm" in error.class_name else math.inf)
    assert found is not None
    assert found.module == "model.layers.1.input_layernorm"
    assert first_over(local_errors(tiny(), padded_batch()), lambda e: 0.72 if "Norm" in e.class_name else 9.0) is None


def test_rotary_angles_in_the_lower_float_stand_out(monkeypatch):
    model = tiny()
    rotary = model.model.rotary_emb
    right = rotary.forward

    def low(value, position_ids):
        angles = position_ids[..., None].to(value.dtype) * rotary.inv_freq.to(value.dtype)
        cosine, _ = right(value, position_ids)
        angles = torch.cat([angles, angles], -1)[..., : cosine.shape[-1]]
        return angles.cos(), angles.sin()

    monkeypatch.setattr(rotary, "forward", low, raising=False)
    errors = {error.module: error for error in local_errors(model, padded_batch(120))}
    assert errors["model.rotary_emb"].rms_roundoffs > 1.2  # grows with the position; 0.3 to 0.4 when it is right


def test_a_wrong_number_is_named_in_the_module_that_makes_it():
    model = tiny()
    model.model.layers[2].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output * (1 + 2**-4) if output.dtype is torch.bfloat16 else output
    )
    over = [error for error in local_errors(model, padded_batch()) if error.rms_roundoffs > 3]
    assert over[0].module == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("dtype", LOWER)
def test_under_autocast_the_unit_is_the_coarsest_float_within(dtype):
    errors = {e.module: e for e in local_errors(tiny(dtype=torch.float32), padded_batch(), autocast=dtype)}
    lower = str(dtype).removeprefix("torch.")
    assert errors["model.layers.0.mlp"].dtype == errors["model.layers.0"].dtype == lower
    assert errors["model.layers.0.input_layernorm"].dtype == "float32"
    assert all(0 <= error.rms_roundoffs < 3 for error in errors.values())


def test_nan_is_kept_and_never_within_a_budget():
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    errors = local_errors(model, padded_batch())
    found = first_over(errors, lambda _: 1e9)
    assert found is not None
    assert found.module == "model.layers.1.mlp.down_proj"
    assert math.isnan(found.rms_roundoffs)


def test_nan_of_an_earlier_run_of_a_module_is_not_hidden_by_a_later_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, first, second):
            return self.shared(first) + self.shared(second)

    good, bad = torch.ones(2, 4), torch.full((2, 4), float("nan"))
    for batch in ({"first": bad, "second": good}, {"first": good, "second": bad}):
        errors = {error.module: error for error in local_errors(Twice(), batch)}
        assert math.isnan(errors["shared"].rms_roundoffs)
    errors = {error.module: error for error in local_errors(Twice(), {"first": good, "second": good})}
    assert errors["shared"].rms_roundoffs < 1


def test_nothing_of_the_size_of_all_activations_is_kept():
    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(40)])

        def forward(self, value):
            for layer in self.layers:
                value = layer(value)
            return value

    alive = []

    def large() -> int:
        kept = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype is torch.float64]
        return sum(t.numel() >= 128 * 64 for t in kept)

    def count(*_):
        alive.append(large() - before)

    gc.collect()
    before = large()  # what other tests of this process hold
    model = Watch()
    model.layers[-1].register_forward_hook(count)
    local_errors(model, {"value": torch.randn(128, 64)})
    assert max(alive) <= 6


def test_the_model_is_left_as_it_was_and_its_cache_too():
    model, batch = tiny(), padded_batch()
    model.train()
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), id(m.__dict__)) for m in model.modules()]
    lengths = []

    def call(model, batch):
        first = model(batch["input_ids"][:, :20], use_cache=True).past_key_values
        lengths.append(first.get_seq_length())
        output = model(batch["input_ids"][:, 20:22], past_key_values=first)
        lengths.append(output.past_key_values.get_seq_length())
        return output

    errors = local_errors(model, batch, call=call)
    assert lengths == [20, 22]
    assert all(error.rms_roundoffs < 3 for error in errors)
    assert model.training
    assert model.config.use_cache
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks), id(m.__dict__)) for m in model.modules()] == hooks


def test_headroom_counts_the_bits_that_are_left():
    model = tiny(dtype=torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data *= 2000
    found = {record.module: record for record in headroom(model, padded_batch())}
    worst = min(found.values(), key=lambda record: record.bits)
    assert found["model.layers.1.mlp.down_proj"].dtype == "float16"
    for record in found.values():
        assert record.bits == pytest.approx(math.log2(65504 / record.largest))
    assert worst.bits < found["model.layers.0.mlp.down_proj"].bits - 5


@pytest.mark.parametrize(("value", "bits"), [(float("inf"), -math.inf), (0.0, math.inf), (1.0, math.log2(65504))])
def test_headroom_of_the_ends(value, bits):
    (record,) = headroom(nn.Identity(), {"input": torch.full((3,), value, dtype=torch.float16)})
    assert (record.module, record.largest, record.bits) == ("", value, pytest.approx(bits))


def test_headroom_shows_nan_past_later_numbers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, value):
            return self.same(value), self.same(torch.ones(3)), self.same(torch.full((2,), float("inf")))

    records = {record.module: record for record in headroom(Twice(), {"value": torch.tensor([1.0, float("nan")])})}
    assert math.isnan(records["same"].bits)
    assert math.isnan(records[""].largest)


@pytest.mark.parametrize("convolution", [nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)])
def test_a_convolution_is_measured(convolution):
    """Its dtypes are compared above dispatch: weights that stay as stored until they are used are refused there."""
    torch.manual_seed(0)
    model = nn.Sequential(convolution, nn.GELU())
    shape = (2, 8, 5) if isinstance(convolution, nn.Conv1d) else (2, 8, 5, 5)
    found = local_errors(model, {"input": torch.randn(shape)})
    assert [error.module for error in found] == ["0", "1", ""]
    assert all(error.rms_roundoffs < 4 and not error.left_out for error in found)


def test_a_convolution_is_streamed():
    torch.manual_seed(0)
    model = nn.Conv1d(8, 8, 3).bfloat16()
    given = {"input": torch.randn(2, 8, 5)}
    whole, streamed = (run_true_fp64(model, given, stream=stream).outputs["output"] for stream in (False, True))
    assert torch.equal(whole, streamed)
