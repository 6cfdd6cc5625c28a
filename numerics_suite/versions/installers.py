"""uv, run quietly: found, told the user's package sources, and its complaints turned into one line.

uv and not pip: it resolves from its cache in tenths of a second and links files instead of copying them, so an environment
per version costs what differs between versions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numerics_suite.versions.pip_settings import PackageSources

_DISTURBING = ("UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_PROJECT_ENVIRONMENT", "UV_BREAK_SYSTEM_PACKAGES", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX")  # fmt: skip
"""Variables that would send uv, or a build that it runs, to another environment than its argument."""


def find_uv() -> str:
    """The path of uv: on PATH, else that of its package in the running environment.

    Raises:
        BadInputError: there is none; the message says how to install it.
    """
    found = shutil.which("uv")
    if found:
        return found
    try:
        import uv

        return uv.find_uv_bin()
    except (ImportError, FileNotFoundError):
        message = "environments per version are made by uv, which is not on PATH: pip install uv"
        raise BadInputError(message) from None


def make_venv(folder: Path, python: str) -> None:
    """A new, empty virtual environment.

    Raises:
        UnsupportedError: no such Python.
        BadInputError: uv is missing, or the disk is full.
    """
    run_uv(["venv", "--no-project", "--python", python, str(folder)], f"an environment of Python {python}", verb="made")


def install(python: Path, requirements: Sequence[str], sources: PackageSources, what: str) -> None:
    """Install requirements into the environment of an interpreter.

    Raises:
        UnsupportedError: they cannot be installed; the message is the reason.
        BadInputError: uv is missing, or the disk is full.
    """
    run_uv(["pip", "install", "--python", str(python), *source_options(sources), *requirements], what, sources)


def source_options(sources: PackageSources) -> list[str]:
    """Options that tell uv what it does not know by itself."""
    options: list[str] = []

    def tell(name: str, option: str) -> None:
        value = getattr(sources, name)
        if name not in sources.known_to_uv:
            values = value if isinstance(value, tuple) else (value,) if value else ()
            for one in values:
                options.extend((option, one))

    tell("index_url", "--default-index")
    tell("extra_index_urls", "--index")
    tell("find_links", "--find-links")
    tell("constraints", "--constraints")
    tell("trusted_hosts", "--allow-insecure-host")
    if sources.no_index and "no_index" not in sources.known_to_uv:
        options.append("--no-index")
    if sources.pre and "pre" not in sources.known_to_uv:
        options.extend(("--prerelease", "allow"))
    if "extra_index_urls" not in sources.known_to_uv and sources.extra_index_urls and not _strategy_is_set():
        # pip takes the best version of all indexes, uv of the first that has the package
        options.extend(("--index-strategy", "unsafe-best-match"))
    return options


def _strategy_is_set() -> bool:
    return bool(os.environ.get("UV_INDEX_STRATEGY"))


def run_uv(arguments: Sequence[str], what: str, sources: PackageSources | None = None, verb: str = "installed") -> str:
    """Run uv and return its standard output.

    Args:
        arguments: of uv.
        what: is being done, for the message.
        sources: whose certificates and proxy are used.
        verb: what `what` could not be, for the message.

    Raises:
        UnsupportedError: uv says no; the message is its reason.
        BadInputError: uv is missing, or the disk is full.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _DISTURBING}
    if sources is not None:
        if sources.cert:
            variables.setdefault("SSL_CERT_FILE", sources.cert)
        if sources.proxy:
            variables.setdefault("ALL_PROXY", sources.proxy)
    status, output, complaint = run_quietly([find_uv(), "--color", "never", "--no-progress", *arguments], variables)
    if status == 0:
        return output
    text = complaint or output
    if out_of_space(text):
        message = f"the disk is full: {what} could not be {verb}; numerics-suite cache clean makes room"
        raise BadInputError(message)
    message = f"{what} cannot be {verb}: {why(text)}"
    raise UnsupportedError(message)


