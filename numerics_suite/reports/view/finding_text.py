"""The texts of one finding: its cells, its place, what shows its cause, its value beside its limit, its batch, its command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numerics_suite.core.text import listed, percent
from numerics_suite.reports.lines import cut
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.view.causes import title_of
from numerics_suite.reports.view.formats import many, plural
from numerics_suite.settings.table import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numerics_suite.core.records import Cell, CheckResult, Finding, RunResult

NAMED = 2
"""Parameters that a place names before it says how many more there are."""

LONGEST_BATCH = 300
"""Characters of a batch's values that are shown; the results file has them all."""

LONGEST_FACT = 100
"""Characters of a fact that stands for an experiment."""

MEASURED = frozenset({"measured", "allowed", "unit", "measurement"})
"""Facts that :func:`measured_text` says."""

NO_SHOWING = frozenset(
    {
        *MEASURED,
        "confidence",
        "exception",
        "losses",
        "gradient norms",
        "first",
        "and others",
        "trained parameters",
        "op",
        "line",
        "source",
    }
)
"""Facts that show nothing of a cause, or stand elsewhere."""

SHARES = frozenset({"share of the steps that is held", "its standard error"})
"""Facts that are printed in percent."""

OUTCOMES = {
    ("the same op in float64", "finite"): "the same operation in float64 is finite",
    ("the same op in float64", "not finite"): "the same operation in float64 is not finite either",
    **dict.fromkeys(
        (("loaded without poison", "other values"), ("over memory of zeros", "other values")),
        "a load into zeroed memory gives other values than a load into memory filled with NaN",
    ),
    ("loaded without poison", "NaN again"): "a load into zeroed memory gives NaN as well",
}
"""Facts that are experiments of their own, in words."""

IN_FLOAT64 = "in fp64"
"""The experiment that repeats a check without rounding."""

RAISES = "model-raises"
"""The cause of a finding that keeps other checks from being asked."""

OF_CAUSE = {
    (
        "optimizer-underflow",
        "the same op in float64",
        "not finite",
    ): "the same operation in float64 on {dtype}'s values (eps is already 0) is not finite either, so it is no overflow",
}
"""The same where the cause gives an outcome its meaning."""

PASSES = {"optimizer": "optimizer step", "backward": "backward pass of step", "forward": "forward pass of step"}

DIFFERENCES = {
    "true-gradient": "times the gradient's largest value",
    "true-loss": "times the loss",
    "true-training-mode": "times the gradient's largest value",
}
OF_THE_ANSWER = "times the root mean square of the logits"
"""What a difference in float64 is measured in, by measurement; of all others it is logits that are compared."""

ROUNDOFFS = {
    "fp64": "float64",
    "fp32": "float32",
    "tf32": "TF32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "pure-fp16": "float16",
    "amp-bf16": "bfloat16",
    "amp-fp16": "float16",
}
"""By precision, the float whose unit roundoff errors of it are measured in."""

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "TF32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""u = 2**-p for a significand of p bits, with the implicit one (Higham, *Accuracy and Stability of Numerical Algorithms*, section 2.1)."""

WORTH_PERCENT = 0.01
"""A relative error from here on is also said in percent."""

UNITS = {
    "rounded": "times the rounding error of the plain run",
    "excess": "times the rounding error that the precision makes unavoidable",
    "median-excess": "times the rounding error that the precision makes unavoidable",
    "gain": "times the scale that keeps variance",
    "local-excess": "times what the baseline and chance explain",
    "gradient-excess": "times what the baseline and chance explain",
    "rotary-excess": "times what rounding explains",
    "curve-growth": "times what rounding explains",
    "composed": "times the error of the same module with every operation rounded once",
    "lost": "times the share held (plus 3 standard errors) is the unit roundoff",
}
"""What a ratio is a ratio of, by measurement; others are named by their unit."""

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


def cells_text(cells: Iterable[Cell]) -> str:
    """Cells of one subject, short: `bf16 (eager, sdpa), fp16 (eager) · cpu`; a single one as `bf16 · eager · cpu`."""
    devices: dict[str, dict[str, list[str]]] = {}
    for cell in sorted(set(cells), key=lambda cell: (cell.device, cell.precision, cell.attn)):
        attns = devices.setdefault(cell.device, {}).setdefault(cell.precision, [])
        attns += [] if cell.attn in attns else [cell.attn]
    texts = []
    for device, precisions in devices.items():
        parts = [f"{precision} ({', '.join(attns)})" for precision, attns in precisions.items()]
        if len(parts) == 1:
            ((precision, attns),) = precisions.items()
            parts = [" · ".join((precision, *attns))] if len(attns) == 1 else parts
        texts.append(" · ".join(part for part in (", ".join(parts), device) if part))
    return "; ".join(texts)


def where_text(finding: Finding) -> str:
    """Step, parameters or module, operation and line: `optimizer step 1, lm_head.weight; aten.addcdiv_ at adam.py:546`."""
    facts = finding.evidence
    step = ""
    if finding.step is not None:
        step = f"{PASSES.get(str(facts.get('pass')), 'step')} {finding.step}"
    elif facts.get("pass") in PASSES:
        step = PASSES[str(facts["pass"])].removesuffix(" of step")
    names = list(finding.parameters[:NAMED])
    others = facts.get("and others", 0) if str(facts.get("first", "")).startswith("parameter ") else 0
    more = len(finding.parameters) - len(names) + (int(others) if isinstance(others, (int, float)) else 0)
    named = ", ".join(names) + (f" and {many(more, 'more parameter')}" if more and names else "")
    trained = facts.get("trained parameters")
    if names and more and trained == len(names) + more:
        named = f"all {trained} trained parameters, first {names[0]}"
    elif more and isinstance(trained, int):
        named += f" of {trained} trained"
    module = finding.module
    if module and any(name.startswith(f"{module}.") for name in names):
        module = None
    source = " at ".join(part for part in (finding.op, finding.source) if part)
    return "; ".join(part for part in (", ".join(part for part in (step, module, named) if part), source) if part)


