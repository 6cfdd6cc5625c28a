"""load.dtype: a head, a whole model or a buffer in another dtype than it should have, each by its own cause, and clean models quiet."""

from __future__ import annotations

import sys

import pytest
import torch
from mutants.article_checkpoints import changed
from mutants.driver import MutantSession
from safetensors.torch import load_file, save_file
from unit.test_clean_models import save

from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.built_model import built_buffers
from numerics_suite.subjects.load import convert

CLASS = "class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):\n"
HALF = """    @classmethod
    def from_pretrained(cls, *args, **words):
        made = super().from_pretrained(*args, **words)
        (made[0] if isinstance(made, tuple) else made).half()
        return made

"""
AS_CONFIGURED = """    @classmethod
    def from_pretrained(cls, *args, **words):
        named = str(words["config"].torch_dtype).removeprefix("torch.")
        model, info = super().from_pretrained(*args, **words)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, named))
        return model, info

"""
MOE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def answer(source, check="load.dtype", precision="bf16", **changes):
    """What the check says, with its remedies tried, by name."""
    settings = Settings(
        **{
            "subjects": (str(source),),
            "precision": (precision,),
            "attn": ("eager",),
            "checks": (check,),
            "device": "cpu",
            "max_examples": 2,
            "seq_len": 12,
            "trust_remote_code": True,
            "origins": {"precision": "command line"},
            **changes,
        }
    )
    session = MutantSession(settings)
    session.findings.tries_remedies = True
    (question,) = session.plan.questions
    result, trace = session.answer(question)
    assert not trace
    return result, {} if result.finding is None else {remedy.name: remedy for remedy in result.finding.remedies}


@pytest.fixture
def coded(tmp_path):
    """Makes a copy of `chatglm-tiny` with a method more in its class."""
    return lambda method, **more: changed(
        tmp_path / tmp_path.name, "chatglm-tiny", code=(CLASS, CLASS + method), **more
    )


# --- parameters --------------------------------------------------------------------------------------------------


def test_a_narrow_head_is_cured_by_a_cast(tmp_path):
    folder = changed(tmp_path / tmp_path.name, "chatglm-tiny-classifier", config={"legacy_head_dtype": "float16"})
    result, remedies = answer(folder)
    assert result.finding.cause == "low-precision-section"
    assert remedies["cast-after-loading"].verified is True
    assert remedies["cast-after-loading"].effect.startswith("classifier_head cast to bfloat16: ")


def test_a_dtype_that_the_code_does_not_heed(coded):
    result, remedies = answer(coded(HALF))
    assert result.finding.cause == "ignored-dtype"
    assert result.finding.title == "bfloat16 was requested, and the model is in float16"
    assert remedies["cast-after-loading"].verified is True, remedies["cast-after-loading"].effect
    assert "load_state_dict with the stored values" in remedies["cast-after-loading"].effect
    assert remedies["fix-config"].verified is not True


def test_a_dtype_that_the_code_takes_from_the_config(coded):
    folder = coded(AS_CONFIGURED, config={"torch_dtype": "float16"})
    result, remedies = answer(folder)
    assert result.finding.cause == "ignored-dtype"
    assert remedies["fix-config"].verified is True, remedies["fix-config"].effect
    assert "torch_dtype bfloat16" in remedies["fix-config"].effect
    assert answer(folder, precision="fp16")[0].status == "passed"


def test_a_model_that_heeds_the_dtype(coded):
    assert answer(coded(AS_CONFIGURED, config={"torch_dtype": "bfloat16"}))[0].status == "passed"


# --- buffers -----------------------------------------------------------------------------------------------------


