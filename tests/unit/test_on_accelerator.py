"""tools/on_accelerator.py: parts alone and together, figures merged in a file, the page, and what is refused."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerator.checking import DEVICE, STANDIN, environment

from numerics_suite.core.errors import CheckError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--device", "cpu", "--small")
NAMES = ("clean", "ratios", "tf32", "mutants", "baseline", "watch", "9b")


@pytest.fixture(scope="module")
def tool():
    """The script and its two modules, imported as `python tools/on_accelerator.py` imports them."""
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield SimpleNamespace(
            script=importlib.import_module("on_accelerator"),
            parts=importlib.import_module("accelerator_parts"),
            page=importlib.import_module("accelerator_page"),
        )
    finally:
        sys.path[:] = path


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n<!-- figures: begin -->\nold\n<!-- figures: end -->\n\nThe end.\n", encoding="utf-8")
    return path


def part(tool, name="ratios", **changes):
    values = {
        "verdict": "met",
        "reason": "nearest to its limit: a|b",
        "columns": ("precision", "most"),
        "rows": (("bf16", 1.23456), ("fp16", float("inf")), ("fp32", None)),
        "seconds": 12.5,
        "device": "cuda (NVIDIA H100)",
        "versions": "torch 2.13.0, transformers 5.24.0",
        "published": True,
    }
    return tool.parts.Part(name=name, **{**values, **changes})


def outcomes(tool, monkeypatch, **verdicts):
    """Every part gives an outcome at once, or raises what is named in place of a verdict."""

    def measure(verdict):
        def run(setup):
            if isinstance(verdict, Exception):
                raise verdict
            return tool.parts.Outcome(verdict=verdict, reason="because")

        return run

    described = {
        name: tool.parts.Description(aim=f"Aim of {name}.", measure=measure(verdicts.get(name, "met")))
        for name in NAMES
    }
    monkeypatch.setattr(tool.parts, "PARTS", described)
    monkeypatch.setattr(tool.parts, "release", lambda device: None)  # nothing was loaded, and collecting takes a while


# --- parts that are measured -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_run_alone_and_are_merged_into_one_file(tool, tmp_path, page, capsys):
    file = tmp_path / "figures.json"
    assert tool.script.main(["--part", "tf32", "--part", "mutants", *SMALL, "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 2
    assert "tf32: not applicable" in said.err
    assert "3 of 3 are caught" in said.out
    before = tool.page.read_parts(file)
    assert tool.script.main(["--part", "watch", *SMALL, "--json", str(file), "--write", str(page)]) == 0
    after = tool.page.read_parts(file)
    assert list(after) == ["tf32", "mutants", "watch"]
    assert {name: after[name] for name in before} == before
    assert "amortised" in {row[0] for row in after["watch"].rows}
    assert len({row[0] for row in after["mutants"].rows}) == 3
    assert page.read_text(encoding="utf-8").count(tool.page.NOT_RUN) == len(NAMES)


@pytest.mark.slow
def test_the_constants_stand_beside_their_limits(tool, tmp_path):
    file = tmp_path / "figures.json"
    assert tool.script.main(["--part", "ratios", *SMALL, "--json", str(file)]) == 0
    rows = tool.page.read_parts(file)["ratios"].rows
    found = {row[:2]: row[3:] for row in rows}
    *_, most, limit = found["reference.end-to-end: excess", "bf16"]
    assert 0.5 < most <= limit == 1.5
    assert found["reference.end-to-end: kernel-ratio", "fp32"][-1] is None
    assert {"reference.local: norm", "reference.local: composed", "reference.gradient: median-excess"} <= {
        measurement for measurement, _ in found
    }


@pytest.mark.slow
def test_the_part_of_nine_billion_gives_seconds_by_group_and_what_is_skipped(tool, tmp_path):
    file = tmp_path / "figures.json"
    assert tool.script.main(["--part", "9b", *SMALL, "--json", str(file)]) == 0
    found = tool.page.read_parts(file)["9b"]
    rows = dict(found.rows)
    assert found.verdict == "not applicable"
    assert rows["parameters"] > 4_000_000
    assert {"loading, seconds", "forward, seconds", "reference, seconds", "train, seconds"} <= set(rows)
    assert rows["peak device memory, GB"] is None  # the CPU has no such count
    assert any(str(value).startswith("forward.pooling: ") for name, value in found.rows if name == "skipped")


# --- several parts -----------------------------------------------------------------------------------------------------


def test_a_part_that_fails_hides_no_other(tool, tmp_path, monkeypatch, capsys):
    outcomes(tool, monkeypatch, ratios=RuntimeError("CUDA error: device-side assert\nmore"), watch="not applicable")
    file = tmp_path / "figures.json"
    assert tool.script.main([*SMALL, "--json", str(file)]) == 1
    found = tool.page.read_parts(file)
    assert list(found) == list(NAMES)
    assert found["ratios"].verdict == "not met"
    assert found["ratios"].reason == "RuntimeError: CUDA error: device-side assert"
    assert {one.verdict for name, one in found.items() if name not in {"ratios", "watch"}} == {"met"}
    assert "RuntimeError" in capsys.readouterr().out


def test_only_parts_that_ran_decide_the_exit_status(tool, tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    outcomes(tool, monkeypatch, clean="not met", watch="not applicable")
    assert tool.script.main(["--part", "clean", *SMALL, "--json", str(file)]) == 1
    assert tool.script.main(["--part", "watch", "--part", "tf32", *SMALL, "--json", str(file)]) == 0
    assert [one.verdict for one in tool.page.read_parts(file).values()] == ["not met", "met", "not applicable"]


def test_what_is_done_is_kept_when_the_run_is_stopped(tool, tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    outcomes(tool, monkeypatch)

    def stopped(setup):
        raise KeyboardInterrupt

    described = tool.parts.PARTS
    monkeypatch.setitem(described, "tf32", replace(described["tf32"], measure=stopped))
    assert tool.script.main([*SMALL, "--json", str(file)]) == 2
    assert list(tool.page.read_parts(file)) == ["clean", "ratios"]


# --- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_check_that_is_skipped_on_the_device_only_is_seen(tool):
    keys = [("load.finite", "glm-tiny", "bf16", attn) for attn in ("eager", "sdpa", "default")]
    here = dict(zip(keys, ("passed", "skipped"), strict=False))
    there = dict(zip(keys, ("passed", "passed", "skipped"), strict=True))
    assert tool.parts.skipped_here(here, there) == [keys[1]]
    assert tool.parts.skipped_here({}, {keys[0]: "failed"}) == [keys[0]]


def test_nothing_is_begun_when_the_time_is_over(tool, tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    outcomes(tool, monkeypatch)
    assert tool.script.main([*SMALL, "--minutes", "0", "--json", str(file)]) == 1
    assert {(one.verdict, one.reason) for one in tool.page.read_parts(file).values()} == {("not met", tool.parts.LATE)}
    setup = tool.parts.Setup(device="cpu", sizes=tool.parts.SMALL, folder=tmp_path, deadline=time.monotonic() + 90)
    assert not setup.is_over
    assert setup.max_time == ("--max-time", "90")


def test_cells_that_were_left_out_are_a_problem(tool):
    assert tool.parts.problems({"exit_status": 5, "checks": []}) == [tool.parts.LATE]
    assert not tool.parts.problems({"exit_status": 0, "checks": []})


def test_flash_attention_runs_in_16_bits_where_it_can(tool, tmp_path, monkeypatch):
    setup = tool.parts.Setup(device="cpu", sizes=tool.parts.SMALL, folder=tmp_path)
    assert [grid[3] for grid in tool.parts.grids(setup, ("fp32", "bf16"))] == ["sdpa"]
    monkeypatch.setattr(tool.parts, "has_flash", lambda device: True)
    grids = tool.parts.grids(setup, ("fp32", "bf16", "amp-fp16", "fp64"))
    assert [grid[1::2] for grid in grids] == [
        ("fp32,bf16,amp-fp16,fp64", "sdpa"),
        ("bf16,amp-fp16", "flash_attention_2"),
    ]


def test_tf32_is_asked_for_and_switched_on(tool, tmp_path, monkeypatch):
    """What an NVIDIA GPU would answer; the switch is as it was afterwards."""
    asked = []

    def checked(setup, subjects, *arguments, **_):
        precision = arguments[arguments.index("--precision") + 1]
        asked.append((precision, torch.get_float32_matmul_precision()))
        return {"checks": [answer("failed", 4000.0) if precision == "tf32" else answer("passed", 2.7)]}

    monkeypatch.setattr(tool.parts, "lacks", lambda recipe, device: None)
    monkeypatch.setattr(tool.parts, "checked", checked)
    before = torch.get_float32_matmul_precision()
    found = tool.parts.tf32(tool.parts.Setup(device="cpu", sizes=tool.parts.SMALL, folder=tmp_path))
    assert found.verdict == "met"
    assert asked == [("fp32", before), ("tf32", before), ("fp32", "medium")]
    assert torch.get_float32_matmul_precision() == before
    assert [row[2] for row in found.rows] == [2.7, 4000.0, 2.7]


def answer(status, ratio, cause="kernel-accuracy"):
    finding = {"cause": cause} if status == "failed" else None
    return {"status": status, "finding": finding, "measurements": {"kernel-ratio": ratio}}


def test_tf32_must_fail_and_float32_must_not(tool):
    clean, caught = answer("passed", 2.7), answer("failed", 4000.0)
    assert not list(tool.parts.tf32_problems("sdpa", clean, caught, clean))
    for own, rounded, switched in (
        (clean, answer("passed", 4000.0), clean),
        (clean, answer("failed", 4000.0, "semantic-error"), clean),
        (clean, answer("failed", 20.0), clean),
        (clean, caught, answer("failed", 4000.0)),
        (answer("failed", 2.7), caught, clean),
    ):
        assert len(list(tool.parts.tf32_problems("sdpa", own, rounded, switched))) == 1


def test_a_mutant_that_is_missed_is_a_problem_and_one_without_a_place_is_replaced(tool, tmp_path, monkeypatch):
    found = iter([("load.finite", "said"), (None, None), (None, "forward.cache: passed"), ("load.dtype", "said")])
    monkeypatch.setattr(tool.parts, "caught_by", lambda mutant, device: next(found))
    outcome = tool.parts.mutants(tool.parts.Setup(device="cpu", sizes=tool.parts.SMALL, folder=tmp_path))
    first, _, missed, last = tool.parts.mutants_of("cpu")[:4]
    assert [row[::2] for row in outcome.rows] == [
        (first.id, "load.finite"),
        (missed.id, None),
        (last.id, "load.dtype"),
    ]
    assert (outcome.verdict, outcome.reason) == ("not met", f"{missed.id}: forward.cache: passed")


def test_a_command_without_an_answer_says_why(tool, tmp_path):
    setup = tool.parts.Setup(device="cpu", sizes=tool.parts.SMALL, folder=tmp_path)
    with pytest.raises(
        CheckError, match="numerics-suite check ended with 4: numerics-suite: error: --attn flash_attention_2"
    ):
        tool.parts.checked(setup, ("glm4-tiny",), "--attn", "flash_attention_2")


def semantics(status, value):
    return {
        "baseline.semantics": {
            "id": "baseline.semantics/x",
            "check": "baseline.semantics",
            "status": status,
            "reason": None,
            "measurements": {"true-answers": value},
        }
    }


def test_a_cell_that_is_changed_or_unanswered_is_a_problem(tool):
    training = {"id": "t", "check": "baseline.training", "status": "failed", "reason": None}
    worse = {**training, "measurements": {"curve-growth": 9.0}}
    changed = {**training, "measurements": {"curve-growth": 9.0, "true-curve": float("nan")}}
    assert not list(tool.parts.baseline_problems("c", semantics("passed", 1e-14)))
    assert not list(tool.parts.baseline_problems("c", {**semantics("passed", 0.0), "baseline.training": worse}))
    assert tool.parts.kinds_of([worse]) == ["worse"]
    assert tool.parts.kinds_of([changed]) == ["changed", "worse"]
    assert list(tool.parts.baseline_problems("c", {**semantics("passed", 0.0), "baseline.training": changed}))
    assert list(tool.parts.baseline_problems("c", semantics("skipped", 0.0)))
    assert list(tool.parts.baseline_problems("c", {}))


def test_the_mutants_are_the_same_each_time_and_from_every_area(tool):
    from mutants import catalogue

    chosen = tool.parts.mutants_of("cpu")[:30]
    assert chosen == tool.parts.mutants_of("cpu")[:30]
    assert len({mutant.id for mutant in chosen}) == 30
    areas = [area for area in vars(catalogue).values() if hasattr(area, "MUTANTS")]
    assert len(areas) == 11
    assert all(any(mutant in area.MUTANTS for mutant in chosen) for area in areas)
    assert {mutant.family for mutant in chosen} == {"glm", "glm4", "chatglm"}
    assert {mutant.precision for mutant in chosen} >= {"fp32", "bf16", "fp16", "amp-bf16"}
    assert not [mutant for mutant in chosen if mutant.equivalent or not mutant.expected_checks]


# --- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_figures_of_a_gpu_and_no_others(tool, page):
    parts = {"ratios": part(tool), "clean": part(tool, "clean", published=False, reason="of the stand-in")}
    tool.page.write_page(page, parts)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- figures: begin -->\n| part |")
    assert text.endswith("<!-- figures: end -->\n\nThe end.\n")
    assert "old" not in text
    assert "stand-in" not in text
    assert text.count("not run yet") == len(NAMES) - 1
    assert "| bf16 | 1.23 |\n| fp16 | inf |\n| fp32 | – |" in text
    assert "cuda (NVIDIA H100); torch 2.13.0, transformers 5.24.0. Nearest to its limit: a\\|b." in text
    tool.page.write_page(page, parts)
    assert page.read_text(encoding="utf-8") == text


def test_a_page_is_written_from_a_file_alone(tool, tmp_path, page):
    file = tmp_path / "figures.json"
    tool.page.write_parts(file, {"watch": part(tool, "watch"), "ratios": part(tool)})
    assert list(tool.page.read_parts(file)) == ["ratios", "watch"]
    assert tool.page.read_parts(file)["ratios"] == part(tool)
    assert tool.script.main(["--from-json", str(file), "--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("### ") == 2


def test_the_committed_page_has_a_line_for_each_part(tool):
    text = tool.page.read_page(ROOT / "docs" / "accelerator.md")
    for name, described in tool.parts.PARTS.items():
        assert f"| {name} | {described.aim} |" in text
        assert f"- **{name}**: " in text
    assert tuple(tool.parts.PARTS) == tool.script.PARTS == NAMES


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unusable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bare.md").write_text("# Nothing\n", encoding="utf-8")
    Path("torn.json").write_text("{", encoding="utf-8")
    Path("other.json").write_text("[1]", encoding="utf-8")
    Path("strange.json").write_text(json.dumps({"schema_version": 1, "parts": {"clean": {}}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--part", "mutant"], "unknown part 'mutant'; did you mean 'mutants'? known: clean, ratios, "),
        (["--smal"], "unrecognized arguments: --smal"),
        (["--device", "cpu", "--write", "nowhere.md"], "--write nowhere.md: No such file or directory"),
        (["--device", "cpu", "--write", "bare.md"], "add the two lines"),
        (["--device", "cpu", "--json", "torn.json"], "torn.json: not valid JSON"),
        (["--device", "cpu", "--json", "other.json"], "not a file of tools/on_accelerator.py"),
        (["--device", "cpu", "--json", "strange.json"], "part 'clean' is not of this release"),
        (["--device", "cpuu"], "unknown device 'cpuu'; did you mean 'cpu'?"),
        (["--from-json", "none.json", "--write", "bare.md"], "none.json: No such file or directory"),
        (["--from-json", "other.json"], "it takes --write PAGE and no other option"),
    ],
)
@pytest.mark.usefixtures("unusable_files")
def test_bad_input_is_one_line_and_exit_4(tool, capsys, arguments, complaint):
    assert tool.script.main(arguments) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert complaint in said.err


def test_without_an_accelerator_nothing_is_measured(tool, monkeypatch, capsys):
    monkeypatch.setattr("numerics_suite.devices.device.accelerator", lambda: None)
    assert tool.script.main(["--small"]) == 4
    assert capsys.readouterr().err.startswith("error: no accelerator is visible to torch")


# --- on a device -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not STANDIN.is_dir(), reason="needs the stand-in accelerator of tests/standin")
def test_every_part_runs_on_the_stand_in(tool, tmp_path, page):
    file = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(ROOT / "tools" / "on_accelerator.py"),
        "--device",
        DEVICE,
        "--small",
        "--minutes",
        "60",
    ]
    done = subprocess.run(
        [*command, "--json", str(file), "--write", str(page)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = tool.page.read_parts(file)
    assert {name: one.verdict for name, one in found.items()} == {
        **dict.fromkeys(NAMES, "met"),
        "tf32": "not applicable",
        "watch": "not applicable",
    }
    assert all(one.device.startswith(DEVICE) and not one.published for one in found.values())
    assert page.read_text(encoding="utf-8").count("not run yet") == len(NAMES)
