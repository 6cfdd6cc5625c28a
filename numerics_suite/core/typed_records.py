"""Records made from a file that somebody else wrote, checked against the types that they declare."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from numerics_suite.core.numbers import revived
from numerics_suite.core.rehearsal import Rehearsal

Record = TypeVar("Record")

WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    Path: "text",
    bool: "true or false",
    type(None): "null",
    **dict.fromkeys((list, tuple), "a list"),
    **dict.fromkeys((dict, Mapping), "an object"),
}
"""Types as a message calls them."""


def record_of(kind: type[Record], content: Any, where: str = "") -> Record:
    """A record from a JSON object: each field as the type that its class declares, and so the records in it.

    Lists become tuples and the names of numbers that are not finite these numbers. A field whose metadata name another `json` key
    is read from there, or where that is empty from the keys of the object itself. Keys that the class does not know are passed over.

    Args:
        kind: a dataclass.
        content: as read.
        where: of the record, for the message.

    Raises:
        TypeError: naming the first field that is missing or has another type.
    """
    _refuse_unless(isinstance(content, Mapping), content, "an object", where.rstrip(".") or "the document")
    made: dict[str, Any] = {}
    hints = _hints(kind)  # type: ignore[arg-type]  # hashable
    for item in fields(kind):  # type: ignore[arg-type]  # a dataclass
        key = item.metadata.get("json", item.name)
        if not key:
            made[item.name] = record_of(hints[item.name], content, where)
        elif key in content:
            made[item.name] = value_of(content[key], hints[item.name], f"{where}{key}")
        elif item.default is MISSING and item.default_factory is MISSING:
            message = f"{where}{key} is missing"
            raise TypeError(message)
    return kind(**made)


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
            name, place = key.rstrip("!"), f"{where}.{key}".strip(".!")
            if name in value:
                refuse_other_shape(value[name], inner, place)
            elif key.endswith("!"):
                message = f"{place} is missing"
                raise TypeError(message)
    elif isinstance(shape, list):
        _refuse_unless(isinstance(value, list), value, "a list", where)
        for at, item in enumerate(value):
            refuse_other_shape(item, shape[0], f"{where}[{at}]")
    else:
        fits = isinstance(value, shape) and (not isinstance(value, bool) or shape is bool)
        _refuse_unless(fits, value, _alternatives(shape if isinstance(shape, tuple) else (shape,)), where)


def _refuse_unless(fits: bool, value: Any, wanted: str, where: str) -> None:  # noqa: FBT001 - read as a sentence
    if not fits:
        message = f"{where} must be {wanted}, not {str(value)[:40]!r}"
        raise TypeError(message)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # Records import these for type checkers alone.
    return get_type_hints(kind, localns={"Mapping": Mapping, "Path": Path, "Rehearsal": Rehearsal})


def value_of(value: Any, wanted: Any, where: str) -> Any:
    """A value of JSON as that type, otherwise as :func:`record_of`."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if is_dataclass(wanted):
        return record_of(wanted, value, f"{where}.")  # type: ignore[arg-type]
    if origin in {Union, types.UnionType}:
        return _one_of(value, wanted, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        _refuse_unless(len(kinds) == len(value), value, f"a list of {len(kinds)}", where)
        return tuple(
            value_of(item, kind, f"{where}[{at}]") for at, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is Mapping and isinstance(value, Mapping):
        return {key: value_of(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    if wanted is float or wanted is Any:
        value = revived(value)
    elif wanted is Path and isinstance(value, str):
        value = Path(value)
    _refuse_unless(_fits(value, wanted), value, _words(wanted), where)
    return value


def _one_of(value: Any, wanted: Any, where: str) -> Any:
    """Of a record or None, what is wrong in the record; of several kinds of number and text, the first that fits."""
    if value is None and type(None) in get_args(wanted):
        return None
    choices = [choice for choice in get_args(wanted) if choice is not type(None)]
    if len(choices) == 1:
        return value_of(value, choices[0], where)
    for choice in choices:
        with suppress(TypeError):
            return value_of(value, choice, where)
    _refuse_unless(False, value, _words(wanted), where)
    return None


def _fits(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if origin is not None:
        return origin is Literal and isinstance(value, str) and value in get_args(wanted)
    kinds = (int, float) if wanted is float else wanted
    return wanted is Any or (isinstance(value, kinds) and not (isinstance(value, bool) and wanted is not bool))


def _words(wanted: Any) -> str:
    inner = get_args(wanted)
    if get_origin(wanted) is Literal:
        return " | ".join(map(str, inner))
    if get_origin(wanted) in {Union, types.UnionType}:
        return _alternatives(inner)
    return WORDS.get(get_origin(wanted) or wanted) or str(getattr(wanted, "__name__", wanted))


def _alternatives(kinds: tuple[Any, ...]) -> str:
    """Each once; a whole number is a number."""
    return " or ".join(dict.fromkeys(_words(kind) for kind in kinds if kind is not int or float not in kinds))
