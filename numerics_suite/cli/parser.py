"""argparse with this tool's manners: one line for a mistake, with the nearest name, and exit status 4."""

from __future__ import annotations

import argparse
import re
import sys
from typing import IO, TYPE_CHECKING, Any, NoReturn

from numerics_suite.cli.output import refuse_undeliverable, refuse_unwritable
from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.settings.options import from_command_line
from numerics_suite.settings.table import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.settings.tree import Settings


class HelpShown(Exception):  # noqa: N818 - no error
    """The command was asked for its help, and gave it."""


class CommandParser(argparse.ArgumentParser):
    """A parser of one command's arguments that raises BadInputError instead of leaving the process."""

    def __init__(self, command: str, *, usage: str, description: str, examples: str) -> None:
        """Prepare the parser."""
        super().__init__(
            prog=f"numerics-suite {command}",
            usage=f"numerics-suite {command} {usage}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:  # noqa: ARG002 - argparse's signature
        """End the command after --help; never by SystemExit, which is how code under test ends a process."""
        raise HelpShown(status)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as one line."""
        text = re.sub(r"^argument ([^\s:]+): ", lambda found: f"{found[1].split('/')[-1]}: ", message)
        raise BadInputError(text)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments, options and positionals in any order.

        Raises:
            BadInputError: an option is unknown or lacks its value.
        """
        given, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            kind = "option" if flag.startswith("-") else "argument"
            hint = nearest(flag, known) if kind == "option" else ""
            self.error(f"unknown {kind} '{flag}'{hint or f' (see {self.prog} --help)'}")
        return given

    def parse_settings(self, arguments: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
        """The settings of a command that has options of `check`, and what it alone takes.

        Raises:
            BadInputError: something cannot be used, or an answer could not be written where it is to go.
        """
        given = vars(self.parse(arguments))
        own = {name: given.pop(name) for name in list(given) if name not in BY_NAME}
        settings = from_command_line(given)
        refuse_unwritable(settings.json)
        if "report" in given:
            refuse_undeliverable(settings.report, settings.junitxml)
        return settings, own

    def parse_action(self, arguments: Sequence[str], actions: Sequence[str]) -> argparse.Namespace:
        """The arguments of a command whose first one is what to do.

        Raises:
            BadInputError: it is missing, or none of these.
        """
        given = self.parse(arguments)
        known = f"(known: {', '.join(actions)})"
        if given.action is None:
            message = f"{self.prog.split()[-1]}: no action given {known}"
            raise BadInputError(message)
        if given.action not in actions:
            message = f"unknown action '{given.action}'{nearest(given.action, actions)} {known}"
            raise BadInputError(message)
        return given

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """Print the help, and see that it reached its reader."""
        super().print_help(file)
        sys.stdout.flush()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """80 columns whatever the terminal, and room enough for the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80, max_help_position=28)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--quiet`, which every command takes."""
    parser.add_argument("--json", metavar="FILE", help="write the answer as JSON; '-' is standard output")
    parser.add_argument("--quiet", action="store_true", help="print nothing that is not asked for")
