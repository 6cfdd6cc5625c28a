"""What `compare` and `bisect` found: differences of two baselines, and the steps to the first bad version."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.text import listed
from numerics_suite.judgement.classify import KINDS
from numerics_suite.reports.comparison import MEANS
from numerics_suite.reports.view.curves import Beside, Figure, PlotLine, over_modules
from numerics_suite.reports.view.formats import number
from numerics_suite.reports.view.series import layer_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.reports.documents import ComparisonFile

LISTED = (
    ("also", "all_kinds"),
    ("contract", "contract"),
    ("missing", "missing"),
    ("added", "contract_added"),
    ("new modules", "new_modules"),
    ("moved modules", "moved_modules"),
    ("subject", "subject"),
    ("versions", "environment"),
)
"""Labels and keys of details that hold texts."""

_CHANGED = re.compile(r"(?P<name>\S+) (?P<before>\S+) → (?P<now>\S+)")

MOST_TEXTS = 30
"""Texts of one list; the JSON has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualDifferences:
    """Equal differences of cells of one subject.

    Attributes:
        module: where it starts, empty where that is not known.
        ratio: error against float64, new over old, empty where it was not measured.
        why: what was measured beyond its budget.
        figure: errors of the modules that moved, None where none did.
    """

    kind: str
    cells: str
    module: str
    ratio: str
    meaning: str
    why: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    figure: Figure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """One `compare`.

    Attributes:
        short_old: the reference, as short as it can be told.
        short_new: the other, as short as it can be told.
        counts: cells of each kind, worst first.
        entries: what is not identical or new, worst first.
        quiet: identical and new cells, a line each.
    """

    old: str
    new: str
    short_old: str
    short_new: str
    counts: tuple[tuple[str, int], ...]
    entries: tuple[EqualDifferences, ...]
    quiet: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What was compared with what: versions where the baselines know them, folders else.

    Attributes:
        old: the reference, as short as it can be told.
        headline: what a headline ends with: `, transformers 5.7.0 → 5.8.1`; empty where only folders are known.
    """

    old: str
    new: str
    headline: str
    lines: tuple[tuple[str, str], ...]

    @property
    def about(self) -> str:
        """`compare of transformers 5.7.0 and transformers 5.8.1`."""
        return f"compare of {self.old} and {self.new}"


def versions_of(comparison: ComparisonFile) -> Moved:
    """What was compared with what."""
    content = comparison.content
    old, new = str(content.get("old", "the old baseline")), str(content.get("new", "the new baseline"))
    folders = (("old", old), ("new", new))
    lines = dict.fromkeys(
        line for item in content["subjects"] for line in _details(item).get("environment", ()) if isinstance(line, str)
    )
    packages = [found for line in lines if (found := _CHANGED.fullmatch(line)) is not None]
    telling = [found for found in packages if found["name"] in {"transformers", "torch"}]
    if len(telling) != 1:
        short_old, short_new = _apart(old, new)
        return Moved(old=short_old, new=short_new, headline="", lines=folders)
    name, before, now = telling[0].group("name", "before", "now")
    return Moved(
        old=f"{name} {before}",
        new=f"{name} {now}",
        headline=f", {name} {before} → {now}",
        lines=(("before", f"{name} {before}"), ("now", f"{name} {now}")),
    )


def _apart(old: str, new: str) -> tuple[str, str]:
    """Two paths by the parts that tell them apart; whole where that leaves nothing."""
    first, second = old.split("/"), new.split("/")
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    return "/".join(first) or old, "/".join(second) or new


def differences_of(comparison: ComparisonFile) -> Differences:
    """One `compare` as the page tells it."""
    content, moved = comparison.content, versions_of(comparison)
    items: list[Mapping[str, Any]] = list(content["subjects"])
    counted = Counter(item["kind"] for item in items)
    order = {kind: at for at, kind in enumerate(KINDS)}
    kinds = sorted(counted, key=lambda kind: order.get(kind, -1))
    loud = [item for item in items if item["kind"] not in {"identical", "new"}]
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for item in loud:
        groups.setdefault(_key(item), []).append(item)
    entries = sorted(groups.values(), key=lambda group: order.get(group[0]["kind"], -1))
    quiet = (
        (kind, _cells([item for item in items if item["kind"] == kind]))
        for kind in ("new", "identical")
        if counted[kind]
    )
    return Differences(
        old=str(content.get("old", "the old baseline")),
        new=str(content.get("new", "the new baseline")),
        short_old=moved.old,
        short_new=moved.new,
        counts=tuple((kind, counted[kind]) for kind in kinds),
        entries=tuple(_entry(group) for group in entries),
        quiet=tuple(quiet),
    )


def _details(item: Mapping[str, Any]) -> Mapping[str, Any]:
    details = item.get("details")
    return details if isinstance(details, Mapping) else {}


def _key(item: Mapping[str, Any]) -> tuple[object, ...]:
    """Cells of one subject with the same module and the same reasons are one entry."""
    details = _details(item)
    names = [str(line).split(" ", 1)[0] for line in details.get("why", ())]
    texts = [str(details.get(key)) for _, key in LISTED]
    return item["kind"], item["subject"], item.get("task"), item.get("module"), *names, *texts


def _entry(group: Sequence[Mapping[str, Any]]) -> EqualDifferences:
    first = max(group, key=_badness)
    details = _details(first)
    ratio = first.get("error_ratio")
    return EqualDifferences(
        kind=first["kind"],
        cells=_cells(group),
        module=first.get("module") or "",
        ratio="" if ratio is None else number(ratio),
        meaning=MEANS.get(first["kind"], ""),
        why=tuple(str(line) for line in details.get("why", ())),
        facts=tuple(_facts(first, details)),
        figure=_figure(group),
    )


def _badness(item: Mapping[str, Any]) -> float:
    ratio = item.get("error_ratio")
    return ratio if isinstance(ratio, (int, float)) and not math.isnan(ratio) else -1.0


def _facts(item: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "error_before" in details and "error_now" in details:
        yield "error", f"{number(details['error_before'])} before, {number(details['error_now'])} now"
    headroom = details.get("headroom_change")
    if isinstance(headroom, (int, float)) and abs(headroom) >= 0.05:
        yield "headroom", f"{headroom:+.1f} bits"
    if details.get("bits_differ"):
        yield "other bits in", listed([str(part) for part in details["bits_differ"]], MOST_TEXTS)
    for label, key in LISTED:
        value = details.get(key)
        texts = [str(text) for text in value if text != item["kind"]] if isinstance(value, (list, tuple)) else []
        if texts:
            yield label, listed(texts, MOST_TEXTS)
    if details.get("matched"):
        yield "modules", str(details["matched"])


def _figure(group: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Local errors before and now, by module; of the cell with the most modules that moved."""
    item = max(group, key=lambda member: len(_details(member).get("local_errors", ())))
    moved = _details(item).get("local_errors", ())
    if not moved:
        return None
    label = "/".join(str(item[name]) for name in ("precision", "attn", "device") if item.get(name))
    before = PlotLine(label="before", points={str(row["module"]): float(row["before"]) for row in moved})
    now = PlotLine(label="now", points={str(row["module"]): float(row["now"]) for row in moved})
    told = Beside(heads=("layer",), of={str(row["module"]): (layer_of(str(row["module"])),) for row in moved})
    title = f"Error of each module that moved, in {label}"
    return over_modules("pairs", title, "roundoffs", [before, now], told)


def _cells(items: Sequence[Mapping[str, Any]]) -> str:
    """`glm4-tiny (causal-lm) bf16/eager/cpu, bf16/sdpa/cpu; …`."""
    by_subject: dict[str, list[str]] = {}
    for item in items:
        name = f"{item['subject']} ({item['task']})" if item.get("task") else str(item["subject"])
        parts = [str(item[key]) for key in ("precision", "attn", "device") if item.get(key)]
        by_subject.setdefault(name, []).append("/".join(parts))
    return "; ".join(f"{subject} {listed(cells, 12)}" for subject, cells in by_subject.items())
