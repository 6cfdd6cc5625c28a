"""Runs every check on every mutant and writes the table of `docs/mutants.md`.

python tests/mutants/table.py [--workers 2] [--write docs/mutants.md] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent.parent):
    sys.path.insert(0, str(folder))

from mutants.catalogue import MUTANTS, ORACLE, Mutant  # noqa: E402
from mutants.editing import NoSuchPlaceError  # noqa: E402

BATCHES = 6
"""Batches that Hypothesis draws for each check, fewer than the command's 10: what these catch, those do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the suite says of one mutant."""

    id: str
    caught_by: tuple[str, ...]
    errors: tuple[str, ...]
    causes: tuple[str, ...]
    module: str | None
    module_right: bool
    module_without_oracle: str | None
    module_right_without_oracle: bool
    absent: bool = False
    cause: str | None = None
    cause_right: bool = False


def judged(mutant: Mutant) -> Row:
    """Every check of the mutant's cell."""
    import torch

    from mutants.driver import failures, is_named, named_cause, named_module, run_mutant
    from numerics_suite.suite import driver

    torch.set_num_threads(1)
    driver.SHRINKS = 0  # whether a batch fails is asked, not which is the smallest that does
    try:
        results = run_mutant(mutant, max_examples=BATCHES)
    except NoSuchPlaceError:
        results = []
    absent = not results or any("NoSuchPlace" in (result.reason or "") for result in results)
    failed = failures(results)
    lawful = [result for result in failed if result.check != ORACLE]
    module, other = named_module(failed), named_module(lawful)
    cause = named_cause(failed)
    return Row(
        id=mutant.id,
        caught_by=tuple(result.check for result in failed),
        errors=tuple(f"{result.check}: {result.reason}" for result in results if result.status == "error"),
        causes=tuple(dict.fromkeys(result.finding.cause for result in failed if result.finding)),
        module=module,
        module_right=is_named(mutant, module),
        module_without_oracle=other,
        module_right_without_oracle=is_named(mutant, other),
        absent=absent,
        cause=cause,
        cause_right=cause in mutant.causes,
    )


def measured(mutants: Iterable[Mutant], workers: int) -> dict[str, Row]:
    """A row for each mutant."""
    chosen = list(mutants)
    if workers < 2:
        return {mutant.id: judged(mutant) for mutant in chosen}
    with ProcessPoolExecutor(workers) as pool:
        found: dict[str, Row] = {}
        for row in pool.map(_judged_by_id, [mutant.id for mutant in chosen]):
            found[row.id] = row
            print(  # noqa: T201 - a script
                f"{len(found)}/{len(chosen)} {row.id}: {', '.join(row.caught_by) or 'nothing'}",
                file=sys.stderr,
                flush=True,
            )
        return found


def _judged_by_id(name: str) -> Row:
    return judged(next(mutant for mutant in MUTANTS if mutant.id == name))


