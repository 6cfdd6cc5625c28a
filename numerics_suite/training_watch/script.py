"""An unchanged training script under the watch: models and optimizers are found as it calls them."""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from numerics_suite.core.attributes import with_attribute
from numerics_suite.training_watch.hooks import plain_model
from numerics_suite.training_watch.patches import is_unheard, listening
from numerics_suite.training_watch.session import Watch
from numerics_suite.training_watch.updates import holds_copies
from numerics_suite.training_watch.watch_settings import WatchSettings


class Finder:
    """Opens a watch on each model that the script trains.

    The outermost module that is called with gradients on and holds parameters to train is a model; an optimizer belongs to the
    models whose parameters it holds.

    Attributes:
        watches: one for each model, in the order of their first calls.
    """

    def __init__(self, settings: WatchSettings, *, on_bad: str, bundle: Path | None) -> None:
        """Nothing is found yet."""
        self.settings, self.on_bad, self.bundle = settings, on_bad, bundle
        self.watches: list[Watch] = []
        self._bound: set[int] = set()
        self._made: list[weakref.ref[torch.optim.Optimizer]] = []
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Within it models and optimizers are found; every hook is gone after, and the last figures are read.

        Raises:
            NumericsError: they are bad.
        """
        with contextlib.ExitStack() as stack:
            self._stack = stack
            stack.callback(register_optimizer_step_pre_hook(self._on_step).remove)
            # Before any watch listens: the optimizer of a GradScaler is known to it then, whether or not it ever steps.
            stack.enter_context(listening("scaler", self._on_scaler))
            stack.enter_context(_optimizers_made(self._made))
            stack.enter_context(_outermost_calls(self._on_call))
            yield

    def notes(self, *, stopped: bool) -> list[str]:
        """What the watch could not see of the script, a line each.

        Args:
            stopped: the script ended where the watch stopped it.
        """
        if not self.watches:
            return ["no module was trained in this process, so nothing was watched; other processes are not"]
        found = []
        for watch in self.watches:
            name = type(watch.model).__name__
            if watch.step <= 1 and not watch._stepped and watch.finding is None:  # noqa: SLF001 - for the notes alone
                found.append(
                    f"{name}: no torch.optim.Optimizer stepped it, so its values were looked at, and neither steps nor updates"
                )
            if watch.finding is not None and self.on_bad == "stop" and not stopped:
                found.append(
                    f"{name}: the script caught the NumericsError and went on; nothing was watched from there on"
                )
        return found

    def _on_call(self, module: nn.Module) -> None:
        if is_unheard() or not torch.is_grad_enabled() or any(watch.called is module for watch in self.watches):
            return
        inner = plain_model(module)
        if any(p.requires_grad for p in inner.parameters()):
            watch = Watch(module, settings=self.settings, on_bad=self.on_bad, bundle=self.bundle)
            self.watches.append(self._stack.enter_context(watch))
            for optimizer in filter(None, [reference() for reference in self._made]):
                if _holds_of(optimizer, watch.model):
                    watch.bind(optimizer)

    def _on_scaler(self, _scaler: Any, optimizer: Any, *, before: bool) -> None:
        if before and isinstance(inner := getattr(optimizer, "optimizer", optimizer), torch.optim.Optimizer):
            self._on_step(inner, None, None)

    def _on_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        if is_unheard() or id(optimizer) in self._bound:
            return
        self._bound.add(id(optimizer))
        owners = [watch for watch in self.watches if _holds_of(optimizer, watch.model)]
        for watch in owners or [watch for watch in self.watches if holds_copies(optimizer, watch.model)]:
            watch.bind(optimizer)


def _holds_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in held for p in model.parameters())


@contextlib.contextmanager
def _optimizers_made(made: list[weakref.ref[torch.optim.Optimizer]]) -> Iterator[None]:
    """Within it each optimizer is noted as it is made, so that it is known before its first step."""
    original = torch.optim.Optimizer.__init__

    def patched(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not is_unheard():
            made.append(weakref.ref(self))

    with with_attribute(torch.optim.Optimizer, "__init__", patched):
        yield


@contextlib.contextmanager
def _outermost_calls(told: Any) -> Iterator[None]:
    """Within it `told` gets each module that is called from no other module, before its forward pass.

    What such a module calls runs as ever: the patch is off meanwhile, so it costs a call and torch.compile never meets it.
    """
    original = nn.Module.__call__

    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        try:
            told(module)
            return original(module, *args, **kwargs)
        finally:  # whatever another thread has made of it meanwhile
            nn.Module.__call__ = patched  # type: ignore[method-assign]

    own_compile = torch.compile

    @functools.wraps(own_compile)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        # A compiled module keeps the method that it finds now, and traces it: it must be torch's own.
        with with_attribute(nn.Module, "__call__", original):
            return own_compile(*args, **kwargs)

    with with_attribute(nn.Module, "__call__", patched), with_attribute(torch, "compile", compiled):
        yield


def run_script(script: Path, arguments: Sequence[str], finder: Finder) -> int:
    """Run a script as `python SCRIPT ARGS…` would, watched.

    Returns:
        The exit status that it chose.

    Raises:
        NumericsError: the watch stopped it.
        Exception: its own, as it was raised.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "argv", sys.argv)
        stack.callback(setattr, sys, "path", list(sys.path))
        sys.argv = [str(script), *arguments]
        # `python script.py` puts the script's folder where this process has the tool's.
        sys.path.insert(0, str(script.resolve().parent))
        with finder.looking():
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as ending:
                return _status(ending.code)
    return 0


def _status(code: object) -> int:
    """The exit status of `sys.exit(code)`; a text is printed and means 1."""
    if code is None or isinstance(code, int):
        return int(code or 0)
    sys.stderr.write(f"{code}\n")
    return 1
