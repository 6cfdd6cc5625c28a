"""Measures what only a GPU can show, and writes docs/accelerator.md.

    python tools/on_accelerator.py --json figures.json --write docs/accelerator.md    every part
    python tools/on_accelerator.py --part clean --json figures.json                   one part, into the same file
    python tools/on_accelerator.py --from-json figures.json --write docs/accelerator.md
    python tools/on_accelerator.py --device cpu --small                               shows that the script runs

Exit status: 0 every part that ran met its aim, 1 one did not, 2 interrupted, 4 bad input.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from numerics_suite.core.atomic import ensure_writable
from numerics_suite.core.errors import BadInputError, nearest

PARTS = ("clean", "ratios", "tf32", "mutants", "baseline", "watch", "9b")
"""Names alone, so that a mistake is told before torch is imported."""


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print with its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as one line."""
        raise BadInputError(message)


def parser() -> Parser:
    """The parser of the script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--device", help="auto, cpu, cuda, … (default: auto, which needs an accelerator)")
    made.add_argument("--part", action="append", default=[], metavar="NAME", help=f"of {', '.join(PARTS)}; repeatable")
    made.add_argument(
        "--small",
        action="store_true",
        help="one fixture, 3 mutants, a tiny watched model, a small shape in place of 9B",
    )
    made.add_argument("--minutes", type=float, default=6, metavar="N", help="for all parts together (default: 6)")
    made.add_argument("--json", type=Path, metavar="FILE", help="put the parts into this file; its other parts stay")
    made.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: the page from this file")
    made.add_argument("--write", type=Path, metavar="PAGE", help="write the figures into this page")
    return made


def run(arguments: Sequence[str]) -> int:
    """Measure and write as asked; gives the exit status.

    Args:
        arguments: of the command line.

    Raises:
        BadInputError: they cannot be used.
    """
    given = parser().parse_args(arguments)
    for name in given.part:
        if name not in PARTS:
            message = f"unknown part '{name}'{nearest(name, PARTS)} known: {', '.join(PARTS)}"
            raise BadInputError(message)
    if given.from_json is not None:
        return _page_only(given)
    if given.json is not None:
        ensure_writable(given.json, "--json")
    return _measure(given)


def _page_only(given: argparse.Namespace) -> int:
    if given.write is None or given.part or given.json or given.device or given.small:
        message = "--from-json writes a page and measures nothing: it takes --write PAGE and no other option"
        raise BadInputError(message)
    import accelerator_page as page

    page.write_page(given.write, page.read_parts(given.from_json))
    return 0


def _measure(given: argparse.Namespace) -> int:
    import accelerator_page as page
    from accelerator_parts import SMALL, Part, Setup, measured, whole_sizes

    if given.write is not None:
        page.read_page(given.write)
    kept = page.read_parts(given.json) if given.json is not None and given.json.exists() else {}
    json_file = None if given.json is None else given.json.resolve()
    device = _device(given.device or "auto")
    ran: dict[str, Part] = {}
    with tempfile.TemporaryDirectory(prefix="on-accelerator-") as folder:
        sizes = SMALL if given.small else whole_sizes()
        deadline = time.monotonic() + 60 * given.minutes
        setup = Setup(device=device, sizes=sizes, folder=Path(folder), deadline=deadline)
        for name in [name for name in PARTS if name in (given.part or PARTS)]:
            print(f"{name}: ", end="", file=sys.stderr, flush=True)
            ran[name] = measured(name, setup)
            print(f"{ran[name].verdict}, {ran[name].seconds:.1f} s", file=sys.stderr, flush=True)
            if json_file is not None:  # after each part, so that an end of the device's time loses one part at most
                page.write_parts(json_file, {**kept, **ran})
    if given.write is not None:
        page.write_page(given.write, {**kept, **ran})
    print(page.terminal_table(ran))
    return int(any(part.verdict == "not met" for part in ran.values()))


def _device(name: str) -> str:
    from numerics_suite.devices.device import accelerator, resolve_device

    if name == "auto" and accelerator() is None:
        message = "no accelerator is visible to torch; --device cpu --small shows that the script runs"
        raise BadInputError(message)
    return resolve_device(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; every way it can end is an exit status.

    Args:
        arguments: None for the process's own.
    """
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
