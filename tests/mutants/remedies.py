"""Tries the remedies of every finding of every mutant, of the article's models and of the defects of `locating_defects`.

python tests/mutants/remedies.py [--workers 2] [--only PATTERN] [--json rows.json]

No wrong remedy may be marked verified. One is wrong where the check was made blind and the defect is still in what the user
runs. `CURES` holds the remedies that truly cure, each with the reason, decided by hand from what the defect is; whatever else
is marked verified is printed as WRONG, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent.parent):
    sys.path.insert(0, str(folder))

from mutants.catalogue import MUTANTS  # noqa: E402
from mutants.locating_defects import DEFECTS, Defect  # noqa: E402

BATCHES = 4

ARTICLE = {
    "ids_through_bf16": "bf16",
    "ids_as_floats": "bf16",
    "mask_as_floats": "bf16",
    "ids_out_of_range": "fp32",
    "norm_without_fp32": "fp16",
    "products_beyond_fp16": "fp16",
    "fully_masked_row": "bf16",
    "zero_by_zero_at_padding": "fp32",
    "reciprocal_at_padding": "fp32",
    "untied": "fp32",
    "detached_branch": "fp32",
    "gradient_never_finite": "amp-fp16",
    "gradient_beyond_any_scale": "amp-fp16",
    "pooled_padding": "fp32",
}
"""Models of `article_models` and the precision in which each fails."""

EXTRA = (
    Defect(
        id="head-too-loud",
        why="a new head a thousand times too large",
        fixture="chatglm-tiny",
        config={"initializer_range": 20.0},
        settings={"task": "sequence-classification"},
        check="*",
        module="classifier_head",
        ops=(),
        file="",
        text=None,
        causes=("bad-initialisation",),
    ),
    Defect(
        id="gradients-explode",
        why="SGD with a learning rate of 10",
        fixture="glm-tiny",
        settings={"optimizer": "sgd", "lr": 10.0, "steps": 10},
        check="*",
        module=None,
        ops=(),
        file="",
        text=None,
        causes=("divergence",),
    ),
)

EAGER_ONLY = "the mistake stands in eager attention's own function, which sdpa does not call"
SECTION = "the module computes in float32 there, which is the section that it lost"
RANGE = "float32's range holds the value"
CURES: tuple[tuple[str, str, str, str], ...] = (
    ("attention-heads-not-brought-back", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-softmax-*", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-scale-twice", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-scale-missing-chatglm", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-groups-in-other-order", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-soft-cap", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-dropout-left-on", "*", "sdpa-attention", EAGER_ONLY),
    ("attention-scores-in-bf16", "*", "sdpa-attention", EAGER_ONLY),
    ("mask-ignored", "*", "sdpa-attention", EAGER_ONLY),
    ("mask-value-too-small", "*", "sdpa-attention", EAGER_ONLY),
    ("mask-causal-one-late", "*", "sdpa-attention", EAGER_ONLY),
    ("mask-window-one-short", "*", "sdpa-attention", EAGER_ONLY),
    ("mask-of-the-first-row", "*", "sdpa-attention", EAGER_ONLY),
    ("*fully_masked_row", "*", "sdpa-attention", EAGER_ONLY),
    ("masked-row-eager", "*", "sdpa-attention", EAGER_ONLY),
    ("norm-without-fp32*", "*", "keep-in-fp32", SECTION),
    ("rope-angles-in-*", "*", "keep-in-fp32", SECTION),
    ("mlp-sums-in-bf16", "*", "keep-in-fp32", SECTION),
    ("*norm_without_fp32", "*", "keep-in-fp32", SECTION),
    (
        "mask-padded-query-sees-nothing",
        "*",
        "sdpa-attention",
        "sdpa gives zeros for a query without a key; it is padding, so no answer depends on it",
    ),
    (
        "attention-softmax-in-fp16",
        "*",
        "fix-padding",
        "the NaN arises in queries of left padding only; the coarse softmax stays, and has a finding of its own",
    ),
    ("masked-row-*", "*", "fix-padding", "the row without a key is one of left padding"),
    ("*fully_masked_row", "*", "fix-padding", "the row without a key is one of left padding"),
    ("mask-dtype-dependent", "inputs.*", "default-input-dtypes", "an int64 mask is read as it should be"),
    ("embedding-takes-floats", "inputs.*", "default-input-dtypes", "with int64 ids nothing is cast"),
    ("article/ids_through_bf16", "inputs.*", "default-input-dtypes", "with int64 ids nothing is cast"),
    ("article/ids_as_floats", "inputs.*", "default-input-dtypes", "with int64 ids nothing is cast"),
    ("*mask_as_floats", "inputs.*", "default-input-dtypes", "with an int64 mask nothing is cast"),
    ("pooled-last-column", "forward.*", "fix-padding", "padded on the left, the last column is the last real token"),
    ("*pooled_padding", "forward.*", "fix-padding", "padded on the left, the last column is the last real token"),
    ("head-uninitialised*", "*", "init-head", "the head is written"),
    ("head-too-loud", "*", "init-head", "the head is written at a sane scale"),
    ("gradients-explode", "train.*", "clip-grad-norm", "the steps are what explodes, and clipping bounds them"),
    ("gradients-explode", "train.*", "lower-learning-rate", "the steps are what explodes"),
    ("learning-rate-too-large", "train.*", "lower-learning-rate", "the steps are what explodes"),
    ("optimizer-eps-fp16", "train.*", "larger-optimizer-eps", "eps is no longer 0 in float16"),
    ("optimizer-eps-fp16", "train.*", "use-amp-bf16", "the optimizer works in float32"),
    ("head-float16-under-bf16", "*", "larger-optimizer-eps", "eps is no longer 0 in the head's float16"),
    *(
        (name, "*", remedy, RANGE)
        for name in (
            "mlp-product-*",
            "scores-fp16-eager",
            "exponential-amp-fp16",
            "embedding-fp16",
            "residual-fp16",
            "*products_beyond_fp16",
        )
        for remedy in ("keep-in-fp32", "use-amp-bf16", "disable-amp")
    ),
    ("norm-without-fp32", "*", "use-amp-bf16", "float32's range holds the squares"),
    ("*gradient_beyond_any_scale", "*", "disable-amp", RANGE),
    ("*gradient_beyond_any_scale", "*", "keep-in-fp32", RANGE),
    ("*gradient_beyond_any_scale", "*", "use-amp-bf16", RANGE),
    ("gradient-beyond-any-scale", "*", "disable-amp", RANGE),
    ("gradient-beyond-any-scale", "*", "keep-in-fp32", RANGE),
    ("gradient-beyond-any-scale", "*", "use-amp-bf16", RANGE),
)
"""Defect, check, remedy and why it truly cures; patterns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the remedies of one finding did.

    Attributes:
        defect: its id; `article/NAME` for one of the article's models.
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

    def verified(self) -> list[tuple[str, str]]:
        """Remedies that are marked verified, with their effect."""
        return [(remedy, effect) for remedy, verified, effect in self.tried if verified]

    def wrong(self) -> list[str]:
        """Those of them that cure nothing."""
        return [remedy for remedy, _ in self.verified() if reason_of(self.defect, self.check, remedy) is None]


