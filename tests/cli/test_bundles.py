"""A hundred scripts that fail: each is caught, its bundle is reopened, and its own script shows the same finding again."""

from __future__ import annotations

import json
import runpy
import sys
import warnings

import pytest
from cli.watched_scripts import scripts

from numerics_suite.cli import watch
from numerics_suite.cli.main import main

ALL = tuple(scripts())
QUICK = (
    "updates that round away: glm none",
    "reentrant checkpoints: glm lora-head float16",
    "a branch that is detached",
)


def test_there_are_a_hundred():
    assert len(ALL) == len({script.name for script in ALL}) == 100


@pytest.mark.parametrize(
    "script",
    [pytest.param(each, id=each.name, marks=[] if each.name.startswith(QUICK) else [pytest.mark.slow]) for each in ALL],
)
def test_a_bundle_fails_as_its_script_did(script, tmp_path, monkeypatch, capsys):
    name = script.factory.partition(":")[0] if script.factory else "train"
    (tmp_path / f"{name}.py").write_text(script.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scripts' own
        assert watch.run(["--json", "watched.json", f"{name}.py"]) == 1, capsys.readouterr().err
        (found,) = json.loads((tmp_path / "watched.json").read_text(encoding="utf-8"))["findings"]
        assert found["cause"] in script.causes, found["title"]
        subject = [f"factory:{script.factory}"] if script.factory else []
        assert main(["check", *subject, "--bundle", ".numerics/bundle", "--json", "again.json"]) == 1
        (check,) = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))["checks"]
        assert (check["status"], check["finding"]["cause"]) == ("failed", found["cause"])
        again, _, measured = check["finding"]["evidence"]["reopened"].partition(": ")
        assert again == "reproduced", measured
        status, said = reproduced(tmp_path / ".numerics" / "bundle", subject, monkeypatch, capsys)
    sys.modules.pop(name, None)
    assert (status, said) == (1, measured)


def reproduced(folder, words, monkeypatch, capsys):
    """Exit status and last line of the bundle's script, run in this process, where torch is imported already."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    monkeypatch.syspath_prepend(str(folder))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "reproduce.py"), run_name="__main__")
    sys.modules.pop("kept_step", None)
    return ended.value.code, capsys.readouterr().out.splitlines()[-1]
