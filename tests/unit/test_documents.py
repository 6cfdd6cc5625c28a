"""Result files read back: what was written comes back as it was, and what is no results file is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.sample_run import sample_run

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.versions import Change, Failure, MatrixCell, MatrixResult, Ran, Versions
from numerics_suite.reports.documents import read_documents
from numerics_suite.reports.matrix import matrix_to_json
from numerics_suite.reports.results import dump, to_json


def matrix_in(folder: Path) -> Path:
    """A matrix of two versions, the first with its results file."""
    results = folder / "cells" / "one.json"
    results.parent.mkdir()
    results.write_text(dump(to_json(sample_run())), encoding="utf-8")
    failure = Failure(
        check="load.head-init", subject="glm4-tiny", task="causal-lm", precision="bf16", attn="sdpa", status="failed"
    )
    change = Change(
        against="5.7.0", subject="glm4-tiny", task="causal-lm", precision="bf16", attn="sdpa", kind="changed"
    )
    ran = Ran(subject="glm4-tiny", task="causal-lm", precision="bf16", passed=1, failed=1, errors=0, skipped=0)
    cells = (
        MatrixCell(
            wanted=Versions(transformers="5.8.1"),
            held=Versions(transformers="5.8.1", torch="2.13.0", python="3.11"),
            status="failed",
            verdict="fail",
            results=Path("cells/one.json"),
            failures=(failure,),
            changes=(change,),
            rows=(ran,),
        ),
        MatrixCell(
            wanted=Versions(transformers="5.9.0"),
            held=Versions(transformers="5.9.0"),
            status="passed",
            results=Path("cells/gone.json"),
        ),
    )
    path = folder / "matrix.json"
    path.write_text(dump(matrix_to_json(MatrixResult(cells=cells, folder=folder))), encoding="utf-8")
    return path


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(dump(to_json(sample_run())), encoding="utf-8")
    documents = read_documents([path])
    assert [run.label for run in documents.runs] == ["out"]
    assert dump(to_json(documents.runs[0].result)) == dump(to_json(sample_run()))


def test_a_matrix_finds_its_cells_beside_it_and_says_which_are_gone(tmp_path: Path) -> None:
    path = matrix_in(tmp_path)
    documents = read_documents([path])
    matrix = documents.matrices[0]
    assert json.loads(path.read_text()) == json.loads(dump(matrix_to_json(matrix.result)))
    assert matrix.runs[0] is not None
    assert matrix.runs[1] is None
    assert [run.label for run in documents.every_run] == ["transformers 5.8.1, torch 2.13.0, python 3.11"]
    assert len(documents.notes) == 1
    assert "gone.json is gone" in documents.notes[0]


def test_a_comparison_keeps_infinity(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    subject = {"subject": "a", "precision": "bf16", "kind": "worse", "error_ratio": "Infinity", "details": {"x": "NaN"}}
    path.write_text(json.dumps({"schema_version": 1, "command": "compare", "subjects": [subject]}), encoding="utf-8")
    (item,) = read_documents([path]).comparisons[0].content["subjects"]
    assert item["error_ratio"] == math.inf
    assert math.isnan(item["details"]["x"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"command": "matrix"}',
        '{"command": "compare"}',
        '{"command": "bisect"}',
        '{"schema_version": 9}',
    ],
)
def test_what_is_no_results_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInputError, match=r"wrong\.json"):
        read_documents([path])


def a_run() -> dict[str, Any]:
    return json.loads(dump(to_json(sample_run())))


def a_search() -> dict[str, Any]:
    tried = {"version": "2", "verdict": "bad", "duration_s": 1}
    return {"command": "bisect", "last_good": "1", "first_bad": "2", "tested": [tried]}


@pytest.mark.parametrize(
    ("content", "change", "words"),
    [
        (a_run, lambda c: c["environment"].update(packages=3), "environment.packages must be an object, not '3'"),
        (a_run, lambda c: c["checks"][0].update(status="ok"), "checks[0].status must be passed | failed"),
        (a_run, lambda c: c["checks"][0].pop("subject"), "checks[0].subject is missing"),
        (a_run, lambda c: c.update(duration_s=True), "duration_s must be a number, not 'True'"),
        (a_search, lambda c: c.pop("first_bad"), "first_bad is missing"),
        (a_search, lambda c: c["tested"][0].pop("duration_s"), "tested[0].duration_s is missing"),
        (a_search, lambda c: c.update(tested=[3]), "tested[0] must be an object, not '3'"),
        (lambda: {"command": "matrix", "cells": [{"with": 3}]}, lambda c: None, "cells[0].with must be an object, not '3'"),
        (lambda: {"command": "matrix", "cells": [{}]}, lambda c: None, "cells[0].status is missing"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_by_its_path(
    tmp_path: Path, content: Callable[[], Any], change: Callable[[Any], object], words: str
) -> None:
    path = tmp_path / "wrong.json"
    written = content()
    change(written)
    path.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(BadInputError) as caught:
        read_documents([path])
    assert str(caught.value).startswith(f"{path}: not a results file of this tool: {words}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot read .*nothing\.json"):
        read_documents([tmp_path / "nothing.json"])
