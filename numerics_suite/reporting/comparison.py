"""Two folders of baselines as a person reads them, worst first, and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from numerics_suite.core.numbers import jsonable
from numerics_suite.judging.kinds import FAILING, KINDS
from numerics_suite.reporting.lines import WIDTH, Line, wrapped
from numerics_suite.reporting.numbers import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numerics_suite.judging.kinds import Comparison

SCHEMA_VERSION = 1

MEANS = {
    "missing": "The old baseline holds it and the new one does not: nothing is known of it.",
    "changed": "With rounding out of the way the model computes something else: another formula, other weights, or a config that "
    "is read otherwise.",
    "worse": "The same function, with a larger rounding error than chance explains: a rounding that was not there before.",
    "contract": "Code that worked with the old version may fail, or silently do another thing.",
    "new": "The old baseline has no such cell, so there is nothing to compare it with.",
    "better": "The same function, with a smaller rounding error.",
    "rounding": "The same function with errors of the same size; other bits.",
    "identical": "The same bits.",
}

STYLES = {
    **dict.fromkeys(("missing", "changed", "worse", "contract"), "bold red"),
    "better": "green",
    "rounding": "yellow",
    "new": "cyan",
    "identical": "green",
}

LABEL = 11
"""Columns of the label in front of each part of a block."""

LISTED = (
    ("also", "all_kinds"),
    ("contract", "contract"),
    ("missing", "missing"),
    ("added", "contract_added"),
    ("modules", "matched"),
    ("new", "new_modules"),
    ("subject", "subject"),
    ("versions", "environment"),
)
"""Labels and keys of details that hold texts."""

NAMED = 8
"""Texts of one list that a block shows; the JSON has them all."""


def comparison_to_json(found: Sequence[Comparison], *, old: str, new: str) -> dict[str, Any]:
    """The answer of `compare` as CONTRACT.md has it.

    Args:
        found: every cell.
        old: the folder.
        new: the folder.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "compare",
        "old": old,
        "new": new,
        "counts": {kind: sum(item.kind == kind for item in found) for kind in KINDS},
        "subjects": [_to_json(item) for item in found],
    }


def _to_json(item: Comparison) -> dict[str, Any]:
    ratio = item.judged.error_ratio
    measured = "error_before" in item.judged.details
    return {
        "subject": item.cell.subject,
        "task": item.cell.task,
        "precision": item.cell.precision,
        "attn": item.cell.attn,
        "device": item.cell.device,
        "kind": item.kind,
        "module": item.judged.module,
        "error_ratio": jsonable(ratio) if measured else None,
        "details": jsonable(dict(item.judged.details))
        | ({"against": item.against} if item.against is not None else {}),
    }


def comparison_lines(found: Sequence[Comparison], *, quiet: bool = False, width: int = WIDTH) -> list[Line]:
    """All lines: a block for each cell that matters, one line for those that do not, the verdict.

    Args:
        found: every cell.
        quiet: the heads of the blocks that fail, and the verdict.
        width: in columns.
    """
    lines: list[Line] = []
    for kind in KINDS:
        members = [item for item in found if item.kind == kind]
        if not members or kind in {"identical", "new"} or (quiet and kind not in FAILING):
            continue
        for group in _alike(members):
            lines += _block(group, quiet=quiet, width=width)
    if not quiet:
        for kind in ("new", "identical"):
            members = [item for item in found if item.kind == kind]
            if members:
                lines += wrapped(f"{kind}: {_cells(members)}", width=width, rest="  ", style=STYLES[kind])
    return [*lines, _verdict(found)]


def _alike(members: Sequence[Comparison]) -> list[list[Comparison]]:
    """Cells of one subject with the same module and the same reasons make one block."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for item in members:
        details = item.judged.details
        names = [line.split(" ", 1)[0] for line in details.get("why", ())]
        texts = [str(details.get(key)) for _, key in LISTED]
        key = (item.cell.subject, item.cell.task, item.judged.module, item.against, *names, *texts)
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _block(group: Sequence[Comparison], *, quiet: bool, width: int) -> list[Line]:
    first = max(group, key=_badness)
    place = f" in {first.judged.module}" if first.judged.module else ""
    was = f" (was {first.against})" if first.against else ""
    head = f"{first.kind}: {_cells(group)}{was}{place}"
    lines = [Line(line.text, STYLES[first.kind]) for line in wrapped(head, width=width, rest="  ")]
    if quiet:
        return lines
    details = first.judged.details
    parts = [("why", line) for line in details.get("why", ())]
    numbers = _numbers(first)
    if numbers:
        parts.append(("numbers", numbers))
    parts += [(label, text) for label, key in LISTED if (text := _text(key, details.get(key), first.kind))]
    parts.append(("meaning", MEANS[first.kind]))
    last = ""
    for label, text in parts:
        shown_label = "" if label == last else label
        lines += wrapped(text, width=width, first=f"  {shown_label:<{LABEL}}", style="cyan")
        last = label
    return [*lines, Line("")]


def _badness(item: Comparison) -> float:
    ratio = item.judged.error_ratio
    return ratio if ratio == ratio else -1.0


def _text(key: str, value: Any, kind: str) -> str:
    if not value:
        return ""
    if isinstance(value, str):
        return value.removeprefix("matched by order and shape: ") + " (by order and shape)"
    texts = [str(item) for item in value if not (key == "all_kinds" and item == kind)]
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return "; ".join(texts[:NAMED]) + more


def _numbers(item: Comparison) -> str:
    """The numbers of a block: errors, local errors, headroom, bits."""
    details: Mapping[str, Any] = item.judged.details
    if "bits_differ" not in details:
        return ""
    parts = []
    if "error_before" in details:
        before, now, ratio = details["error_before"], details["error_now"], item.judged.error_ratio
        parts.append(f"error against float64 {shown(before)} → {shown(now)} ({shown(ratio)} times)")
    parts += [
        f"{change['module']} {shown(change['before'])} → {shown(change['now'])} roundoffs"
        for change in details.get("local_errors", ())[:3]
    ]
    if details["bits_differ"]:
        parts.append(f"other bits in {', '.join(details['bits_differ'])}")
    change = details["headroom_change"]
    if change == change and abs(change) >= 0.05:
        parts.append(f"headroom {change:+.1f} bits")
    return "; ".join(parts)


def _cells(members: Sequence[Comparison]) -> str:
    """`glm4-tiny (causal-lm) bf16/eager/cpu, bf16/sdpa/cpu; …`."""
    by_subject: dict[str, list[str]] = {}
    for item in members:
        cell = item.cell
        by_subject.setdefault(f"{cell.subject} ({cell.task})", []).append(f"{cell.precision}/{cell.attn}/{cell.device}")
    return "; ".join(f"{subject} {', '.join(cells)}" for subject, cells in by_subject.items())


def _verdict(found: Sequence[Comparison]) -> Line:
    counted = Counter(item.kind for item in found)
    told = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind])
    failing = any(item.kind in FAILING for item in found)
    return Line(
        f"{'CHANGED' if failing else 'PASS'}: {told} (exit {int(failing)})", "bold red" if failing else "bold green"
    )
