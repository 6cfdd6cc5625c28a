"""A SUBJECT that cannot be used: exit status 4, one line on standard error, nothing on standard output, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
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


LOAD = (
    "--precision",
    "fp32",
    "--attn",
    "eager",
    "--checks",
    "load.*",
    "--no-diagnose",
    "-n",
    "0",
    "--json",
    "out.json",
)


@pytest.fixture
def unbuildable(tmp_path, monkeypatch):
    """A folder that passes every look at its files, and of whose config no model can be built."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "mine"))
    edit(folder, hidden_act="x")
    return "mine"


def test_a_config_of_which_no_model_can_be_built(unbuildable, capsys):
    assert main(["check", unbuildable, *LOAD]) == 4
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert all(word in err for word in ("mine/config.json", "hidden_act is 'x'", "KeyError")), err
    assert "could not be carried out" not in out
    document = json.loads(Path("out.json").read_text())
    assert (document["complete"], document["verdict"]) == (True, "error")
    assert {(entry["status"], entry["bad_input"]) for entry in document["checks"]} == {("error", True)}
    schema = Path(numerics_suite.__file__).parent / "reports" / "schema.json"
    jsonschema.validate(document, json.loads(schema.read_text(encoding="utf-8")))
    assert main(["report", "out.json", "--out", "report"]) == 0


def test_it_hides_no_answer_of_another_subject(unbuildable, capsys):
    assert main(["check", unbuildable, "fixture:glm4-tiny", *LOAD]) == 4
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert out.count("hidden_act is 'x'") == 2, out  # as it goes on, and in the summary; not once a check
    statuses = {entry["subject"]: entry["status"] for entry in json.loads(Path("out.json").read_text())["checks"]}
    assert statuses == {"mine": "error", "glm4-tiny": "passed"}


def test_a_finding_beside_it_is_a_finding(unbuildable, tmp_path, capsys):
    shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "other")
    edit(tmp_path / "other", num_hidden_layers=4)
    assert main(["check", unbuildable, "other", *LOAD]) == 1
    assert capsys.readouterr().err == ""


def test_neither_can_it_be_recorded_nor_is_it_loaded_for_a_list(unbuildable, capsys):
    assert main(["record", unbuildable, *LOAD[:4], "-n", "0", "--baseline", "kept"]) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "hidden_act is 'x'" in err
    assert main(["check", unbuildable, "--list"]) == 0


def test_an_adapter_that_does_not_fit_its_base(tmp_path, capsys, monkeypatch):
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    shutil.copytree(fixture_path("glm4-tiny"), "base")
    Path("mine").mkdir()
    begin = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{begin}.lora_A.weight": torch.ones(2, 64), f"{begin}.lora_B.weight": torch.zeros(64, 2)},
              "mine/adapter_model.safetensors")  # fmt: skip
    told = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": 2, "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj"], "layers_to_transform": [0], "init_lora_weights": "no-such-way"}  # fmt: skip
    Path("mine/adapter_config.json").write_text(json.dumps(told))
    assert main(["check", "mine", *LOAD]) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "mine") in err


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
