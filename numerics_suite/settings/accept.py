"""Accepted findings: which finding an entry of `[[tool.numerics-suite.accept]]` excuses, and when the entry is stale."""

from __future__ import annotations

import datetime as dt
import fnmatch
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.core.extensions import OWN_NAME
from numerics_suite.settings import parsers
from numerics_suite.settings.choices import ATTENTIONS, CAUSES, PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numerics_suite.core.records import CheckResult


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptEntry:
    """A finding that is known, with the reason; it is shown and does not fail the run.

    Attributes:
        check: id or glob.
        reason: why it is accepted, for whoever reads the report.
        subject: only for the subject of this name.
        precision: only in this precision.
        attn: only with this attention implementation.
        cause: only with this cause.
        transformers: only with a release in this specifier, such as `<5.9`.
        until: the last day on which it holds.
    """

    check: str
    reason: str
    subject: str | None = None
    precision: str | None = None
    attn: str | None = None
    cause: str | None = None
    transformers: str | None = None
    until: dt.date | None = None

    def __str__(self) -> str:
        """What the entry selects: `check=forward.*, precision=fp16`."""
        selected = ("check", "subject", "precision", "attn", "cause", "transformers", "until")
        return ", ".join(f"{name}={value}" for name in selected if (value := getattr(self, name)) is not None)


def matches(entry: AcceptEntry, result: CheckResult, transformers_version: str, today: dt.date) -> bool:
    """Whether the entry accepts the finding of this result."""
    if result.finding is None or _is_past(entry, today) or not _applies(entry, transformers_version):
        return False
    named = fnmatch.fnmatchcase(result.check, entry.check) and entry.cause in {None, result.finding.cause}
    return named and reaches(entry, result)


def reaches(entry: AcceptEntry, result: CheckResult) -> bool:
    """Whether the entry is for the cell of this result, whatever check and cause it names: so far a root's acceptance goes."""
    cell = result.cell
    wanted = ((entry.subject, cell.subject), (entry.precision, cell.precision), (entry.attn, cell.attn))
    return all(want in {None, have} for want, have in wanted)


def stale(
    entries: Sequence[AcceptEntry], results: Sequence[CheckResult], today: dt.date, transformers_version: str
) -> list[str]:
    """One line for each entry that is past its date or matched no finding of what ran; each fails the run.

    An entry for other transformers releases is not asked to match, or no run over several versions could pass.
    """
    lines = []
    for entry in entries:
        if _is_past(entry, today):
            lines.append(f"accept entry ({entry}) ended on {entry.until}: repair the finding or give a later date")
        elif _applies(entry, transformers_version) and not any(
            matches(entry, result, transformers_version, today) for result in results
        ):
            lines.append(
                f"accept entry ({entry}) matched no finding of this run: remove it, or correct what it selects"
            )
    return lines


def _is_past(entry: AcceptEntry, today: dt.date) -> bool:
    return entry.until is not None and today > entry.until


def _applies(entry: AcceptEntry, transformers_version: str) -> bool:
    if entry.transformers is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(entry.transformers).contains(transformers_version, prereleases=True)


def entry_to_json(entry: AcceptEntry) -> dict[str, str]:
    """The entry without what it leaves open; the date as YYYY-MM-DD."""
    return {name: str(value) for name, value in asdict(entry).items() if value is not None}


def parse_accept(value: Any, where: str) -> tuple[AcceptEntry, ...]:
    """The entries of an array of tables.

    Raises:
        BadInputError: an entry cannot be used.
    """
    if not isinstance(value, (list, tuple)):
        message = f"{where} must be an array of tables: write [[tool.numerics-suite.accept]]"
        raise BadInputError(message)
    return tuple(_entry(table, f"{where}, entry {number}") for number, table in enumerate(value, start=1))


def _entry(table: Any, where: str) -> AcceptEntry:
    if not isinstance(table, dict):
        message = f"{where} must be a table with check and reason"
        raise BadInputError(message)
    for key in table:
        if key not in _PARSERS:
            message = f"{where}: unknown key '{key}'{nearest(key, _PARSERS)} (known: {', '.join(_PARSERS)})"
            raise BadInputError(message)
    for key in ("check", "reason"):
        if key not in table:
            message = f"{where}: '{key}' is missing"
            raise BadInputError(message)
    return AcceptEntry(**{key: _value(table, key, where) for key in table})


def _value(table: Mapping[str, Any], key: str, where: str) -> Any:
    value = table[key]
    try:
        if key == "until":
            return _date(value)
        if not isinstance(value, str):
            message = f"must be text, not {value!r}"
            raise ValueError(message)  # noqa: TRY301, TRY004 - one way out for every unusable value
        return _PARSERS[key](value)
    except ValueError as error:
        message = f"{where}: {key}: {error}"
        raise BadInputError(message) from None


def _date(value: Any) -> dt.date:
    if isinstance(value, dt.datetime):
        return value.date()
    if isinstance(value, dt.date):
        return value
    try:
        return dt.date.fromisoformat(value)
    except (TypeError, ValueError):
        message = f"must be a date as in 2026-12-31, not '{value}'"
        raise ValueError(message) from None


def _specifier(value: str) -> str:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        SpecifierSet(parsers.text(value))
    except InvalidSpecifier:
        message = f"must be a version specifier as in '>=5.8,<5.9', not '{value}'"
        raise ValueError(message) from None
    return value


def _cause(value: str) -> str:
    """A cause of ours, or one that another package has named in its own way, as in `acme.coarse-logits`."""
    return value if OWN_NAME.fullmatch(value) else parsers.one_of("cause", CAUSES)(value)


_PARSERS: dict[str, Any] = {
    "check": parsers.check_glob,
    "reason": parsers.text,
    "subject": parsers.text,
    "precision": parsers.one_of("precision", PRECISIONS),
    "attn": parsers.one_of("attention implementation", ATTENTIONS),
    "cause": _cause,
    "transformers": _specifier,
    "until": _date,
}
