"""From what each source says to one `Settings`: command line over pytest option over pyproject.toml over default."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.settings.accept import AcceptEntry, parse_accept
from numerics_suite.settings.table import BY_KEY, Option
from numerics_suite.settings.tree import PYPROJECT, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FILE, TABLE = "pyproject.toml", "numerics-suite"
KNOWN_KEYS = (*BY_KEY, "accept")


def parse_option(option: Option, given: Any, where: str) -> Any:
    """The value of an option from its text, or texts where it is given several times.

    Raises:
        BadInputError: it cannot be used.
    """
    try:
        if not option.many:
            value = option.parse(given)
            return Path(value) if option.path and option.name != "json" else value
        items = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
        if not items or "" in items:
            message = f"has an empty item in '{given if isinstance(given, str) else ','.join(items)}'"
            raise ValueError(message)  # noqa: TRY301 - one way out for every unusable value
        return (
            tuple(dict.fromkeys(option.parse(item) for item in items))
            if option.form == "list"
            else tuple(option.parse(item) for item in items)
        )
    except ValueError as error:
        message = f"{where}: {error}"
        raise BadInputError(message) from None


def merge(layers: Sequence[tuple[str, Mapping[str, Any]]], accept: tuple[AcceptEntry, ...] = ()) -> Settings:
    """One `Settings` from layers of parsed values, weakest first.

    Args:
        layers: origin, and field name to value.
        accept: the accepted findings, of pyproject.toml.

    Raises:
        BadInputError: values that do not go together.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    if accept:
        values["accept"], origins["accept"] = accept, PYPROJECT
    settings = Settings(**values, origins={name: origins[name] for name in sorted(origins)})
    if len(settings.names) > len(settings.subjects):
        message = f"--name: {len(settings.names)} names for {len(settings.subjects)} subjects; give one per SUBJECT"
        raise BadInputError(message)
    return settings


def find_pyproject(start: Path) -> Path | None:
    """The nearest pyproject.toml at `start` or above it, None without one."""
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return folder / FILE
    return None


def has_table(file: Path) -> bool:
    """Whether the file exists and has a `[tool.numerics-suite]`."""
    return file.is_file() and TABLE in read_toml(file).get("tool", {})


def read_pyproject(file: Path | None) -> tuple[dict[str, Any], tuple[AcceptEntry, ...]]:
    """Field name to value, and the accepted findings, of `[tool.numerics-suite]`.

    Raises:
        BadInputError: the file cannot be read, or holds what cannot be used.
    """
    if file is None:
        return {}, ()
    table = read_toml(file).get("tool", {}).get(TABLE, {})
    if not isinstance(table, dict):
        message = f"{file}: tool.{TABLE} must be a table"
        raise BadInputError(message)
    values = {}
    for key, value in table.items():
        if key == "accept":
            continue
        where = f"{file}: [tool.{TABLE}] {key}"
        option = option_of_key(key)
        if option is None:
            message = f"{where}: unknown key{nearest(key, KNOWN_KEYS)} (known: {', '.join(KNOWN_KEYS)})"
            raise BadInputError(message)
        values[option.name] = _relative(
            option, parse_option(option, _as_text(option, value, where), where), file.parent
        )
    return values, parse_accept(table.get("accept", []), f"{file}: [[tool.{TABLE}.accept]]")


def option_of_key(key: str) -> Option | None:
    """The option that a key of pyproject.toml names: by its key, or as its flag or pytest twin is spelt."""
    spelt = key.replace("_", "-")
    twins = {option.twin.removeprefix("--numerics-"): option for option in BY_KEY.values()}
    return BY_KEY.get(spelt) or twins.get(spelt)


def read_toml(file: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        BadInputError: it cannot be read.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot read {file}: {error.strerror or error}"
    except UnicodeDecodeError:
        message = f"{file}: not UTF-8 text"
    except tomllib.TOMLDecodeError as error:
        message = f"{file}: not valid TOML: {error}"
    else:
        return content
    raise BadInputError(message)


def _as_text(option: Option, value: Any, where: str) -> Any:
    """A TOML value as the command line would give it."""
    if option.form in {"flag", "switch"}:
        if not isinstance(value, bool):
            message = f"{where}: must be true or false, not {value!r}"
            raise BadInputError(message)
        return str(value).lower()
    if option.many and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    if option.form == "repeat" and isinstance(value, str):
        return [value]
    if (
        isinstance(value, bool)
        or not isinstance(value, (str, int, float))
        or (option.many and not isinstance(value, str))
    ):
        wanted = "a list of texts" if option.many else "text or a number"
        message = f"{where}: must be {wanted}, not {value!r}"
        raise BadInputError(message)
    return str(value)


def _relative(option: Option, value: Any, folder: Path) -> Any:
    """Paths in pyproject.toml are relative to its folder, so that the command may be typed anywhere below it."""
    if folder == Path.cwd():
        return value
    if option.path:
        return folder / value
    if option.name == "subjects":
        return tuple(str(folder / item) if (folder / item).is_dir() else item for item in value)
    return value
