"""The code that ChatGLM was published in, where a folder of it is at hand: `NUMERICS_CHATGLM_CODE` names that folder.

It holds `configuration_chatglm.py`, `modeling_chatglm.py` and what they import, `config.json`, and for the tokenizer
`tokenization_chatglm.py` with `tokenizer_config.json`, as published. None of it is part of this repository.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from unit.test_chatglm_2023 import TRUSTED, failed
from unit.test_clean_models import statuses
from unit.test_loading_dtypes import answer
from unit.test_other_defects import run_of, verified

from numerics_suite.core.errors import UnsupportedError
from numerics_suite.core.records import Finding
from numerics_suite.diagnosis.remedies import SAFE_EPS
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.resolve import resolve
from numerics_suite.suite.session import SuiteSession

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
PRECISIONS = ("bf16", "fp32", "amp-bf16", "pure-fp16")
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
CLASSIFY = {"task": "sequence-classification"}
MENDED = """

_as_published = {kind}._pad


def _pad(self, *args, padding_side=None, **kwargs):
    return _as_published(self, *args, **kwargs)


{kind}._pad = _pad
"""
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


def code(name: str) -> str:
    return Path(CODE, name).read_text("utf-8")


needs_classifier = pytest.mark.skipif(
    not CODE or "ForSequenceClassification(" not in code("modeling_chatglm.py"), reason="this copy has no classifier"
)


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


def with_tokenizer(folder: str) -> str:
    for name in ("tokenization_chatglm.py", "tokenizer_config.json"):
        shutil.copy(Path(CODE, name), folder)
    vocabulary(Path(folder, "tokenizer.model"))
    special(Path(folder, "tokenizer_config.json"))
    return folder


def test_its_tokenizer(tmp_path):
    """Written before 4.45, its `_pad` takes no `padding_side`; the change that is tried is verified, also where the head is new."""
    folder = with_tokenizer(checkpoint(tmp_path, head=False))
    told, remedies = answer(folder, "inputs.pipeline", "fp32", attn=("default",), **{**TRUSTED, "diagnose": True})
    if told.status == "skipped":
        pytest.skip(told.reason)
    if not of_tokenizer():
        assert told.finding is None
        return
    assert told.finding.cause == "tokenizer-incompatible"
    assert "padding_side" in told.finding.title
    assert remedies["fix-tokenizer"].verified


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_language_model(precision, tmp_path):
    found = statuses(checkpoint(tmp_path, head=False), (), precision, task="causal-lm", attn=("default",), **TRUSTED)
    # A fault that the installed training stack is known to have is shown as accepted.
    wrong = {check: said for check, said in failed(found).items() if not said.startswith("accepted: ")}
    # Up to 4.49 the code builds in the dtype of config.json where it is handed a config.
    ignored = {"load.dtype", "reference.gradient", "reference.local", "train.finite"}
    if "rotary_pos_emb" in wrong.get("reference.local", ""):
        del wrong["reference.local"]  # ChatGLM2's angles, as below
    assert set(wrong) <= (ignored if transformers.__version__ < "4.50" else set())
    assert not any(said.startswith("error") for said in wrong.values())
    assert found["reference.oracle"] == found["forward.cache"] == "passed"


def test_a_copy_without_a_classifier(tmp_path):
    """One keeper of ChatGLM2's code left the class out that config.json still names."""
    if "class ChatGLMForSequenceClassification(" in code("modeling_chatglm.py"):
        pytest.skip("it has one")
    with pytest.raises(
        UnsupportedError, match=r"auto_map.AutoModelForSequenceClassification names .*, which that file"
    ):
        resolve(checkpoint(tmp_path, head=False), task=CLASSIFY["task"], trust_remote_code=True)


@needs_classifier
def test_a_classifier_in_the_dtype_of_its_head(tmp_path):
    """In float16 body and head agree: what is left is what training in it meets."""
    found = statuses(checkpoint(tmp_path, head=True), (), "pure-fp16", attn=("default",), **TRUSTED)
    # ChatGLM2's code computes the angles of its rotary table in float16, which reference.local names.
    wrong = {check: said for check, said in failed(found).items() if not said.startswith("accepted: ")}
    assert set(wrong) <= {"train.finite", "reference.local"}
    assert "rotary_pos_emb" in wrong.get("reference.local", "rotary_pos_emb")
    assert found["forward.pooling"] == found["reference.oracle"] == found["load.roundtrip"] == "passed"


