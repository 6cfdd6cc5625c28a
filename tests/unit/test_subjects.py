"""What a SUBJECT means, and what is said about one that cannot be used."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from numerics_suite.core.errors import BadInputError, UnsupportedError
from numerics_suite.subjects import compat
from numerics_suite.subjects.families import FAMILIES, family_of
from numerics_suite.subjects.files import digest, read_tensor, tensor_headers
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.subjects.memory import estimate_bytes
from numerics_suite.subjects.resolve import resolve, resolve_all, unsupported_subject

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny Glm base model that a test may damage."""
    return Path(shutil.copytree(fixture_path("glm-tiny"), tmp_path / "mine"))


@pytest.fixture
def classifier(tmp_path):
    return Path(shutil.copytree(fixture_path("glm-tiny-classifier"), tmp_path / "mine"))


def edit(folder, **changes):
    """Set keys of the folder's config; `...` removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refusal(source, **options):
    with pytest.raises(BadInputError) as caught:
        resolve(str(source), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- forms -----------------------------------------------------------------------------------------------------------


def test_a_fixture_tells_its_facts():
    subject = resolve("fixture:glm-tiny-classifier")
    assert (subject.id, subject.kind, subject.family) == ("glm-tiny-classifier", "fixture", "glm")
    assert (subject.task, subject.num_labels, subject.new_head) == ("sequence-classification", 3, False)
    assert (subject.model_class, subject.stored_dtype) == ("GlmForSequenceClassification", "bfloat16")
    assert subject.parameters == 160_768
    assert subject.digest.startswith("sha256:")


def test_the_code_of_a_fixture_is_trusted_and_its_copy_is_not(tmp_path):
    assert resolve("fixture:chatglm-tiny").trust_remote_code
    copy = shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "chatglm-tiny")
    assert "--trust-remote-code" in refusal(copy)
    subject = resolve(str(copy), trust_remote_code=True)
    assert (subject.family, subject.model_class) == ("chatglm", "ChatGLMForConditionalGeneration")


def test_a_directory_has_its_own_name(checkpoint, monkeypatch):
    assert resolve(str(checkpoint)).id == "mine"
    monkeypatch.chdir(checkpoint)
    assert resolve(".").id == "mine"
    assert resolve(".", name="yours").id == "yours"


def test_resolving_a_checkpoint_imports_no_torch():
    code = "import sys; from numerics_suite.subjects import resolve; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("fixture", "task", "new_head"),
    [
        ("glm-tiny", "causal-lm", False),
        ("glm-tiny", "sequence-classification", True),
        ("glm-tiny", "token-classification", True),
        ("glm-tiny-classifier", "sequence-classification", False),
        ("glm-tiny-classifier", "token-classification", True),
        ("glm-tiny-classifier", "causal-lm", True),
        ("chatglm-tiny", "sequence-classification", True),
        ("chatglm-tiny-classifier", "sequence-classification", False),
    ],
)
def test_a_head_that_the_checkpoint_lacks_is_new(fixture, task, new_head):
    subject = resolve(f"fixture:{fixture}", task=task)
    assert (subject.task, subject.new_head) == (task, new_head)


def test_another_number_of_labels_needs_a_new_head():
    assert not resolve("fixture:glm-tiny-classifier", num_labels=3).new_head
    subject = resolve("fixture:glm-tiny-classifier", num_labels=5)
    assert (subject.num_labels, subject.new_head) == (5, True)


def test_a_head_that_is_promised_and_not_stored_is_missing_and_not_new(checkpoint):
    edit(checkpoint, architectures=["GlmForSequenceClassification"])
    assert not resolve(str(checkpoint)).new_head


def test_the_body_of_glm_4_9b_is_a_language_model(tmp_path):
    copy = Path(shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "chatglm"))
    edit(copy, architectures=["ChatGLMModel"])
    subject = resolve(str(copy), trust_remote_code=True)
    assert (subject.task, subject.new_head) == ("causal-lm", False)


def test_two_alike_names_ask_for_name(checkpoint):
    with pytest.raises(BadInputError, match="--name"):
        resolve_all([str(checkpoint), "fixture:glm-tiny", f"{checkpoint}/"])
    both = resolve_all([str(checkpoint), str(checkpoint)], ["one"])
    assert [subject.id for subject in both] == ["one", "mine"]
    with pytest.raises(BadInputError, match="--name is given 2 times for 1"):
        resolve_all([str(checkpoint)], ["one", "two"])


# --- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with `org/tiny` in it, laid out as `huggingface_hub` does, and no network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "refs" / "v1").write_text(REVISION)
    shutil.copytree(fixture_path("glm-tiny"), repository / "snapshots" / REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(
    "source", ["org/tiny", "org/tiny@main", "org/tiny@v1", f"org/tiny@{REVISION}", "org/tiny@0123456"]
)
def test_a_hub_id_is_found_in_the_cache(hub, source):
    subject = resolve(source)
    assert (subject.id, subject.kind, subject.revision) == ("org/tiny", "hub", REVISION)
    assert subject.path == hub / "snapshots" / REVISION


@pytest.mark.parametrize("source", ["org/other", "org/tiny@v2"])
@pytest.mark.usefixtures("hub")
def test_a_hub_id_that_is_not_cached_is_refused_offline(source):
    text = refusal(source)
    assert source in text
    assert "HF_HUB_OFFLINE" in text


# --- factories -------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of factories in the working directory."""
    (tmp_path / "my_factories.py").write_text(
        "import torch\n"
        "CALLS = []\n"
        "def linear():\n    CALLS.append(1)\n    return torch.nn.Linear(4, 2), {'input': torch.ones(3, 4)}\n"
        "def broken():\n    raise ValueError('no weights\\nsecond line')\n"
        "def three():\n    return 3\n"
        "def badly_batched():\n    return torch.nn.Linear(4, 2), [1]\n"
        "def glm():\n"
        "    from transformers import GlmConfig, GlmForCausalLM\n"
        "    return GlmForCausalLM(GlmConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,\n"
        "        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "factory:my_factories:"
    sys.modules.pop("my_factories", None)


def test_a_factory_of_a_plain_module(module):
    subject = resolve(f"{module}linear")
    assert (subject.id, subject.task, subject.family) == ("linear", "module", "generic")
    assert (subject.parameters, subject.stored_dtype, subject.path) == (10, "float32", None)
    assert len(sys.modules["my_factories"].CALLS) == 1


def test_a_factory_of_a_language_model_keeps_its_family(module):
    subject = resolve(f"{module}glm")
    assert (subject.task, subject.family, subject.model_class) == ("causal-lm", "glm", "GlmForCausalLM")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", ["raised ValueError: no weights"]),
        ("three", ["returned an int", "nn.Module"]),
        ("badly_batched", ["batch is a list"]),
        ("linaer", ["did you mean 'linear'?"]),
    ],
)
def test_a_factory_that_cannot_be_used(module, name, words):
    text = refusal(f"{module}{name}")
    assert all(word in text for word in words)


