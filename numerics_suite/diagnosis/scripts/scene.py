"""The records that a script is written from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from numerics_suite.core.records import Finding
from numerics_suite.devices.kinds import kind_of
from numerics_suite.engine.cell_context import CellContext

SYMPTOM = "REPRODUCED"
"""How the assertion of every script begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptContext:
    """What a script is made of: where the model comes from, and the batch.

    Attributes:
        config: the checkpoint's config, cut down; None for the checkpoint itself and for a factory.
    """

    check: str
    finding: Finding
    context: CellContext
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None

    @property
    def source(self) -> Literal["config", "checkpoint", "factory"]:
        """Where the script takes its model from."""
        if self.config is not None:
            return "config"
        return "factory" if self.context.subject.kind == "factory" else "checkpoint"

    @property
    def measurement(self) -> str:
        """Name of the measurement that was over its budget."""
        return str(self.finding.evidence.get("measurement", ""))

    @property
    def module(self) -> str:
        """The finding's module within a text of the script: a name with anything else in it would be code there."""
        return re.sub(r"[^\w.\[\]-]", "?", self.finding.module or "the model")

    @property
    def allowed(self) -> float:
        """The budget's limit."""
        return float(self.finding.evidence["allowed"])

    @property
    def device_kind(self) -> str:
        """`cpu`, `cuda`, …: what autocast and the loss scaler are asked for."""
        return kind_of(self.context.cell.device)


Facts = Mapping[str, Any]
Asks = Callable[[ScriptContext], Facts | None]


def nothing_more(_: ScriptContext) -> Facts:
    """The facts of a template that asks for none of its own."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The part of a script that shows the symptom.

    Attributes:
        facts: what the template says beyond what every one knows; None where this scene cannot show the symptom.
        model: the script begins with loading `model`.
        fills: uninitialised memory is NaN while the model is made, where that matters.
        twins: float64 copies of the model are made, which need their memory.
        rows: fewest rows that can show it.
    """

    template: str = ""
    facts: Asks = nothing_more
    model: bool = True
    batch: bool = True
    fills: bool = False
    twins: bool = False
    rows: int = 1
