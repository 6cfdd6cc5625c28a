"""The folder of baselines: the same back, the same bytes, whole at every moment, and one line for whatever is wrong with it."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit.sample_baseline import baseline, moved_sketch, same, with_module

import numerics_suite
from numerics_suite.baselines import store
from numerics_suite.baselines.store import Baselines, check_writable, load, save
from numerics_suite.core import atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Cell

STEM = "glm4-tiny--causal-lm"
CELLS = tuple((precision, attn) for precision in ("fp32", "bf16", "amp-bf16") for attn in ("eager", "sdpa"))
ROOT = Path(numerics_suite.__file__).parents[1]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def refused(function, *arguments, **keywords) -> str:
    with pytest.raises(BadInputError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same back -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    odd = replace(
        baseline(),
        error=math.nan,
        inherent=math.inf,
        headroom_bits=-math.inf,
        headroom_module=None,
        left_out={"inherent": "above a billion parameters"},
        contract={"head": {"std": math.nan}, "cache": None, "list": []},
        curve=replace(baseline().curve, losses=(6.0, math.nan), norms=(math.inf,)),
    )
    odd = with_module(odd, "model.norm", gave=None, local_error=math.nan, local_count=3)
    odd = with_module(odd, "lm_head", local_error=None, local_count=5)
    assert save(tmp_path, [odd], force=False) == [tmp_path / f"{STEM}.json"]
    assert same(load(tmp_path)[odd.cell], odd)


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float32", "float64", "uint8"])
def test_batches_keep_their_dtypes(tmp_path, dtype):
    made = baseline()
    tensors = {
        "x": np.array([[0, 1], [1, 0]], dtype=dtype),
        "empty": np.zeros((0, 3), dtype=dtype),
        "one": np.array(1, dtype=dtype),
    }
    made = replace(made, batches=(replace(made.batches[0], tensors=tensors),))
    save(tmp_path, [made], force=False)
    assert same(load(tmp_path)[made.cell].batches, made.batches)


def test_large_ids_survive(tmp_path):
    made = baseline()
    ids = np.array([[0, 2**31 - 1], [-(2**31), 2**40]])
    made = replace(made, batches=(replace(made.batches[0], tensors={"input_ids": ids}),))
    save(tmp_path, [made], force=False)
    assert same(load(tmp_path)[made.cell].batches, made.batches)


def test_a_cell_without_anything_true(tmp_path):
    made = replace(baseline(), answers=(), gradients=(), modules=(), batches=(), checks=(), true_loss=math.nan)
    save(tmp_path, [made], force=False)
    assert same(load(tmp_path)[made.cell], made)


def test_a_baseline_of_schema_1_is_read_without_what_it_lacks(tmp_path):
    made = baseline()
    (file,) = save(tmp_path, [replace(made, uses=made.batches, use_answers=made.answers)], force=False)
    content = json.loads(file.read_text(encoding="utf-8"))
    content["schema_version"] = 1
    for cell in content["cells"]:
        for key in ("uses", "use_answers", "use_modules", "tensors"):
            del cell[key]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert same(load(tmp_path)[made.cell], replace(made, tensors=()))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    cells = [baseline(precision=precision, attn=attn, noise=1e-14) for precision, attn in CELLS]
    save(tmp_path / "a", cells, force=False)
    save(tmp_path / "b", cells[::-1], force=False)
    left, right = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert left == right
    assert len(left) == 2


def test_true_values_of_cells_that_agree_are_shared_and_others_are_not(tmp_path):
    first, second = (baseline(precision=precision, noise=1e-14) for precision in ("bf16", "fp32"))
    assert not same(first.answers, second.answers)
    save(tmp_path, [first, second], force=False)
    found = load(tmp_path)
    assert same(found[first.cell].answers, found[second.cell].answers)
    assert same(found[first.cell].modules, first.modules)
    other = with_module(second, "model.norm", gave=moved_sketch(second.modules[-2].gave, 1e-11))
    save(tmp_path, [other], force=True)
    assert same(load(tmp_path)[other.cell].modules[-2].gave.projections, other.modules[-2].gave.projections)


def test_a_tiny_baseline_of_six_cells_is_small(tmp_path):
    save(tmp_path, [baseline(precision=p, attn=a, noise=1e-14, blocks=4) for p, a in CELLS], force=False)
    assert size_of(tmp_path) < 100_000


def test_a_large_model_s_baseline_is_small(tmp_path):
    """Forty blocks of twelve modules, 151,552 words, 280 parameters, in six cells."""
    cells = [
        baseline(precision=p, attn=a, noise=1e-14, blocks=40, vocabulary=151_552, parameters=280) for p, a in CELLS
    ]
    save(tmp_path, cells, force=False)
    assert size_of(tmp_path) < 5_000_000
    assert max(path.stat().st_size for path in tmp_path.glob("*.json")) < 500_000


def test_a_person_can_read_the_json(tmp_path):
    save(tmp_path, [baseline()], force=False)
    text = (tmp_path / f"{STEM}.json").read_text()
    assert text.endswith("}\n")
    assert '"subject": "glm4-tiny"' in text
    assert max(len(line) for line in text.splitlines()) < 400


@pytest.mark.parametrize("subject", ["zai-org/GLM-4-9B-0414", "my model", "a+b", "ünï"])
def test_names_of_subjects_become_names_of_files(tmp_path, subject):
    made = baseline(subject=subject)
    (written,) = save(tmp_path, [made], force=False)
    assert written.parent == tmp_path
    assert made.cell in load(tmp_path)


def test_two_names_never_share_a_file():
    names = ["a/b", "a+b", "a%2Fb", "a b", "a-b"]
    assert len({store.stem_of(name, "causal-lm") for name in names}) == len(names)


def test_a_device_s_number_is_no_part_of_the_key():
    made = replace(baseline(), cell=replace(baseline().cell, device="cuda"))
    found = Baselines(Path(), [made])
    assert replace(made.cell, device="cuda:1") in found
    assert found[replace(made.cell, device="cuda:1")] is made
    assert replace(made.cell, device="cpu") not in found
    assert "cuda" not in found


# --- merging -----------------------------------------------------------------------------------------------------------


def test_cells_of_one_subject_are_merged(tmp_path):
    first, second = baseline(precision="bf16"), baseline(precision="fp32")
    save(tmp_path, [first], force=False)
    save(tmp_path, [second], force=False)
    assert list(load(tmp_path)) == [first.cell, second.cell]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cell_is_not_overwritten_without_force(tmp_path):
    made = baseline()
    save(tmp_path, [made], force=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = replace(made, error=0.5)
    words = f"{tmp_path / STEM}.json holds glm4-tiny/bf16/eager/cpu (causal-lm) already; --force overwrites"
    assert refused(save, tmp_path, [other, baseline(subject="another")], force=False) == words
    assert refused(check_writable, tmp_path, [made.cell], force=False) == words
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    check_writable(tmp_path, [made.cell], force=True)
    save(tmp_path, [other], force=True)
    assert load(tmp_path)[made.cell].error == 0.5


def test_checking_writes_nothing(tmp_path):
    check_writable(tmp_path / "not" / "yet", [baseline().cell], force=False)
    assert not list(tmp_path.iterdir())


# --- what is wrong with a folder ---------------------------------------------------------------------------------------


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    hint = "numerics-suite record --baseline"
    assert refused(load, tmp_path / "no") == f"no folder of baselines at {tmp_path}/no; {hint} {tmp_path}/no writes one"
    assert (
        refused(load, tmp_path / "empty") == f"{tmp_path}/empty holds no baseline; {hint} {tmp_path}/empty writes one"
    )
    assert refused(load, tmp_path / "file") == f"{tmp_path}/file is a file, not a folder of baselines"
    for function, cells in ((save, [baseline()]), (check_writable, [baseline().cell])):
        assert (
            refused(function, tmp_path / "file", cells, force=False)
            == f"--baseline: {tmp_path}/file is a file, not a folder of baselines"
        )
    assert "which is a file" in refused(check_writable, tmp_path / "file" / "in", [baseline().cell], force=False)
    assert "is a file" in refused(save, tmp_path / "file" / "in", [baseline()], force=False)


def test_other_files_are_left_alone(tmp_path):
    save(tmp_path, [baseline()], force=False)
    others = ["README.md", ".gitattributes", "weights.safetensors", "other--causal-lm.0123456789ab.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    save(tmp_path, [replace(baseline(), error=0.5)], force=True)
    assert [name for name in others if (tmp_path / name).read_text() != "mine"] == []
    assert len(load(tmp_path)) == 1


def edited(folder: Path, change) -> Path:
    path = folder / f"{STEM}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(schema_version=3), "schema_version 3 is newer than the 2 that this release reads; upgrade numerics-suite"),
        (lambda c: c.update(schema_version=0), "schema_version 0 is older than the 1 that this release reads; delete it and record again"),
        (lambda c: c.update(schema_version="1"), "schema_version must be a whole number"),
        (lambda c: c.update(format="x"), "not a baseline of numerics-suite; move it out of the folder"),
        (lambda c: c.pop("format"), "not a baseline of numerics-suite; move it out of the folder"),
        (lambda c: c.pop("cells"), "'cells' is missing; restore it from git, or delete it and record again"),
        (lambda c: c["cells"][0].pop("error"), "cells[0]: 'error' is missing"),
        (lambda c: c["cells"][0].update(error="much"), "cells[0].error must be a number, not 'much'"),
        (lambda c: c["cells"][0].update(error=True), "cells[0].error must be a number, not 'True'"),
        (lambda c: c["cells"][0].update(error_count=1.5), "cells[0].error_count must be a whole number, not '1.5'"),
        (lambda c: c["cells"][0].update(bits=[]), "cells[0].bits must be an object, not '[]'"),
        (lambda c: c["cells"][0].update(modules=9), "parts.modules: has no entry 9"),
        (lambda c: c["cells"][0]["curve"].update(losses={}), "cells[0].curve.losses must be a list, not '{}'"),
        (lambda c: c["parts"]["answers"][0][0].update(values="no"), "parts.answers[0][0].values: the tensor file has no 'no'"),
        (lambda c: c["parts"]["module_rows"][0].pop(), "has the shape"),
        (lambda c: c["parts"]["batches"][0][0]["tensors"]["labels"].update(dtype="int65"), "'int65' is no dtype"),
        (lambda c: c["tensors"].update(file="../x.safetensors"), "'../x.safetensors' is no tensor file beside it"),
        (lambda c: c.update(cells={}), "cells must be a list, not '{}'"),
    ],
)  # fmt: skip
def test_a_json_that_is_wrong_is_named(tmp_path, change, words):
    save(tmp_path, [baseline()], force=False)
    path = edited(tmp_path, change)
    line = refused(load, tmp_path)
    assert line.startswith(str(path))
    assert words in line
    # Nothing that cannot be read is written over, even by force: it may hold more than the new cells.
    before = path.read_bytes()
    assert refused(save, tmp_path, [baseline()], force=True) == line
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 10, 500, -1])
def test_a_torn_json_is_named(tmp_path, kept):
    save(tmp_path, [baseline()], force=False)
    path = tmp_path / f"{STEM}.json"
    text = path.read_bytes()
    path.write_bytes(text[: kept if kept >= 0 else len(text) - 3])
    assert refused(load, tmp_path).startswith(f"{path}: not valid JSON")


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_foreign_json_is_named(tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    assert refused(load, tmp_path).startswith(f"{tmp_path / 'other.json'}: not ")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "torn or edited, its SHA-256 is not the one in"),
        (lambda path: path.write_bytes(b""), "torn or edited, its SHA-256 is not the one in"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
            "torn or edited, its SHA-256 is not the one in",
        ),
        (lambda path: path.unlink(), f"missing, and {STEM}.json needs it"),
    ],
)
def test_a_torn_tensor_file_is_named(tmp_path, spoil, words):
    made = baseline()
    save(tmp_path, [replace(made, answers=(replace(made.answers[0], values=made.answers[0].values + 1),))], force=False)
    path = tensor_file(tmp_path)
    spoil(path)
    line = refused(load, tmp_path)
    assert line.startswith(f"{path}: {words}")
    assert "restore it from git" in line


def test_a_tensor_file_that_is_none_is_named(tmp_path):
    import hashlib

    save(tmp_path, [baseline()], force=False)
    path = tensor_file(tmp_path)
    path.write_bytes(b"not one")
    edited(tmp_path, lambda content: content["tensors"].update(sha256=hashlib.sha256(b"not one").hexdigest()))
    assert refused(load, tmp_path).startswith(f"{path}: not a safetensors file")


def test_one_cell_in_two_files_is_named(tmp_path):
    save(tmp_path, [baseline()], force=False)
    (tmp_path / "copy.json").write_bytes((tmp_path / f"{STEM}.json").read_bytes())
    assert "both hold glm4-tiny/bf16/eager/cpu (causal-lm): delete one" in refused(load, tmp_path)


# --- disks that refuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_a_disk_that_refuses_leaves_the_earlier_baseline(tmp_path, monkeypatch, fails_at, code, words):
    made = baseline()
    save(tmp_path, [made], force=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def fsync(_descriptor):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    other = replace(made, answers=(replace(made.answers[0], values=made.answers[0].values + 1),))
    line = refused(save, tmp_path, [other], force=True)
    assert line.startswith(f"--baseline: cannot write {tmp_path}")
    assert line.endswith(words)
    assert same(load(tmp_path)[made.cell], made)
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
    monkeypatch.undo()
    save(tmp_path, [other], force=True)
    assert same(load(tmp_path)[made.cell], other)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_read_only_folder(tmp_path, monkeypatch):
    """As root writes anywhere, the system's refusal is made up."""
    (tmp_path / "b").mkdir()

    def refuse(*_arguments, **_keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "mkstemp", refuse)
    line = refused(check_writable, tmp_path / "b", [baseline().cell], force=False)
    assert line.startswith("--baseline: cannot write")
    assert line.endswith("Permission denied")
    assert refused(save, tmp_path / "b", [baseline()], force=False).endswith("Permission denied")
    assert not list((tmp_path / "b").iterdir())


