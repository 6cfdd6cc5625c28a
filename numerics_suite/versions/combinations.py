"""From `--transformers`, `--torch` and `--python` to the environments of a matrix, oldest first."""

from __future__ import annotations

import re

from packaging.version import Version

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.versions import Versions
from numerics_suite.versions.index import resolve


def resolve_all(
    transformers: str | None, torch: str | None, python: str | None, *, pre: bool = False
) -> list[Versions]:
    """Every combination of the three.

    Args:
        transformers: a SPEC, None for the installed one.
        torch: a SPEC, None for the installed one.
        python: a list, None for this one.
        pre: pre-releases count too.

    Returns:
        Each once, oldest first.

    Raises:
        BadInputError: a SPEC is malformed or means nothing; the message names the nearest version.
    """
    pythons = _pythons(python)
    return [
        Versions(transformers=one, torch=other, python=interpreter)
        for interpreter in pythons
        for other in _of("torch", torch, pre=pre, python=pythons[-1])
        for one in _of("transformers", transformers, pre=pre, python=pythons[-1])
    ]


def _of(package: str, spec: str | None, *, pre: bool, python: str | None) -> list[str | None]:
    if spec is None:
        return [None]
    try:
        return list(dict.fromkeys(resolve(package, spec, pre=pre, python=python)))
    except BadInputError as error:
        message = f"--{package}: {error}"
        raise BadInputError(message) from None


def _pythons(spec: str | None) -> list[str | None]:
    if spec is None:
        return [None]
    names = [name.strip() for name in spec.split(",")]
    wrong = next((name for name in names if not re.fullmatch(r"3\.\d+(\.\d+)?", name)), None)
    if wrong is not None:
        message = f"--python: '{wrong}' is no version of Python; give a list such as 3.10,3.12"
        raise BadInputError(message)
    return [*sorted(dict.fromkeys(names), key=Version)]
