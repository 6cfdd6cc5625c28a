"""A SUBJECT that cannot be used: exit status 4, one line on standard error, nothing on standard output, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import numerics_suite
from numerics_suite.cli.main import main
from numerics_suite.subjects.fixtures import fixture_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    edit(folder, model_type="glm9", architectures=["Glm9ForCausalLM"])


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def corrupt(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"BF16"', b'"QF16"', 1))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def small_embedding(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 999, "content": "<|far|>"})
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, ["has no config.json"]),
        (broken_config, ["config.json is not JSON"]),
        (unknown_architecture, ["config.json", "model_type 'glm9'"]),
        (truncated, ["model.safetensors is truncated"]),
        (corrupt, ["model.safetensors is corrupt"]),
        (no_weights, ["has no weights"]),
        (pickled, ["pytorch_model.bin", "--allow-pickle"]),
        (small_embedding, ["tokenizer.json", "1000 ids", "768 rows"]),
    ],
)
def test_a_damaged_checkpoint(damage, words, tmp_path, capsys):
    folder = Path(shutil.copytree(fixture_path("glm-tiny-classifier"), tmp_path / "mine"))
    damage(folder)
    _refused([str(folder)], [str(folder), *words], tmp_path, capsys)


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("./nowhere", ["no such directory"]),
        ("org/nothing", ["org/nothing", "HF_HUB_OFFLINE"]),
        ("fixture:glm5-tiny", ["did you mean 'glm"]),
        ("factory:no_such_module:build", ["no_such_module cannot be imported"]),
        ("factory:json:loadz", ["no callable 'loadz'", "did you mean 'load"]),
    ],
)
def test_a_subject_that_is_not_there(subject, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _refused([subject], words, tmp_path, capsys)


def test_remote_code_names_its_flag(tmp_path, capsys):
    folder = Path(shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "mine"))
    _refused([str(folder)], ["--trust-remote-code"], tmp_path, capsys)


def test_two_alike_names_ask_for_a_name(tmp_path, capsys):
    _refused(["fixture:glm-tiny", "fixture:glm-tiny"], ["--name"], tmp_path, capsys)


def test_too_few_labels(tmp_path, capsys):
    _refused(["fixture:glm-tiny", "--num-labels", "0"], ["--num-labels"], tmp_path, capsys)


def _refused(arguments: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = folder / "results.json"
    status = main(["check", *arguments, "--precision", "fp32", "--json", str(results)])
    out, err = capsys.readouterr()
    assert status == 4
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not results.exists()


def test_the_same_from_outside(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "numerics_suite", "check", "./nowhere", "--json", "results.json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("numerics-suite: error: ./nowhere: no such directory")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