def shown_text(finding: Finding) -> str:
    """What shows that the cause is right: the experiments and what came of them, or what was seen; and how sure that is."""
    facts = {str(name): value for name, value in finding.evidence.items()}
    parts = [
        OF_CAUSE.get((finding.cause, name, value), words).format(dtype=facts.get("dtype", "the dtype"))
        for (name, value), words in OUTCOMES.items()
        if facts.get(name) == value
    ]
    for outcome, words in (("passes", "the check passes {}"), ("fails", "the check fails {} too")):
        conditions = [name for name, value in facts.items() if value == outcome]
        parts += [words.format(" and ".join(conditions))] if conditions else []
        parts += ["so rounding is not the cause"] if outcome == "fails" and IN_FLOAT64 in conditions else []
    if not parts:
        seen = [
            (name, value) for name, value in facts.items() if name not in NO_SHOWING and not name.startswith("also ")
        ]
        parts = [cut(_seen(name, value), LONGEST_FACT) for name, value in seen[:2]]
    confidence = str(facts.get("confidence", ""))
    parts += [confidence.partition(": ")[2]] if confidence.startswith(("low", "medium")) else []
    return "; ".join(part for part in parts if part)


def _seen(name: str, value: object) -> str:
    if name in SHARES and isinstance(value, (int, float)):
        return f"{name}: {percent(value)}"
    text = {"True": "yes", "False": "no"}.get(str(value)) or shown(value)
    return f"seen in {text}" if name == "where" else f"{name}: {text}"


def value_text(name: str, value: float, limit: float, unit: str, fall: float | None = None) -> str:
    """A value beside its limit, in words: `0.79 roundoffs; at most 0.75`, `1 pair; none is allowed`.

    Args:
        name: of the measurement.
        value: measured.
        limit: the most that it may be.
        unit: of both.
        fall: of the loss, in nats, where the value is its rise.
    """
    if name == "rise" and fall is not None:
        return f"loss {'fell' if fall >= 0 else 'rose'} by {shown(abs(fall))}; it must not rise"
    if limit == 0:
        return f"{shown(value)} {plural(unit, value)}; none is allowed"
    words = UNITS.get(name, unit)
    if name not in UNITS and unit == "ratio":
        return f"{shown(value)} {DIFFERENCES.get(name, OF_THE_ANSWER)}, in float64, whose rounding explains at most {shown(limit)}"
    return f"{shown(value)} {words}".rstrip() + f"; at most {shown(limit)}"


def measured_text(result: CheckResult) -> str:
    """The measured value of a result's finding beside its limit, empty where neither is known."""
    facts = {} if result.finding is None else result.finding.evidence
    value, limit = facts.get("measured"), facts.get("allowed")
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    name, unit = str(facts.get("measurement", "")), str(facts.get("unit", ""))
    if not isinstance(limit, (int, float)):
        return f"{shown(value)} {unit}".rstrip()
    if unit == "roundoffs" and result.check.startswith("reference."):
        dtype = ROUNDOFFS.get(result.cell.precision, result.cell.precision)
        unit = f"unit roundoffs of {dtype}"
        # A unit roundoff is relative to the value: their number times it is the relative error.
        error = value * UNIT_ROUNDOFF.get(dtype, 0.0)
        unit += f" (an error of {percent(error)})" if error >= WORTH_PERCENT else ""
    return value_text(name, value, limit, unit, result.measurements.get("fall"))


def evidence_rows(finding: Finding, leave_out: Iterable[str] = ()) -> tuple[tuple[str, str], ...]:
    """Every fact but the measured value, as names and texts."""
    left = {*MEASURED, *leave_out}
    return tuple((str(name), shown(value)) for name, value in finding.evidence.items() if name not in left)


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


def following_lines(root: Finding, results: Iterable[CheckResult]) -> tuple[str, ...]:
    """Which checks fail as a consequence, a line for each title: `train.finite (3 cells): training is not finite …`.

    Args:
        root: the finding that they follow from; a title that is its own is not said again.
        results: whose findings follow from it.
    """
    checks: dict[str, dict[str, set[Cell]]] = {}
    for result in results:
        title = title_of(result.finding) if result.finding is not None else ""
        checks.setdefault("" if title == title_of(root) else title, {}).setdefault(result.check, set()).add(result.cell)
    lines = []
    for title, cells in checks.items():
        names = [f"{check} ({len(held)} cells)" if len(held) > 1 else check for check, held in cells.items()]
        # Where the model's own code raises, the same exception in another check is no other fault: that check did not run.
        could_not = "could not run: " if not title and root.cause == RAISES else ""
        lines.append(f"{could_not}{listed(names, 6)}{f': {title}' if title else ''}")
    return tuple(lines)


def rerun_words(result: CheckResult, run: RunResult) -> list[str]:
    """The words of the command that asks the same check of the same cell again, with the same batches."""
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


def scope_text(subjects: Sequence[str], cells: Iterable[Cell], labels: Sequence[str] = ()) -> str:
    """What a finding is about: `glm4-tiny · bf16 (eager, sdpa) · cpu · 5.8.0 to 5.9.1`."""
    span = f"{labels[0]} to {labels[-1]}" if len(labels) > 2 else " and ".join(labels)
    return " · ".join(part for part in (listed(subjects, 2), cells_text(cells), span) if part)
