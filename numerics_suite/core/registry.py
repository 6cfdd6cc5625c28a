"""The register of checks: ids from the files' paths, functions on demand.

A check is a function in `numerics_suite/checks/GROUP/NAME.py` decorated with :func:`check`. Its id is its path:
`checks/load/head_init.py` is `load.head-init`. Other packages add checks as entry points, whose name is the id. Ids are
listed without importing a check (nor torch).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numerics_suite.core.deprecation import renamed
from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.core.extensions import CHECKS, extensions, load_as

if TYPE_CHECKING:
    from numerics_suite.core.records import Budget  # its many records take longer to make than all else here

Scope = Literal["subject", "precision", "cell"]
"""How often a check is asked: once a subject, once a precision of it, or in every cell."""

GROUPS = ("load", "inputs", "forward", "reference", "train", "baseline")
"""Our own; the group of an added check is the prefix of the package that adds it."""


@renamed(of_broken="runs_on_nonfinite")
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """A check and what it needs before it can be asked.

    Attributes:
        id: such as `forward.padding`.
        function: the cell's context (and a batch, where `batches`) to measurements, and series of numbers to be shown with them.
        scope: how often it is asked.
        batches: Hypothesis draws the batches for it; else it is called once with the context alone.
        trains: it runs training steps, so a serving precision and a quantised checkpoint skip it.
        needs: capabilities of the subject: `checkpoint` (files), `token-ids`, `head` (a classification head),
            `causal`, `tokenizer`.
        seeks: the measurement that Hypothesis climbs towards (`target()`), None elsewhere.
        share: of `--max-examples` that is asked; a law under twins costs tens of forward passes a batch.
        adds: columns that it adds to a batch, which is drawn that much shorter where the model's longest row ends.
        reads: results that checks of a cell share and that are large; each is dropped after the last check that reads it.
        runs_on_nonfinite: asked also where weights are NaN or infinite; elsewhere every answer would be the same NaN.
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
    adds: int = 0
    reads: frozenset[str] = frozenset()
    runs_on_nonfinite: bool = False
    doc: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedCheck:
    """A check of another package: the value of an entry point of `numerics_suite.checks`.

    Attributes:
        spec: the check, whose id is the entry point's name.
        budgets: what its measurements may be, at least one.
    """

    spec: CheckSpec
    budgets: tuple[Budget, ...]


@renamed(of_broken="runs_on_nonfinite")
def check(  # noqa: PLR0913 - the fields of CheckSpec
    *,
    scope: Scope = "cell",
    batches: bool = False,
    trains: bool = False,
    needs: tuple[str, ...] = (),
    seeks: str | None = None,
    share: float = 1.0,
    adds: int = 0,
    reads: tuple[str, ...] = (),
    runs_on_nonfinite: bool = False,
    check_id: str | None = None,
) -> Callable[[Callable[..., Any]], CheckSpec]:
    """Turn a function into a check whose id is the path of its file, or the one that is given; keywords as in :class:`CheckSpec`."""

    def wrap(function: Callable[..., Any]) -> CheckSpec:
        named = check_id or ".".join(function.__module__.split(".")[-2:]).replace("_", "-")
        return CheckSpec(
            id=named,
            function=function,
            scope=scope,
            batches=batches,
            trains=trains,
            needs=frozenset(needs),
            seeks=seeks,
            share=share,
            adds=adds,
            reads=frozenset(reads),
            runs_on_nonfinite=runs_on_nonfinite or named.startswith("load."),
            doc=(function.__doc__ or "").strip().partition("\n")[0],
        )

    return wrap


@cache
def own_check_ids() -> tuple[str, ...]:
    """Ids of the checks of this package, in the order in which they are run; imports none of them."""
    folder = Path(__file__).resolve().parent.parent / "checks"
    return tuple(
        f"{group}.{file.stem.replace('_', '-')}"
        for group in GROUPS
        for file in sorted((folder / group).glob("[a-z]*.py"))
    )


def check_ids() -> tuple[str, ...]:
    """Ids of every check that is installed, ours first, in the order in which they are run; imports none of them.

    Raises:
        BadInputError: another package adds one whose id cannot be used.
    """
    return (*own_check_ids(), *extensions(CHECKS, taken=GROUPS))


def get_check(check_id: str) -> CheckSpec:
    """The check of that id.

    Raises:
        BadInputError: no such check; the message has the nearest id. Or one of another package that cannot be used.
    """
    if check_id in own_check_ids():
        return _own_check(check_id)
    added = added_check(check_id)
    if added is None:
        message = f"unknown check '{check_id}'{nearest(check_id, check_ids())}"
        raise BadInputError(message)
    return added.spec


@cache
def _own_check(check_id: str) -> CheckSpec:
    group, name = check_id.split(".")
    module = importlib.import_module(f"numerics_suite.checks.{group}.{name.replace('-', '_')}")
    specs = [value for value in vars(module).values() if isinstance(value, CheckSpec) and value.id == check_id]
    if len(specs) != 1:
        message = f"{module.__name__} must hold exactly one check"
        raise AssertionError(message)
    return specs[0]


def added_check(check_id: str) -> AddedCheck | None:
    """The check of that id that another package adds, None where none does.

    Raises:
        BadInputError: it cannot be loaded, or is not of the entry's name.
    """
    extension = extensions(CHECKS, taken=GROUPS).get(check_id)
    if extension is None:
        return None
    added = load_as(extension, AddedCheck)
    if added.spec.id != check_id:
        extension.refuse(f"the check's id is '{added.spec.id}', and must be the entry point's name")
    if not added.spec.doc:
        extension.refuse("the check's function has no docstring, whose first line is the question")
    return added
