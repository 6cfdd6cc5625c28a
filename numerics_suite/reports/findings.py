"""Findings as short blocks that a person can act on; alike ones of many cells are one block."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.text import listed
from numerics_suite.core.tree import root_id
from numerics_suite.reports.charts import chart_lines
from numerics_suite.reports.lines import WIDTH, TerminalLine, printable, wrapped
from numerics_suite.reports.numbers import shown
from numerics_suite.settings.table import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numerics_suite.core.records import Cell, CheckResult, Finding, Remedy, RunResult

LABEL = 10
"""Columns of the label in front of each part of a block."""

NAMED = 4
"""Parameters that a block names before it says how many more there are."""

LONGEST_BATCH = 300
"""Characters of a batch's values that a block shows; the results file has them all."""

CHARTED = {"loss": "losses", "gradient-norm": "gradient norms"}
"""Facts that a chart of the series tells."""

RERUN_OPTIONS = (
    "task",
    "num_labels",
    "device",
    "trust_remote_code",
    "allow_pickle",
    "steps",
    "optimizer",
    "lr",
    "max_grad_norm",
    "train_scope",
    "effort",
    "max_examples",
    "batch_size",
    "seq_len",
    "data",
    "baseline",
)
"""Settings that a rerun needs where somebody set them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Results with a finding of the same check, subject, task and cause; the worst first.

    Attributes:
        results: with their findings.
        consequences: results of other checks, or with other causes, whose findings follow from these.
    """

    results: tuple[CheckResult, ...]
    consequences: tuple[CheckResult, ...] = ()

    @property
    def worst(self) -> CheckResult:
        """The one that the block shows."""
        return self.results[0]

    @property
    def finding(self) -> Finding:
        """The worst one's finding."""
        assert self.worst.finding is not None
        return self.worst.finding


def grouped(results: Iterable[CheckResult]) -> list[Group]:
    """Groups of roots in the order in which the first of each came; what follows from a root is not a group of its own.

    Args:
        results: any; those without a finding are left out. One whose root is not among them stands for itself.
    """
    found = [result for result in results if result.finding is not None]
    ids = {result.id for result in found}
    keys = {result.id: _alike(result) for result in found}
    groups: dict[tuple[str, ...], list[CheckResult]] = {}
    following: dict[tuple[str, ...], list[CheckResult]] = {}
    for result in found:
        key, root = keys[result.id], root_id(result)
        if root in ids and keys[root] != key:
            following.setdefault(keys[root], []).append(result)
        else:
            groups.setdefault(key, []).append(result)
    return [
        Group(results=tuple(sorted(members, key=_badness, reverse=True)), consequences=tuple(following.get(key, ())))
        for key, members in groups.items()
    ]


def _alike(result: CheckResult) -> tuple[str, ...]:
    assert result.finding is not None
    return result.check, result.cell.subject, result.cell.task, result.finding.cause


def following_text(results: Iterable[CheckResult]) -> str:
    """Which checks fail as a consequence, and in how many cells: `train.finite, forward.headroom (3 cells)`.

    Args:
        results: whose findings follow from one root.
    """
    cells: dict[str, set[Cell]] = {}
    for result in results:
        cells.setdefault(result.check, set()).add(result.cell)
    return ", ".join(f"{check} ({len(held)} cells)" if len(held) > 1 else check for check, held in cells.items())


def _badness(result: CheckResult) -> tuple[bool, float]:
    """How bad the measured value is; NaN is the worst there is."""
    assert result.finding is not None
    measured = result.finding.evidence.get("measured", 0)
    if isinstance(measured, str):
        return False, 0.0
    return (True, 0.0) if math.isnan(measured) else (False, float(measured))


def block(
    group: Group, *, number: int | None = None, run: RunResult | None = None, width: int = WIDTH
) -> list[TerminalLine]:
    """One block: what, in which cells, where, how much, why, from which batch, what to try and how to see it again.

    Args:
        group: alike findings.
        number: of the block, None for none.
        run: the whole run, which the command to see it again needs; None leaves that line out.
        width: in columns.
    """
    finding, result = group.finding, group.worst
    head = f"{number}. " if number is not None else ""
    indent = " " * 3
    lines = wrapped(f"{head}{finding.title}", width=width, rest=" " * len(head), style="bold red")
    lines = [TerminalLine(line.text, "bold red") for line in lines]
    parts = [
        ("check", f"{result.check} on {result.cell.subject} ({result.cell.task})"),
        ("cells", cells_text([member.cell for member in group.results])),
        ("cause", finding.cause),
        ("where", _where(finding)),
        ("measured", _measured(finding)),
        ("evidence", _evidence(finding.evidence, charted={series.name for series in result.series})),
    ]
    lines += _labelled(parts, indent, width)
    lines += chart_lines(result.series, step=finding.step, first=indent, column=LABEL, width=width)
    lines += _labelled([("batch", batch_text(finding.batch)), ("why", finding.explanation)], indent, width)
    tries = [("" if index else "try", _remedy(remedy)) for index, remedy in enumerate(finding.remedies)]
    lines += _labelled(tries, indent, width)
    lines += _labelled([("leads to", following_text(group.consequences)), ("follows", _root(finding))], indent, width)
    if finding.reproducer:
        lines += _labelled([("script", f"python {shlex.quote(finding.reproducer)}")], indent, width)
    if run is not None:
        lines += _command_lines(rerun_words(result, run), width, f"{indent}{'rerun':<{LABEL}}")
    return lines


