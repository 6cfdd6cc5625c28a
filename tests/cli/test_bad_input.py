"""Bad input other than a subject: exit status 4, one line on standard error, nothing on standard output, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import numerics_suite
from numerics_suite.cli.main import main
from numerics_suite.subjects.fixtures import fixture_path

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])}
FEW = ("--precision", "fp32", "--attn", "eager", "-n", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to run in."""
    run_in = tmp_path / "run"
    run_in.mkdir()
    monkeypatch.chdir(run_in)
    return run_in


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that the refusal says; nothing else is said or written."""
    status = main(["check", *arguments, *FEW, "--json", "results.json"])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (4, "", 1), err
    assert not list(Path.cwd().iterdir())
    return err.removeprefix("numerics-suite: error: ").rstrip("\n")


def copy_of(fixture: str, folder: Path) -> Path:
    return Path(shutil.copytree(fixture_path(fixture), folder))


@pytest.mark.parametrize(
    ("subject", "content", "words"),
    [
        ("glm-tiny", None, ["No such file"]),
        ("glm-tiny", b"", ["holds no example"]),
        ("glm-tiny", b'{"text": "a"}\n{oops\n', ["line 2", "not JSON"]),
        ("glm-tiny", b"[1]\n", ["line 1", "'text'"]),
        ("glm-tiny", b'{"text": " "}\n', ["line 1", "'text' is empty"]),
        (
            "glm-tiny",
            b'{"text": "a", "label": "x"}\n',
            ["line 1", "'label' must be a number or a list of numbers, not 'x'"],
        ),
        (
            "glm-tiny",
            b'{"text": "a", "label": NaN}\n',
            ["line 1", "'label' must be a number or a list of numbers, not nan"],
        ),
        ("glm-tiny", b'{"text": "a"}\n\xff\n', ["line 2", "not UTF-8"]),
        ("glm-tiny", b"[" * 100_000, ["line 1", "nested too deeply"]),
        ("glm-tiny", b'{"text": "a", "label": ' + b"1" * 5000 + b"}", ["line 1", "not JSON that can be read"]),
        ("glm-tiny", b'{"text": "\\ud800"}', ["line 1", "'text' holds half of a surrogate pair"]),
        ("glm-tiny", b'{"texts": "a"}', ["line 1", "'text'", "'prompt' with 'completion'", "'messages'"]),
        ("glm-tiny", b'{"text": 3}', ["line 1", "needs a string 'text'"]),
        ("glm-tiny", b'{"prompt": "a"}', ["line 1", "needs a string 'completion'"]),
        ("glm-tiny", b'{"completion": "a"}', ["line 1", "needs a string 'prompt'"]),
        ("glm-tiny", b'{"prompt": "a", "completion": ""}', ["line 1", "'completion' is empty"]),
        ("glm-tiny", b'{"messages": []}', ["line 1", "'messages' must be a list of at least one"]),
        ("glm-tiny", b'{"messages": [{"role": "user"}]}', ["line 1", "messages[0] needs 'role' and 'content'"]),
        ("glm-tiny-classifier", b'{"prompt": "a", "completion": "b"}', ["line 1", "needs a 'label' on every line"]),
        ("glm-tiny-classifier", b'{"text": "a", "label": 7}\n', ["label 7 needs --num-labels 8"]),
        ("glm-tiny-classifier", b'{"text": "a", "label": 0.5}\n', ["label 0.5 is not a class"]),
        ("glm-tiny-classifier", b'{"text": "a", "label": -1}\n', ["label -1 is not a class"]),
        ("glm-tiny-classifier", b'{"text": "a"}\n', ["needs a 'label' on every line"]),
    ],
)
def test_data(subject, content, words, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, f"fixture:{subject}", "--data", str(path))
    assert line.startswith(f"--data {path}")
    assert [word for word in words if word not in line] == []


def test_data_without_a_tokenizer(tmp_path, capsys):
    subject = copy_of("glm-tiny", tmp_path / "mine")
    for path in subject.glob("*token*"):
        path.unlink()
    data = tmp_path / "mine.jsonl"
    data.write_text('{"text": "a"}\n')
    assert "has no tokenizer" in refused(capsys, str(subject), "--data", str(data))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("tokenizer_config.json", None, ["tokenizer_config.json is not JSON"]),
        ("config.json", {"pad_token_id": -5}, ["pad_token_id is -5", "set-pad-token"]),
        ("config.json", {"vocab_size": 100}, ["tokenizer.json", "100 rows", "vocab_size"]),
    ],
)
def test_a_file_of_the_checkpoint(file, changes, words, tmp_path, capsys):
    subject = copy_of("glm-tiny", tmp_path / "mine")
    path = subject / file
    path.write_text("{" if changes is None else json.dumps({**json.loads(path.read_text()), **changes}))
    line = refused(capsys, str(subject))
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("label", "arguments"),
    [
        (2, ["fixture:glm-tiny-classifier"]),
        (1, ["fixture:glm-tiny", "--task", "token-classification"]),
        (0.5, ["fixture:glm-tiny", "--task", "sequence-classification", "--num-labels", "1"]),
        (None, ["fixture:glm-tiny"]),
    ],
)
def test_good_data_is_trained_on(label, arguments, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    lines = [{"text": text, **({} if label is None else {"label": label})} for text in ("one two three", "four")]
    data.write_text("\n".join(map(json.dumps, lines)))
    checks = "train.finite,train.labels,train.accumulation,train.descends,forward.padding,inputs.pipeline"
    more = ["--data", str(data), "--checks", checks, "--max-examples", "2", "--quiet", "--json", "results.json"]
    status = main(["check", *arguments, *FEW, *more])
    assert (status, capsys.readouterr().err) == (0, "")
    counts = json.loads(Path("results.json").read_text())["counts"]
    assert counts == {"passed": 6, "failed": 0, "accepted": 0, "skipped": 0, "error": 0, "findings": 0}


def test_only_the_results_are_written(folder):
    """Hypothesis would leave a folder of its own beside them."""
    arguments = ["fixture:glm-tiny", *FEW, "--checks", "load.finite,forward.finite", "--max-examples", "2", "--quiet"]
    assert main(["check", *arguments, "--json", "a.json", "--junitxml", "b.xml"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.xml"]
    assert (folder / "b.xml").read_text().startswith("<?xml")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("option", ["--json", "--junitxml"])
def test_a_disk_that_is_full_at_the_end(option, capsys, folder):
    status = main(["check", "fixture:glm-tiny", *FEW, "--checks", "load.finite", "--quiet", option, "/dev/full"])
    assert status == 4
    line = f"numerics-suite: error: {option}: cannot write /dev/full: No space left on device\n"
    assert capsys.readouterr().err == line
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_interruption(workers, folder):
    """Control-C reaches every process of the foreground group."""
    arguments = ["fixture:glm-tiny", "fixture:glm4-tiny", "--precision", "fp32,bf16", "--max-examples", "200"]
    command = [sys.executable, "-m", "numerics_suite", "check", *arguments, "-n", workers]
    files = ["--json", "a.json", "--junitxml", "b.xml"]
    run = subprocess.Popen(
        [*command, *files],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    assert run.stdout is not None
    run.stdout.readline()  # the header: the run has begun
    time.sleep(2)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2, err
    assert "Traceback" not in err
    document = json.loads((folder / "a.json").read_text())
    assert (document["complete"], document["verdict"]) == (False, "error")
    assert {path.name for path in folder.iterdir()} <= {"a.json", "b.xml"}
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
