"""Records made from a file that somebody else wrote, checked against the types that they declare."""

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


def refuse_other_shape(value: Any, shape: Any, where: str) -> None:
    """See that JSON values that are read without a record have the types that their readers count on.

    Args:
        value: of a document.
        shape: a type or several; `[shape]` for a list of such; `{key: shape}` for an object, whose keys may be absent but for
            those that end in `!`.
        where: of the value, for the message.

    Raises:
        TypeError: naming the first that has another.
    """
    if isinstance(shape, dict):
        _refuse_unless(isinstance(value, Mapping), value, "an object", where)
        for key, inner in shape.items():
            name = key.rstrip("!")
            if name in value or key.endswith("!"):
                refuse_other_shape(value.get(name), inner, f"{where}.{name}")
    elif isinstance(shape, list):
        _refuse_unless(isinstance(value, list), value, "a list", where)
        for at, item in enumerate(value):
            refuse_other_shape(item, shape[0], f"{where}[{at}]")
    else:
        fits = isinstance(value, shape) and (not isinstance(value, bool) or shape is bool)
        _refuse_unless(fits, value, str(getattr(shape, "__name__", shape)), where)


def _refuse_unless(fits: bool, value: Any, wanted: str, where: str) -> None:  # noqa: FBT001 - read as a sentence
    if not fits:
        message = f"{where} must be {wanted}, not {str(value)[:40]!r}"
        raise TypeError(message)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # Records import these for type checkers alone.
    return get_type_hints(kind, localns={"Mapping": Mapping, "Path": Path, "Rehearsal": Rehearsal})


def _refuse(value: Any, wanted: Any, where: str) -> None:
    words = (
        " | ".join(map(str, get_args(wanted))) if get_origin(wanted) is Literal else getattr(wanted, "__name__", wanted)
    )
    _refuse_unless(_fits(value, wanted, where), value, str(words), where)


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
