"""The table of options put to use: as argparse's, as pytest's, and the settings made of either."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.switch import switch_off
from numerics_suite.settings.accept import AcceptEntry
from numerics_suite.settings.sources import find_pyproject, has_table, merge, parse_option, read_pyproject
from numerics_suite.settings.strangers import without_strangers_wishes
from numerics_suite.settings.table import OPTIONS, Option
from numerics_suite.settings.tree import COMMAND_LINE, PYPROJECT, PYTEST, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest


def add_cli_options(parser: argparse.ArgumentParser, names: tuple[str, ...] | None = None) -> None:
    """Add all options, or those of these fields, to a parser; values stay text, so that one place judges them."""
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if not option.flags or (names is not None and option.name not in names):
            continue
        if option.flags == ("SUBJECT",):
            parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=option.help)
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group].add_argument, option, option.flags, option.help.replace("%", "%%"))


def _add(add: Any, option: Option, flags: tuple[str, ...], help_text: str, dest: str | None = None) -> None:
    """Add an option, and where it is a switch its `--no-` form."""
    common: dict[str, Any] = {"dest": dest or option.name, "default": None}
    if option.form in {"flag", "switch"}:
        add(*flags, action="store_const", const="true", help=help_text, **common)
        if option.form == "switch":
            prefix = "--numerics-" if dest else "--"
            negative = flags[0].replace(prefix, f"{prefix}no-", 1)
            add(negative, action="store_const", const="false", help=f"the opposite of {flags[0]}", **common)
        return
    action = "append" if option.form == "repeat" else "store"
    add(*flags, action=action, metavar=option.metavar, help=help_text, **common)


def from_command_line(given: Mapping[str, Any], folder: Path | None = None) -> Settings:
    """The settings of one command; extensions that they leave out are off from here on.

    Args:
        given: field name to text (or texts), None where the user said nothing.
        folder: where the search for pyproject.toml begins, None for the current folder.

    Raises:
        BadInputError: a value cannot be used.
    """
    parsed = _parsed(given, _cli_name)
    stated, accept = _of_file(find_pyproject(folder or Path.cwd()), parsed)
    return _heeded(merge([(PYPROJECT, stated), (COMMAND_LINE, parsed)], accept))


def _of_file(file: Path | None, parsed: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[AcceptEntry, ...]]:
    """What a pyproject.toml says and may say, beside the options that were parsed already."""
    stated, accept = read_pyproject(file)
    if file is None:
        return stated, accept
    return without_strangers_wishes(file, stated, accept, parsed.get("subjects", ()))


def _heeded(settings: Settings) -> Settings:
    """These settings, with extensions off in this process where they say so.

    What is added is looked up in many places, down to the family of a config; so this is a matter of the process.
    """
    if not settings.extensions:
        switch_off()
    return settings


def _cli_name(option: Option, text: Any) -> str:
    if option.form == "switch" and text == "false":
        return option.flags[0].replace("--", "--no-", 1)
    return option.flags[0]


def _parsed(given: Mapping[str, Any], where: Any) -> dict[str, Any]:
    return {
        option.name: parse_option(option, text, where(option, text))
        for option in OPTIONS
        if (text := given.get(option.name)) is not None and text != []
    }


def _dest(option: Option) -> str:
    return option.twin.removeprefix("--").replace("-", "_")


def add_pytest_options(parser: pytest.Parser) -> None:
    """Add the `--numerics-…` twins to pytest, all of them text until :func:`from_pytest` reads them."""
    group = parser.getgroup("numerics-suite", "numerical regression harness")
    for option in OPTIONS:
        help_text = option.help.replace("%", "%%")
        shown = help_text if option.shown else argparse.SUPPRESS
        _add(group.addoption, option, (option.twin,), shown, dest=_dest(option))


def from_pytest(config: pytest.Config) -> Settings:
    """The settings of a pytest run: its `--numerics-…` options over `[tool.numerics-suite]` of pyproject.toml.

    Extensions that they leave out are off from here on.

    Raises:
        BadInputError: a value cannot be used.
    """
    given = {option.name: config.getoption(_dest(option), None) for option in OPTIONS}
    parsed = _parsed(given, lambda option, _: option.twin)
    stated, accept = _of_file(_pyproject_of(config), parsed)
    return _heeded(merge([(PYPROJECT, stated), (PYTEST, parsed)], accept))


def _pyproject_of(config: pytest.Config) -> Path | None:
    """The one of pytest's root if it has a table for this suite, else the nearest to pytest's working directory."""
    own = config.rootpath / "pyproject.toml"
    return own if has_table(own) else find_pyproject(Path(config.invocation_params.dir))
