"""Records made from a file that somebody else wrote, held to the types that they declare."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from numerics_suite.core.rehearsal import Rehearsal


def refuse_wrong_types(record: Any, where: str = "") -> None:
    """See that every field of a record, and of the records in it, has the type that its class declares.

    Args:
        record: a dataclass.
        where: of the record, for the message.

    Raises:
        TypeError: naming the first field that has another.
    """
    kind: Any = type(record)
    hints = _hints(kind)
    for item in fields(record):
        _refuse(getattr(record, item.name), hints[item.name], f"{where}{item.name}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # Records import these for type checkers alone.
    return get_type_hints(kind, localns={"Mapping": Mapping, "Path": Path, "Rehearsal": Rehearsal})


def _refuse(value: Any, wanted: Any, where: str) -> None:
    if not _fits(value, wanted, where):
        words = (
            " | ".join(map(str, get_args(wanted)))
            if get_origin(wanted) is Literal
            else getattr(wanted, "__name__", wanted)
        )
        message = f"{where} must be {words}, not {str(value)[:40]!r}"
        raise TypeError(message)


def _fits(value: Any, wanted: Any, where: str) -> bool:
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in {Union, types.UnionType}:
        return any(_fits(value, choice, where) for choice in inner)
    if origin is not None:
        return _holds(value, origin, inner, where)
    if wanted is float:
        wanted = (int, float)
    fits = wanted is Any or (isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool))
    if fits and is_dataclass(value):
        refuse_wrong_types(value, f"{where}.")
    return fits


def _holds(value: Any, origin: Any, inner: tuple[Any, ...], where: str) -> bool:
    """Whether it is a tuple or a mapping whose every item fits."""
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _fits(item, inner[0], f"{where}[{at}]") for at, item in enumerate(value)
        )
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and _fits(item, inner[1], f"{where}.{key}") for key, item in value.items()
    )