def _labelled(parts: Iterable[tuple[str, str]], indent: str, width: int) -> list[TerminalLine]:
    return [
        line
        for label, text in parts
        if text
        for line in wrapped(text, width=width, first=f"{indent}{label:<{LABEL}}", style="cyan")
    ]


def cells_text(cells: Sequence[Cell]) -> str:
    """Cells of one subject, short: `bf16 (eager, sdpa), fp16 (eager) on cpu`."""
    devices: dict[str, dict[str, list[str]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.device, cell.precision, cell.attn)):
        devices.setdefault(cell.device, {}).setdefault(cell.precision, []).append(cell.attn)
    texts = []
    for device, precisions in devices.items():
        inner = ", ".join(f"{precision} ({', '.join(attns)})" for precision, attns in precisions.items())
        texts.append(f"{inner} on {device}")
    return "; ".join(texts)


def _where(finding: Finding) -> str:
    source = f"{finding.op or 'an operation'} at {finding.source}" if finding.source else finding.op
    parts = [
        f"step {finding.step}" if finding.step is not None else "",
        f"module {finding.module}" if finding.module else "",
        source or "",
        f"{'parameter' if len(finding.parameters) == 1 else 'parameters'} {listed(list(finding.parameters), NAMED)}"
        if finding.parameters
        else "",
    ]
    return "; ".join(part for part in parts if part)


def _root(finding: Finding) -> str:
    return f"from the finding of {finding.consequence_of}" if finding.consequence_of else ""


def _measured(finding: Finding) -> str:
    facts = finding.evidence
    if "measured" not in facts:
        return ""
    unit = f" {facts['unit']}" if facts.get("unit") else ""
    name = f" ({facts['measurement']})" if facts.get("measurement") else ""
    allowed = f", {shown(facts['allowed'])} allowed" if "allowed" in facts else ""
    return f"{shown(facts['measured'])}{unit}{name}{allowed}"


def _evidence(facts: Mapping[str, Any], charted: Collection[str] = ()) -> str:
    """Facts in a line, without those that stand elsewhere in the block."""
    told = {"measured", "allowed", "unit", "measurement"} | {CHARTED[name] for name in charted if name in CHARTED}
    return "; ".join(f"{name}: {shown(value)}" for name, value in facts.items() if name not in told)


def batch_text(batch: Mapping[str, Any] | None) -> str:
    """The smallest failing batch: how it was drawn, then each tensor with its values where they are few."""
    if not batch:
        return ""
    parts = [str(batch["drawn"])] if batch.get("drawn") else []
    for name, value in batch.items():
        if not isinstance(value, dict):
            parts += [] if name == "drawn" else [f"{name}: {shown(value)}"]
            continue
        values = str(value.get("values", ""))
        text = f"{name} {value.get('dtype', '')} {value.get('shape', '')}".rstrip()
        parts.append(f"{text} = {values}" if 0 < len(values) <= LONGEST_BATCH else text)
    return "; ".join(parts)


def _remedy(remedy: Remedy) -> str:
    tried = {None: "", True: " (tried: it works)", False: " (tried: no help)"}[remedy.verified]
    effect = f" [{remedy.effect}]" if remedy.effect else ""
    return f"{' with '.join((remedy.name, *remedy.together))}{tried}: {remedy.description}{effect}"


def rerun_words(result: CheckResult, run: RunResult) -> list[str]:
    """The words of the command that asks the same check of the same cell again, with the same batches.

    Args:
        result: of the check.
        run: the whole run.
    """
    settings, cell = run.settings, result.cell
    source = next((subject.source for subject in run.subjects if subject.id == cell.subject), None)
    bundle = settings.get("bundle")
    # A bundle is of the model that was watched: without a subject there is only the name of its class.
    words = ["numerics-suite", "check", *([] if bundle and source is None else [source or cell.subject])]
    if cell.subject in settings.get("names", ()):
        words += ["--name", cell.subject]
    words += ["--bundle", str(bundle)] if bundle else ["--checks", result.check]
    words += ["--precision", cell.precision, "--attn", cell.attn]
    for name in RERUN_OPTIONS:
        value = settings.get(name)
        if name not in settings.get("origins", {}) or value is None or value is False:
            continue
        flag = BY_NAME[name].flags[0]
        words += [flag] if value is True else [flag, str(value)]
    return [*words, "--seed", str(settings.get("seed", 0))]


def _command_lines(words: list[str], width: int, first: str) -> list[TerminalLine]:
    """The command over several lines with backslashes, so that it can be copied from any terminal."""
    pieces: list[str] = []
    for word in words:
        quoted = shlex.quote(printable(word))
        if not pieces or word.startswith("--"):
            pieces.append(quoted)
        else:
            pieces[-1] += f" {quoted}"
    rows: list[str] = []
    for piece in pieces:
        if rows and len(first) + len(rows[-1]) + len(piece) + 3 <= width:
            rows[-1] += f" {piece}"
        else:
            rows.append(piece)
    last = len(rows) - 1
    texts = [f"{row} \\" if index < last else row for index, row in enumerate(rows)]
    begin = " " * len(first)
    return [TerminalLine(f"{begin if index else first}{text}", "cyan", len(first)) for index, text in enumerate(texts)]
