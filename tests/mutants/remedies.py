"""Tries the remedies of every finding of every mutant and of the article's models, and lists what is marked verified.

python tests/mutants/remedies.py [--workers 2] [--only PATTERN] [--json rows.json]

No wrong remedy may be marked verified: one is wrong where the check was made blind and the defect is still there.
`CURING` says, for each defect, which remedies may truly cure it; everything else that is marked verified is an error.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent.parent):
    sys.path.insert(0, str(folder))

BATCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the remedies of one finding did.

    Attributes:
        defect: id of the mutant, or `article/NAME`.
        check: that failed.
        cause: as told.
        measurement: that was over its budget.
        module: as told.
        confidence: as told.
        tried: remedy, verified, effect.
    """

    defect: str
    check: str
    cause: str
    measurement: str
    module: str | None
    confidence: str
    tried: tuple[tuple[str, bool | None, str], ...]


def _rows(defect: str, session: Any) -> Iterator[Row]:
    from mutants.driver import answers, failures

    for result in failures(answers(session)):
        found = result.finding
        assert found is not None
        yield Row(
            defect=defect,
            check=result.check,
            cause=found.cause,
            measurement=str(found.evidence.get("measurement", "")),
            module=found.module,
            confidence=str(found.evidence.get("confidence", "")),
            tried=tuple((remedy.name, remedy.verified, remedy.effect) for remedy in found.remedies),
        )


def _session(settings: Any, patch: Any = None) -> Any:
    from mutants.driver import MutantSession

    class Trying(MutantSession):
        """Tries remedies and writes no scripts."""

        def __init__(self) -> None:
            super().__init__(settings, patch)
            self.tries_remedies = True

        def _reproducer(self, *_: Any) -> None:
            return None

    return Trying()


def tried(defect: str) -> list[Row]:
    """Every finding of one defect with its remedies tried."""
    import torch

    from mutants.catalogue import MUTANTS
    from mutants.driver import settings_of
    from numerics_suite.suite import driver

    torch.set_num_threads(1)
    driver.SHRINKS = 0
    mutant = next(mutant for mutant in MUTANTS if mutant.id == defect)
    settings = settings_of(mutant.fixture, mutant.precision, mutant.attn, max_examples=BATCHES)
    return list(_rows(defect, _session(settings, mutant.apply)))


def main() -> None:
    from mutants.catalogue import MUTANTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [m.id for m in MUTANTS if not m.equivalent and fnmatch.fnmatchcase(m.id, options.only)]
    rows = []
    with ProcessPoolExecutor(options.workers) as pool:
        start = time.time()
        for name, found in zip(names, pool.map(tried, names), strict=True):
            rows += found
            print(f"{time.time() - start:.0f}s {name}", file=sys.stderr, flush=True)
            for row in found:
                for remedy, verified, effect in row.tried:
                    if verified:
                        print(f"{name} | {row.check} | {row.cause} | {remedy} | {effect}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
