"""Two folders of baselines as a person reads them, worst first and as a diff, and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from numerics_suite.core.numbers import jsonable
from numerics_suite.core.text import listed
from numerics_suite.judgement.classify import FAILING, KINDS
from numerics_suite.reports.charts import side_by_side, told
from numerics_suite.reports.lines import WIDTH, TerminalLine, printable, wrapped
from numerics_suite.reports.numbers import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.judgement.classify import Comparison
    from numerics_suite.judgement.diff_rows import Changed

SCHEMA_VERSION = 1

MEANS = {
    "missing": "The old baseline holds it and the new one does not: nothing is known of it.",
    "changed": "With rounding out of the way the model computes something else: another formula, other weights, or a config that "
    "is read otherwise.",
    "worse": "The same function, with a larger rounding error than chance explains: a rounding that was not there before.",
    "contract": "Code that worked with the old version may fail, or silently behave differently.",
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
    "all_kinds",
    "contract",
    "missing",
    "contract_added",
    "matched",
    "new_modules",
    "tensors",
    "fused",
    "inlined_modules",
    "not_compared",
    "subject",
    "environment",
)
"""Keys of details that hold texts: cells that share them are one block."""

NAMED = 5
"""Changes of one group that a block shows; the JSON has them all."""

FUSED = 2
"""Tensors found by value that a block names."""

SIGNS = {"-": "red", "+": "green", " ": ""}
"""Of a line of the diff: of the old baseline, of the new one, of neither."""


def comparison_to_json(found: Sequence[Comparison], *, old: str, new: str) -> dict[str, Any]:
    """The answer of `compare` as CONTRACT.md has it."""
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
        **item.cell.named,
        "kind": item.kind,
        "module": item.judged.module,
        "error_ratio": jsonable(ratio) if measured else None,
        "details": jsonable(dict(item.judged.details))
        | ({"against": item.against} if item.against is not None else {}),
    }


def comparison_lines(
    found: Sequence[Comparison], *, old: str, new: str, quiet: bool = False, width: int = WIDTH
) -> list[TerminalLine]:
    """All lines: a block for each cell that matters, one line for those that do not, the verdict.

    A block is a diff: what begins with `-` is the old baseline's, what begins with `+` is the new one's.

    Args:
        found: every cell.
        old: the folder.
        new: the folder.
        quiet: the heads of the blocks that fail, and the verdict.
        width: in columns.
    """
    lines: list[TerminalLine] = []
    for kind in KINDS:
        members = [item for item in found if item.kind == kind]
        if not members or kind in {"identical", "new"} or (quiet and kind not in FAILING):
            continue
        for group in _alike(members):
            lines += _block(group, quiet=quiet, width=width)
    if not quiet:
        head = [
            TerminalLine(printable(f"--- {old}"), "red"),
            TerminalLine(printable(f"+++ {new}"), "green"),
            TerminalLine(""),
        ]
        lines = [*head, *lines] if lines else []
        for kind in ("new", "identical"):
            members = [item for item in found if item.kind == kind]
            if members:
                lines += wrapped(f"{kind}: {_cells(members)}", width=width, rest="  ", style=STYLES[kind])
        for line in _not_asked(found):
            lines += wrapped(f"not compared: {line}", width=width, rest="  ", style="yellow")
    return [*lines, *_verdict(found, width)]


def _not_asked(found: Sequence[Comparison]) -> list[str]:
    """What baselines of another schema lack, of cells that have no block of their own to say it."""
    plain = (item for item in found if item.kind == "identical")
    return list(dict.fromkeys(line for item in plain for line in item.judged.details.get("not_compared", ())))


def _alike(members: Sequence[Comparison]) -> list[list[Comparison]]:
    """Cells of one subject with the same module and the same reasons make one block."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for item in members:
        details = item.judged.details
        names = [line.split(" ", 1)[0] for line in details.get("why", ())]
        texts = [str(details.get(key)) for key in LISTED]
        key = (item.cell.subject, item.cell.task, item.judged.module, item.against, *names, *texts)
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _block(group: Sequence[Comparison], *, quiet: bool, width: int) -> list[TerminalLine]:
    first = max(group, key=_badness)
    place = f" in {first.judged.module}" if first.judged.module else ""
    was = f" (was {first.against})" if first.against else ""
    head = f"{first.kind}: {_cells(group)}{was}{place}"
    lines = [TerminalLine(line.text, STYLES[first.kind]) for line in wrapped(head, width=width, rest="  ")]
    if quiet:
        return lines
    for sign, text in _diff(first.judged.changed):
        changed = wrapped(text, width=width, first=f"{sign} ", rest=f"{sign}   ")
        lines += [TerminalLine(line.text, SIGNS[sign]) for line in changed]
    last = ""
    for label, text in _told(first):
        shown_label = "" if label == last else label
        lines += wrapped(text, width=width, first=f"  {shown_label:<{LABEL}}", style="cyan")
        last = label
    return [*lines, TerminalLine("")]


