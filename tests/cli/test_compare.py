"""`compare` from outside: exit status, what is printed in 80 columns, the JSON of the contract, one line for bad input."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from unit.sample_baseline import baseline, moved_sketch, renamed, with_bits, with_module

import numerics_suite
from numerics_suite.baselines.store import save
from numerics_suite.cli.main import main

OLD = baseline()
NORM = "model.layers.1.input_layernorm"
SNAPSHOT = Path(__file__).parents[1] / "unit" / "snapshots" / "compare.txt"
KINDS = {"identical", "rounding", "better", "worse", "changed", "contract", "missing", "new"}


def changed(made):
    start = [module.name for module in made.modules].index(NORM)
    modules = tuple(
        module if index < start else replace(module, gave=moved_sketch(module.gave, 1e-3))
        for index, module in enumerate(made.modules)
    )
    answer = made.answers[0]
    return with_bits(
        replace(made, modules=modules, answers=(replace(answer, values=answer.values * 1.001),)), logits="x"
    )


NEW = {
    "identical": OLD,
    "rounding": with_bits(OLD, logits="other"),
    "better": with_bits(replace(OLD, error=0.005), logits="other"),
    "worse": with_bits(with_module(OLD, NORM, local_error=0.9), logits="other"),
    "changed": changed(OLD),
    "contract": replace(OLD, contract={**OLD.contract, "default_dtype": "float32"}),
    "missing": replace(OLD, checks=("forward.finite",)),
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Saves two folders, `old` and `new`, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(old, new):
        save(Path("old"), old, force=False)
        save(Path("new"), new, force=False)

    return write


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["compare", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("kind", sorted(NEW))
def test_each_kind_has_its_exit_status_and_its_block(capsys, folders, kind):
    folders([OLD], [NEW[kind]])
    status, out, err = ended(capsys, "old", "new", "--json", "out.json")
    failing = kind in {"worse", "changed", "contract", "missing"}
    assert (status, err) == (int(failing), "")
    assert f"{kind}: glm4-tiny (causal-lm) bf16/eager/cpu" in out
    assert out.splitlines()[-1] == f"{'CHANGED' if failing else 'PASS'}: 1 {kind} (exit {int(failing)})"
    assert max(len(line) for line in out.splitlines()) <= 80
    written = json.loads(Path("out.json").read_text())
    assert written["command"] == "compare"
    (entry,) = written["subjects"]
    assert {name: entry[name] for name in ("subject", "task", "precision", "attn", "device", "kind")} == {
        "subject": "glm4-tiny", "task": "causal-lm", "precision": "bf16", "attn": "eager", "device": "cpu", "kind": kind,
    }  # fmt: skip
    assert entry["module"] == (NORM if kind in {"worse", "changed"} else None)
    assert entry["details"]["all_kinds"][0] == kind
    assert entry["error_ratio"] == (0.5 if kind == "better" else 1.0)
    assert set(written["counts"]) == KINDS


def test_a_block_says_what_where_how_much_and_what_that_means(capsys, folders):
    folders([OLD], [NEW["worse"]])
    _, out, _ = ended(capsys, "old", "new")
    text = " ".join(out.split())
    assert text.startswith(f"--- old +++ new worse: glm4-tiny (causal-lm) bf16/eager/cpu in {NORM} - error of ")
    assert out.splitlines()[4:6] == [
        f"- error of {NORM}: 0.61 roundoffs",
        f"+ error of {NORM}: 0.9 roundoffs (1.475 times)",
    ]
    assert "why local-excess 1.2 " in text
    assert "bits other bits in logits" in text
    assert "meaning The same function, with a larger rounding error" in text


def many():
    """A cell of each kind that has a block."""
    cells = [baseline(precision=precision) for precision in ("fp32", "bf16", "fp16", "amp-bf16", "amp-fp16", "fp64")]
    worse = with_bits(with_module(cells[1], NORM, local_error=0.9), logits="other")
    packages = {**worse.environment["packages"], "transformers": "5.25.0"}
    stops = replace(worse.curve, losses=(6.26, 6.11, 7.98, math.nan))
    worse = replace(worse, error=0.0172, environment={**worse.environment, "packages": packages}, curve=stops)
    contract = {**cells[4].contract, "default_dtype": "float32", "signature": ["input_ids", "labels", "position_ids"]}
    new = [
        with_bits(replace(cells[0], error=0.005), logits="other"),
        worse,
        renamed(replace(changed(cells[2]), true_loss=6.31), {"model.layers.3": "model.blocks.3"}),
        replace(cells[3], checks=("forward.finite",)),
        replace(cells[4], contract=contract),
        cells[5],
    ]
    return cells, new


def test_the_diff_reads_as_it_did(capsys, folders):
    """To change it on purpose: write `out` to the file and read the difference."""
    folders(*many())
    status, out, _ = ended(capsys, "old", "new")
    assert status == 1
    assert out == SNAPSHOT.read_text(encoding="utf-8")
    assert max(len(line) for line in out.splitlines()) <= 80


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_the_old_is_red_and_the_new_is_green_where_somebody_watches(folders, monkeypatch):
    folders([OLD], [NEW["worse"]])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for colours in (True, False):
        if not colours:
            monkeypatch.setenv("NO_COLOR", "1")
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["compare", "old", "new"]) == 1
        red, green, end = ("\x1b[38;5;196m", "\x1b[38;5;28m", "\x1b[0m") if colours else ("", "", "")
        assert f"{red}- error of {NORM}: 0.61 roundoffs{end}\n" in screen.getvalue()
        assert f"{green}+ error of {NORM}: 0.9 roundoffs (1.475 times){end}\n" in screen.getvalue()


def test_arrows_and_curves_are_ascii_where_the_stream_says_nothing_else(folders, tmp_path):
    folders(*many())
    done = subprocess.run(
        [sys.executable, "-m", "numerics_suite", "compare", "old", "new"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1]), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "+ training loss: ,,#x 6.26 6.11 7.98 NaN\n" in done.stdout


def test_worst_first_alike_ones_together_and_the_rest_in_one_line(capsys, folders):
    cells = [baseline(precision=precision) for precision in ("fp32", "bf16", "amp-bf16", "fp16", "tf32")]
    new = [
        with_bits(cells[0], logits="other"),
        changed(cells[1]),
        changed(cells[2]),
        cells[3],
        baseline(precision="fp64"),
    ]
    folders(cells, new)
    status, out, _ = ended(capsys, "old", "new")
    assert out.startswith("--- old\n+++ new\n\n")
    heads = [line for line in out.splitlines() if line and line[0] not in " -+"]
    assert status == 1
    assert [head.partition(":")[0] for head in heads] == [
        "missing",
        "changed",
        "rounding",
        "new",
        "identical",
        "CHANGED",
    ]
    assert "amp-bf16/eager/cpu, bf16/eager/cpu" in heads[1]
    assert heads[-1] == "CHANGED: 1 missing, 2 changed, 1 new, 1 rounding, 1 identical (exit 1)"
    status, out, _ = ended(capsys, "old", "new", "--quiet")
    assert [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "missing",
        "changed",
        "CHANGED",
    ]


def test_renamed_modules_are_said(capsys, folders):
    folders([OLD], [renamed(changed(OLD), {"model": "transformer"})])
    _, out, _ = ended(capsys, "old", "new")
    assert f"in {NORM.replace('model', 'transformer')}" in " ".join(out.split())
    assert "- module: model.embed_tokens\n+ module: transformer.embed_tokens\n" in out
    assert "  and 45 more: renamed modules, matched by order and shape\n" in out


def test_json_on_standard_output_alone(capsys, folders):
    nan = replace(OLD, error=math.nan, true_loss=math.nan, left_out={})
    folders([OLD], [nan])
    status, out, err = ended(capsys, "old", "new", "--json", "-")
    (entry,) = json.loads(out)["subjects"]
    assert (status, err, entry["kind"], entry["error_ratio"], entry["details"]["true_loss"]) == (
        1,
        "",
        "changed",
        "NaN",
        "NaN",
    )


def test_subjects_are_paired(capsys, folders):
    folders([OLD], [baseline(subject="glm4-next")])
    status, out, err = ended(capsys, "old", "new")
    assert (status, out) == (4, "")
    assert err == (
        "numerics-suite: error: old and new have no cell in common (glm4-tiny/bf16/eager/cpu (causal-lm) and "
        "glm4-next/bf16/eager/cpu (causal-lm)); --as OLD=NEW pairs subjects of different names\n"
    )
    status, _, _ = ended(capsys, "old", "new", "--as", "glm4-tiny=glm4-next", "--json", "out.json")
    (entry,) = json.loads(Path("out.json").read_text())["subjects"]
    assert (status, entry["subject"], entry["details"]["against"]) == (0, "glm4-next", "glm4-tiny")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "compare takes two folders, OLD and NEW; 0 given"),
        (["old"], "compare takes two folders, OLD and NEW; 1 given"),
        (["old", "new", "third"], "compare takes two folders, OLD and NEW; 3 given"),
        (["old", "no"], "no folder of baselines at no; numerics-suite record --baseline no writes one"),
        (["old", "new", "--as", "x"], "--as: 'x' is no pair; write OLD=NEW"),
        (["old", "new", "--as", "=x"], "--as: '=x' is no pair; write OLD=NEW"),
        (["old", "new", "--as", "glm-tiny=x"], "--as glm-tiny=x: OLD (old) has no subject 'glm-tiny'; did you mean 'glm4-tiny'?"),
        (["old", "new", "--jsn", "x"], "unknown option '--jsn'; did you mean '--json'?"),
        (["old", "other"], ("glm4-tiny/bf16/eager/cpu (causal-lm) cannot be compared: recorded with seed 0 and 1; "
         "record both with the same --seed")),
        (["old", "torn"], ("torn/glm4-tiny--causal-lm.json: not valid JSON in line 1: torn or edited; restore it from git, "
         "or delete it and record again")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_4(capsys, folders, arguments, line):
    folders([OLD], [OLD])
    save(Path("other"), [replace(OLD, recipe={**OLD.recipe, "seed": 1})], force=False)
    Path("torn").mkdir()
    Path("torn/glm4-tiny--causal-lm.json").write_text('{"format": ')
    status, out, err = ended(capsys, *arguments)
    assert (status, out, err) == (4, "", f"numerics-suite: error: {line}\n")


def test_an_unwritable_answer_is_refused_before_anything_is_read(capsys, folders, tmp_path):
    folders([OLD], [OLD])
    status, _, err = ended(capsys, "old", "no", "--json", "not/there.json")
    assert (status, err) == (
        4,
        f"numerics-suite: error: --json: cannot write not/there.json: no folder {tmp_path}/not\n",
    )


def test_it_starts_without_torch(folders, tmp_path):
    folders([OLD], [NEW["changed"]])
    script = (
        "import sys\n"
        "from numerics_suite.cli.main import main\n"
        "status = main(['compare', 'old', 'new', '--quiet'])\n"
        "print(status, sorted({'torch', 'transformers', 'pytest', 'hypothesis', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "1 []"
