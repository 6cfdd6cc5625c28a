"""`numerics-suite COMMAND`: picks the command and turns every way it can end into an exit status."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.cli.parser import HelpShown
from numerics_suite.cli.supervisor import SUPERVISED, supervised
from numerics_suite.core.errors import BadInputError, NumericsSuiteError, nearest
from numerics_suite.core.interrupts import interruptible
from numerics_suite.core.switch import switch_kept
from numerics_suite.core.text import harmless

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED, INTERNAL, BAD_INPUT = 2, 3, 4

COMMANDS = {
    "check": "run the suite over subject × precision × attention × device",
    "record": "write baselines",
    "compare": "two baselines: what changed and where it starts",
    "matrix": "check in one environment per version",
    "bisect": "the first version at which the verdict changes",
    "cache": "environments and built fixtures kept between runs",
    "watch": "run a training script under the watch",
    "report": "HTML, JUnit, SARIF and Markdown from results files",
    "init": "adopt the gate in your repository",
    "fixtures": "list, build or find the shipped tiny checkpoints",
}
"""Each is a module of `numerics_suite.cli` with `run(arguments) -> int`."""

HELP = """\
usage: numerics-suite COMMAND [--help] ...

Catches numerical bugs in GLM-4 checkpoints before they are a NaN loss.

commands:
{commands}

options:
  -h, --help  show this message
  --version   show the version

examples:
  numerics-suite check
  numerics-suite check ./my-checkpoint --precision bf16,amp-bf16
  numerics-suite record ./my-checkpoint --baseline .numerics/baselines
  numerics-suite matrix ./my-checkpoint --transformers 'latest:3'
  numerics-suite check --help
"""


def main(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - one for each way to end
    """Run one command and return its exit status."""
    _tolerate()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        with switch_kept(), interruptible() if given[:1] != ["watch"] else nullcontext():
            status = _dispatch(given)
        _flush()
    except HelpShown:
        return 0
    except SystemExit as ending:
        return _end(INTERNAL, f"internal error: code that the command ran called sys.exit({ending.code!r})")
    except BrokenPipeError:  # of help or a list
        from numerics_suite.reports.streams import abandon

        abandon(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return _end(INTERRUPTED, "interrupted")
    except BadInputError as error:
        return _end(BAD_INPUT, f"error: {error}")
    except NumericsSuiteError as error:
        return _end(INTERNAL, f"internal error: {error}")
    except OSError as error:
        return _end(*_of_os_error(error))
    except ImportError as error:
        return _end(*_of_import_error(error))
    except Exception as error:  # noqa: BLE001 - the last resort of the process
        return _end(INTERNAL, f"internal error: {type(error).__name__}: {error}")
    return status


def entry() -> int:
    """The program itself: one command, with a process that watches over those that run models."""
    _fill_closed_streams()
    given = sys.argv[1:]
    if given[:1] != ["watch"]:
        os.environ.setdefault(
            "PYTHONSAFEPATH", "1"
        )  # a worker that begins in a stranger's folder imports nothing from it
    if given[:1] and given[0] in SUPERVISED and not {"-h", "--help"} & set(given):
        return supervised(given, main)
    return main(given)


def _fill_closed_streams() -> None:
    """Let what a caller closed (`>&-`) lead nowhere: else the next file that is opened gets its number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w" if number else "r", encoding="utf-8"))  # noqa: SIM115 - it lives as long as the process


def _tolerate() -> None:
    """Let streams that cannot say a letter show its code: a `×` in a help text ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if "utf" not in str(getattr(stream, "encoding", "")).lower() and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """See that what was printed reached its reader; one that is gone changes no verdict."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        from numerics_suite.reports.streams import abandon

        abandon(sys.stdout)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        message = "no command given; see numerics-suite --help"
        raise BadInputError(message)
    command, *rest = arguments
    if command in {"-h", "--help", "help"}:
        sys.stdout.write(HELP.format(commands=_listed(COMMANDS)))
        return 0
    if command == "--version":
        from numerics_suite import __version__

        sys.stdout.write(f"numerics-suite {__version__}\n")
        return 0
    if command not in COMMANDS:
        kind = "option" if command.startswith("-") else "command"
        hint = nearest(command, (*COMMANDS, "--help", "--version"))
        message = f"unknown {kind} '{command}'{hint or ' (see numerics-suite --help)'}"
        raise BadInputError(message)
    try:
        os.getcwd()  # noqa: PTH109 - pathlib says no more
    except FileNotFoundError:
        message = "the folder that this command runs in is gone; change to one that exists"
        raise BadInputError(message) from None
    module = importlib.import_module(f"numerics_suite.cli.{command}")
    return int(module.run(rest))


def _listed(commands: dict[str, str]) -> str:
    return "\n".join(f"  {name:<10}{text}" for name, text in commands.items())


def _end(status: int, text: str) -> int:
    """One line on standard error, and the traceback for whoever asked for it."""
    if os.environ.get("NUMERICS_SUITE_DEBUG") == "1":
        traceback.print_exc()
    line = harmless(" ".join(text.split()))
    try:
        sys.stderr.write(f"numerics-suite: {line}\n")
        sys.stderr.flush()
    except OSError:
        pass  # no reader is left
    return status


def _of_import_error(error: ImportError) -> tuple[int, str]:
    """Packages that do not fit together, as transformers and tokenizers of other releases, are the user's to repair; our own modules are not."""
    if (error.name or "").partition(".")[0] == "numerics_suite":
        return INTERNAL, f"internal error: {type(error).__name__}: {error}"
    return (
        BAD_INPUT,
        f"error: the installed packages cannot be imported together ({error}); `pip check` names what does not fit",
    )


def _of_os_error(error: OSError) -> tuple[int, str]:
    """A disk that is full is the user's to repair; what else the system refuses was not foreseen."""
    import errno

    from numerics_suite.reports.streams import abandon

    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
        abandon(sys.stdout)
        where = error.filename or "standard output"
        return BAD_INPUT, f"error: cannot write {where}: {error.strerror}"
    return INTERNAL, f"internal error: {type(error).__name__}: {error}"