def test_a_factory_that_cannot_be_found():
    assert "cannot be imported: ModuleNotFoundError" in refusal("factory:no_such_module_here:build")
    assert "factory:module:function" in refusal("factory:json")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "/nowhere/at/all"])
def test_no_such_directory(source):
    assert refusal(source).startswith(f"{source}: no such directory")


def test_unknown_fixture_has_the_nearest():
    assert "did you mean 'glm-tiny'?" in refusal("fixture:glm-tyny")


def test_no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refusal(checkpoint)


def test_config_that_is_not_json(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "glm",\n oops}')
    assert "config.json is not JSON" in refusal(checkpoint)
    assert "line 2" in refusal(checkpoint)


def test_unknown_model_type_and_architecture(checkpoint):
    edit(checkpoint, model_type="glmm")
    assert "model_type 'glmm' is unknown to transformers" in refusal(checkpoint)
    edit(checkpoint, model_type="glm", architectures=["GlmForPoetry"])
    assert "architectures names GlmForPoetry" in refusal(checkpoint)
    edit(checkpoint, model_type=...)
    assert "model_type is missing" in refusal(checkpoint)


def test_a_family_that_this_release_lacks_names_the_first_that_has_it(checkpoint, monkeypatch):
    knows = compat.knows_model_type
    monkeypatch.setattr(compat, "knows_model_type", lambda kind: kind != "glm" and knows(kind))
    with pytest.raises(UnsupportedError, match=r"model type glm needs transformers 4\.46 or newer"):
        resolve(str(checkpoint))
    subject = unsupported_subject(str(checkpoint))
    assert (subject.id, subject.family, subject.task) == ("mine", "glm", "causal-lm")


def test_a_task_without_a_class_is_unsupported():
    with pytest.raises(UnsupportedError, match="no class for token-classification"):
        resolve("fixture:chatglm-tiny", task="token-classification")


@pytest.mark.parametrize("left", ["class", "import", "star"])
def test_a_class_that_its_file_does_not_define(tmp_path, left):
    """Copies of published code leave the classifier out that config.json goes on to name; one may also be imported."""
    copy = Path(shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "chatglm"))
    code = copy / "modeling_chatglm.py"
    text = code.read_text("utf-8").replace("class ChatGLMForSequenceClassification(", "class Other(")
    more = {
        "class": "",
        "import": "from .heads import Head as ChatGLMForSequenceClassification\n",
        "star": "from .heads import *\n",
    }
    code.write_text(f"{text}\n\n{more[left]}", "utf-8")
    wanted = {"task": "sequence-classification", "trust_remote_code": True}
    if left == "class":
        with pytest.raises(
            UnsupportedError, match=r"modeling_chatglm\.ChatGLMForSequenceClassification, which that file does"
        ):
            resolve(str(copy), **wanted)
    else:
        assert resolve(str(copy), **wanted).model_class == "ChatGLMForSequenceClassification"
    assert resolve(str(copy), trust_remote_code=True).task == "causal-lm"


