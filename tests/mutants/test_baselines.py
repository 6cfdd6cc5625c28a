"""Against a recorded baseline: each check of it fails for a defect, the clean model passes, and mutants get their kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mutants.baseline_table import judged, recorded
from mutants.catalogue import MUTANTS, Mutant
from mutants.driver import MutantSession, answers, describe, is_named, release, settings_of
from numerics_suite.baselines.store import save

CHECKS = ("baseline.semantics", "baseline.precision", "baseline.training", "baseline.contract")

FAILS = [
    ("mlp-gelu", "baseline.semantics", "semantic-change"),
    ("cache-without-rotation", "baseline.semantics", "semantic-change"),
    ("norm-without-fp32-bf16", "baseline.precision", "rounding-change"),
    ("gradient-through-fp16", "baseline.precision", "rounding-change"),
    ("training-scales-states", "baseline.training", "semantic-change"),
    ("head-float16-under-bf16", "baseline.training", "rounding-change"),
    ("embedding-takes-floats", "baseline.contract", "contract-change"),
    ("block-skipped", "baseline.contract", "contract-change"),
]

OF_A_KIND_ALREADY_THERE = {"cache-without-rotation", "gradient-through-fp16", "block-skipped"}
"""Their check and cause are those of the defect before them."""

UNSEEN = {"mlp-clipped", "packing-positions-ignored-by-the-mask", "packing-mask-read-by-its-last-row"}
"""No state of these small weights reaches the clip, so nothing differs; and a baseline holds no packed rows."""

OTHER_KIND = {"head-float16-under-bf16"}
"""Only the head's dtype changes, and in float16 AdamW's eps is zero: training becomes NaN, which is worse than `contract`."""

OTHER_MODULE = {
    "mask-padded-query-sees-nothing",  # the NaN of a padded query reaches real tokens one block later
    "cache-position-one-ahead-chatglm",  # the table is asked for by the wrong position: it is the first that differs
    "cache-positions-ignore-padding",
    "gradient-through-fp16",  # the first parameter behind it: v_proj, not o_proj whose output it is
    "gradient-undone-by-a-copy",  # only the training curve differs, which knows no module
    "embedding-takes-floats",  # only the contract changes, which knows no module
    "head-float16-under-bf16",
    "weight-in-fp32-under-bf16",
    "sum-without-an-order",  # rounding has no module
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of(name: str) -> Mutant:
    found = next(mutant for mutant in MUTANTS if mutant.id == name)
    if found.family == "glm4" and release() < (4, 51):
        pytest.skip("Glm4 appeared in transformers 4.51")
    return found


def session(mutant: Mutant, folder: Path, *, changed: bool) -> MutantSession:
    save(folder, [recorded(mutant.fixture, mutant.precision, mutant.attn)], force=True)
    settings = settings_of(mutant.fixture, mutant.precision, mutant.attn, ("baseline.*",), baseline=folder)
    return MutantSession(settings, mutant.apply if changed else None)


@pytest.mark.parametrize(
    ("name", "check", "cause"),
    [
        pytest.param(*row, marks=pytest.mark.slow if row[0] in OF_A_KIND_ALREADY_THERE else [], id="-".join(row))
        for row in FAILS
    ],
)
def test_a_check_of_baselines_catches_a_defect(name, check, cause, tmp_path):
    mutant = of(name)
    (result,) = answers(session(mutant, tmp_path, changed=True), (check,))
    if "NoSuchPlaceError" in (result.reason or ""):
        pytest.skip("this release is written otherwise")
    assert result.status == "failed", describe([result])
    assert result.finding is not None
    assert result.finding.cause == cause
    assert {remedy.name for remedy in result.finding.remedies} >= {"pin-version", "newer-version"}


@pytest.mark.parametrize("name", sorted({name for name, _, _ in FAILS}))
@pytest.mark.slow
def test_the_clean_cell_passes_every_check_of_its_baseline(name, tmp_path):
    results = list(answers(session(of(name), tmp_path, changed=False), CHECKS))
    assert [result.status for result in results if result.status != "skipped"] == ["passed"] * len(results)
    assert len(results) == len(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_every_mutant_has_its_kind_and_its_module(mutant: Mutant):
    row = judged(of(mutant.id))
    if row.absent:
        pytest.skip("this release is written otherwise")
    assert row.caught == (mutant.id not in UNSEEN and (not mutant.equivalent or mutant.kind != "changed")), row
    assert row.kind_right == (mutant.id not in UNSEEN | OTHER_KIND), row
    if mutant.module_pattern is not None and row.caught and mutant.id not in OTHER_MODULE:
        assert is_named(mutant, row.module), row
