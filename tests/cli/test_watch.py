"""`watch SCRIPT` and `check --bundle` from outside: the script is as it would be without, and what is caught is reopened."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path

import jsonschema
import pytest
from preloaded import python

import numerics_suite
from numerics_suite.reports.results import load_schema

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])}

SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from torch.nn.utils import clip_grad_norm_
    from transformers import AutoModelForCausalLM
    import beside

    assert __name__ == "__main__" and __file__ == sys.argv[0]
    print("argv", sys.argv[1:], beside.VALUE)
    bad_step, status = int(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3]).float()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_function = torch.nn.CrossEntropyLoss()
    for step in range(1, 5):
        if step == bad_step:
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        ids = torch.randint(0, model.config.vocab_size, (2, 12))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = loss_function(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"done {float(sum(p.detach().double().sum() for p in model.parameters())):.15g}")
    sys.exit(status)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    (tmp_path / "beside.py").write_text("VALUE = 'beside'\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model():
    from numerics_suite.subjects.fixtures import fixture_path

    return str(fixture_path("glm-tiny"))


def command(*arguments, cwd=None):
    return subprocess.run(
        [python(), "-m", "numerics_suite", *map(str, arguments)],
        text=True, capture_output=True, check=False, cwd=cwd, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip


def test_a_clean_script_is_as_without(tmp_path, script, model):
    bare = subprocess.run(
        [python(), str(script), "0", "7", model, "--own", "-x"],
        text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    done = command("watch", script, "0", "7", model, "--own", "-x", cwd=tmp_path)
    assert done.returncode == bare.returncode == 7
    assert done.stdout == bare.stdout
    assert "numerics-suite" not in done.stderr
    assert not (tmp_path / ".numerics").exists()


def test_a_bad_step_stops_the_script_and_its_bundle_is_reopened(tmp_path, script, model):
    done = command("watch", "--json", tmp_path / "out.json", script, "3", "0", model, cwd=tmp_path)
    assert done.returncode == 1
    assert "done" not in done.stdout
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("numerics-suite: ")]
    assert lines[0].startswith(
        "numerics-suite: step 3: the logits are not finite; model.layers.1.mlp.down_proj.weight is not finite"
    )
    assert lines[1].startswith("numerics-suite: numerics-suite check --bundle ")
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (written["command"], written["steps"], written["findings"][0]["step"]) == ("watch", 3, 3)
    _reopened(Path(written["bundles"][0]), tmp_path)


def _reopened(bundle, tmp_path):
    again = command("check", "--bundle", bundle, "--json", "-", cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    result = json.loads(again.stdout)
    jsonschema.validate(result, load_schema())
    (check,) = result["checks"]
    assert (check["check"], check["precision"], check["status"]) == ("train.finite", "fp32", "failed")
    assert check["finding"]["module"] == "model.layers.1.mlp.down_proj"
    assert check["finding"]["step"] == 3
    healthy = command("check", "fixture:glm-tiny", "--bundle", bundle, cwd=tmp_path)
    assert healthy.returncode == 0, healthy.stderr
    assert "PASS (exit 0)" in healthy.stdout
    (bundle / "batches.safetensors").write_bytes(b"torn")
    torn = command("check", "--bundle", bundle, cwd=tmp_path)
    assert (torn.returncode, torn.stdout) == (4, "")
    assert torn.stderr.count("\n") == 1
    assert "is torn" in torn.stderr


def test_warn_lets_the_script_end_and_still_tells(tmp_path, script, model):
    done = command(
        "watch",
        "--on-bad=warn",
        "--bundle",
        tmp_path / "b",
        "--quiet",
        "--json",
        "-",
        script,
        "2",
        "0",
        model,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert (result["script_status"], result["steps"]) == (0, 4)
    assert "done nan" in done.stderr, "what the script prints makes way for the JSON"


def test_a_scripts_own_error_is_shown_as_python_shows_it(tmp_path):
    (tmp_path / "fails.py").write_text(
        "import sys\n\ndef f():\n    raise ValueError('its own')\n\nf()\n", encoding="utf-8"
    )
    done = command("watch", "fails.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert 'fails.py", line 6' in done.stderr.splitlines()[1]
    assert "ValueError: its own" in done.stderr
    assert "numerics_suite" not in done.stderr.replace(
        "numerics-suite: no module was trained in this process, so nothing was watched; other processes are not", ""
    )


def test_sys_exit_with_a_text_and_nothing_trained(tmp_path):
    (tmp_path / "ends.py").write_text("import sys\nsys.exit('enough')\n", encoding="utf-8")
    done = command("watch", "ends.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "enough",
        "numerics-suite: no module was trained in this process, so nothing was watched; other processes are not",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no SCRIPT given; see numerics-suite watch --help"),
        (["nowhere.py"], "no script nowhere.py"),
        (["--on-bad", "explode", "x.py"], "--on-bad: must be stop, warn or skip, not 'explode'"),
        (["--evry", "2", "x.py"], "unknown option '--evry'; did you mean '--every'?"),
        (["--every", "0", "here.py"], "every must be a whole number of at least 1, not 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_4(tmp_path, monkeypatch, capsys, arguments, line):
    from numerics_suite.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").write_text("", encoding="utf-8")
    assert main(["watch", *arguments]) == 4
    assert capsys.readouterr() == ("", f"numerics-suite: error: {line}\n")


def test_a_bundle_asks_one_question(tmp_path, capsys):
    from numerics_suite.cli.main import main

    assert main(["check", "--bundle", str(tmp_path), "--checks", "load.*"]) == 4
    assert "--checks cannot go with --bundle" in capsys.readouterr().err


def test_several_models_and_optimizers_of_one_script(tmp_path):
    (tmp_path / "gan.py").write_text(
        textwrap.dedent("""
            import torch
            from torch import nn
            one, other = nn.Linear(4, 4), nn.Linear(4, 1)
            steps = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (one, other)]
            for k in range(3):
                other(one(torch.ones(2, 4))).sum().backward()
                [s.step() for s in steps]
                [s.zero_grad() for s in steps]
        """),
        encoding="utf-8",
    )
    done = command("watch", "--json", "-", "gan.py", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["steps"]) == (0, 3), done.stderr


SILENT = """
    import copy, sys, torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(50, 16), nn.Linear(16, 50)

        def forward(self, input_ids, labels):
            hidden = self.embed(input_ids)
            logits = self.lm_head(hidden)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            return {"logits": logits, "loss": loss + (hidden * 0).sqrt().sum() if "scaler" in sys.argv else loss}

    torch.manual_seed(0)
    model = Model()
    held = copy.deepcopy(model) if "copies" in sys.argv else model
    optimizer = torch.optim.AdamW(held.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled="scaler" in sys.argv)
    for _ in range(25):
        ids = torch.randint(0, 50, (2, 8))
        scaler.scale(model(ids, labels=ids)["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    print("done")
"""


@pytest.mark.parametrize(
    ("mode", "cause", "remedy"),
    [("scaler", "loss-scaling", None), ("copies", "untrained-parameters", "rebuild-optimizer"), ("sound", None, None)],
)
def test_a_script_that_learns_nothing_in_silence(tmp_path, mode, cause, remedy):
    script = tmp_path / "silent.py"
    script.write_text(textwrap.dedent(SILENT), encoding="utf-8")
    ran = command("watch", "--json", "watched.json", script, mode, cwd=tmp_path)
    told = json.loads((tmp_path / "watched.json").read_text(encoding="utf-8"))
    assert ran.returncode == (1 if cause else 0), ran.stderr
    assert [finding["cause"] for finding in told["findings"]] == ([cause] if cause else [])
    verified = {each["name"] for finding in told["findings"] for each in finding["remedies"] if each["verified"]}
    assert verified == ({remedy} if remedy else set())
