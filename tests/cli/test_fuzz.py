"""Files that somebody else made, bent at random: each is refused with one line and exit 4, or answered; never a traceback."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numerics_suite.cli.main import main
from numerics_suite.subjects.fixtures import fixture_path

CASES = int(os.environ.get("NUMERICS_SUITE_CASES", "150"))
"""For each of the kinds of input; 2,430 in all, 30 of them of a kind that builds and checks a model each time."""

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [-1, 0, 1, 2**31, "", "NaN", "\x1b[2J", "::error::x", "../..", "é\u2028\u202e", [], {}, [[]], {"": None}]
    ),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.sampled_from([5, 120, 900])),
)


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a document are."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def _has(holder: Any, key: Any) -> bool:
    if isinstance(holder, list):
        return isinstance(key, int) and key < len(holder)
    return isinstance(holder, dict) and key in holder


@st.composite
def bent(draw: st.DrawFn, content: Any) -> Any:
    """The document with one to three of its values replaced or gone."""
    found = [place for place in places(content) if place]
    content = copy.deepcopy(content)
    for place in draw(st.lists(st.sampled_from(found), min_size=1, max_size=3)):
        holder = content
        for key in place[:-1]:
            holder = holder[key] if _has(holder, key) else None
        if not _has(holder, place[-1]):
            continue  # an earlier change took it away
        if isinstance(holder, dict) and draw(st.booleans()):
            del holder[place[-1]]
        else:
            holder[place[-1]] = draw(ODD)
    return content


@st.composite
def torn(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes with a part cut out or overwritten."""
    begin = draw(st.integers(0, len(raw)))
    return raw[:begin] + draw(st.binary(max_size=12)) + raw[begin + draw(st.integers(0, 40)) :]


def refused_or_answered(*arguments: str) -> int:
    said, told = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(told):
        status = main(arguments)
    assert status in {0, 1, 4, 5}, (status, told.getvalue())
    if status == 4:
        assert len(told.getvalue().splitlines()) == 1, told.getvalue()
        assert told.getvalue().isprintable() or told.getvalue().rstrip("\n").isprintable(), told.getvalue()
    assert "Traceback" not in said.getvalue() + told.getvalue()
    assert "\x1b" not in said.getvalue()
    return status