def test_code_that_is_not_in_the_folder(tmp_path):
    copy = Path(shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "chatglm"))
    (copy / "modeling_chatglm.py").unlink()
    assert "modeling_chatglm.py is not in the folder" in refusal(copy, trust_remote_code=True)


def test_truncated_weights(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is truncated" in refusal(checkpoint)
    weights.write_bytes(weights.read_bytes()[:100])
    assert "truncated or no safetensors file" in refusal(checkpoint)
    weights.write_bytes(b"")
    assert "truncated or no safetensors file" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"not json", b"", "its header is not a JSON object"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4, "entry for a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"\0" * 4, "does not fit its 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"\0" * 8, "overlap or leave gaps"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 9, "holds 9"),
    ],
)
def test_corrupt_weights(checkpoint, header, data, words):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert words in refusal(checkpoint)


def shard(folder):
    """Split the folder's weights in two shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def test_shards_are_read_as_one_file(checkpoint):
    whole = tensor_headers(checkpoint)
    weight = read_tensor(checkpoint, "lm_head.weight")
    shard(checkpoint)
    assert tensor_headers(checkpoint) == whole
    assert read_tensor(checkpoint, "lm_head.weight").equal(weight)
    assert resolve(str(checkpoint)).parameters == resolve("fixture:glm-tiny").parameters


def test_a_missing_shard(checkpoint):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert "names the shard model-00002-of-00002.safetensors (1 of 2 are missing)" in refusal(checkpoint)


def test_pickles_need_the_users_word(checkpoint):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "--allow-pickle" in refusal(checkpoint)
    assert resolve(str(checkpoint), allow_pickle=True).parameters is None
    (checkpoint / "pytorch_model.bin").unlink()
    assert "has no weights" in refusal(checkpoint)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(checkpoint):
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 768, "content": "<|new|>"})
    path.write_text(json.dumps(tokenizer))
    text = refusal(checkpoint)
    assert "a vocabulary of 769 ids, model.embed_tokens.weight has 768 rows" in text


def test_a_pad_token_outside_the_embedding(classifier):
    edit(classifier, pad_token_id=768)
    assert "pad_token_id is 768, outside the 768 rows" in refusal(classifier)
    # Left out, Glm's own default of 151329 holds.
    edit(classifier, pad_token_id=...)
    assert "pad_token_id is missing (default 151329)" in refusal(classifier)


def test_a_value_that_this_release_refuses(checkpoint):
    edit(checkpoint, num_labels="many", id2label=..., label2id=...)
    assert "config.json: transformers" in refusal(checkpoint)


@pytest.mark.parametrize("number", [0, -3])
def test_too_few_labels(number):
    assert f"--num-labels {number}" in refusal("fixture:glm-tiny", num_labels=number)


# --- families, digests, memory -----------------------------------------------------------------------------------------


def test_families_know_their_classes():
    for family in FAMILIES:
        assert family_of({"model_type": family.model_types[0]}) is family
    glm4 = family_of({"model_type": "glm4"})
    assert [
        glm4.kind_of(f"Glm4{part}") for part in ("RMSNorm", "RotaryEmbedding", "Attention", "MLP", "DecoderLayer")
    ] == [
        "norm",
        "rotary",
        "attention",
        "mlp",
        "block",
    ]
    assert glm4.kind_of("Linear") is None


@pytest.mark.parametrize(
    ("config", "sides", "pooling"),
    [
        ({"model_type": "chatglm"}, ("left",), "last-column"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ("left", "right"), "pad-id"),
        ({"model_type": "gpt2"}, ("right",), "pad-id"),
        ({"model_type": "bert", "type_vocab_size": 2}, ("right",), "unknown"),
        ({}, ("left", "right"), "pad-id"),
    ],
)
def test_what_a_family_declares(config, sides, pooling):
    family = family_of(config)
    assert (family.padding_sides, family.pooling) == (sides, pooling)


def test_a_digest_changes_with_any_byte(checkpoint):
    before = digest(checkpoint)
    assert digest(checkpoint) == before
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert digest(checkpoint) != before


def test_training_needs_four_times_the_weights_and_wide_dtypes_more():
    subject = resolve("fixture:glm-tiny")
    held = estimate_bytes(subject, "bfloat16", training=False, batch=1, seq=1)
    trained = estimate_bytes(subject, "bfloat16", training=True, batch=1, seq=1)
    assert subject.parameters * 2 < held < subject.parameters * 4
    assert trained > subject.parameters * 8
    assert estimate_bytes(subject, "float32", training=False, batch=1, seq=1) > held
