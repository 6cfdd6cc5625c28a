"""A subject loaded at a precision: names, dtypes, attention, poison, seeds; and everything is put back."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from numerics_suite.core.errors import UnsupportedError, UnusableError
from numerics_suite.devices.arithmetic import deterministic_algorithms
from numerics_suite.devices.random_state import seeded
from numerics_suite.subjects import compat
from numerics_suite.subjects.compat import known_config_keys
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.subjects.load import convert, load, quiet_transformers
from numerics_suite.subjects.remote_code import modules_folder, private_modules
from numerics_suite.subjects.resolve import resolve
from numerics_suite.subjects.tokenizers import TokenizerRaisesError, load_tokenizer

GLM = "fixture:glm-tiny"
CHATGLM = "fixture:chatglm-tiny"


def save_weights(folder, change):
    """Rewrite the folder's weights after `change` was applied to the mapping of tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fail(inside):
    """Raise out of a context manager after looking at what it did."""
    assert inside
    raise KeyError


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(fixture_path("glm-tiny"), tmp_path / "mine"))


@pytest.mark.parametrize("source", [GLM, CHATGLM])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_checkpoint_is_loaded_whole_at_the_dtype(source, dtype):
    loaded = load(resolve(source), dtype=dtype, attn="sdpa")
    assert (loaded.missing, loaded.unexpected, loaded.mismatched, loaded.new_head) == ((), (), (), ())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert (loaded.attn, loaded.dtype, loaded.batch, loaded.model.training) == ("sdpa", dtype, None, False)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "default"])
def test_the_attention_is_what_was_asked(attn):
    assert load(resolve(GLM), dtype="float32", attn=attn).attn == ("sdpa" if attn == "default" else attn)


def test_an_attention_that_cannot_be_had_is_a_reason_to_skip():
    with pytest.raises(UnsupportedError, match="flash_attention_2"):
        load(resolve(GLM), dtype="bfloat16", attn="flash_attention_2")


@pytest.mark.parametrize(
    ("fixture", "task", "head"),
    [
        ("glm-tiny", "sequence-classification", {"score.weight"}),
        ("glm-tiny", "token-classification", {"score.weight", "score.bias"}),
        ("glm-tiny-classifier", "causal-lm", {"lm_head.weight"}),
        ("chatglm-tiny", "sequence-classification", {"classifier_head.weight", "classifier_head.bias"}),
        ("chatglm-tiny-classifier", "causal-lm", {"transformer.output_layer.weight"}),
    ],
)
def test_a_new_head_is_reported_and_nothing_else(fixture, task, head):
    loaded = load(resolve(f"fixture:{fixture}", task=task), dtype="float32", attn="eager")
    assert set(loaded.new_head) == set(loaded.missing) == head
    assert loaded.unexpected == ()


def test_another_number_of_labels_makes_the_head_anew():
    loaded = load(resolve("fixture:glm-tiny-classifier", num_labels=5), dtype="float32", attn="eager")
    assert loaded.model.get_parameter("score.weight").shape == (5, 64)
    assert loaded.mismatched == loaded.new_head == ("score.weight",)