# --- killed ------------------------------------------------------------------------------------------------------------

WRITER = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from unit.sample_baseline import baseline
    from numerics_suite.baselines.store import save
    made = baseline()
    for number in range({start}, 100_000):
        values = made.answers[0].values + number
        save(Path({folder!r}), [replace(made, error=float(number), answers=(replace(made.answers[0], values=values),))], force=True)
        print(number, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_baseline_is_left(tmp_path):
    """Fifty random moments of a process that saves without a pause."""
    draw = random.Random(0)
    folder = tmp_path / "b"
    made = baseline()
    save(folder, [replace(made, error=-1.0)], force=False)
    tests = str(Path(__file__).resolve().parents[1])
    done = -1
    for _ in range(50):
        script = textwrap.dedent(WRITER).format(tests=tests, folder=str(folder), start=done + 1)
        with subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as writer:
            assert writer.stdout is not None
            first = int(writer.stdout.readline())
            time.sleep(draw.random() * 0.02)
            writer.send_signal(signal.SIGKILL)
            said = [first, *(int(line) for line in writer.stdout.read().split("\n")[:-1])]
        found = load(folder)[made.cell]
        # What was said to be saved is there, or the next one that was under way.
        assert found.error in {said[-1], said[-1] + 1}
        np.testing.assert_array_equal(found.answers[0].values, made.answers[0].values + found.error)
        done = int(found.error)
    save(folder, [made], force=True)
    assert len(list(folder.iterdir())) == 2


def test_writers_do_not_lose_each_other_s_cells(tmp_path):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, {tests!r})
        from unit.sample_baseline import baseline
        from numerics_suite.baselines.store import save
        for attn in {attns!r}:
            save(Path({folder!r}), [baseline(attn=attn)], force=False)
    """)
    tests = str(Path(__file__).resolve().parents[1])
    halves = [[f"a{number}" for number in range(10)], [f"b{number}" for number in range(10)]]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script.format(tests=tests, folder=str(tmp_path), attns=half)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for half in halves
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(cell.attn for cell in load(tmp_path)) == sorted([*halves[0], *halves[1]])


def test_a_reader_that_meets_a_writer_reads_again(tmp_path, monkeypatch):
    made, other = baseline(), replace(baseline(), error=0.5, true_loss=1.0)
    save(tmp_path, [made], force=False)
    own, calls = store._parsed, []

    def parsed(text, file):
        calls.append(1)
        if len(calls) == 1:
            monkeypatch.setattr(store, "_parsed", own)
            changed = replace(other, answers=(replace(other.answers[0], values=other.answers[0].values + 1),))
            save(tmp_path, [changed], force=True)
        return own(text, file)

    monkeypatch.setattr(store, "_parsed", parsed)
    assert load(tmp_path)[made.cell].error == 0.5


def test_the_key_is_the_whole_cell():
    cells = [
        Cell(subject="s", precision="bf16", attn="eager", device="cpu", task=task)
        for task in ("causal-lm", "token-classification")
    ]
    assert len(Baselines(Path(), [replace(baseline(), cell=cell) for cell in cells])) == 2


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_in_the_usual_place_is_never_passed_over(tmp_path, monkeypatch, kind):
    from numerics_suite.settings.tree import Settings
    from numerics_suite.suite.baseline_selection import baselines_of

    monkeypatch.chdir(tmp_path)
    assert baselines_of(Settings()) is None
    (tmp_path / ".numerics").mkdir()
    place = tmp_path / ".numerics" / "baselines"
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to("nowhere")
    with pytest.raises(BadInputError, match="baselines"):
        baselines_of(Settings())
