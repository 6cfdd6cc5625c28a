"""`forward.packing`: rows packed into one row are rows by themselves, in the ways that release and class have code for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families.checkpoints import build
from mutants.catalogue import MUTANTS
from mutants.driver import MutantSession, settings_of
from torch import nn

from numerics_suite.core.records import Cell
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.packed_rows import packed, ways_of
from numerics_suite.engine.request import Request
from numerics_suite.subjects import compat
from numerics_suite.subjects.resolve import resolve_all
from numerics_suite.suite import driver

BY_ID = {mutant.id: mutant for mutant in MUTANTS}
BY_POSITIONS, BY_LAST_ROW = "packing-positions-ignored-by-the-mask", "packing-mask-read-by-its-last-row"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(driver, "SHRINKS", 0)


def told(fixture, mutant=None, *, precision="fp32", attn="eager", remedies=False):
    settings = settings_of(fixture, precision, attn, ("forward.packing",), max_examples=5)
    session = MutantSession(settings, mutant and BY_ID[mutant].apply)
    session.findings.tries_remedies = remedies
    (question,) = session.plan.questions
    return session.answer(question)[0]


class Places(nn.Module):
    def forward(self, input_ids, attention_mask=None, position_ids=None):
        raise NotImplementedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_is_given(dtype):
    model = Places()
    model.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    by_positions = packed(rows, "position_ids", model)
    assert by_positions["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert by_positions["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert "attention_mask" not in by_positions
    mask = packed(rows, "block-mask", model)["attention_mask"]
    assert (mask.shape, mask.dtype) == ((1, 1, 4, 4), dtype)
    assert (mask[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    offsets = packed(rows, "cu_seqlens", model)
    assert offsets["cu_seq_lens_q"].tolist() == [0, 3, 4]
    assert (offsets["cu_seq_lens_k"].dtype, offsets["max_length_q"]) == (torch.int32, 3)


def test_a_clean_model_in_a_release_that_has_every_way():
    if not compat.packs_by_positions():
        pytest.skip("the installed transformers builds no masks from position_ids")
    result = told("glm-tiny", precision="bf16", attn="sdpa")
    assert (result.status, result.reason) == ("passed", None)
    assert result.measurements["true"] <= 1e-10


def test_a_way_that_the_release_lacks_is_one_skip_that_names_the_other(monkeypatch):
    monkeypatch.setattr(compat, "packs_by_positions", lambda: False)
    result = told("glm-tiny-classifier")
    assert result.status == "skipped"
    assert "does not keep packed rows apart by position_ids (4.53.1 and newer do)" in result.reason
    assert result.reason.endswith("a block-diagonal 4-D attention_mask does")


def test_the_way_that_such_a_release_has_is_held_to_the_law(monkeypatch):
    monkeypatch.setattr(compat, "packs_by_positions", lambda: False)
    result = told("glm-tiny", BY_LAST_ROW)
    assert (result.status, result.finding.cause) == ("failed", "packing-leak")
    assert result.finding.evidence["packed by"] == "a block-diagonal 4-D attention_mask"


def test_a_class_without_any_way_is_a_skip():
    result = told("chatglm-tiny")
    assert result.status == "skipped"
    assert "neither by position_ids nor by a block-diagonal 4-D attention_mask" in result.reason
    assert result.reason.endswith("train on rows of their own, padded")


@pytest.mark.skipif(not compat.packs_by_positions(), reason="needs masks from position_ids")
@pytest.mark.parametrize(
    ("mutant", "effect"),
    [
        (BY_POSITIONS, "by a block-diagonal 4-D attention_mask: "),
        pytest.param(BY_LAST_ROW, "by rows of their own, padded: ", marks=pytest.mark.slow),
    ],
)
def test_the_next_way_that_holds_is_the_remedy(mutant, effect):
    attn = BY_ID[mutant].attn
    finding = told("glm-tiny", mutant, attn=attn, remedies=True).finding
    assert (finding.cause, finding.evidence["packed by"]) == ("packing-leak", "position_ids that start again")
    remedy = next(remedy for remedy in finding.remedies if remedy.name == "separate-rows")
    assert remedy.verified is True
    assert remedy.effect.startswith(effect)


@pytest.mark.slow
@pytest.mark.skipif(compat.release() < (5, 24), reason="classes are written otherwise in other releases")
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("llama", ("position_ids", "block-mask")),
        ("mistral", ("position_ids", "block-mask")),
        ("opt", ("block-mask",)),
        ("bamba", ()),
    ],
)
def test_any_other_class_is_tried(name, asked, tmp_path):
    (subject,) = resolve_all((build(name, tmp_path),), ())
    cell = Cell(subject=subject.id, precision="fp32", attn="sdpa", device="cpu", task=subject.task)
    ways = ways_of(CellContext(subject, cell, Request()))
    assert ways.asked == asked
    assert bool(ways.left_out) == ("position_ids" not in asked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_mask_of_ones_own_is_no_sliding_window(name, tmp_path):
    folder = build(name, tmp_path)
    settings = settings_of("glm-tiny", "fp32", "eager", ("forward.packing",), seq_len=16)
    session = MutantSession(replace(settings, subjects=(folder,)))
    (question,) = session.plan.questions
    assert session.answer(question)[0].status in {"passed", "skipped"}
