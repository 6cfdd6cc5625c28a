"""The code that ChatGLM was published in, where a folder of it is at hand: `NUMERICS_CHATGLM_CODE` names that folder.

It holds `configuration_chatglm.py`, `modeling_chatglm.py` and what they import, `config.json`, and for the tokenizer
`tokenization_chatglm.py` with `tokenizer_config.json`, as published. None of it is part of this repository.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from unit.test_chatglm_2023 import TRUSTED, failed
from unit.test_clean_models import statuses
from unit.test_loading_dtypes import answer

CODE = os.environ.get("NUMERICS_CHATGLM_CODE", "")
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "padded_vocab_size": 512,
    "seq_length": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
TEXTS = [
    f"the {noun} of {place} is {number} years old"
    for noun in ("king", "river", "song")
    for place in ("spain", "france")
    for number in range(40)
]
# transformers 5 has neither `use_return_dict` nor the config keys by which this code lives.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CODE, reason="NUMERICS_CHATGLM_CODE names no folder"),
    pytest.mark.skipif(
        int(transformers.__version__.split(".")[0]) >= 5, reason="the code is older than transformers 5"
    ),
]


def tensors() -> dict[str, torch.Tensor]:
    """Weights of a model of those sizes, in float16 as published, with the rotary buffer that is not read."""
    draw = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * columns**-0.5).half()

    found = {
        "transformer.embedding.word_embeddings.weight": linear(512, 64),
        "transformer.rotary_pos_emb.inv_freq": (10000.0 ** -(torch.arange(0, 8, 2) / 8)).half(),
        "transformer.encoder.final_layernorm.weight": torch.ones(64).half(),
        "transformer.output_layer.weight": linear(512, 64),
    }
    for layer in ("transformer.encoder.layers.0", "transformer.encoder.layers.1"):
        found |= {
            f"{layer}.input_layernorm.weight": torch.ones(64).half(),
            f"{layer}.self_attention.query_key_value.weight": linear(128, 64),
            f"{layer}.self_attention.query_key_value.bias": torch.zeros(128).half(),
            f"{layer}.self_attention.dense.weight": linear(64, 64),
            f"{layer}.post_attention_layernorm.weight": torch.ones(64).half(),
            f"{layer}.mlp.dense_h_to_4h.weight": linear(256, 64),
            f"{layer}.mlp.dense_4h_to_h.weight": linear(64, 128),
        }
    return found


def vocabulary(file: Path) -> None:
    """A vocabulary of bytes in the form that the tokenizer reads: tiktoken's ranks for GLM-4, sentencepiece before it."""
    if "tiktoken" in Path(CODE, "tokenization_chatglm.py").read_text("utf-8"):
        pytest.importorskip("tiktoken")
        ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
        file.write_text("\n".join(ranks), "utf-8")
        return
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(file.with_suffix("")), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


def special(file: Path) -> None:
    """The special tokens of GLM-4 behind the vocabulary of bytes, where its tokenizer's config names them by id."""
    config = json.loads(file.read_text("utf-8"))
    if config.get("tokenizer_class") == "ChatGLM4Tokenizer":
        flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        config["added_tokens_decoder"] = {str(256 + at): {"content": name, **flags} for at, name in enumerate(SPECIAL)}
        file.write_text(json.dumps(config), "utf-8")


def checkpoint(folder: Path, *, head: bool) -> str:
    """A tiny checkpoint of that code, with a classifier's head in its file or without."""
    folder /= folder.name
    folder.mkdir()
    for file in Path(CODE).glob("*.py"):
        shutil.copy(file, folder)
    config = json.loads(Path(CODE, "config.json").read_text("utf-8")) | SMALL | {"torch_dtype": "float16"}
    config.pop("quantization_bit", None)
    stored = tensors()
    if head:
        config["architectures"] = ["ChatGLMForSequenceClassification"]
        stored |= {
            "classifier_head.weight": (torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * 0.1).half(),
            "classifier_head.bias": torch.zeros(2).half(),
        }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_its_tokenizer(tmp_path):
    """Written before 4.45, its `_pad` takes no `padding_side`; the change that is tried is verified, also where the head is new."""
    folder = checkpoint(tmp_path, head=False)
    for name in ("tokenization_chatglm.py", "tokenizer_config.json"):
        shutil.copy(Path(CODE, name), folder)
    vocabulary(Path(folder, "tokenizer.model"))
    special(Path(folder, "tokenizer_config.json"))
    told, remedies = answer(folder, "inputs.pipeline", "fp32", attn=("default",), **{**TRUSTED, "diagnose": True})
    assert told.finding.cause == "tokenizer-incompatible"
    assert "padding_side" in told.finding.title
    assert remedies["fix-tokenizer"].verified


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_language_model(precision, tmp_path):
    found = statuses(checkpoint(tmp_path, head=False), (), precision, task="causal-lm", attn=("default",), **TRUSTED)
    wrong = failed(found)
    # Up to 4.49 the code builds in the dtype of config.json where it is handed a config.
    ignored = {"load.dtype", "reference.gradient", "reference.local", "train.finite"}
    assert set(wrong) <= (ignored if transformers.__version__ < "4.50" else set())
    assert not any(said.startswith("error") for said in wrong.values())
    assert found["reference.oracle"] == found["forward.cache"] == "passed"


def test_a_classifier_in_the_dtype_of_its_head(tmp_path):
    """In float16 body and head agree: what is left is what training in it meets."""
    found = statuses(checkpoint(tmp_path, head=True), (), "pure-fp16", attn=("default",), **TRUSTED)
    # ChatGLM2's code computes the angles of its rotary table in float16, which reference.local names.
    wrong = failed(found)
    assert set(wrong) <= {"train.finite", "reference.local"}
    assert "rotary_pos_emb" in wrong.get("reference.local", "rotary_pos_emb")
    assert found["forward.pooling"] == found["reference.oracle"] == found["load.roundtrip"] == "passed"


def test_a_new_head(tmp_path):
    folder = checkpoint(tmp_path, head=False)
    found = statuses(folder, ("load.*",), task="sequence-classification", attn=("default",), **TRUSTED)
    # Some copies of ChatGLM2's code were given an initialisation by whoever keeps them.
    initialises = ".normal_(" in Path(CODE, "modeling_chatglm.py").read_text("utf-8")
    never = "failed: never initialised: classifier_head.bias, classifier_head.weight"
    assert found["load.head-init"] == ("passed" if initialises else never)
    assert not any(said.startswith("error") for said in found.values())