@needs_classifier
def test_a_new_head(tmp_path):
    folder = checkpoint(tmp_path, head=False)
    found = statuses(folder, ("load.*",), task="sequence-classification", attn=("default",), **TRUSTED)
    # Some copies of ChatGLM2's code were given an initialisation by whoever keeps them.
    initialises = ".normal_(" in Path(CODE, "modeling_chatglm.py").read_text("utf-8")
    never = "failed: never initialised: classifier_head.bias, classifier_head.weight"
    assert found["load.head-init"] == ("passed" if initialises else never)
    assert not any(said.startswith("error") for said in found.values())


# --- from what was published to a cured classifier -----------------------------------------------------------------


def judged(folder: str, precision: str, **changes: object) -> dict[str, Finding]:
    """The roots of all findings by check; what an installed training stack is known for is accepted, and no check is an error."""
    run = run_of(folder, (), precision, **CLASSIFY, **{"steps": 3, **changes})
    wrong = [f"{each.check}: {each.reason}" for each in run.checks if each.status == "error"]
    assert not wrong
    roots = {
        each.check: each.finding
        for each in run.checks
        if each.finding is not None and each.status == "failed" and each.finding.consequence_of is None
    }
    # ChatGLM2's code computes the angles of its rotary table in the precision of its weights: a finding of its own, which nothing here cures.
    if "rotary_pos_emb" in str(getattr(roots.get("reference.local"), "module", "")):
        del roots["reference.local"]
    told = ", ".join(f"{check} {root.cause} {verified(root)}" for check, root in roots.items())
    logging.getLogger(__name__).info("%s %s %s: %s", transformers.__version__, CODE, precision, told or "no finding")
    return roots


def with_head(folder: Path) -> str:
    return with_tokenizer(checkpoint(folder, head=True))


def names_half() -> bool:
    return "dtype=torch.half" in code("modeling_chatglm.py")


def ignores(precision: str) -> bool:
    """Up to 4.49 the code builds in the dtype of config.json, which is float16 here, where it is handed a config."""
    return RELEASE <= (4, 49) and precision != "pure-fp16"


def causes(found: Mapping[str, Finding]) -> dict[str, str]:
    return {check: finding.cause for check, finding in found.items()}


def of_tokenizer() -> dict[str, str]:
    """Some copies were given a `_pad` that takes `padding_side` by whoever keeps them."""
    old = "padding_side:" not in code("tokenization_chatglm.py").partition("def _pad(")[2].partition(")")[0]
    return {"inputs.pipeline": "tokenizer-incompatible"} if old else {}


@needs_classifier
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_new_head_is_named(precision, tmp_path):
    """Nobody initialises it; where the class names float16 for it, that shows as soon as it was saved."""
    found = judged(with_tokenizer(checkpoint(tmp_path, head=False)), precision)
    alone = precision != "pure-fp16"
    expected, cures = of_tokenizer(), {}
    if ".normal_(" not in code("modeling_chatglm.py"):
        expected["load.head-init"] = "uninitialised-parameters"
        cures["init-head"] = () if alone else ("larger-optimizer-eps",)
    if alone and (ignores(precision) or names_half()):
        check = "load.dtype" if ignores(precision) else "load.roundtrip"
        expected[check] = "ignored-dtype" if ignores(precision) else "low-precision-section"
        assert "cast-after-loading" in verified(found[check])
    if not alone:
        # AdamW's eps is 0 in float16: neither remedy helps without the other.
        cures["larger-optimizer-eps"] = ("init-head",) if cures else ()
        expected["train.finite"] = found["train.finite"].cause
        assert verified(found["train.finite"]).items() >= cures.items()
    assert causes(found) == expected
    assert "load.head-init" not in expected or verified(found["load.head-init"]) == cures


