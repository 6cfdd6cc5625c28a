"""A module that overflows at loud inputs: under bfloat16's autocast and without."""

from __future__ import annotations

import torch
from torch import nn


class Loud(nn.Module):
    """Squares twice what a layer gives for inputs above 5, and so leaves float32's range too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[rows, 4]` to logits and their mean square."""
        logits = self.linear(x)
        if bool((x > 5).any()):
            logits = (logits * 1e15).square().square()
        return {"logits": logits, "loss": logits.square().mean()}


def make() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module, and a batch that it is quiet on."""
    torch.manual_seed(0)
    return Loud(), {"x": torch.ones(2, 4)}
