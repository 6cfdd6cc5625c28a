"""Files that somebody else made, bent at random: each is refused with one line and exit 4, or answered; never a traceback."""

from __future__ import annotations

import copy
import io
import json
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

CASES = 300
"""For each of the kinds of file; 2,100 in all."""

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
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def documents() -> list[dict[str, Any]]:
    from unit.report_samples import bisection, comparison, regression
    from unit.sample_run import sample_run

    from numerics_suite.core.numbers import jsonable
    from numerics_suite.reporting.matrix import matrix_to_json
    from numerics_suite.reporting.results import to_json

    matrix = regression(with_runs=False).matrices[0].result
    cells = tuple(replace(cell, results=None) for cell in matrix.cells)
    found = [to_json(sample_run()), matrix_to_json(replace(matrix, cells=cells))]
    return [
        json.loads(json.dumps(item)) for item in (*found, jsonable(comparison().content), jsonable(bisection().content))
    ]


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_checkpoints_json(checkpoint: Path, name: str) -> None:
    sound = json.loads((checkpoint / name).read_text())

    @bounded
    @given(content=bent(sound))
    def ask(content: Any) -> None:
        (checkpoint / name).write_text(json.dumps(content))
        refused_or_answered(*LIST)

    ask()


def test_a_safetensors_header(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    sound = json.loads(raw[8 : 8 + length])

    @bounded
    @given(content=bent(sound), claimed=st.sampled_from([None, None, None, 0, 2**63, 10**8]))
    def ask(content: Any, claimed: int | None) -> None:
        header = json.dumps(content).encode()
        file.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + raw[8 + length :])
        refused_or_answered(*LIST)

    ask()


def test_an_adapter(checkpoint: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(checkpoint), "r": 2, "lora_alpha": 2,
               "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "bias": "none"}  # fmt: skip
    Path("adapter").mkdir()

    @bounded
    @given(content=bent(adapter))
    def ask(content: Any) -> None:
        Path("adapter/adapter_config.json").write_text(json.dumps(content))
        refused_or_answered("check", "adapter", "--list")

    ask()


@bounded
@given(
    table=st.dictionaries(
        st.sampled_from(
            ["precision", "attn", "checks", "skip", "steps", "lr", "seed", "subject", "accept", "max-time", "data", "x"]
        ),
        ODD,
    )
)
def test_a_section_of_pyproject(tmp_path: Path, table: dict[str, Any]) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    Path("pyproject.toml").write_text(
        "[tool.numerics-suite]\n" + "\n".join(lines) + "\n", encoding="utf-8", errors="replace"
    )
    refused_or_answered("check", "--list")
