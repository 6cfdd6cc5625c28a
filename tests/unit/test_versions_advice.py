"""Another release is advised where the evidence bears it out, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from mutants.article_checkpoints import changed
from unit import same_defects
from unit.sample_run import finding

from numerics_suite.core.records import Cell, Remedy
from numerics_suite.diagnosis import versions_advice
from numerics_suite.diagnosis.remedy_trials import ask_once
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.request import Request
from numerics_suite.subjects.resolve import resolve_all

BOTH = ("newer-version", "pin-version")


def context_of(source, **request):
    (subject,) = resolve_all((str(source),))
    cell = Cell(subject=subject.id, precision="fp32", attn="eager", device="cpu", task=subject.task)
    return CellContext(subject, cell, Request(**request))


def advised():
    return finding("lost-weights", "t", remedies=tuple(Remedy(name=name, description="d") for name in BOTH))


def names(found):
    return tuple(remedy.name for remedy in found.remedies)


def test_a_release_is_no_advice_on_the_users_own_code():
    assert names(versions_advice.borne_out(advised(), context_of("factory:unit.same_defects:sound"))) == ()
    assert names(versions_advice.borne_out_of(advised(), same_defects.Model())) == ()
    assert names(versions_advice.borne_out(advised(), context_of("fixture:glm4-tiny"))) == BOTH


def test_a_release_is_no_advice_where_a_part_of_the_model_is_the_users_own():
    assert names(versions_advice.borne_out(advised(), context_of("factory:mutants.factories:gradient_doubled"))) == ()
    assert names(versions_advice.borne_out(advised(), context_of("factory:mutants.factories:clean_glm_tiny"))) == BOTH


def test_no_release_gives_back_the_weights_of_a_baseline():
    baseline = SimpleNamespace(subject={"digest": "sha256:other"})
    context = context_of("fixture:glm4-tiny", baseline=baseline)
    assert names(versions_advice.borne_out(advised(), context)) == ("newer-version",)
    context.request = replace(context.request, baseline=SimpleNamespace(subject={"digest": context.subject.digest}))
    assert names(versions_advice.borne_out(advised(), context)) == BOTH


@pytest.mark.parametrize(
    ("installed", "left"), [("5.24.0", ("pin-version",)), ("5.25.0", ("pin-version",)), ("5.23.1", BOTH)]
)
def test_the_newest_release_has_no_newer_one(monkeypatch, installed, left):
    monkeypatch.setattr(versions_advice.compat, "version", lambda: installed)
    assert names(versions_advice.without_newer(advised())) == left


def rename(tensors):
    tensors["model.layers.1.mlp.other.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight")


def test_a_release_that_loads_a_fixture_of_the_same_shape_is_not_at_fault(tmp_path):
    broken = changed(tmp_path / "broken", "glm4-tiny", tensors=rename)
    context = context_of(broken)
    assert ask_once("load.complete", context).breaches
    assert versions_advice.clean_on_a_fixture("load.complete", context, ask_once)
    scaled = changed(
        tmp_path / "scaled",
        "glm4-tiny",
        tensors=rename,
        config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    )
    assert not versions_advice.clean_on_a_fixture("load.complete", context_of(scaled), ask_once)
    fails = lambda *_: SimpleNamespace(breaches=("worse",))  # noqa: E731 - a release that is at fault
    assert not versions_advice.clean_on_a_fixture("load.complete", context, fails)