def run_quietly(arguments: Sequence[str], variables: dict[str, str], **options: Any) -> tuple[int, str, str]:
    """Run a program to its end, or end it when we are ended.

    Returns:
        Exit status, standard output, standard error.
    """
    with subprocess.Popen(  # noqa: S603 - our own interpreter or uv
        list(arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=variables,
        **options,
    ) as process:
        _running.add(process)
        try:
            output, complaint = process.communicate()
        except BaseException:
            process.kill()
            raise
        finally:
            _running.discard(process)
    return process.returncode, output, complaint


_running: set[subprocess.Popen[str]] = set()


def end_running() -> None:
    """End every program that any thread of this process runs quietly: the user stopped."""
    for process in tuple(_running):
        process.kill()


def out_of_space(text: str) -> bool:
    """Whether a program's complaint is about a full disk."""
    return bool(re.search(r"No space left on device|os error (28|112|122)\b|Disk quota exceeded", text))


def why(complaint: str) -> str:
    """The reason, in one line, out of what uv wrote on standard error."""
    text = _flat(complaint)
    for pattern, reason in _REASONS:
        found = re.search(pattern, text)
        if found:
            return _short(found.expand(reason))
    causes = re.findall(r"(?:^|\n)cause: ([^\n]+)", text)
    errors = re.findall(r"(?:^|\n)error: ([^\n]+)", text)
    return _short((causes or errors or [text])[0] or "uv gives no reason")


_REASONS = (
    (r"Failed to download `[^`]*/cpython-[^`]*`", "there is none here, and none could be downloaded"),
    (r"network was disabled", "it is not in uv's cache, and the network is disabled (UV_OFFLINE)"),
    (r"error sending request for url \((\S+?)\)", r"no network: \1 cannot be reached"),
    (
        r"Request failed after[^\n]*\ncause: Failed to (?:fetch|download):? `?([^\s`]+)",
        r"no network: \1 cannot be reached",
    ),
    (
        r"You require CPython (\S+) [^\n]*? only found wheels for `([^`]+)` \(v([^)]+)\)",
        r"no wheel of \2 \3 for Python \1",
    ),
    (
        r"Failed to build `([^`]+)==([^`]+)`[\s\S]*?hint: `\1` \S+ was included because `([^`]+)` \(v([^)]+)\)",
        r"\1 \2, which \3 \4 needs, has no wheel here and cannot be built",
    ),
    (r"Failed to build `([^`]+)`", r"\1 has no wheel here and cannot be built"),
    (r"Because there is no version of (\S+?)==(\S+?) and you require", r"no index has \1 \2"),
    (r"you require (\S+?)==\S+ and \1([<>!~]=?\S+?)(?:,|$)", r"a constraint allows \1\2 only"),
    (r"Because only (\S+?)([<>=!~]\S+?)(?: is| are) available", r"the indexes have \1\2 only"),
)


def _flat(complaint: str) -> str:
    """Without decoration, warnings and the line breaks that a terminal's width made."""
    lines: list[str] = []
    for raw in complaint.splitlines():
        line = re.sub(r"^[\s×╰─▶│├]+", "", raw).rstrip()
        begins = re.match(r"(error|cause|hint|warning|Because|Using|Resolved|Prepared)\b", line)
        boxed = re.match(r"^\s*[╰├]─▶", raw)
        if line and (begins or boxed or not lines or not re.match(r"^\s+[^\s]|^\s*│", raw)):
            lines.append(f"cause: {line}" if boxed else line)
        elif line:
            lines[-1] += f" {line}"
    return "\n".join(line for line in lines if not line.startswith("warning:"))


def _short(reason: str) -> str:
    reason = re.sub(r",? we can conclude that .*", "", " ".join(reason.split()))
    reason = re.sub(r"^Because ", "", reason)
    return reason if len(reason) <= 300 else f"{reason[:297]}..."