@needs_classifier
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_head_is_named(precision, tmp_path):
    """What the class or the release makes of the dtype asked for, and in float16 AdamW's eps."""
    found = judged(with_head(tmp_path), precision)
    expected = of_tokenizer()
    if ignores(precision):
        expected["load.dtype"] = "ignored-dtype"
    elif names_half() and precision != "pure-fp16":
        expected["load.dtype"] = "low-precision-section"
    if precision == "pure-fp16":
        expected["train.finite"] = "optimizer-underflow"
        assert "larger-optimizer-eps" in verified(found["train.finite"])
    assert causes(found) == expected
    if "load.dtype" in expected:
        assert "cast-after-loading" in verified(found["load.dtype"])


def cured(folder: str, precision: str, target: Path) -> str:
    """What a user makes of the remedies: a new head with values in the dtype of the rest, saved beside code that is changed as they say."""
    dtype = getattr(torch, {"bf16": "bfloat16", "pure-fp16": "float16"}.get(precision, "float32"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, torch_dtype=dtype, trust_remote_code=True
    )
    torch.nn.init.xavier_uniform_(model.classifier_head.weight)
    torch.nn.init.zeros_(model.classifier_head.bias)
    model.classifier_head.to(dtype)
    model.save_pretrained(target)
    for file in Path(folder).glob("*token*"):
        shutil.copy(file, target)
    for file in Path(folder).glob("*.py"):
        shutil.copy(file, target)
    tokenization = target / "tokenization_chatglm.py"
    kind = re.search(r"^class (\w+)\(PreTrainedTokenizer\)", tokenization.read_text("utf-8"), re.MULTILINE)[1]
    if of_tokenizer():
        tokenization.write_text(tokenization.read_text("utf-8") + MENDED.format(kind=kind), "utf-8")
    return str(target)


def told_line(finding: Finding, folder: str) -> None:
    """Change the code as the finding says."""
    told = re.search(r"write (dtype=\S+) for (dtype=\S+) at (\S+):(\d+)", str(finding.evidence["the class"]))
    path = Path(folder, told[3])
    lines = path.read_text("utf-8").splitlines(keepends=True)
    lines[int(told[4]) - 1] = lines[int(told[4]) - 1].replace(told[2], told[1])
    path.write_text("".join(lines), "utf-8")


@needs_classifier
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_saved_after_the_remedies(precision, tmp_path):
    """No finding and no error, but for the eps of pure float16, which is a setting; and twenty steps on texts take the loss down."""
    for name in ("new", "saved", "data"):
        (tmp_path / name).mkdir()
    folder = with_tokenizer(checkpoint(tmp_path / "new", head=False))
    target = cured(folder, precision, tmp_path / "saved" / "chatglm_saved")
    # The loaded model is cured; where the class makes its head float16 at each load, what is saved needs the line that the finding names.
    (dtypes,) = run_of(target, ("load.dtype",), precision, **CLASSIFY).checks
    if dtypes.finding is not None:
        assert names_half()
        assert precision != "pure-fp16"
        told_line(dtypes.finding, target)
    data = tmp_path / "data" / "texts.jsonl"
    rows = [{"text": text, "label": int("spain" in text)} for text in TEXTS[::5]]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    found = judged(target, precision, steps=20, data=data)
    if precision == "pure-fp16":
        finding = found.pop("train.finite")
        assert finding.cause == "optimizer-underflow"
        assert "larger-optimizer-eps" in verified(finding)
    assert causes(found) == {}
    first, last = losses(target, precision, data)
    computes_in = {"fp32": torch.float32, "pure-fp16": torch.float16}.get(precision, torch.bfloat16)
    assert first - last > 4 * torch.finfo(computes_in).eps * max(first, 1.0)  # as train.descends has it


def losses(folder: str, precision: str, data: Path) -> tuple[float, float]:
    """First and last of twenty steps on the texts; in pure float16 with the eps that the remedy sets."""
    settings = Settings(
        subjects=(folder,), precision=(precision,), attn=("default",), checks=("train.descends",), device="cpu", steps=20,
        seq_len=12, data=data, trust_remote_code=True, task=CLASSIFY["task"], origins={"precision": "command line"},
    )  # fmt: skip
    session = SuiteSession(settings)
    context = session.context(session.plan.questions[0].cell)
    run = context.variant(plan=context.with_plan(eps=SAFE_EPS)) if precision == "pure-fp16" else context
    return run.trajectory.losses[0], run.trajectory.losses[-1]
