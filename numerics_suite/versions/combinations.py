"""From `--transformers`, `--torch`, `--python` and `--with` to the environments of a matrix, oldest first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from packaging.utils import canonicalize_name
from packaging.version import Version

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.versions import Versions
from numerics_suite.versions.index import resolve

OWN_OPTIONS = {"transformers": "--transformers SPEC", "torch": "--torch SPEC", "python": "--python LIST"}
WITH = "--with takes a package and its versions: accelerate==1.2.0, 'peft>=0.13,<0.15' or accelerate:latest:3"


def resolve_all(
    transformers: str | None,
    torch: str | None,
    python: str | None,
    others: Sequence[str] = (),
    *,
    pre: bool = False,
) -> list[Versions]:
    """Every combination of them.

    Args:
        transformers: a SPEC, None for the installed one.
        torch: a SPEC, None for the installed one.
        python: a list, None for this one.
        others: `PACKAGE==V`, `PACKAGE>=V` or `PACKAGE:SPEC` each; those of one package are versions of it.
        pre: pre-releases count too.

    Returns:
        Each once, oldest first.

    Raises:
        BadInputError: a SPEC is malformed or means nothing; the message names the nearest version.
    """
    pythons = _pythons(python)
    specs: dict[str, list[str]] = {}
    for text in others:
        name, spec = _with(text)
        specs.setdefault(name, []).append(spec)
    columns = [
        [(name, str(version)) for version in _of(name, ";".join(each), pre=pre, python=pythons[-1], option="with")]
        for name, each in sorted(specs.items())
    ]
    return [
        Versions(transformers=one, torch=other, python=interpreter, others=chosen)
        for interpreter in pythons
        for other in _of("torch", torch, pre=pre, python=pythons[-1])
        for one in _of("transformers", transformers, pre=pre, python=pythons[-1])
        for chosen in itertools.product(*columns)
    ]


def _with(text: str) -> tuple[str, str]:
    """Package and SPEC of a `--with`."""
    found = re.fullmatch(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(:|(?=[=<>~!]))\s*(.+)", text)
    if found is None:
        message = f"--with {text}: {WITH}"
        raise BadInputError(message)
    name = canonicalize_name(found[1])
    if name in OWN_OPTIONS:
        message = f"--with {text}: {name} has an option of its own, {OWN_OPTIONS[name]}"
        raise BadInputError(message)
    return name, found[3].removeprefix("===").removeprefix("==") if re.fullmatch(r"={2,3}[^*,;]+", found[3]) else found[
        3
    ]


def _of(
    package: str, spec: str | None, *, pre: bool, python: str | None, option: str | None = None
) -> list[str | None]:
    if spec is None:
        return [None]
    try:
        return list(dict.fromkeys(resolve(package, spec, pre=pre, python=python)))
    except BadInputError as error:
        message = f"--{option or package}: {error}"
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
