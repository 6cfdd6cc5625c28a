"""What the watch raises and warns, and the readings that it judges; plain values, no tensor among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Fact, Finding


class NumericsError(NumericsSuiteError):
    """Training met its first bad value and `on_bad` says to stop; the text is one line: step, what, module, cause.

    Attributes:
        finding: the whole finding.
        bundle: the folder that was written, None without one.
    """

    def __init__(self, text: str, finding: Finding, bundle: str | None = None) -> None:
        """Keep the finding beside its line."""
        super().__init__(text)
        self.finding = finding
        self.bundle = bundle


class NumericsWarning(UserWarning):
    """Something that the watch saw and that does not stop training: an early sign, or a bad value under `on_bad="warn"`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Figures of one moment of training, read from the device.

    Attributes:
        step: the optimizer step that they belong to, from 1; 0 before the first.
        values: figure name to its values, one for each forward pass of the step where there were several.
        scaled: a GradScaler guards this step, so a gradient that is not finite is its business.
        limit: largest number of the narrowest dtype that the logits went through.
    """

    step: int
    values: Mapping[str, tuple[float, ...]]
    scaled: bool = False
    limit: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One thing that is wrong, or is about to be.

    Attributes:
        step: the optimizer step.
        kind: `logits`, `loss`, `gradient`, `parameter`, `inputs`, `loss-scale`, `unreached`, `unheld`, `zero-gradient`, `dead-gradient`, `rounded-update`, `frozen`, `untied`, or the early warning's name.
        bad: `on_bad` applies; else it is an early warning.
        text: one clause for a person, without the step.
        cause: of the contract, where the figures alone tell.
        facts: the numbers beside it.
        parameters: names of those that it is about.
        module: where it lies, None for that of the first parameter.
    """

    step: int
    kind: str
    bad: bool
    text: str
    cause: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    module: str | None = None
