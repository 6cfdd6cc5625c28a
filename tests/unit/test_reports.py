"""Printers: the results file and its schema, files whole or not at all, the terminal, and numbers that are not finite."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import jsonschema
import pytest
from rich.color import Color
from unit.sample_run import SUBJECT, failing_checks, finding, result, sample_run

from numerics_suite.core import atomic
from numerics_suite.core.atomic import ensure_writable, write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.findings import finding_from_json, finding_to_json
from numerics_suite.core.records import Cell, Finding, Remedy, Subject
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.findings import block
from numerics_suite.reports.plan import PlanRow, plan_to_json, readable_bytes
from numerics_suite.reports.results import (
    check_from_json,
    check_to_json,
    dump,
    from_json,
    load_schema,
    to_json,
    write_results,
)
from numerics_suite.reports.terminal import COLOURS, Terminal
from numerics_suite.reports.text import finding_text, summary_lines
from numerics_suite.reports.view.cards import cards_of
from numerics_suite.reports.view.places import places_of
from numerics_suite.reports.view.problems import problems_of

SNAPSHOT = Path(__file__).parent / "snapshots" / "summary.txt"


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def printed(run=None, *, quiet=False, stream=None):
    stream = stream if stream is not None else io.StringIO()
    Terminal(stream=stream, quiet=quiet).summary(run or sample_run())
    return stream.getvalue()


# --- results file


def test_a_run_survives_the_results_file():
    run = sample_run()
    again = from_json(json.loads(dump(to_json(run))))
    assert to_json(again) == to_json(run)
    measured = {check.id: check.measurements for check in again.checks}
    training = measured[f"train.finite/{SUBJECT}/pure-fp16/sdpa/cpu"]
    assert math.isnan(training["non-finite"])
    assert training["last-loss"] == -math.inf
    heads = measured[f"load.head-init/{SUBJECT}/fp32/eager/cpu"]
    assert heads["uninitialised"] == math.inf


def test_numbers_that_are_not_finite_are_their_names():
    checks = {check["id"]: check for check in to_json(sample_run())["checks"]}
    training = checks[f"train.finite/{SUBJECT}/pure-fp16/sdpa/cpu"]
    assert training["measurements"] == {"non-finite": "NaN", "last-loss": "-Infinity"}
    assert training["finding"]["evidence"]["measured"] == "NaN"
    assert checks[f"load.head-init/{SUBJECT}/fp32/eager/cpu"]["finding"]["evidence"]["measured"] == "Infinity"


def test_a_check_survives_the_way_from_a_worker():
    for check in failing_checks():
        assert check_to_json(check_from_json(json.loads(json.dumps(check_to_json(check))))) == check_to_json(check)


def test_the_keys_are_the_contracts():
    written = to_json(sample_run())
    contract = {"schema_version", "tool", "command", "started_at", "duration_s", "verdict", "counts", "environment"}
    assert contract | {"settings", "subjects", "checks"} <= set(written)
    assert written["counts"] == {"passed": 3, "failed": 12, "accepted": 1, "skipped": 8, "error": 1, "findings": 13}
    assert [check["check"] for check in written["checks"]] == [check.check for check in sample_run().checks]
    failed = next(check for check in written["checks"] if check["finding"])
    assert set(failed["finding"]) == {
        "cause", "title", "explanation", "module", "op", "source", "step", "parameters", "evidence", "batch",
        "remedies", "reproducer", "consequence_of",
    }  # fmt: skip


def test_the_results_file_fits_its_schema():
    schema = load_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(to_json(sample_run()), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.pop("verdict"),
        lambda run: run["counts"].pop("error"),
        lambda run: run["checks"][0].update(status="green"),
        lambda run: run["checks"][0].update(measurements={}),
        lambda run: run["checks"][0].update(measurements={"x": "nan"}),
        lambda run: run["checks"][0].update(measurements={"x": None}),
        lambda run: run["checks"][1].update(finding=None),
        lambda run: run["checks"][1]["finding"].update(cause="bad luck"),
        lambda run: run["checks"][1]["finding"].update(title="two\nlines"),
        lambda run: run["checks"][-1].update(reason=None),
        lambda run: run.update(started_at="yesterday"),
    ],
)
def test_the_schema_refuses(spoil):
    written = to_json(sample_run())
    spoil(written)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, load_schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("content", [{}, {"schema_version": 2}, {"schema_version": 1, "checks": 3}])
def test_what_is_no_results_file_is_refused_in_one_line(content):
    with pytest.raises(BadInputError) as caught:
        from_json(content)
    assert "\n" not in str(caught.value)


# --- files


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old", encoding="utf-8")
    path.chmod(0o640)
    write_results(path, sample_run())
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 1
    assert path.stat().st_mode & 0o777 == 0o640
    assert names_in(tmp_path) == ["out.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch, error):
    path = tmp_path / "out.json"
    path.write_text("old", encoding="utf-8")

    def fail(_descriptor):
        raise error

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises((BadInputError, KeyboardInterrupt)) as caught:
        write_atomic(path, "new", "--json")
    if isinstance(error, OSError):
        assert str(caught.value) == f"--json: cannot write {path}: No space left on device"
    assert path.read_text(encoding="utf-8") == "old"
    assert names_in(tmp_path) == ["out.json"]


def test_a_full_disk_is_told(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(BadInputError, match=r"^--json: cannot write /dev/full: No space left on device$"):
        write_atomic(Path("/dev/full"), "x", "--json")
    assert Path("/dev/full").is_char_device()


def test_an_unwritable_path_is_known_before_and_nothing_is_written(tmp_path):
    with pytest.raises(BadInputError) as caught:
        ensure_writable(tmp_path / "no" / "out.json", "--json")
    assert str(caught.value) == f"--json: cannot write {tmp_path}/no/out.json: no folder {tmp_path}/no"
    with pytest.raises(BadInputError, match="it is a folder"):
        ensure_writable(tmp_path, "--json")
    ensure_writable(tmp_path / "out.json", "--json")
    assert names_in(tmp_path) == []


# --- terminal


def test_the_summary_reads_as_it_did():
    """To change it on purpose: write `printed()` to the file and read the difference."""
    assert printed() == SNAPSHOT.read_text(encoding="utf-8")


def test_the_summary_fits_80_columns():
    assert max(len(line) for line in printed().splitlines()) <= 80


def test_where_nobody_watches_there_is_no_control_code(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    terminal = Terminal(stream=stream)
    header_and_progress(terminal)
    terminal.summary(sample_run())
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_colour_on_a_terminal_unless_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;38;5;196m" in printed(stream=Screen())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "38;5;" not in printed(stream=Screen())


def luminance(number):
    """Relative luminance of one of the 256 colours (WCAG 2)."""
    parts = [part / 255 for part in Color.from_ansi(number).get_truecolor()]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", COLOURS.values())
def test_every_colour_reads_on_white_and_on_black(colour):
    own = luminance(int(colour.removeprefix("color(").removesuffix(")")))
    assert min(1.05 / (own + 0.05), (own + 0.05) / 0.05) > 3.9, "large text needs 3, small text 4.5 (WCAG 2)"


def test_what_a_model_says_cannot_steer_the_terminal():
    text = printed(stream=Screen())
    assert "[red]not a tag[/red]" in text
    assert "\x1b[31m\n" not in text


def header_and_progress(terminal, checks=None):
    subject = Subject(
        id=SUBJECT, source="./m", kind="directory", task="causal-lm", family="glm4", parameters=160768, new_head=True
    )
    run = sample_run()
    cells = [check.cell for check in run.checks]
    terminal.header(run.environment, [subject], cells, run.settings)
    listed = list(checks if checks is not None else run.checks)
    for done, check in enumerate(listed, start=1):
        terminal.progress(done, len(listed), check)
    terminal.stop()


def test_the_header_names_what_is_run_and_by_what():
    stream = io.StringIO()
    header_and_progress(Terminal(stream=stream), checks=[])
    text = stream.getvalue()
    for part in (
        "torch 2.13.0",
        "transformers 5.24.0",
        "glm4-tiny-classifier = ./m: glm4",
        "with a new head",
        "seed 7",
    ):
        assert part in text


def test_copies_of_a_finding_are_told_once_while_it_runs():
    stream = io.StringIO()
    header_and_progress(Terminal(stream=stream))
    told = [line for line in stream.getvalue().splitlines() if line.startswith(("FAIL", "ERR"))]
    assert [line.split()[1] for line in told] == ["load.head-init", "forward.finite", "train.finite", "forward.padding"]


def test_progress_is_live_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    header_and_progress(Terminal(stream=screen))
    assert "\x1b[?25l" in screen.getvalue(), "the cursor is hidden while the bar moves"
    assert screen.getvalue().count("\x1b[?25h") == 1, "and comes back"


def test_quiet_is_the_titles_and_the_verdict():
    stream = io.StringIO()
    terminal = Terminal(stream=stream, quiet=True)
    header_and_progress(terminal)
    assert stream.getvalue() == ""
    assert printed(quiet=True).splitlines()[4:] == [
        f"forward.finite {SUBJECT}: 6 output elements are NaN or infinite:",
        "  aten.mul.Tensor of finite inputs exceeds the largest number of its dtype",
        "  (overflow).",
        f"train.finite {SUBJECT}: Training is not finite from step 2 on: the",
        "  optimizer's eps (1e-8 by default) is 0 in the dtype of its state, so its step",
        "  divides by 0 (optimizer-underflow).",
        "note: accept entry (check=load.tied) matched no finding of this run: remove it",
        "3 passed, 12 failed, 1 accepted, 8 skipped, 1 error in 41.2 s",
        f"FAIL: 3 findings in {SUBJECT} (exit 1)",
    ]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"verdict": "pass", "exit_status": 0, "checks": (result("load.config", "fp32"),)}, ["1 passed in 41.2 s", "PASS (exit 0)"]),
        ({"verdict": "pass", "exit_status": 5, "checks": ()}, ["no check was planned in 41.2 s", "NOTHING RAN (exit 5)"]),
        (
            {"verdict": "pass", "exit_status": 5, "checks": (result("load.config", "fp32"), result("load.tied", "fp32", status="skipped", reason="time limit"))},
            ["1 passed, 1 skipped in 41.2 s", "INCOMPLETE (exit 5)"],
        ),
        (
            {"verdict": "error", "exit_status": 3, "checks": (result("load.config", "fp32", status="error", reason="x"),)},
            ["1 error in 41.2 s", "ERROR (exit 3)"],
        ),
    ],
)  # fmt: skip
def test_verdicts(changes, lines):
    assert printed(sample_run(notes=(), **changes)).splitlines()[-2:] == lines


def test_a_reader_that_is_gone_does_not_stop_the_run():
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", encoding="utf-8")
    terminal = Terminal(stream=stream)
    header_and_progress(terminal)
    terminal.summary(sample_run())
    stream.close()


def test_a_full_disk_under_the_terminal_is_an_error():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w", encoding="utf-8") as stream:
        terminal = Terminal(stream=stream)
        with pytest.raises(OSError, match="No space left"):
            terminal.summary(sample_run())


def test_a_stream_without_the_letter_shows_its_code():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    note = "modèle 模型"
    Terminal(stream=stream).summary(sample_run(notes=(note,)))
    stream.flush()
    assert b"note: mod\\xe8le \\u6a21\\u578b" in raw.getvalue()


def test_the_text_for_pytest_is_the_blocks():
    text = finding_text(failing_checks()[-1])
    assert text.startswith(
        f"FAIL  train.finite   {SUBJECT} · pure-fp16 · sdpa · cpu\n  Training is not finite from step 2 on: "
    )
    assert "  where     step 2, score.weight\n" in text
    assert "\n".join(summary_lines(sample_run())) in printed()


def test_alike_findings_are_one_block_with_nan_as_the_worst():
    values = (3.0, math.nan, math.inf)
    checks = [
        result(
            "forward.finite", precision, status="failed",
            finding=finding("overflow", f"value {value}", evidence={"measured": value, "allowed": 0}),
        )
        for precision, value in zip(("fp32", "fp16", "bf16"), values, strict=True)
    ]  # fmt: skip
    run = sample_run(checks=tuple(checks))
    (problem,) = problems_of(places_of(Documents(runs=(CheckRun(label="", result=run),))))
    assert len(problem.places) == 3
    assert problem.finding.title == "value nan"
    (card,) = cards_of([problem])
    assert block(card)[0].text == f"FAIL  forward.finite   {SUBJECT} · bf16 (eager), fp16 (eager), fp32"


# --- plan


def rows():
    cell = Cell(subject="m", precision="bf16", attn="sdpa", device="cpu", task="causal-lm")
    other = Cell(subject="m", precision="tf32", attn="sdpa", device="cpu", task="causal-lm")
    return [
        PlanRow(cell=cell, checks=30, bytes=18_000_000_000, seconds=1500.0),
        PlanRow(cell=other, checks=0, bytes=None, note="tf32 needs an NVIDIA GPU"),
    ]


def test_the_plan_as_a_table():
    stream = io.StringIO()
    Terminal(stream=stream).plan(rows(), 1500.0)
    assert stream.getvalue().splitlines() == [
        "subject  precision  attention  device  checks   memory     time",
        "m        bf16       sdpa       cpu         30    18 GB   25 min",
        "m        tf32       sdpa       cpu          0        ?        ?  tf32 needs an NVIDIA GPU",
        "2 cells, 30 checks; the largest cell may need 18 GB; about 25 min on an idle machine; nothing was run",
    ]


def test_the_plan_as_json():
    written = plan_to_json(rows())
    assert (written["schema_version"], written["command"], len(written["planned"])) == (1, "check", 2)
    assert written["planned"][0] == {
        "subject": "m", "task": "causal-lm", "precision": "bf16", "attn": "sdpa", "device": "cpu", "checks": 30,
        "bytes": 18_000_000_000, "seconds": 1500.0, "note": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_400_000, "2.4 MB"), (18_000_000_000, "18 GB"), (None, "?")],
)
def test_bytes_for_people(count, text):
    assert readable_bytes(count) == text


def test_a_combination_and_a_root_survive_the_results_file():
    remedy = Remedy(name="init-head", description="d", verified=True, effect="e", together=("larger-optimizer-eps",))
    found = Finding(
        cause="overflow", title="t", explanation="e", remedies=(remedy,), consequence_of="load.finite/a/fp32/sdpa/cpu"
    )
    written = finding_to_json(found)
    assert written["remedies"][0]["with"] == ["larger-optimizer-eps"]
    assert finding_from_json(json.loads(json.dumps(written))) == found
    older = {**written, "remedies": [{k: v for k, v in written["remedies"][0].items() if k != "with"}]}
    del older["consequence_of"]
    assert finding_from_json(older).remedies[0].together == ()