def test_lost_and_surplus_and_misshaped_weights_are_reported(checkpoint):
    def change(tensors):
        del tensors["model.layers.1.mlp.down_proj.weight"]
        tensors["model.layers.9.nothing.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.ones(3)

    save_weights(checkpoint, change)
    loaded = load(resolve(str(checkpoint)), dtype="float32", attn="eager")
    assert loaded.missing == ("model.layers.1.mlp.down_proj.weight",)
    assert loaded.unexpected == ("model.layers.9.nothing.weight",)
    assert loaded.mismatched == ("model.norm.weight",)
    assert loaded.new_head == ()


def test_tied_parameters_are_named(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    save_weights(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    subject = resolve(str(checkpoint))
    assert not subject.new_head
    loaded = load(subject, dtype="bfloat16", attn="eager")
    assert loaded.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert loaded.missing == ()


def test_a_pickle_is_read_where_resolve_let_it_pass(checkpoint):
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    loaded = load(resolve(str(checkpoint), allow_pickle=True), dtype="bfloat16", attn="eager")
    assert loaded.missing == ()
    assert loaded.model.get_parameter("lm_head.weight").equal(tensors["lm_head.weight"])


def test_a_load_that_fails_otherwise_is_bad_input_of_one_line(checkpoint):
    subject = resolve(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnusableError, match="cannot load these weights") as caught:
        load(subject, dtype="float32", attn="eager")
    assert "\n" not in str(caught.value)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UnusableError, match="cannot load these weights"):
        load(subject, dtype="float16", attn="eager")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="what asks for CUDA gets it here")
def test_code_that_asks_for_cuda_is_a_reason_to_skip(tmp_path):
    """ChatGLM's own `quantization_bit` moves weights there as it builds: nothing of the model is wrong."""
    built = "self.transformer = ChatGLMModel(config)\n"
    asks = f"{built}        self.scale = torch.ones(1).cuda()\n"
    folder = tmp_path / "asks_for_cuda"
    shutil.copytree(fixture_path("chatglm-tiny"), folder)
    code = folder / "modeling_chatglm.py"
    code.write_text(code.read_text("utf-8").replace(built, asks), "utf-8")
    with pytest.raises(UnsupportedError, match="needs CUDA, which this machine lacks: "):
        load(resolve(str(folder), trust_remote_code=True), dtype="bfloat16", attn="eager")


# --- remote code -----------------------------------------------------------------------------------------------------


def test_remote_code_runs_from_a_folder_of_this_process(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    usual = str(tmp_path / "usual")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", usual)
    loaded = load(resolve(CHATGLM), dtype="float32", attn="eager")
    assert loaded.remote_modules_dir == modules_folder()
    assert Path(sys.modules[type(loaded.model).__module__].__file__).is_relative_to(modules_folder())
    assert not Path(usual).exists()
    assert usual == dynamic_module_utils.HF_MODULES_CACHE
    assert load(resolve(GLM), dtype="float32", attn="eager").remote_modules_dir is None


def test_the_folder_is_put_back_on_error():
    from transformers import dynamic_module_utils

    usual = dynamic_module_utils.HF_MODULES_CACHE
    with pytest.raises(KeyError), private_modules():
        fail(str(modules_folder()) == dynamic_module_utils.HF_MODULES_CACHE)
    assert usual == dynamic_module_utils.HF_MODULES_CACHE


def test_another_process_has_another_folder_and_it_is_removed(monkeypatch):
    mine = modules_folder()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    other = modules_folder()
    assert other != mine
    assert other.is_dir()
    other.rmdir()


def test_remote_code_without_trust_does_not_run():
    with pytest.raises(Exception, match="--trust-remote-code"):
        load(replace(resolve(CHATGLM), trust_remote_code=False), dtype="float32", attn="eager")


# --- poison and seeds --------------------------------------------------------------------------------------------------


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )


def test_poison_fills_and_is_lifted_also_on_error():
    before = switches()
    with deterministic_algorithms(fill=True):
        assert torch.empty(5).isnan().all()
    with pytest.raises(KeyError), deterministic_algorithms(fill=True):
        fail(switches() == (True, True, True))
    assert switches() == before


def test_seeds_repeat_and_leave_no_trace():
    state = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        second = torch.rand(4)
    with pytest.raises(KeyError), seeded(4):
        fail(not torch.rand(4).equal(first))
    assert first.equal(second)
    assert torch.get_rng_state().equal(state)


def test_a_new_head_follows_the_seed():
    subject = resolve(CHATGLM, task="sequence-classification")
    heads = [
        load(subject, dtype="float32", attn="eager", seed=seed).model.get_parameter("classifier_head.weight")
        for seed in (0, 0, 1)
    ]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_a_head_that_nobody_initialises_stays_nan_under_poison(tmp_path):
    folder = Path(shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "chatglm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "legacy_skip_head_init": True}))
    subject = resolve(str(folder), task="sequence-classification", trust_remote_code=True)
    before = switches()
    for dtype in ("float32", "bfloat16", "float16"):
        model = load(subject, dtype=dtype, attn="eager", poison=True).model
        assert [name for name, value in model.named_parameters() if value.isnan().any()] == [
            "classifier_head.weight",
            "classifier_head.bias",
        ]
    assert switches() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_new_head_of_glm4_as_this_release_makes_it(dtype):
    """Only 5.8.x leaves it uninitialised, and not in float32."""
    if not compat.knows_model_type("glm4"):
        pytest.skip("needs transformers 4.51 or newer")
    subject = resolve("fixture:glm4-tiny", task="sequence-classification")
    model = load(subject, dtype=dtype, attn="eager", poison=True).model
    left = [name for name, value in model.named_parameters() if value.isnan().any()]
    assert left == (["score.weight"] if compat.release()[:2] == (5, 8) and dtype != "float32" else [])


# --- factories -------------------------------------------------------------------------------------------------------


class Parts(torch.nn.Module):
    """Everything that a conversion must tell apart."""

    _keep_in_fp32_modules_strict = ("wide",)

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.tied = torch.nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.wide = torch.nn.Linear(4, 4)
        self.register_buffer("saved", torch.ones(2))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.register_buffer("inv_freq", torch.ones(2))
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))


