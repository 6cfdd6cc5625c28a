"""Where the program is: the module that runs, and the source line, in the forward pass and in the backward pass.

An op of the backward pass has neither a module nor a line of the model on the stack. Autograd numbers its nodes in the
order of the forward pass, so each number is kept with the module and the line that made the node.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

OWN = f"{Path(__file__).parent.parent}/"
"""Not resolved: frames name the path of import, which is a link in an environment of a matrix."""

TORCH = f"{Path(torch.__file__).parent}/"
OPTIMIZERS = f"{TORCH}optim/"
ENGINE = "_engine_run_backward"
"""Torch's function that runs the backward pass; frames outside it on the stack only called it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlace:
    """A module by its dotted name ("" is the model itself, None unknown) and `file.py:123` of the line that called."""

    module: str | None
    source: str | None


@dataclass(slots=True)
class ModuleStack:
    """Names of the modules that are running, outermost first, and where each autograd node was made."""

    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    made: dict[int, ModulePlace] = field(default_factory=dict)

    def enter(self, name: str) -> None:
        """A module begins."""
        self.names.append(name)
        self.starts.append(_sequence())

    def leave(self) -> None:
        """The innermost module ends; autograd's nodes recorded within it belong to it."""
        if self.names:
            self.spans.append((self.starts.pop(), _sequence(), self.names.pop()))

    def of_backward(self) -> str | None:
        """The module whose forward pass recorded the node that autograd is at, None outside a backward pass."""
        node = current_node()
        if node is None:
            return None
        number = node._sequence_nr()  # noqa: SLF001 - torch has no public way to ask
        around = [(stop - start, name) for start, stop, name in self.spans if start <= number < stop]
        return min(around)[1] if around else None

    def note(self) -> None:
        """Record the place of autograd's last node, unless it has one: its own op comes first."""
        number = _sequence() - 1
        if number >= 0 and number not in self.made:
            self.made[number] = ModulePlace(module=self.names[-1] if self.names else None, source=model_line())

    def place(self, outermost: CodeType | None) -> ModulePlace:
        """Module and line of the op that runs now.

        Args:
            outermost: of the function that began to watch; frames beyond it are no part of the run.
        """
        line = model_line(outermost)
        if self.names:
            return ModulePlace(module=self.names[-1], source=line)
        node = current_node()
        if node is None:
            return ModulePlace(module=None, source=line)
        made = self.made.get(node._sequence_nr())  # noqa: SLF001 - as above
        module = self.of_backward() if made is None or made.module is None else made.module
        # A hand-written backward has lines of its own, which say more than the line that called its forward.
        return ModulePlace(module=module, source=line or (made.source if made is not None else None))


def current_node() -> Any:
    """The node that autograd is at, None outside a backward pass."""
    return torch._C._current_autograd_node()  # noqa: SLF001 - torch has no public way to ask


def _sequence() -> int:
    """The number that autograd gives to the next node of this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]  # noqa: SLF001 - torch has no public way to ask


@contextmanager
def module_stack(model: nn.Module) -> Iterator[ModuleStack]:
    """Track the running module by hooks, which are removed on exit."""
    stack = ModuleStack()
    handles = []

    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        # What a hook returns would take the place of the module's output.
        stack.leave()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, n=name: stack.enter(n)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def model_line(outermost: CodeType | None = None) -> str | None:
    """`file.py:123` of the innermost frame that belongs to neither torch nor this package; else the optimizer's own.

    In a backward pass only what runs inside it counts, such as a hand-written backward or a recomputed forward.

    Args:
        outermost: code of the function at which the walk ends.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to walk frames cheaply
    optimizer = None
    while frame is not None and frame.f_code is not outermost and frame.f_code.co_name != ENGINE:
        file = frame.f_code.co_filename
        if file.startswith(OPTIMIZERS) and optimizer is None:
            optimizer = _line(frame)
        elif not file.startswith((TORCH, OWN, "<")):
            return optimizer or _line(frame)
        frame = frame.f_back
    return optimizer


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
