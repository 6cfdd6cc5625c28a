"""The templates of scripts, each at the id of its check (`forward/finite.py.j2`), which look like the scripts that they give."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from pprint import pformat

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from numerics_suite.diagnosis.scripts.facts import CONSTANTS


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=False,  # noqa: S701 - Python and no markup; what a checkpoint names goes through `repr`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(CONSTANTS)
    environment.filters |= {"repr": repr, "written": written, "names": _names}
    return environment


def _names(names: Iterable[str]) -> set[str] | str:
    return set(names) or "()"


def rendered(template: str, known: Mapping[str, object]) -> str:
    """The text of a template, where each of these names may stand."""
    return _without_empty_with(_environment().get_template(template).render(known))


def _without_empty_with(text: str) -> str:
    """Of a `with` that is left without a context, as in float32, the block alone stays."""
    return re.sub(r"(?m)^( *)with :\n((?:\1    .*\n)+)", lambda found: re.sub(r"(?m)^    ", "", found[2]), text)


def spaced(text: str) -> str:
    """Blank lines as PEP 8 has them, whatever the templates leave."""
    text = re.sub(r"\n(?: *\n)+", "\n", text)
    return re.sub(r"(?m)^((?:def|class) .*\n(?:    .*\n)+)", r"\n\n\1\n\n", text)


def written(value: object) -> str:
    """A value as source text, over as many lines as it takes."""
    return pformat(dict(value) if isinstance(value, Mapping) else value, width=108, compact=True)
