"""The article's three symptoms, end to end: the first remedy that the doctor names cures text classification in 20 steps."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mutants.driver import MutantSession
from numerics_suite.core.records import Finding, Remedy
from numerics_suite.settings.tree import Settings

TEXTS = Path(__file__).resolve().parents[2] / "fixtures" / "texts.jsonl"
FIXTURES = [
    "chatglm-tiny",
    pytest.param(
        "smollm2-glm",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif("NUMERICS_REAL" not in os.environ, reason="minutes; set NUMERICS_REAL=1"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixteen labelled texts of three classes."""
    path = tmp_path / "texts.jsonl"
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()[:16]]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def found(fixture: str, check: str, texts: Path, *, precision: str, patch: Any = None) -> Finding:
    settings = Settings(
        subjects=(f"fixture:{fixture}",),
        task="sequence-classification",
        num_labels=3,
        precision=(precision,),
        attn=("sdpa",),
        checks=(check,),
        device="cpu",
        data=texts,
        steps=20,
        lr=5e-5,
        max_examples=2,
        origins={"precision": "command line"},
    )
    session = MutantSession(settings, patch)
    session.findings.tries_remedies = True
    (question,) = session.plan.questions
    result, trace = session.answer(question)
    assert result.finding is not None, f"{result.status} {result.reason} {trace}"
    return result.finding


def falls(remedy: Remedy) -> bool:
    """Whether its effect tells of a loss that fell over 20 steps."""
    told = re.search(r"loss ([\d.e+-]+) → ([\d.e+-]+) in 20 steps", remedy.effect)
    return told is not None and float(told[2]) < float(told[1])


def head_of(model: Any) -> Any:
    return next(getattr(model, name) for name in ("score", "classifier_head", "classifier") if hasattr(model, name))


@pytest.mark.parametrize("fixture", FIXTURES)
def test_a_head_that_nobody_initialised(fixture: str, texts: Path) -> None:
    def patch(model: Any) -> None:
        with torch.no_grad():
            head_of(model).weight.fill_(float("nan"))

    finding = found(fixture, "train.finite", texts, precision="fp32", patch=patch)
    assert finding.cause == "uninitialised-parameters"
    first = finding.remedies[0]
    assert (first.name, first.verified) == ("init-head", True)
    assert falls(first)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_pure_float16_once_the_head_is_initialised(fixture: str, texts: Path) -> None:
    finding = found(fixture, "train.finite", texts, precision="pure-fp16")
    first = finding.remedies[0]
    assert first.verified is True
    assert falls(first)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_ids_in_bfloat16(fixture: str, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes floating ids silently: those above 256 are other tokens."""
    own = torch.nn.functional.embedding
    monkeypatch.setattr(torch.nn.functional, "embedding", lambda ids, *rest, **more: own(ids.long(), *rest, **more))
    finding = found(fixture, "inputs.ids-dtype", texts, precision="bf16")
    assert finding.cause == "wrong-input-dtype"
    first = finding.remedies[0]
    assert (first.name, first.verified) == ("default-input-dtypes", True)
    cured = found_curve(fixture, texts)
    assert cured[-1] < cured[0]


def found_curve(fixture: str, texts: Path) -> tuple[float, ...]:
    """Twenty steps with ids in int64."""
    from numerics_suite.suite.rehearsal import rehearse
    from numerics_suite.suite.session import SuiteSession

    settings = Settings(
        subjects=(f"fixture:{fixture}",),
        task="sequence-classification",
        num_labels=3,
        precision=("amp-bf16",),
        attn=("sdpa",),
        device="cpu",
        data=texts,
        steps=20,
        lr=5e-5,
        origins={"precision": "command line"},
    )
    (rehearsed,) = rehearse(SuiteSession(settings))
    return rehearsed.runs[0].losses