def _badness(item: Comparison) -> float:
    ratio = item.judged.error_ratio
    return ratio if ratio == ratio else -1.0


def _diff(changed: Sequence[Changed]) -> Iterator[tuple[str, str]]:
    """A sign and a text for each line of the diff; of a long group the first, and how many more there are."""
    counted = Counter(item.group for item in changed)
    seen = Counter[str]()
    for item in changed:
        seen[item.group] += 1
        if seen[item.group] <= NAMED:
            old, new = _sides(item)
            if item.old is not None:
                yield "-", f"{item.what}{old}"
            if item.new is not None:
                yield "+", f"{item.what}{new}"
        elif seen[item.group] == counted[item.group]:
            yield " ", f"and {counted[item.group] - NAMED} more: {item.group}"


def _sides(item: Changed) -> tuple[str, str]:
    """The two values as they stand behind the name; curves have one scale."""
    if isinstance(item.old, tuple) and isinstance(item.new, tuple):
        before, now = side_by_side(item.old, item.new)
        return f": {before} {told(item.old)}", f": {now} {told(item.new)}"
    old, new = (
        f": {shown(value)} {item.unit}".rstrip() if value not in {None, ""} else "" for value in (item.old, item.new)
    )
    times = _times(item)
    return old, f"{new} ({times} times)" if times else new


def _times(item: Changed) -> str:
    """New over old, of errors."""
    if item.group != "errors" or not isinstance(item.old, (int, float)) or not isinstance(item.new, (int, float)):
        return ""
    return shown(item.new / item.old) if item.old else ""


def _told(item: Comparison) -> list[tuple[str, str]]:
    """Labels and texts below the diff: the reasons, and what has no old and new value."""
    details = item.judged.details
    parts = [("why", str(line)) for line in details.get("why", ())]
    others = [kind for kind in details.get("all_kinds", ()) if kind != item.kind]
    if others:
        parts.append(("also", ", ".join(others)))
    if details.get("fused"):
        parts.append(("fused", f"the same values in other tensors: {listed(details['fused'], FUSED)}"))
    parts += [("not asked", line) for line in details.get("not_compared", ())]
    if details.get("bits_differ"):
        parts.append(("bits", f"other bits in {', '.join(details['bits_differ'])}"))
    change = details.get("headroom_change", 0.0)
    if change == change and abs(change) >= 0.05:
        parts.append(("headroom", f"{change:+.1f} bits"))
    return [*parts, ("meaning", MEANS[item.kind])]


def _cells(members: Sequence[Comparison]) -> str:
    """`glm4-tiny (causal-lm) bf16/eager/cpu, bf16/sdpa/cpu; …`."""
    by_subject: dict[str, list[str]] = {}
    for item in members:
        cell = item.cell
        by_subject.setdefault(f"{cell.subject} ({cell.task})", []).append(f"{cell.precision}/{cell.attn}/{cell.device}")
    return "; ".join(f"{subject} {', '.join(cells)}" for subject, cells in by_subject.items())


def _verdict(found: Sequence[Comparison], width: int) -> list[TerminalLine]:
    counted = Counter(item.kind for item in found)
    parts = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind])
    failing = any(item.kind in FAILING for item in found)
    text = f"{'CHANGED' if failing else 'PASS'}: {parts} (exit {int(failing)})"
    return wrapped(text, width=width, rest="  ", style="bold red" if failing else "bold green")
