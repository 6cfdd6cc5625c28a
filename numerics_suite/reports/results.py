"""The results file: `RunResult` to the JSON of CONTRACT.md and back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite import __version__
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.findings import finding_to_json
from numerics_suite.core.numbers import jsonable
from numerics_suite.core.records import CheckResult, RunResult, Series
from numerics_suite.core.tree import is_root
from numerics_suite.core.typed_records import record_of, refuse_other_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMA_VERSION = 1
_PLAIN = r'(?:"[^"\s\\]*"|null|-?\d[-+.\deE]*)'
_PLAIN_LIST = re.compile(rf"\[\n *({_PLAIN}(?:,\n *{_PLAIN})*)\n *\]")
_BREAK = re.compile(r"\n *")
"""No text in JSON holds a line break, so what these match is between texts, never inside one."""

STATUSES = ("passed", "failed", "accepted", "skipped", "error")


def counts(checks: Iterable[CheckResult]) -> dict[str, int]:
    """How many results have each status, in the order of the contract."""
    counted = Counter[str](result.status for result in checks)
    return {status: counted[status] for status in STATUSES}


def _counts(checks: Sequence[CheckResult]) -> dict[str, int]:
    """The same, and how many findings follow from no other."""
    return {**counts(checks), "findings": sum(is_root(result) for result in checks)}


def to_json(result: RunResult) -> dict[str, Any]:
    """The results file as a dict of JSON's own types; checks stay in the order that they came in."""
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "numerics-suite", "version": __version__},
        "command": result.command,
        "started_at": result.started_at,
        "duration_s": jsonable(result.duration_s),
        "complete": result.complete,
        "verdict": result.verdict,
        "exit_status": result.exit_status,
        "counts": _counts(result.checks),
        "notes": list(result.notes),
        "environment": jsonable(result.environment),
        "settings": jsonable(result.settings),
        "subjects": [jsonable(asdict(subject)) for subject in result.subjects],
        "checks": [check_to_json(check) for check in result.checks],
        **({"rehearsal": jsonable([asdict(item) for item in result.rehearsals])} if result.rehearsals else {}),
    }


def unfinished(command: str, **content: Any) -> dict[str, Any]:
    """The document of a command that has not come to its end, which no reader can take for an answer.

    Args:
        command: of the contract.
        content: what its documents hold besides, empty or as far as it is known.
    """
    packages = {}
    for name in ("torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    about: dict[str, Any] = {
        "started_at": datetime.now(tz=timezone.utc).astimezone().isoformat(timespec="seconds"),
        "duration_s": 0.0,
        "exit_status": 3,
        "counts": _counts(()),
        "notes": [],
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": "",
            "packages": packages,
        },
        "settings": {},
        "subjects": [],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "numerics-suite", "version": __version__},
        "command": command,
        "complete": False,
        "verdict": "error",
        **(about if command == "check" else {}),
        **content,
    }


def check_to_json(result: CheckResult) -> dict[str, Any]:
    """One entry of `checks`."""
    return {
        "id": result.id,
        "check": result.check,
        **result.cell.named,
        "status": result.status,
        "duration_s": jsonable(result.duration_s),
        "reason": result.reason,
        "measurements": jsonable(result.measurements),
        "finding": None if result.finding is None else finding_to_json(result.finding),
        "series": [_series_to_json(series) for series in result.series],
        **({"bad_input": True} if result.bad_input else {}),
    }


def _series_to_json(series: Series) -> dict[str, Any]:
    """The names of its budgets stay behind: once judged, their limits are what is left to say."""
    return {key: value for key, value in jsonable(asdict(series)).items() if key != "budgets"}


def from_json(content: Mapping[str, Any]) -> RunResult:
    """The inverse of :func:`to_json`.

    Raises:
        BadInputError: it is none, or of another version of the schema.
    """
    if not isinstance(content, Mapping):
        message = "not a results file of this tool"
        raise BadInputError(message)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        message = f"a results file of schema_version {version!r}; this release reads {SCHEMA_VERSION}"
        raise BadInputError(message)
    try:
        refuse_other_shape(content, {"environment": {"packages": {}, "extensions": {}}}, "")
        return record_of(RunResult, content)
    except (TypeError, ValueError) as error:
        message = f"not a results file of this tool: {error}"
        raise BadInputError(message) from None


def check_from_json(content: Mapping[str, Any]) -> CheckResult:
    """The inverse of :func:`check_to_json`."""
    return record_of(CheckResult, content)


def dump(content: Mapping[str, Any]) -> str:
    """JSON text, indented, with a last newline; a number that is not finite is a mistake here and is refused.

    A list of numbers and words (names of modules, roles) is one line: a series is a few lines, not a few thousand.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return _PLAIN_LIST.sub(lambda found: f"[{_BREAK.sub(' ', found.group(1))}]", text) + "\n"


_NO_CHECKS = '"checks": []'


def indented(entry: Mapping[str, Any]) -> str:
    """One entry of `checks` as the text that :func:`dump` gives it."""
    return dump(entry).rstrip("\n").replace("\n", "\n  ")


def with_checks(head: Mapping[str, Any], entries: Iterable[str]) -> str:
    """The text of a results file, from that of its checks."""
    listed = ",\n  ".join(entries)
    text = dump(head)
    if not listed:
        return text
    before, _, after = text.rpartition(_NO_CHECKS)
    return f'{before}"checks": [\n  {listed}\n ]{after}'


def write_results(path: Path, result: RunResult) -> None:
    """Write the results file, whole or not at all.

    Raises:
        BadInputError: it cannot be written.
    """
    write_atomic(path, dump(to_json(result)))


@cache
def load_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a results file."""
    text = (Path(__file__).resolve().parent / "schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
