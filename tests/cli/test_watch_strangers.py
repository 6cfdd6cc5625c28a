"""Scripts that the watch sees only in part: it says what it cannot see, and the script's own exit status stays."""

from __future__ import annotations

import json
import textwrap

import pytest

from numerics_suite.cli import watch

MODEL = """
    import os, subprocess, sys
    import torch
    from torch import nn

    def train(model, optimizer, steps=4, bad=False, call=None):
        for step in range(steps):
            value = torch.ones(2, 4) * (float("nan") if bad and step == 2 else 1.0)
            (model if call is None else call)(value).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
"""
NOTHING = "no module was trained in this process, so nothing was watched; other processes are not"
CAUGHT = "Linear: the script caught the NumericsError and went on; nothing was watched from there on"
NO_STEPS = "Linear: no torch.optim.Optimizer stepped it, so its values were looked at, and neither steps nor updates"

SCRIPTS = {
    "never trains": ("with torch.no_grad(): model(torch.ones(2, 4))\nsys.exit(5)", 5, [NOTHING], []),
    "trains in a subprocess": (
        "done = subprocess.run([sys.executable, '-c', 'print(1); raise SystemExit(6)'])\nsys.exit(done.returncode)",
        6, [NOTHING], [],
    ),
    "catches our exception": (
        "try:\n    train(model, optimizer, bad=True)\nexcept Exception as error:\n    print('caught', type(error).__name__)\nsys.exit(7)",
        7, [CAUGHT], ["out-of-range-input"],
    ),
    "forks workers": (
        "class Rows(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 6\n"
        "    def __getitem__(self, index): return torch.full((4,), 0.1 * index)\n"
        "for rows in torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context='fork'):\n"
        "    model(rows).square().mean().backward(); optimizer.step(); optimizer.zero_grad()\n"
        "sys.exit(8)",
        8, [], [],
    ),
    "forks a process that ends by itself": (
        "train(model, optimizer)\nchild = os.fork()\nif child == 0: sys.exit(9)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        9, [], [],
    ),
    "uses torch.compile": ("train(model, optimizer, call=torch.compile(model, backend='eager'))\nsys.exit(10)", 10, [], []),
    "uses torch.compile and fails": (
        "train(model, optimizer, bad=True, call=torch.compile(model, backend='eager'))\nsys.exit(10)", 1, [], ["out-of-range-input"],
    ),
    "has an optimizer of its own": (
        "class Own:\n"
        "    def step(self):\n"
        "        with torch.no_grad(): [p.sub_(1e-3 * p.grad) for p in model.parameters()]\n"
        "    def zero_grad(self): model.zero_grad()\n"
        "train(model, Own())\nsys.exit(11)",
        11, [NO_STEPS], [],
    ),
    "has an optimizer of its own and fails": (
        "class Own:\n    def step(self): pass\n    def zero_grad(self): model.zero_grad()\ntrain(model, Own(), bad=True)",
        1, [], ["out-of-range-input"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_seen_is_said_and_the_status_is_kept(name, tmp_path, monkeypatch, capfd):
    text, status, notes, causes = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(f"{textwrap.dedent(MODEL)}\n{text}\n", encoding="utf-8")
    assert watch.run(["--json", "watched.json", "train.py"]) == status
    told = json.loads((tmp_path / "watched.json").read_text(encoding="utf-8"))
    assert told["notes"] == notes
    assert [finding["cause"] for finding in told["findings"]] == causes
    said = capfd.readouterr().err.splitlines()
    assert [line.removeprefix("numerics-suite: ") for line in said if line.endswith(tuple(notes))] == notes, said