def reason_of(defect: str, check: str, remedy: str) -> str | None:
    """Why the remedy truly cures the defect, None where it does not."""
    for defects, checks, name, reason in CURES:
        if name == remedy and fnmatch.fnmatchcase(defect, defects) and fnmatch.fnmatchcase(check, checks):
            return reason
    return None


def defects() -> tuple[str, ...]:
    """Ids of all defects whose remedies are tried."""
    return (
        *(mutant.id for mutant in MUTANTS if not mutant.equivalent),
        *(f"article/{name}" for name in ARTICLE),
        *(f"locating/{defect.id}" for defect in (*DEFECTS, *EXTRA)),
    )


def _session(name: str, folder: Path) -> Any:
    """The suite's session over a defect; it tries remedies and writes no scripts."""
    from mutants.driver import MutantSession, settings_of
    from mutants.locating import settings_for
    from numerics_suite.settings.tree import Settings

    class Trying(MutantSession):
        def _reproducer(self, *_: Any) -> None:
            return None

    kind, _, rest = name.partition("/")
    patch = None
    if kind == "article":
        settings = Settings(
            subjects=(f"factory:mutants.article_models:{rest}",),
            precision=(ARTICLE[rest],),
            attn=("eager",),
            device="cpu",
            origins={"precision": "command line"},
        )
    elif kind == "locating":
        defect = next(defect for defect in (*DEFECTS, *EXTRA) if defect.id == rest)
        settings, patch = settings_for(defect, folder), defect.apply
    else:
        mutant = next(mutant for mutant in MUTANTS if mutant.id == name)
        settings, patch = settings_of(mutant.fixture, mutant.precision, mutant.attn), mutant.apply
    session = Trying(replace(settings, max_examples=BATCHES), patch)
    session.findings.tries_remedies = True
    return session


def tried(name: str) -> list[Row]:
    """Every finding of one defect with its remedies tried."""
    import torch

    from numerics_suite.suite import driver

    torch.set_num_threads(1)
    kept, driver.SHRINKS = driver.SHRINKS, 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            return list(_rows(name, _session(name, Path(folder))))
    finally:
        driver.SHRINKS = kept


def _rows(name: str, session: Any) -> Iterator[Row]:
    from mutants.driver import answers, failures

    for result in failures(answers(session)):
        found = result.finding
        assert found is not None
        yield Row(
            defect=name.removeprefix("locating/"),
            check=result.check,
            cause=found.cause,
            measurement=str(found.evidence.get("measurement", "")),
            module=found.module,
            confidence=str(found.evidence.get("confidence", "")),
            tried=tuple((remedy.name, remedy.verified, remedy.effect) for remedy in found.remedies),
        )


def main() -> int:
    """Try, and list what is marked verified; 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="*")
    parser.add_argument("--json", type=Path, help="every row")
    options = parser.parse_args()
    names = [name for name in defects() if any(fnmatch.fnmatchcase(name, p) for p in options.only.split(","))]
    rows: list[Row] = []
    start = time.monotonic()
    with ProcessPoolExecutor(options.workers) as pool:
        for name, found in zip(names, pool.map(tried, names), strict=True):
            rows += found
            print(f"{time.monotonic() - start:.0f} s {name}", file=sys.stderr, flush=True)  # noqa: T201 - a script
            for row in found:
                for remedy, effect in row.verified():
                    mark = "WRONG" if remedy in row.wrong() else "cures"
                    print(f"{mark} {name} | {row.check} | {row.cause} | {remedy} | {effect}", flush=True)  # noqa: T201
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    verified = sum(len(row.verified()) for row in rows)
    wrong = sum(len(row.wrong()) for row in rows)
    print(f"{verified} verified over {len(rows)} findings of {len(names)} defects, {wrong} of them wrong")  # noqa: T201
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
