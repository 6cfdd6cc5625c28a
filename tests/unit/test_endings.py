"""The parts of a run's end, each by itself."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from unit.sample_run import finding, result, sample_run

from numerics_suite.cli.matrix import baseline_of
from numerics_suite.core import interrupts
from numerics_suite.core.answer_file import AnswerFile
from numerics_suite.core.deaths import death_text
from numerics_suite.core.errors import BadInputError
from numerics_suite.reports.results import check_to_json, dump, indented, to_json, unfinished, with_checks
from numerics_suite.settings.tree import Settings
from numerics_suite.suite import run_findings
from numerics_suite.suite.run import worker_count
from numerics_suite.suite.run_findings import RunFindings


def test_how_a_process_ended_is_said_in_words() -> None:
    assert death_text(-signal.SIGKILL, 3_200_000_000) == "killed, probably out of memory: 3.2 GB in use (SIGKILL)"
    assert death_text(-signal.SIGSEGV) == "ended by SIGSEGV"
    assert "exit status 0" in death_text(0)


def test_the_answer_file_is_written_at_once_and_then_within_a_second(tmp_path: Path) -> None:
    file = AnswerFile(str(tmp_path / "out"))
    file.offer(lambda: "first")
    assert (tmp_path / "out").read_text() == "first"
    file.offer(lambda: "second")
    file.offer(lambda: "third")
    assert (tmp_path / "out").read_text() == "first"
    time.sleep(1.5)
    assert (tmp_path / "out").read_text() == "third"
    file.offer(lambda: "fourth")
    file.close()
    assert (tmp_path / "out").read_text() == "fourth"


@pytest.mark.parametrize("earlier", ["of an earlier run", None])
def test_a_run_that_did_not_begin_leaves_the_earlier_file(tmp_path: Path, earlier: str | None) -> None:
    if earlier is not None:
        (tmp_path / "out").write_text(earlier)
    file = AnswerFile(str(tmp_path / "out"))
    file.offer(lambda: "unfinished")
    file.withdraw()
    assert ((tmp_path / "out").read_text() if (tmp_path / "out").exists() else None) == earlier


def test_a_results_file_put_together_from_parts_is_the_whole_one() -> None:
    run = sample_run()
    head = {**to_json(dataclasses.replace(run, checks=())), "counts": to_json(run)["counts"]}
    assert with_checks(head, [indented(check_to_json(check)) for check in run.checks]) == dump(to_json(run))
    assert with_checks(head, []) == dump(head)


def test_an_unfinished_document_is_of_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from numerics_suite.reports.results import load_schema

    document = unfinished("check", checks=[])
    jsonschema.validate(json.loads(dump(document)), load_schema())
    assert (document["complete"], document["verdict"]) == (False, "error")


def test_one_request_to_stop_interrupts_once_and_is_not_forgotten() -> None:
    with interrupts.interruptible():
        assert not interrupts.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` signals a process and then its group
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.stop_if_requested()
    assert not interrupts.requested()


def test_a_request_that_a_destructor_loses_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    class Asked:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = sys.unraisablehook
    with interrupts.interruptible():
        asked = Asked()
        del asked
        assert interrupts.requested()
    assert sys.unraisablehook is before
    assert capsys.readouterr().err == ""


def test_no_more_workers_than_cells() -> None:
    plan: Any = SimpleNamespace(
        device="cpu", questions=[SimpleNamespace(cell="one", skip=None, error=None)] * 3, cells=["one"]
    )
    assert worker_count(Settings(workers=30), plan) == 1
    assert worker_count(Settings(workers=0), plan) == 0


def test_each_cause_has_a_reproducer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_findings, "reproducer", lambda _check, found, *_: found.cause)
    findings = RunFindings(Settings(), tmp_path)
    for attn, cause in (("eager", "overflow"), ("sdpa", "invalid-operation"), ("flex_attention", "underflow")):
        context: Any = SimpleNamespace(cell=result("forward.finite", "bf16", attn).cell)
        path = findings._reproducer("forward.finite", finding(cause, "title"), context, None)
        assert path is not None
        assert Path(path).read_text() == cause
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["invalid-operation", "overflow", "underflow"]


def test_a_matrix_refuses_baselines_of_other_subjects_before_it_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    from numerics_suite.suite import baseline_selection

    class Baselines(list[Any]):
        folder = Path("kept")

    monkeypatch.setattr(
        baseline_selection, "baselines_of", lambda _: Baselines([result("forward.finite", "bf16").cell])
    )
    subject = result("forward.finite", "bf16").cell.subject
    named = Settings(baseline=Path("kept"))
    assert baseline_of(named, [subject, "another"]) == Path("kept")
    with pytest.raises(BadInputError, match=f"it holds {subject}, and nothing of another"):
        baseline_of(named, ["another"])
    assert baseline_of(Settings(), ["another"]) == Path(
        "kept"
    )  # found in its usual place: it need not speak of every subject


@pytest.mark.parametrize("other", [{"precision": ("fp32",)}, {"attn": ("sdpa",)}, {"task": "token-classification"}])
def test_a_matrix_refuses_baselines_of_other_cells_before_it_installs(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    from numerics_suite.suite import baseline_selection

    class Baselines(list[Any]):
        folder = Path("kept")

    cell = result("forward.finite", "bf16", "eager").cell
    monkeypatch.setattr(baseline_selection, "baselines_of", lambda _: Baselines([cell]))
    same = Settings(baseline=Path("kept"), precision=("bf16", "fp32"), attn=("eager",), task=cell.task)
    assert baseline_of(same, [cell.subject]) == Path("kept")
    with pytest.raises(BadInputError, match=f"no cell in common with this run; it holds {cell.subject} "):
        baseline_of(dataclasses.replace(same, **{"precision": ("bf16",), **other}), [cell.subject])


def test_a_matrix_of_which_no_cell_can_load_the_subject_is_bad_input() -> None:
    from numerics_suite.core.versions import MatrixCell, Versions
    from numerics_suite.versions.matrix import _refuse_if_all

    def cell(release: str, *, bad_input: bool) -> MatrixCell:
        versions = Versions(transformers=release)
        reason = f"config.json: transformers {release} can build no model"
        return MatrixCell(
            wanted=versions, held=versions, status="error", verdict="error", reason=reason, bad_input=bad_input
        )

    both: Any = [cell("5.0.0", bad_input=True), cell("5.1.0", bad_input=True)]
    with pytest.raises(BadInputError, match=r"transformers 5\.0\.0 .*; .*transformers 5\.1\.0 "):
        _refuse_if_all(both, ["one"])  # type: ignore[list-item]
    _refuse_if_all([both[0], cell("5.1.0", bad_input=False)], ["one"])  # type: ignore[list-item]


@pytest.mark.parametrize(("others", "status"), [((), 4), (("passed",), 4), (("error",), 3), (("failed",), 1)])
def test_bad_input_that_only_a_load_can_tell(others: tuple[Any, ...], status: int) -> None:
    from numerics_suite.suite.endings import ending

    first = dataclasses.replace(
        result("load.finite", "bf16"), status="error", reason="no model", bad_input=True, finding=None
    )
    rest = [dataclasses.replace(result("load.dtype", "bf16"), status=other, finding=None) for other in others]
    end = ending([first, *rest])
    assert (end.status, end.complete, end.verdict) == (status, True, "fail" if status == 1 else "error")