bounded = settings(
    max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
few = settings(bounded, max_examples=max(1, CASES // 5))
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def documents() -> list[dict[str, Any]]:
    from unit.report_samples import bisection, comparison, regression
    from unit.sample_run import sample_run

    from numerics_suite.core.findings import finding_to_json
    from numerics_suite.core.numbers import jsonable
    from numerics_suite.reports.matrix import matrix_to_json
    from numerics_suite.reports.results import to_json

    matrix = regression(with_runs=False).matrices[0].result
    cells = tuple(replace(cell, results=None) for cell in matrix.cells)
    search = bisection()
    finding = None if search.finding is None else finding_to_json(search.finding)
    found = [to_json(sample_run()), matrix_to_json(replace(matrix, cells=cells))]
    found += [jsonable(comparison().content), jsonable({**search.content, "finding": finding})]
    return [json.loads(json.dumps(item)) for item in found]


DOCUMENTS = documents()


@pytest.mark.parametrize("content", DOCUMENTS, ids=lambda content: content["command"])
def test_a_sound_results_file(content: Any) -> None:
    Path("in.json").write_text(json.dumps(content))
    assert refused_or_answered("report", "in.json", "--out", "out") == 0


@bounded
@given(content=st.sampled_from(DOCUMENTS).flatmap(bent))
def test_a_results_file(tmp_path: Path, content: Any) -> None:
    Path("in.json").write_text(json.dumps(content))
    refused_or_answered("report", "in.json", "--out", "out")


@bounded
@given(raw=st.sampled_from([json.dumps(item).encode() for item in DOCUMENTS]).flatmap(torn))
def test_a_torn_results_file(tmp_path: Path, raw: bytes) -> None:
    Path("in.json").write_bytes(raw)
    refused_or_answered("report", "in.json", "--out", "out")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


LIST = ("check", "checkpoint", "--list")
FEW = ("--precision", "fp32", "--attn", "eager", "--no-diagnose", "-n", "0", "--steps", "1", "--max-examples", "1")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_checkpoints_json(checkpoint: Path, name: str) -> None:
    sound = json.loads((checkpoint / name).read_text())

    @bounded
    @given(content=bent(sound))
    def ask(content: Any) -> None:
        (checkpoint / name).write_text(json.dumps(content))
        refused_or_answered(*LIST)

    ask()


def test_a_config_that_a_model_is_built_from(checkpoint: Path) -> None:
    sound = json.loads((checkpoint / "config.json").read_text())

    @few
    @given(content=bent(sound))
    def ask(content: Any) -> None:
        (checkpoint / "config.json").write_text(json.dumps(content))
        refused_or_answered("check", "checkpoint", "--checks", "load.complete,load.finite", *FEW)

    ask()


def with_header(raw: bytes, content: Any, claimed: int | None) -> bytes:
    """A safetensors file with another header, or with another claim of how long that is."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(content).encode()
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + raw[8 + length :]


def header_of(raw: bytes) -> Any:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


CLAIMED = st.sampled_from([None, None, None, None, 0, 2**63, 10**8])


def test_a_safetensors_header(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    raw = file.read_bytes()

    @bounded
    @given(content=bent(header_of(raw)), claimed=CLAIMED)
    def ask(content: Any, claimed: int | None) -> None:
        file.write_bytes(with_header(raw, content, claimed))
        refused_or_answered(*LIST)

    ask()


@pytest.mark.parametrize("change", ["bent", "torn"])
def test_a_tokenizer_that_is_opened(checkpoint: Path, change: str) -> None:
    sound = (checkpoint / "tokenizer.json").read_bytes()
    small = json.loads(sound)
    small["model"]["merges"] = small["model"].get("merges", [])[:20]  # else every change is to one of a thousand merges
    others = torn(sound) if change == "torn" else bent(small).map(lambda content: json.dumps(content).encode())
    Path("in.jsonl").write_text('{"text": "one two three"}\n')

    @bounded
    @given(raw=others)
    def ask(raw: bytes) -> None:
        (checkpoint / "tokenizer.json").write_bytes(raw)
        refused_or_answered(*LIST, "--data", "in.jsonl")

    ask()


@pytest.fixture
def adapter(checkpoint: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    Path("adapter").mkdir()
    (file,) = checkpoint.glob("*.safetensors")
    shape = load_file(file)["model.layers.0.self_attn.q_proj.weight"].shape
    begin = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{begin}.lora_A.weight": torch.ones(2, shape[1]), f"{begin}.lora_B.weight": torch.zeros(shape[0], 2)}
    save_file(weights, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(checkpoint), "r": 2, "lora_alpha": 2,
              "target_modules": ["q_proj"], "layers_to_transform": [0], "task_type": "CAUSAL_LM", "bias": "none"}  # fmt: skip
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    assert refused_or_answered("check", "adapter", "--list") == 0
    return Path("adapter")


def test_an_adapters_config(adapter: Path) -> None:
    file = adapter / "adapter_config.json"

    @bounded
    @given(content=bent(json.loads(file.read_text())), loads=st.sampled_from([False, False, False, True]))
    def ask(content: Any, loads: bool) -> None:
        file.write_text(json.dumps(content))
        refused_or_answered("check", "adapter", *(("--checks", "load.complete", *FEW) if loads else ("--list",)))

    ask()


def test_an_adapters_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    raw = file.read_bytes()

    @bounded
    @given(content=bent(header_of(raw)), claimed=CLAIMED, loads=st.sampled_from([False, False, False, True]))
    def ask(content: Any, claimed: int | None, loads: bool) -> None:
        file.write_bytes(with_header(raw, content, claimed))
        refused_or_answered("check", "adapter", *(("--checks", "load.complete", *FEW) if loads else ("--list",)))

    ask()


@pytest.mark.parametrize("change", ["bent", "torn", "arrays"])
def test_a_baseline(tmp_path: Path, change: str) -> None:
    from unit.sample_baseline import baseline

    from numerics_suite.baselines.store import save

    for name in ("old", "new"):
        save(Path(name), [baseline(blocks=1, parameters=4, vocabulary=16)], force=False)
    assert refused_or_answered("compare", "old", "new") == 0
    (file,) = Path("old").glob("*.safetensors" if change == "arrays" else "*.json")
    raw = file.read_bytes()
    others = bent(json.loads(raw)).map(lambda content: json.dumps(content).encode()) if change == "bent" else torn(raw)

    @bounded
    @given(other=others)
    def ask(other: bytes) -> None:
        file.write_bytes(other)
        refused_or_answered("compare", "old", "new")

    ask()


@pytest.mark.parametrize("change", ["bundle.json", "batches.safetensors"])
def test_a_bundle(tmp_path: Path, change: str) -> None:
    from unit.test_training_watch_bundle import caught

    from numerics_suite.subjects.files import sha256_of

    caught(Path("caught"), ring=2)
    assert refused_or_answered("check", "--bundle", "caught") == 1
    file, told = Path("caught", change), Path("caught/bundle.json")
    raw, sound = file.read_bytes(), json.loads(told.read_text())
    whole = sound if file == told else header_of(raw)

    @bounded
    @given(content=bent(whole), claimed=CLAIMED)
    def ask(content: Any, claimed: int | None) -> None:
        if file == told:
            told.write_text(json.dumps(content))
        else:
            file.write_bytes(with_header(raw, content, claimed))
            files = {**sound["files"], change: f"sha256:{sha256_of(file)}"}  # of whoever made it, so it holds
            told.write_text(json.dumps({**sound, "files": files}))
        refused_or_answered("check", "--bundle", "caught")

    ask()


ROW = st.dictionaries(
    st.sampled_from(["text", "label", "prompt", "completion", "messages", "x"]),
    st.one_of(
        ODD,
        st.just("one two"),
        st.lists(
            st.fixed_dictionaries({}, optional={"role": st.one_of(st.just("user"), ODD), "content": ODD}), max_size=2
        ),
    ),
    max_size=3,
).map(lambda row: json.dumps(row).encode())
SOUND_ROWS = [
    b'{"text": "one two"}',
    b'{"prompt": "a", "completion": "b"}',
    b'{"messages": [{"role": "user", "content": "a"}]}',
]


@bounded
@given(
    lines=st.lists(st.one_of(ROW, st.sampled_from(SOUND_ROWS), st.sampled_from(SOUND_ROWS).flatmap(torn)), max_size=4),
    between=st.sampled_from([b"\n", b"\r\n", b"\n\n", "\u2028".encode(), b"\x00"]),
    mark=st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
)
def test_a_data_file(tmp_path: Path, lines: list[bytes], between: bytes, mark: bytes) -> None:
    Path("in.jsonl").write_bytes(mark + between.join(lines))
    refused_or_answered("check", "fixture:glm-tiny", "--data", "in.jsonl", "--list")


NAMES = [
    *(
        "precision",
        "attn",
        "checks",
        "skip",
        "steps",
        "lr",
        "seed",
        "subjects",
        "accept",
        "max-time",
        "data",
        "baseline",
    ),
    *("report", "names", "task", "num-labels", "device", "train-scope", "max-grad-norm", "batch-size", "collect", "x"),
]
ENTRY = st.dictionaries(st.sampled_from(["check", "reason", "until", "transformers", "subject", "x"]), ODD)


@bounded
@given(
    table=st.dictionaries(
        st.sampled_from(NAMES), st.one_of(ODD, st.lists(ODD, max_size=2), st.lists(ENTRY, max_size=2))
    )
)
def test_a_section_of_pyproject(tmp_path: Path, table: dict[str, Any]) -> None:
    lines = [f"{key} = {in_toml(value)}" for key, value in table.items() if value is not None]
    Path("pyproject.toml").write_text(
        "[tool.numerics-suite]\n" + "\n".join(lines) + "\n", encoding="utf-8", errors="replace"
    )
    refused_or_answered("check", "fixture:glm-tiny", "--list")


def in_toml(value: Any) -> str:
    """The value as TOML has it, whose tables within a value are not JSON's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {in_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list) and "{" in json.dumps(value):
        return "[" + ", ".join(in_toml(inner) for inner in value) + "]"
    return "''" if value is None else json.dumps(value)