def kept_rows(path: Path, kind: type[Any]) -> dict[str, Any]:
    """The rows of an earlier run, by mutant; `kind` is their record."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
        for name, row in kept.items()
    }


def _mark(*, yes: bool) -> str:
    return "yes" if yes else "no"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "0 of 0"


def totals(rows: dict[str, Row]) -> dict[str, str]:
    """The figures that stand above the table."""
    real = [mutant for mutant in MUTANTS if not mutant.equivalent and mutant.id in rows and not rows[mutant.id].absent]
    caught = [mutant for mutant in real if rows[mutant.id].caught_by]
    lawful = [mutant for mutant in real if set(rows[mutant.id].caught_by) - {ORACLE}]
    placed = [mutant for mutant in caught if mutant.module_pattern is not None]
    equal = [mutant for mutant in MUTANTS if mutant.equivalent and mutant.id in rows and not rows[mutant.id].absent]
    return {
        "mutants that are not equivalent": str(len(real)),
        "caught": _share(len(caught), len(real)),
        "caught without the oracle, as in another family": _share(len(lawful), len(real)),
        "module at fault named, of all caught": _share(sum(rows[m.id].module_right for m in caught), len(caught)),
        "module at fault named, of those caught that have one and a check that looks for it": _share(
            sum(rows[m.id].module_right for m in placed), len(placed)
        ),
        "module at fault named without the oracle, of those caught without it": _share(
            sum(rows[m.id].module_right_without_oracle for m in lawful), len(lawful)
        ),
        "cause right, of all caught": _share(sum(rows[m.id].cause_right for m in caught), len(caught)),
        "the most specific of the right causes, of all caught": _share(
            sum(rows[m.id].cause == m.causes[0] for m in caught), len(caught)
        ),
        "equivalent mutants that raise nothing": _share(sum(not rows[m.id].caught_by for m in equal), len(equal)),
    }


def page(rows: dict[str, Row]) -> str:
    """The whole page."""
    import torch
    import transformers

    def cells(mutant: Mutant) -> str:
        row = rows[mutant.id]
        others = [check for check in row.caught_by if check != ORACLE]
        place = "–" if mutant.module_pattern is None else _mark(yes=row.module_right)
        oracle = _mark(yes=ORACLE in row.caught_by)
        name = f"`{mutant.id}`"
        where = f"{mutant.family}, {mutant.precision}, {mutant.attn}"
        listed = ", ".join(f"`{check}`" for check in others) or "–"
        cause = f"{'✓' if row.cause_right else '✗'} `{row.cause}`" if row.cause else "–"
        return f"| {name} | {where} | {mutant.why} | {oracle} | {listed} | {place} | {cause} |"

    present = [mutant for mutant in MUTANTS if mutant.id in rows and not rows[mutant.id].absent]
    lines = [
        "# Mutants: what the suite catches",
        "",
        "Each mutant is a shipped checkpoint's model with one place changed when it is loaded. Every check of its cell is",
        f"then asked, over {BATCHES} batches where the command draws 10. Measured with transformers {transformers.__version__} and torch",
        f"{torch.__version__.partition('+')[0]} on CPU; written by `python tests/mutants/table.py --write docs/mutants.md`.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in totals(rows).items()),
        "",
        "The oracle is the family's definition in float64; another family has none, so its figure is the one without. *Module",
        "named* means that the finding which knows most about places names the module at fault; – stands where no module",
        "is at fault (a loss), or where the check compares answers and looks for no module. *Cause* is that of the finding which knows",
        "most about causes; what is right follows by one rule from what the mistake is (`Mutant.causes`), and any wrong function of the",
        "forward pass is also a `semantic-error`, so the row below it asks for the most specific cause.",
        "",
        "Read the figures for what they are. The catalogue and the checks were written side by side: misses in it led to new",
        "measurements (`coarser`, `merged-edges`, `true-training-mode`, places of broken laws), the order in which findings are asked",
        "for the module and for the cause was chosen on these mutants, and the right causes were written down with the findings in view.",
        "They show what the suite was made to see, not its recall on defects that it has not met. `sum-without-an-order-bf16` is caught",
        "in some runs and missed in others, so 176 of 179 is what repeats.",
        "",
        "## Not equivalent",
        "",
        "| mutant | cell | mistake | oracle | other checks | module named | cause |",
        "|---|---|---|---|---|---|---|",
        *(cells(mutant) for mutant in present if not mutant.equivalent),
        "",
        "## Not caught",
        "",
        *([f"- `{m.id}`: {m.why}" for m in present if not m.equivalent and not rows[m.id].caught_by] or ["None."]),
        "",
        "## Equivalent",
        "",
        "Nothing that a user could measure changes, and nothing is raised.",
        "",
        "| mutant | cell | why nothing changes | raised |",
        "|---|---|---|---|",
        *(
            f"| `{m.id}` | {m.family}, {m.precision}, {m.attn} | {m.why} | {', '.join(rows[m.id].caught_by) or 'nothing'} |"
            for m in present
            if m.equivalent
        ),
        "",
    ]
    return "\n".join(lines)


def _with_baselines(text: str, path: Path) -> str:
    """The page with the section that `baseline_table.py` wrote into the earlier one, if any."""
    from mutants.baseline_table import BEGIN, END

    before = path.read_text(encoding="utf-8") if path.exists() else ""
    section = before.partition(BEGIN)[2].partition(END)[0]
    return f"{text.rstrip()}\n\n{BEGIN}{section}{END}\n" if section else text


def main() -> None:
    """Measure, print the totals and the misses, and write the page where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--json", type=Path, help="every row")
    parser.add_argument("--only", default="*")
    parser.add_argument("--from-json", type=Path, help="write the page from the rows of an earlier run")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if fnmatch.fnmatchcase(mutant.id, options.only)]
    rows = kept_rows(options.from_json, Row) if options.from_json else measured(chosen, options.workers)
    chosen = [mutant for mutant in chosen if mutant.id in rows]
    if options.json:
        options.json.write_text(
            json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1), encoding="utf-8"
        )
    for name, value in totals(rows).items():
        print(f"{name}: {value}")  # noqa: T201 - a script
    for mutant in chosen:
        row = rows[mutant.id]
        missed = bool(row.caught_by) == mutant.equivalent
        unplaced = mutant.module_pattern is not None and not mutant.equivalent and not row.module_right
        uncaused = bool(row.caught_by) and not row.cause_right and not mutant.equivalent
        if missed or unplaced or uncaused or row.errors or row.absent:
            print(f"{mutant.id}: {asdict(row)}")  # noqa: T201 - a script
    if options.write:
        options.write.write_text(_with_baselines(page(rows), options.write), encoding="utf-8")


if __name__ == "__main__":
    main()
