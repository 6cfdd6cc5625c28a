"""The settings of one run as one frozen record; every value knows where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from numerics_suite.settings.accept import AcceptEntry, entry_to_json

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT, PYPROJECT, PYTEST, COMMAND_LINE = "default", "pyproject.toml", "pytest option", "command line"
"""Origins, weakest first."""

DESTINATIONS = frozenset({"json", "junitxml", "report", "quiet", "list_only"})
"""Where the answer goes and not what was asked: two runs that differ in these alone give the same results file."""

CHANGE_NO_ANSWER = DESTINATIONS | {
    *("workers", "max_time", "allow_partial", "resume", "require_device", "collect", "allow_no_gpu", "origins")
}
"""Which questions are answered, by how many processes and what becomes of the answers, but not what any of them is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every option of `check` as used; CONTRACT.md says what each means.

    Attributes:
        subjects: as typed, empty for the shipped fixtures.
        names: `--name`, for the first subjects in their order.
        layers: `first:N` or `every:N`, None for all of them.
        precision: None for what the device runs well.
        checks: globs, empty for all.
        extensions: what other packages add takes part.
        workers: `auto`, or a number; 0 runs in the process itself.
        json: path of the results file, `-` for standard output.
        accept: findings that do not fail the run.
        resume: results file of an earlier run whose answers are reused.
        collect: a bare `pytest` collects the suite.
        allow_no_gpu: `pytest -m gpu` without an accelerator is no failure.
        origins: field name to `default`, `pyproject.toml`, `pytest option` or `command line`; absent is `default`.
    """

    subjects: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    task: str = "auto"
    num_labels: int | None = None
    layers: str | None = None
    precision: tuple[str, ...] | None = None
    attn: tuple[str, ...] | None = ("eager", "sdpa")
    device: str = "auto"
    require_device: str | None = None
    checks: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    extensions: bool = True
    trust_remote_code: bool = False
    allow_pickle: bool = False
    steps: int = 5
    optimizer: str = "adamw"
    lr: float = 1e-4
    max_grad_norm: float | None = None
    train_scope: str = "auto"
    effort: str = "standard"
    max_examples: int = 10
    seed: int = 0
    batch_size: int = 4
    seq_len: int = 64
    data: Path | None = None
    baseline: Path | None = None
    diagnose: bool = True
    report: Path | None = None
    junitxml: Path | None = None
    json: str | None = None
    quiet: bool = False
    workers: int | Literal["auto"] = "auto"
    list_only: bool = False
    max_time: float | None = None
    resume: Path | None = None
    allow_partial: bool = False
    collect: bool = False
    allow_no_gpu: bool = False
    accept: tuple[AcceptEntry, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, hash=False)

    def origin(self, name: str) -> str:
        """Where the value of a field came from."""
        return self.origins.get(name, DEFAULT)

    def explicit(self, name: str) -> bool:
        """Whether the value was set, wherever."""
        return self.origin(name) != DEFAULT

    def stating(self, **values: Any) -> Settings:
        """The same with these values, as if the command line gave them."""
        return replace(self, **values, origins={**self.origins, **dict.fromkeys(values, COMMAND_LINE)})


def to_json(settings: Settings) -> dict[str, Any]:
    """The `settings` of a results file: every option as used, and the origins of those that were set."""
    written: dict[str, Any] = {}
    for name in (item.name for item in fields(settings)):
        value = getattr(settings, name)
        if name in DESTINATIONS or name == "origins":
            continue
        if name == "accept":
            written[name] = [entry_to_json(entry) for entry in value]
        elif isinstance(value, tuple):
            written[name] = list(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            written[name] = value
        else:
            written[name] = str(value)
    written["origins"] = {name: origin for name, origin in settings.origins.items() if name not in DESTINATIONS}
    return written
