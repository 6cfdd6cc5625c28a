"""`check --baseline`: which cells are held to what, what is skipped, what fails the run, and what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from unit.sample_baseline import baseline

from numerics_suite.baselines.records import CellBaseline
from numerics_suite.baselines.store import load, save
from numerics_suite.checks.baseline import _difference
from numerics_suite.cli.main import main
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import RunResult
from numerics_suite.reports.terminal import Terminal
from numerics_suite.settings.options import from_command_line
from numerics_suite.settings.tree import PYPROJECT
from numerics_suite.suite.planning import applicable_checks, make_plan
from numerics_suite.suite.recording import record_cells, recording_session
from numerics_suite.suite.run import run_check
from numerics_suite.suite.session import SuiteSession

FEW = {"precision": "fp32", "attn": "eager", "workers": "0"}
CHECKS = ["baseline.semantics", "baseline.precision", "baseline.training", "baseline.contract"]


@pytest.fixture(scope="module")
def recorded() -> CellBaseline:
    """One cell of a shipped checkpoint."""
    settings = from_command_line({"subjects": ["fixture:glm-tiny"], **FEW}, Path("/"))
    (found,) = record_cells(recording_session(settings), lambda _: None)
    return found


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(**given):
    return from_command_line({"subjects": ["fixture:glm-tiny"], **FEW, "baseline": "b", **given})


def ran(**given) -> RunResult:
    return run_check(
        SuiteSession(settings(**{"checks": "baseline.*", **given})), Terminal(stream=io.StringIO(), quiet=True)
    )


@pytest.fixture(scope="module")
def measurements() -> dict[tuple[object, ...], CellBaseline]:
    """By cell, plan and seed."""
    return {}


@pytest.fixture
def _measured_once(measurements, monkeypatch):
    """For tests that change what the baseline says and never the cell or its batches, so that one measurement serves all."""
    measure = _difference.measure_cell

    def once(context, *asked):
        key = context.cell, context.request.plan, context.request.seed
        if key not in measurements:
            measurements[key] = measure(context, *asked)
        return measurements[key]

    monkeypatch.setattr(_difference, "measure_cell", once)


def statuses(run: RunResult) -> dict[str, str]:
    return {result.check: result.status for result in run.checks}


def refused(**given) -> str:
    with pytest.raises(BadInputError) as caught:
        make_plan(settings(**given))
    return str(caught.value)


# --- the plan ----------------------------------------------------------------------------------------------------------


def planned(**given) -> set[str]:
    return {question.check for question in make_plan(settings(**given)).questions if question.group == "baseline"}


def test_without_a_folder_nothing_is_asked_of_baselines():
    assert not planned(baseline=None)


def test_with_a_folder_every_check_is_asked(recorded):
    save(Path("b"), [recorded], force=False)
    assert planned() == set(CHECKS)
    assert planned(skip="baseline.training") == set(CHECKS) - {"baseline.training"}
    assert not planned(checks="load.*")


@pytest.mark.parametrize("below", [".", "src/deep"])
def test_the_usual_folder_is_found_below_the_project_too(recorded, monkeypatch, tmp_path, below):
    Path("pyproject.toml").write_text("[project]\n")
    save(Path(".numerics/baselines"), [recorded], force=False)
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / below)
    assert planned(baseline=None) == set(CHECKS)


def test_asked_by_name_without_a_folder_they_are_skipped_with_the_reason():
    questions = make_plan(settings(baseline=None, checks="baseline.*")).questions
    assert {question.skip for question in questions} == {
        "no folder of baselines: --baseline DIR names one, and numerics-suite record writes .numerics/baselines"
    }


def test_a_cell_that_the_folder_lacks_is_skipped_with_the_command_that_adds_it(recorded):
    save(Path("b"), [recorded], force=False)
    plan = make_plan(settings(attn="eager,sdpa"))
    skips = {
        question.skip for question in plan.questions if question.group == "baseline" and question.cell.attn == "sdpa"
    }
    assert skips == {"b has no baseline of this cell; numerics-suite record fixture:glm-tiny --baseline b"}


def test_a_folder_that_was_named_has_to_do_with_the_run(recorded):
    save(Path("b"), [baseline()], force=False)
    assert refused() == (
        "--baseline b: no cell in common with this run; it holds glm4-tiny (causal-lm) in bf16/eager/cpu"
    )
    save(Path(".numerics/baselines"), [baseline()], force=False)
    skips = {question.skip for question in make_plan(settings(baseline=None)).questions if question.group == "baseline"}
    assert len(skips) == 1
    assert "has no baseline of this cell" in skips.pop()


def test_an_unreadable_folder_is_refused_and_never_skipped(recorded):
    assert refused().startswith("no folder of baselines at b")
    save(Path("b"), [recorded], force=False)
    (file,) = Path("b").glob("*.json")
    file.write_bytes(file.read_bytes()[:-30])
    assert refused().startswith(f"{file}: not valid JSON")


def test_the_command_line_says_so_in_one_line_and_exit_4(capsys):
    assert main(["check", "fixture:glm-tiny", "--baseline", "no", "--precision", "fp32"]) == 4
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("numerics-suite: error: no folder of baselines at no")


def test_what_applies_does_not_depend_on_baselines(recorded):
    subject = make_plan(settings(baseline=None)).subjects["glm-tiny"]
    assert recorded.checks == applicable_checks(subject, "fp32")
    assert not [check for check in recorded.checks if check.startswith("baseline.")]


# --- the run -----------------------------------------------------------------------------------------------------------


def test_record_then_check_passes(recorded):
    save(Path("b"), [recorded], force=False)
    run = ran()
    assert (run.verdict, run.exit_status, run.notes) == ("pass", 0, ())
    assert statuses(run) == dict.fromkeys(CHECKS, "passed") | {}


def test_the_recorded_batches_and_recipe_are_used_whatever_the_command_says(recorded):
    save(Path("b"), [recorded], force=False)
    run = ran(seed="7", steps="2", lr="0.5", batch_size="2", seq_len="16")
    assert set(statuses(run).values()) == {"passed"}


@pytest.mark.usefixtures("_measured_once")
@pytest.mark.parametrize(
    ("change", "failing", "words"),
    [
        (
            lambda r: replace(r, true_loss=r.true_loss * (1 + 1e-9)),
            "baseline.semantics",
            "the loss of the true fp64 run differs",
        ),
        (
            lambda r: replace(r, error=r.error / 9, bits={**r.bits, "cell": "other"}),
            "baseline.precision",
            "times as large as the baseline's and chance explain",
        ),
        (
            lambda r: replace(
                r, curve=replace(r.curve, true_losses=tuple(loss * 1.001 for loss in r.curve.true_losses))
            ),
            "baseline.training",
            "the training curve in true fp64 differs",
        ),
        (
            lambda r: replace(r, contract={**r.contract, "cache": "Cache"}),
            "baseline.contract",
            "1 entries that callers rely on",
        ),
        (
            lambda r: replace(r, checks=(*r.checks, "train.amplify")),
            "baseline.contract",
            "1 parts of the baseline are missing now",
        ),
    ],
)
def test_a_baseline_that_says_otherwise_fails_the_check_that_asks_about_it(recorded, change, failing, words):
    save(Path("b"), [change(recorded)], force=False)
    run = ran(diagnose="false")
    assert (run.verdict, run.exit_status) == ("fail", 1)
    assert {check for check, status in statuses(run).items() if status == "failed"} == {failing}
    (finding,) = [result.finding for result in run.checks if result.finding is not None]
    assert words in finding.title


@pytest.mark.usefixtures("_measured_once")
def test_a_vanished_check_is_named(recorded):
    save(Path("b"), [replace(recorded, checks=(*recorded.checks, "train.amplify"))], force=False)
    (finding,) = [result.finding for result in ran().checks if result.finding is not None]
    assert finding.evidence["missing"] == "check train.amplify"
    assert finding.cause == "contract-change"


@pytest.mark.usefixtures("_measured_once")
def test_another_recipe_is_an_error_of_the_check_and_not_a_finding(recorded):
    save(Path("b"), [replace(recorded, recipe={**recorded.recipe, "scope": "head"})], force=False)
    run = ran(checks="baseline.semantics")
    assert (run.verdict, run.exit_status) == ("error", 3)
    assert "recorded with scope head and full" in (run.checks[0].reason or "")


# --- subjects that the run leaves out ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_measured_once")
def test_a_subject_left_out_by_name_is_only_told(recorded):
    save(Path("b"), [recorded, baseline()], force=False)
    run = ran()
    assert (run.verdict, run.exit_status) == ("pass", 0)
    assert run.notes == ("glm4-tiny (causal-lm) is in b and not in this run",)


@pytest.mark.usefixtures("_measured_once")
def test_a_subject_that_the_project_no_longer_has_fails_the_run(recorded):
    save(Path("b"), [recorded, baseline()], force=False)
    chosen = settings(checks="baseline.*")
    from_file = replace(chosen, origins={**chosen.origins, "subjects": PYPROJECT})
    run = run_check(SuiteSession(from_file), Terminal(stream=io.StringIO(), quiet=True))
    assert (run.verdict, run.exit_status) == ("fail", 1)
    assert run.notes == ("missing: glm4-tiny (causal-lm) is in b and not in this run",)
    other = replace(from_file, checks=("load.complete",))
    assert run_check(SuiteSession(other), Terminal(stream=io.StringIO(), quiet=True)).exit_status == 0


# --- the whole way -----------------------------------------------------------------------------------------------------


def test_from_record_to_check_on_the_command_line(capsys):
    subject = ["fixture:glm-tiny-classifier", "--precision", "bf16", "--attn", "sdpa", "-n", "0"]
    assert main(["record", *subject, "--baseline", "kept", "--quiet"]) == 0
    assert len(load(Path("kept"))) == 1
    capsys.readouterr()
    assert (
        main(["check", *subject, "--baseline", "kept", "--checks", "baseline.*", "--json", "out.json", "--quiet"]) == 0
    )
    written = json.loads(Path("out.json").read_text())
    assert {check["status"] for check in written["checks"]} == {"passed"}
    assert written["settings"]["baseline"] == "kept"
