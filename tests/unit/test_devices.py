"""Which device runs the cells."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from numerics_suite.core.errors import BadInputError
from numerics_suite.devices.device import accelerator, resolve_device


def refused() -> NoReturn:
    """As torch 2.6, built for CUDA, answers on a machine without one."""
    message = "Cannot access accelerator device when none is available."
    raise RuntimeError(message)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", refused)


@pytest.mark.usefixtures("without")
def test_without_an_accelerator_the_cpu_runs_and_torch_is_not_asked_for_its_kind() -> None:
    assert accelerator() is None
    assert resolve_device("auto") == "cpu"
    with pytest.raises(BadInputError, match="torch sees no accelerator"):
        resolve_device("cuda")


def test_an_accelerator_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert resolve_device("auto") == "xpu"
    with pytest.raises(BadInputError, match="torch sees 1 of that kind"):
        resolve_device("xpu:1")