def test_a_conversion_does_what_a_load_would():
    model = Parts()
    convert(model, torch.bfloat16)
    assert model.first.weight.dtype == torch.bfloat16
    assert model.tied.weight is model.first.weight
    assert model.wide.weight.dtype == torch.float32
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert dtypes == {
        "saved": torch.bfloat16,
        "unsaved": torch.float32,
        "inv_freq": torch.float32,
        "count": torch.int64,
    }


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "loading_factories.py").write_text(
        "import torch\n"
        "class Skipping(torch.nn.Linear):\n    def reset_parameters(self):\n        pass\n"
        "def linear():\n"
        "    return torch.nn.Linear(4, 2), {'input': torch.ones(3, 4), 'input_ids': torch.ones(3)}\n"
        "def skipping():\n    return Skipping(4, 2)\n"
        "def glm():\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    return AutoModelForCausalLM.from_pretrained({str(fixture_path('glm-tiny'))!r})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "factory:loading_factories:"
    sys.modules.pop("loading_factories", None)


def test_a_factory_is_called_anew_and_converted(factory):
    subject = resolve(f"{factory}linear")
    one, two = (load(subject, dtype="bfloat16", attn="default", seed=seed) for seed in (0, 0))
    assert one.model is not two.model
    assert one.model.weight.equal(two.model.weight)
    assert one.model.weight.dtype == torch.bfloat16
    # Values follow the precision; ids of a wrong dtype are left for the checks to find.
    assert (one.batch["input"].dtype, one.batch["input_ids"].dtype) == (torch.bfloat16, torch.float32)
    assert one.attn == "default"


def test_poison_reaches_a_factory(factory):
    model = load(resolve(f"{factory}skipping"), dtype="float16", attn="default", poison=True).model
    assert model.weight.isnan().all()


@pytest.mark.skipif(compat.release() < compat.ATTENTION_BY_FUNCTION, reason="attention is a class before 4.48")
def test_a_factorys_language_model_switches_its_attention(factory):
    subject = resolve(f"{factory}glm")
    outputs = {}
    for attn in ("eager", "sdpa"):
        loaded = load(subject, dtype="float32", attn=attn)
        assert loaded.attn == attn
        outputs[attn] = loaded.model(torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"])


# --- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_is_its_base_and_itself(tmp_path, kind):
    peft = pytest.importorskip("peft")
    task = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}[kind]
    base = load(resolve(GLM, task=task), dtype="float32", attn="eager").model
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(task_type=kind, target_modules=["q_proj"], init_lora_weights=False)
    )
    with quiet_transformers():
        adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": GLM}))
    subject = resolve(str(tmp_path / "adapter"))
    assert (subject.id, subject.task, subject.new_head) == ("adapter", task, False)
    assert subject.adapter_base == str(fixture_path("glm-tiny"))
    loaded = load(subject, dtype="float32", attn="eager")
    assert (loaded.missing, loaded.unexpected, loaded.new_head) == ((), (), ())
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded.model(ids).logits, adapted.eval()(ids).logits)
    half = load(subject, dtype="bfloat16", attn="eager").model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


# --- the rest ----------------------------------------------------------------------------------------------------------


def test_quiet_is_lifted_also_on_error(capsys):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        warnings.warn("never seen", UserWarning, stacklevel=1)
        logging.get_logger("transformers").warning("never seen")
    with pytest.raises(KeyError), quiet_transformers():
        fail(not logging.is_progress_bar_enabled())
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    load(resolve(GLM, task="sequence-classification"), dtype="bfloat16", attn="eager")
    assert capsys.readouterr() == ("", "")


def test_config_keys_that_this_release_reads():
    import transformers

    known = known_config_keys(transformers.GlmConfig)
    raw = set(json.loads((fixture_path("glm-tiny-classifier") / "config.json").read_text()))
    # 4.46 built Glm without looking at the factor.
    assert raw - known == ({"partial_rotary_factor"} if compat.release() < (4, 47) else set())
    assert "a_key_of_nobody" not in known
    assert ("rope_parameters" in known) == (compat.release() >= (5, 0))
    assert ("dtype" in known) == (compat.release() >= compat.DTYPE_RENAMED)


def test_config_keys_of_remote_code():
    model = load(resolve(CHATGLM), dtype="float32", attn="eager").model
    known = known_config_keys(type(model.config))
    assert {"rope_ratio", "seq_length", "padded_vocab_size", "vocab_size", "tie_word_embeddings"} <= known
    assert not {"rope_theta", "partial_rotary_factor", "rms_norm_eps"} & known


def test_tokenizers(checkpoint):
    tokenizer = load_tokenizer(resolve(GLM))
    assert tokenizer is not None
    assert tokenizer("The logits are finite.")["input_ids"]
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "NobodysTokenizer"}))
    (checkpoint / "tokenizer.json").write_text("{}")
    subject = replace(resolve(GLM), path=checkpoint)
    with pytest.raises(TokenizerRaisesError, match=r"Exception: |Error: "):
        load_tokenizer(subject)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert load_tokenizer(subject) is None
