"""Is the place and the cause of a value that is not finite named as it is, forward, backward and in the optimizer?"""

from __future__ import annotations

import pytest
import torch

from mutants.driver import release
from mutants.editing import NoSuchPlaceError
from mutants.locating import row_of
from mutants.locating_defects import DEFECTS, Defect
from mutants.remedies import ARTICLE, CURES, defects, reason_of, tried
from numerics_suite.observations.bad_value_location import find_origin

SAMPLE = (
    "norm-without-fp32-fp16",
    "mask-causal-one-early-chatglm",
    "embedding-ids-through-bf16",
    "sum-without-an-order",
    "state-kept-between-calls",
    "mask-padded-query-sees-nothing",
    "article/products_beyond_fp16",
    "article/pooled_padding",
    "article/gradient_beyond_any_scale",
    "article/ids_out_of_range",
    "locating/head-uninitialised",
    "locating/optimizer-eps-fp16",
)
"""Defects whose remedies tempt: each was, or could be, cured in name only, or is truly cured by one of several."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_the_suite_names_where_and_why(defect: Defect) -> None:
    if defect.fixture.startswith("glm4") and release() < (4, 51):
        pytest.skip("Glm4 appeared in transformers 4.51")
    try:
        row = row_of(defect, others=False)
    except NoSuchPlaceError as error:
        pytest.skip(f"this release is written otherwise: {error}")
    if "NoSuchPlaceError" in row.ours.said:
        pytest.skip("this release is written otherwise")
    if defect.module is not None:
        assert row.module_right, row.ours
    if defect.ops:
        assert row.op_right, row.ours
    if row.line is not None:
        assert row.line_right, row.ours
    assert row.cause_right, row.ours


def test_the_catalogue_covers_what_it_should() -> None:
    assert len({defect.id for defect in DEFECTS}) == len(DEFECTS) >= 20
    assert {defect.fixture for defect in DEFECTS} >= {"glm-tiny", "glm4-tiny", "chatglm-tiny"}
    assert {defect.precision for defect in DEFECTS} >= {"fp32", "bf16", "fp16", "amp-fp16"}
    assert {defect.attn for defect in DEFECTS} == {"eager", "sdpa"}
    assert sum(defect.backward for defect in DEFECTS) >= 4


def test_a_nan_that_is_thrown_away_is_no_origin_of_another() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    def run() -> torch.Tensor:
        x = model[0](torch.ones(2, 4))
        kept = torch.where(torch.ones_like(x, dtype=torch.bool), x, x / 0)
        return torch.log(model[1](kept) * 0 - 1)

    origin = find_origin(model, run)
    assert origin is not None
    assert origin.op == "aten.log"
    assert origin.outside_domain


def test_a_run_that_stays_finite_has_no_origin() -> None:
    model = torch.nn.Linear(4, 4)
    mask = torch.full((2, 4), float("-inf")).triu(1)
    assert find_origin(model, lambda: (model(torch.ones(2, 4)) + mask).softmax(-1).sum().backward()) is None


def test_an_overflow_is_told_from_a_pole() -> None:
    model = torch.nn.Identity()
    large = torch.full((2, 2), 300.0, dtype=torch.float16)
    over = find_origin(model, lambda: large @ large * large)
    pole = find_origin(model, lambda: 1 / (large - large))
    assert over is not None
    assert pole is not None
    assert over.finite_in_fp64 is True
    assert pole.finite_in_fp64 is False
    assert pole.outside_domain


@pytest.mark.slow
@pytest.mark.parametrize("defect", SAMPLE)
def test_no_wrong_remedy_is_marked_verified(defect: str) -> None:
    rows = tried(defect)
    assert rows
    assert not [(row.check, row.wrong()) for row in rows if row.wrong()]


def test_every_cure_is_of_a_defect_that_there_is() -> None:
    """A pattern without a defect would pass over a remedy that is wrong elsewhere."""
    names = {name.removeprefix("locating/") for name in defects()}
    for pattern, checks, remedy, reason in CURES:
        assert any(reason_of(name, checks.replace("*", "x"), remedy) for name in names), pattern
        assert reason
    assert len(ARTICLE) >= 10
