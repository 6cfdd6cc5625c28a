"""The register of checks: ids from the files' paths, functions on demand.

A check is a function in `numerics_suite/checks/GROUP/NAME.py` decorated with :func:`check`. Its id is its path:
`checks/load/head_init.py` is `load.head-init`. Ids are listed without importing a check (nor torch).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from numerics_suite.core.errors import BadInputError, nearest

Scope = Literal["subject", "precision", "cell"]
"""How often a check is asked: once a subject, once a precision of it, or in every cell."""

GROUPS = ("load", "inputs", "forward", "reference", "train", "baseline")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """A check and what it needs before it can be asked.

    Attributes:
        id: such as `forward.padding`.
        function: evidence (and a batch, where `batches`) to measurements, and series of numbers to be shown beside them.
        scope: how often it is asked.
        batches: Hypothesis draws the batches for it; else it is called once with evidence alone.
        trains: it runs training steps, so a serving precision and a quantised checkpoint skip it.
        needs: capabilities of the subject: `checkpoint` (files), `token-ids`, `head` (a classification head),
            `causal`, `tokenizer`.
        seeks: the measurement that Hypothesis climbs towards (`target()`), None elsewhere.
        share: of `--max-examples` that is asked; a law under twins costs tens of forward passes a batch.
        of_broken: asked also where weights are NaN or infinite; elsewhere every answer would be the same NaN.
        doc: the first line of the function's docstring: the question.
    """

    id: str
    function: Callable[..., Any]
    scope: Scope = "cell"
    batches: bool = False
    trains: bool = False
    needs: frozenset[str] = frozenset()
    seeks: str | None = None
    share: float = 1.0
    of_broken: bool = False
    doc: str = ""


def check(  # noqa: PLR0913 - the fields of CheckSpec
    *,
    scope: Scope = "cell",
    batches: bool = False,
    trains: bool = False,
    needs: tuple[str, ...] = (),
    seeks: str | None = None,
    share: float = 1.0,
    of_broken: bool = False,
) -> Callable[[Callable[..., Any]], CheckSpec]:
    """Turn a function into a check whose id is the path of its file.

    Args:
        scope: see :class:`CheckSpec`.
        batches: see :class:`CheckSpec`.
        trains: see :class:`CheckSpec`.
        needs: see :class:`CheckSpec`.
        seeks: see :class:`CheckSpec`.
        share: see :class:`CheckSpec`.
        of_broken: see :class:`CheckSpec`.
    """

    def wrap(function: Callable[..., Any]) -> CheckSpec:
        group, name = function.__module__.split(".")[-2:]
        return CheckSpec(
            id=f"{group}.{name.replace('_', '-')}",
            function=function,
            scope=scope,
            batches=batches,
            trains=trains,
            needs=frozenset(needs),
            seeks=seeks,
            share=share,
            of_broken=of_broken or group == "load",
            doc=(function.__doc__ or "").strip().splitlines()[0],
        )

    return wrap


@cache
def check_ids() -> tuple[str, ...]:
    """Ids of every check that is installed, in the order in which they are run; imports none of them."""
    folder = Path(__file__).resolve().parent.parent / "checks"
    return tuple(
        f"{group}.{file.stem.replace('_', '-')}"
        for group in GROUPS
        for file in sorted((folder / group).glob("[a-z]*.py"))
    )


@cache
def get_check(check_id: str) -> CheckSpec:
    """The check of that id.

    Raises:
        BadInputError: no such check; the message has the nearest id.
    """
    if check_id not in check_ids():
        message = f"unknown check '{check_id}'{nearest(check_id, check_ids())}"
        raise BadInputError(message)
    group, name = check_id.split(".")
    module = importlib.import_module(f"numerics_suite.checks.{group}.{name.replace('-', '_')}")
    specs = [value for value in vars(module).values() if isinstance(value, CheckSpec) and value.id == check_id]
    if len(specs) != 1:
        message = f"{module.__name__} must hold exactly one check"
        raise AssertionError(message)
    return specs[0]