def moe(folder, *, spread):
    """A router whose biases differ by less than bfloat16 tells apart at their size; the file keeps them in float32."""
    save(folder, "Glm4MoeForCausalLM", "Glm4MoeConfig", **MOE)
    held = load_file(folder / "model.safetensors")
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(0))
    held = {name: value if name == BIAS else value.bfloat16() for name, value in held.items()}
    held[BIAS] = 10 + spread * drawn if spread else torch.zeros(32)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored_narrow(folder):
    """As a model is saved after `model.to(torch.bfloat16)`."""
    held = load_file(folder / "model.safetensors")
    save_file(
        {name: value.bfloat16() for name, value in held.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_routers_bias_that_was_saved_rounded(tmp_path, precision):
    result, remedies = answer(stored_narrow(moe(tmp_path, spread=0.5)), precision=precision)
    finding = result.finding
    assert finding.cause == "rounded-buffer"
    assert finding.parameters == (BIAS,)
    assert finding.evidence[BIAS].startswith("stored in bfloat16: 9 distinct values of 32")
    assert remedies["load-with-dtype"].verified is None
    assert "the files hold the rounded values" in remedies["load-with-dtype"].effect


def test_a_routers_bias_in_float32_or_untrained_is_quiet(tmp_path):
    assert answer(moe(tmp_path / "wide", spread=0.5))[0].status == "passed"
    assert answer(stored_narrow(moe(tmp_path / "zeros", spread=0)))[0].status == "passed"


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """SUBJECT of a function that makes a model: `clean`, `cast`, `cast_and_back`, `scaled`."""
    moe(tmp_path / "moe", spread=0.5)
    config = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    save(tmp_path / "gemma", "Gemma3ForCausalLM", "Gemma3TextConfig", **config)
    (tmp_path / "dtype_factories.py").write_text(
        "import pathlib, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "HERE = pathlib.Path(__file__).parent\n"
        "def clean(name='moe', **words):\n"
        "    return AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation='eager', **words)\n"
        "def cast():\n    return clean().to(torch.bfloat16)\n"
        "def cast_and_back():\n    return cast().float()\n"
        "def scaled():\n    return clean('gemma', torch_dtype=torch.bfloat16)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield lambda name: f"factory:dtype_factories:{name}"
    sys.modules.pop("dtype_factories", None)


def test_a_cast_after_loading_rounds_the_rotary_table_and_the_router(factory):
    result, _ = answer(factory("cast"))
    assert result.finding.cause == "rounded-buffer"
    assert BIAS in result.finding.parameters
    assert "held in bfloat16: 9 distinct values of 32" in result.finding.evidence[BIAS]
    assert "model.rotary_emb.inv_freq" in result.finding.parameters


def test_a_rotary_table_that_was_cast_and_widened_again(factory):
    result, remedies = answer(factory("cast_and_back"), precision="fp32")
    finding = result.finding
    assert finding.cause == "rounded-buffer"
    assert all(name.endswith("inv_freq") for name in finding.parameters)
    assert "rounded from float32 to bfloat16" in finding.evidence["model.rotary_emb.inv_freq"]
    assert remedies["load-with-dtype"].verified is True, remedies["load-with-dtype"].effect


@pytest.mark.parametrize("name", ["clean", "scaled"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_factories_whose_buffers_are_as_their_classes_build_them(factory, name, precision):
    """Gemma's scale of embeddings is built in the dtype of the load, and was trained so."""
    assert answer(factory(name), precision=precision)[0].status == "passed"


def test_our_own_conversion_rounds_no_buffer_whose_dtype_the_class_names(tmp_path):
    from transformers import Glm4MoeForCausalLM

    model = Glm4MoeForCausalLM.from_pretrained(moe(tmp_path, spread=0.5))
    before = model.get_buffer(BIAS).clone()
    convert(model, torch.bfloat16)
    assert torch.equal(model.get_buffer(BIAS), before)


def test_buffers_are_built_without_memory_for_weights_and_leave_nothing_changed(tmp_path):
    from transformers import Glm4MoeForCausalLM

    model = Glm4MoeForCausalLM.from_pretrained(moe(tmp_path, spread=0.5))
    before, drawn = torch.nn.Module.register_parameter, torch.get_rng_state()
    built = built_buffers(model, torch.bfloat16)
    assert built is not None
    assert built[BIAS].dtype == built["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert torch.nn.Module.register_parameter is before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.get_default_dtype() == torch.float32
    assert built_buffers(torch.nn.Linear(2, 2), torch.bfloat16) is None
