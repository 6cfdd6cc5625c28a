"""The condition of a run: precision, device, seed. Entering sets everything; leaving restores everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from numerics_suite.devices import arithmetic, random_state
from numerics_suite.devices.kinds import main_device
from numerics_suite.devices.precisions import Precision


def dtype_of(name: str) -> torch.dtype:
    """`torch.dtype` of a name such as `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What surrounds a pass.

    Attributes:
        precision: the recipe.
        device: where the model is; several, with commas, over which it is spread.
        seed: of the random states within, None to leave them alone.
    """

    precision: Precision
    device: str
    seed: int | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of its autocast sections, None without them."""
        return None if self.precision.autocast is None else dtype_of(self.precision.autocast)

    @property
    def main_device(self) -> str:
        """The device for inputs."""
        return main_device(self.device)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass: arithmetic switches, autocast, random states."""
        with self.arithmetic(), arithmetic.autocast(self.main_device, self.autocast):
            yield

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Around a backward pass, in which autocast has no part: the arithmetic switches and random states."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(arithmetic.switches(tf32=self.precision.tf32, device=self.device))
            if self.seed is not None:
                stack.enter_context(random_state.torch_seeded(self.seed))
            yield
