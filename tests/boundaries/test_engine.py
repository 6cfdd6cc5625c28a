"""Only `devices/` names what differs between devices, and only `engine/` runs a model."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from boundaries.source_tree import PACKAGE, source_files
from torch import nn

import numerics_suite
from numerics_suite.cli.main import main
from numerics_suite.core.registry import own_check_ids

# --- names of devices ------------------------------------------------------------------------------------------------

MODULES = ("torch.cuda", "torch.accelerator", "torch.mps", "torch.xpu", "torch.backends.cuda", "torch.backends.cudnn")
NAMES = frozenset(
    """
    autocast is_autocast_enabled get_autocast_dtype is_autocast_available GradScaler fork_rng manual_seed get_rng_state
    set_rng_state allow_tf32 fp32_precision set_float32_matmul_precision use_deterministic_algorithms
    set_deterministic_debug_mode
    fill_uninitialized_memory mem_get_info memory_allocated empty_cache current_stream Event
    """.split()  # noqa: SIM905 - a list would take a line per name
)
"""Attributes of torch that a device decides about."""

EXEMPT = {
    "numerics_suite/engine/kept_step.py": {
        "autocast",
        "set_rng_state",
    },  # a bundle carries it to where this package is not
    "numerics_suite/engine/weight_stream.py": {"get_rng_state", "set_rng_state"},  # with torch's own helper for devices
    "numerics_suite/training_watch/patches.py": {"GradScaler"},  # the user's scaler is watched
    "numerics_suite/versions/ray_backend.py": {"Event"},  # threading's
}


def device_names(path: str, tree: ast.AST) -> Iterator[str]:
    """`file:line name` of each attribute of torch that only `devices/` may name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        whole = ast.unparse(node)
        if whole in MODULES or (whole.startswith("torch.") and node.attr in NAMES - EXEMPT.get(path, set())):
            yield f"{path}:{node.lineno} {whole}"


def test_only_devices_names_what_a_device_decides_about() -> None:
    found = [name for file in source_files() if file.stage != "devices" for name in device_names(file.path, file.tree)]
    assert not found


@pytest.mark.parametrize(
    "text", ["torch.cuda.synchronize()", "torch.autocast('cpu')", "torch.random.fork_rng()", "torch.amp.autocast"]
)
def test_a_name_of_a_device_elsewhere_is_seen(text: str) -> None:
    assert list(device_names("a.py", ast.parse(f"import torch\n{text}")))


def test_every_exemption_is_used() -> None:
    for path, names in EXEMPT.items():
        text = (PACKAGE.parent / path).read_text(encoding="utf-8")
        assert not [name for name in names if not re.search(rf"\b{name}\b", text)], path


# --- calls of models -------------------------------------------------------------------------------------------------

OWN = f"{PACKAGE}/"
ENGINE = f"{PACKAGE}/engine/"
SCRIPT = "<reproducer>"
"""The file of a script that shows a finding alone: the user's own code, wherever it is run."""


def caller_outside_the_engine() -> str | None:
    """`file:line` of the nearest frame of the package on the stack, where that is not in `engine/`."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == SCRIPT:
            return None
        if file.startswith(OWN):
            return None if file.startswith(ENGINE) else f"{Path(file).relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


@contextmanager
def watched_calls() -> Iterator[set[str]]:
    """Within it every call of a module is looked at; yields the places outside `engine/` that made one."""
    found: set[str] = set()
    original: Callable[..., Any] = nn.Module.__call__

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        place = caller_outside_the_engine()
        if place is not None:
            found.add(place)
        return original(self, *args, **kwargs)

    nn.Module.__call__ = watched
    try:
        yield found
    finally:
        nn.Module.__call__ = original


SMALL = ("--max-examples", "1", "--steps", "1", "--batch-size", "2", "--seq-len", "8", "-n", "0", "--quiet")


def test_only_the_engine_runs_a_model(tmp_path: Path) -> None:
    """Every check of a causal model and of a classifier, in a precision with autocast."""
    out = tmp_path / "out.json"
    with watched_calls() as found:
        arguments = ("fixture:glm4-tiny", "fixture:glm4-tiny-classifier", "--precision", "amp-bf16", "--attn", "sdpa")
        assert main(["check", *arguments, *SMALL, "--json", str(out)]) == 0
    assert not found
    assert {check for check in own_check_ids() if not check.startswith("baseline.")} <= set(
        re.findall(r'"check": "([^"]+)"', out.read_text(encoding="utf-8"))
    )


def test_only_the_engine_runs_a_model_while_a_finding_is_diagnosed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experiments, remedies and the reproducer of an uninitialised head."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_head.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with watched_calls() as found:
        assert main(["check", "factory:broken_head:make", "--precision", "bf16", "--attn", "eager", *SMALL]) == 1
    assert not found


def test_only_the_engine_runs_a_model_while_the_watch_diagnoses(tmp_path: Path) -> None:
    """The caught steps run again, are located, and remedies are tried on them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e30)

    def train() -> None:
        with numerics_suite.watch(model, optimizer, bundle=tmp_path / "bundle"):
            for _ in range(6):
                optimizer.zero_grad()
                model(torch.ones(2, 4)).square().mean().backward()
                optimizer.step()

    with watched_calls() as found, pytest.raises(numerics_suite.NumericsError):
        train()
    assert not found


BROKEN = """
import torch
from transformers import AutoModelForSequenceClassification
from numerics_suite.subjects.fixtures import fixture_path

def make():
    model = AutoModelForSequenceClassification.from_pretrained(fixture_path("glm4-tiny-classifier"))
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    ids = torch.arange(1, 13).reshape(2, 6)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
"""


def test_a_call_outside_the_engine_is_seen() -> None:
    code = compile("def call(model, value):\n    return model(value)\n", f"{OWN}checks/wrong.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    with watched_calls() as found:
        names["call"](nn.Linear(2, 2), torch.ones(2))
    assert found == {"checks/wrong.py:2"}
