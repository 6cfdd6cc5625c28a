"""A rehearsal for people: the curve of each precision, and the recipe with the measurement behind each line."""

from __future__ import annotations

from collections.abc import Sequence

from numerics_suite.core.rehearsal import Rehearsal, RehearsedRun
from numerics_suite.reports.lines import WIDTH, TerminalLine, wrapped

SHOWN = 6
"""Losses of a curve that are shown: the first, the last, and some between."""


def rehearsal_lines(rehearsals: Sequence[Rehearsal], *, width: int = WIDTH) -> list[TerminalLine]:
    """The section of the terminal."""
    lines: list[TerminalLine] = []
    for rehearsal in rehearsals:
        head = (
            f"rehearsal of {rehearsal.subject} ({rehearsal.task}) on {rehearsal.batch}: {rehearsal.steps} steps of "
            f"{rehearsal.optimizer} at lr {rehearsal.lr:.2g}, {rehearsal.attn} on {rehearsal.device}"
        )
        lines += [TerminalLine(""), *[TerminalLine(line.text, "bold") for line in wrapped(head, width=width)]]
        for run in rehearsal.runs:
            lines += wrapped(
                _run_text(run, rehearsal.chance), width=width, first=f"   {run.precision:<10}", style="cyan"
            )
        lines += (
            [TerminalLine("   recommended", "bold")]
            if rehearsal.recipe
            else [TerminalLine("   nothing here trains", "bold red")]
        )
        for advice in rehearsal.recipe:
            text = f"{advice.value}: {advice.because}"
            lines += wrapped(text, width=width, first=f"   {advice.setting:<15}", style="green")
    return lines


def _run_text(run: RehearsedRun, chance: float | None) -> str:
    parts = [f"largest initial logit {run.largest_logit:.3g}"]
    if run.losses:
        guess = f" (chance {chance:.3g})" if chance is not None else ""
        parts.append(f"loss {' '.join(f'{loss:.3g}' for loss in _some(run.losses))}{guess}")
    if run.gradient_norms:
        parts.append(f"gradient norm {min(run.gradient_norms):.3g} to {max(run.gradient_norms):.3g}")
    if run.clipped_losses:
        parts.append(f"clipped to 1 it ends at {run.clipped_losses[-1]:.3g}")
    if run.scales:
        parts.append(f"loss scale {run.scales[-1]:g}, {run.skipped} skipped")
    if run.stopped:
        parts.append(f"STOPPED: {run.stopped}")
    if run.largest_stable_lr is not None:
        parts.append(f"largest stable lr {'at least ' if run.at_least else ''}{run.largest_stable_lr:.2g}")
    return "; ".join(parts)


def _some(losses: Sequence[float]) -> list[float]:
    if len(losses) <= SHOWN:
        return list(losses)
    last = len(losses) - 1
    return [losses[round(index * last / (SHOWN - 1))] for index in range(SHOWN)]
