"""What follows an alarm: a warning, or at the first bad value the finding, the bundle, and the end of the run if asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from numerics_suite.core.records import Finding
from numerics_suite.core.text import harmless
from numerics_suite.training_watch.alarms import Alarm, NumericsError, NumericsWarning, Reading
from numerics_suite.training_watch.bundle import SCRIPT_NAME, Caught, write_bundle
from numerics_suite.training_watch.diagnosis import CaughtContext, finding_of
from numerics_suite.training_watch.remedies import left_untried, with_remedies_tried

OnBad = Literal["stop", "warn", "skip"] | Callable[[Finding], Any]
POLICIES = ("stop", "warn", "skip")

LOGGED = {
    "loss": "loss",
    "logits": "largest_logit",
    "gradient norm": "gradient_norm",
    "parameter norm": "parameter_norm",
    "update ratio": "update_ratio",
    "loss scale": "loss_scale",
}
"""Figures that are logged, under the names that they get after `numerics/`."""


def checked_policy(on_bad: object) -> OnBad:
    """The value of `on_bad`.

    Raises:
        ValueError: it is none.
    """
    if callable(on_bad) or on_bad in POLICIES:
        return on_bad  # type: ignore[return-value]
    message = f"watch: on_bad must be 'stop', 'warn', 'skip' or a callable, not {on_bad!r}"
    raise ValueError(message)


def logged(reading: Reading) -> dict[str, float]:
    """The reading's values under the names of curves; of several forward passes the largest."""
    return {f"numerics/{LOGGED[name]}": max(values) for name, values in reading.values.items() if name in LOGGED}


def send(log: Any, values: dict[str, float], step: int) -> None:
    """Hand values to a SummaryWriter, to anything with its `add_scalar`, or to a function of (values, step)."""
    if log is None or not values:
        return
    if hasattr(log, "add_scalar"):
        for name, value in values.items():
            log.add_scalar(name, value, step)
    else:
        log(values, step)


def early(alarm: Alarm) -> None:
    """Warn of what is not bad yet."""
    warnings.warn(harmless(f"step {alarm.step}: {alarm.text}"), NumericsWarning, stacklevel=2)


def several_processes() -> bool:
    """Whether this is one process of several that train together."""
    return bool(
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


class Response:
    """Answers bad values: the first in full, later ones by counting.

    Attributes:
        finding: of the first bad value.
        bundle_path: what was written for it.
        bad_steps: steps with a bad value, in order.
    """

    def __init__(self, on_bad: OnBad, bundle: Path | None) -> None:
        """Nothing bad was seen yet."""
        self.on_bad, self.bundle = on_bad, bundle
        self.finding: Finding | None = None
        self.bundle_path: Path | None = None
        self.bad_steps: list[int] = []

    @property
    def policy(self) -> str:
        """`on_bad` as text."""
        return self.on_bad if isinstance(self.on_bad, str) else getattr(self.on_bad, "__name__", repr(self.on_bad))

    def answer(self, alarm: Alarm, scene: CaughtContext, caught: Caught) -> str | None:
        """Find out, write down, tell.

        Returns:
            The line to stop with, None to go on.
        """
        if alarm.step not in self.bad_steps:
            self.bad_steps.append(alarm.step)
        if self.finding is None:
            self.finding = self._with_remedies(finding_of(alarm, scene), scene)
            self.bundle_path = self._write(scene, caught)
            if self.bundle_path is not None:
                self.finding = replace(self.finding, reproducer=str(self.bundle_path / SCRIPT_NAME))
        elif self.on_bad != "skip":
            return None
        action = self.on_bad(self.finding) if callable(self.on_bad) else self.on_bad
        line = self.line(alarm)
        if action in {"warn", "skip"}:
            warnings.warn(harmless(line), NumericsWarning, stacklevel=2)
        return line if action == "stop" else None

    def _with_remedies(self, finding: Finding, scene: CaughtContext) -> Finding:
        """The remedies tried where the loop ends here; one that goes on is not kept waiting."""
        if self.on_bad != "stop":
            return left_untried(finding, "not tried while training goes on: numerics-suite check --bundle does")
        try:
            return with_remedies_tried(finding, scene)
        except RuntimeError as error:
            return left_untried(finding, f"could not be tried: {type(error).__name__}")

    def _write(self, scene: CaughtContext, caught: Caught) -> Path | None:
        """The bundle's folder; a disk that is full must not hide what was found."""
        if self.bundle is None or self.finding is None:
            return None
        target = self.bundle
        if several_processes():
            target = target.with_name(f"{target.name}-rank{torch.distributed.get_rank()}")
        try:
            return write_bundle(target, self.finding, scene, caught)
        except OSError as error:
            warnings.warn(f"the bundle could not be written: {error}", NumericsWarning, stacklevel=2)
            return None

    def line(self, alarm: Alarm) -> str:
        """Step, what, where, why, and the bundle, in one line."""
        assert self.finding is not None
        text = self.finding.title if self.finding.step == alarm.step else alarm.text
        where = f" (bundle: {self.bundle_path})" if self.bundle_path is not None else ""
        return f"step {alarm.step}: {text}{where}"

    def error(self, line: str) -> NumericsError:
        """What is raised to stop."""
        assert self.finding is not None
        return NumericsError(line, self.finding, None if self.bundle_path is None else str(self.bundle_path))
