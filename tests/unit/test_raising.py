"""An exception of the model's own code is one finding; one of ours, of memory or of a call that only a check makes is none."""

from __future__ import annotations

import json

import pytest
from mutants.article_checkpoints import NOBODY_INITIALISES, changed
from mutants.driver import MutantSession, settings_of
from unit.test_consequences import answered

from numerics_suite.settings.tree import Settings
from numerics_suite.suite.session import SuiteSession


def run_of(factory, *checks, **changes):
    settings = Settings(
        subjects=(f"factory:unit.raising_models:{factory}",),
        precision=("fp32",),
        attn=("default",),
        checks=checks or ("load.*", "forward.*", "train.*"),
        device="cpu",
        origins={"precision": "command line"},
        **changes,
    )
    return answered(SuiteSession(settings))


def test_what_always_raises_is_one_root_of_the_first_check_that_runs_it():
    run = run_of("always")
    failed = [each for each in run.checks if each.status == "failed"]
    assert len(failed) > 4
    assert not [each.id for each in run.checks if each.status == "error"]
    root, *others = failed
    assert root.check == "forward.deterministic"
    assert {each.finding.consequence_of for each in others} == {root.id}
    found = root.finding
    assert (found.cause, found.module) == ("model-raises", "")
    assert found.evidence["exception"] == "AttributeError: 'Raises' object has no attribute 'cache'"
    assert found.evidence["line"] == found.source == "raising_models.py:14"
    assert found.evidence["input"] == "input_ids int64 [4, 8], labels int64 [4, 8]"
    assert "newer-version" not in [remedy.name for remedy in found.remedies]
    assert run.exit_status == 1


def test_what_raises_in_training_only_is_found_there():
    run = run_of("in_training_only")
    failed = [each for each in run.checks if each.status == "failed"]
    assert {each.check.partition(".")[0] for each in failed} == {"train"}
    assert failed[0].finding.evidence["line"].startswith("raising_models.py:")
    assert failed[0].finding.evidence["call"] == "forward and backward"
    assert sum(each.finding.consequence_of is None for each in failed) == 1


def test_two_lines_that_raise_are_two_roots():
    run = run_of("two", "forward.finite", "train.finite")
    assert [each.finding.consequence_of for each in run.checks] == [None, None]
    assert run.checks[0].finding.source != run.checks[1].finding.source


@pytest.mark.parametrize("factory", ["out_of_memory", "without_a_kernel"])
def test_memory_and_kernels_stay_errors(factory):
    (result,) = run_of(factory, "forward.finite").checks
    assert (result.status, result.finding) == ("error", None)


def test_memory_is_told_in_bytes():
    (result,) = run_of("out_of_memory", "forward.finite").checks
    assert "4398046511104 bytes asked" in result.reason


def test_what_only_a_check_does_is_no_finding_of_the_models():
    run = run_of("under_hooks_only")
    assert not [each.id for each in run.checks if each.finding is not None]


def test_our_own_errors_stay_errors(monkeypatch):
    session = MutantSession(settings_of("glm4-tiny", "fp32", "eager", ["forward.deterministic"]))

    def broken(*_args, **_kwargs):
        message = "ours"
        raise TypeError(message)

    monkeypatch.setattr("numerics_suite.suite.session.ask", broken)
    result, trace = session.answer(session.plan.questions[0])
    assert (result.status, result.finding) == ("error", None)
    assert "TypeError: ours" in trace


def test_code_of_a_released_class_raises_too():
    """The attention's own code: a name that a release took away, as remote code meets it."""

    def patch(model):
        def raises(*_args, **_kwargs):
            return {}["rotary"]

        model.model.layers[0].self_attn.forward = raises

    session = MutantSession(settings_of("glm4-tiny", "bf16", "eager", ["forward.finite", "train.finite"]), patch)
    session.findings.tries_remedies = True
    run = answered(session)
    first, second = run.checks
    assert first.finding.cause == "model-raises"
    assert first.finding.evidence["exception"] == "KeyError: 'rotary'"
    assert first.finding.evidence["line"].startswith("modeling_glm4.py:")
    assert first.finding.evidence["input"].startswith("input_ids int64 [")
    assert second.finding.consequence_of == first.id
    tried = {remedy.name: remedy for remedy in first.finding.remedies}
    assert tried["sdpa-attention"].verified is False
    assert tried["sdpa-attention"].effect.startswith("still raises KeyError")
    assert json.dumps(first.finding.batch)


def test_what_cures_an_exception_is_named():
    def patch(model):
        if model.config._attn_implementation == "eager":
            model.model.layers[0].self_attn.q_proj.in_features = None

            def raises(*_args, **_kwargs):
                message = "index 4 is out of range"
                raise IndexError(message)

            model.model.layers[0].self_attn.forward = raises

    session = MutantSession(settings_of("glm4-tiny", "bf16", "eager", ["forward.finite"]), patch)
    session.findings.tries_remedies = True
    (result,) = answered(session).checks
    assert [remedy.name for remedy in result.finding.remedies if remedy.verified] == ["sdpa-attention"]


def test_remote_code_that_raises_while_it_is_loaded(tmp_path):
    raises = (NOBODY_INITIALISES[0], "if module.nothing_of_this_name:")
    folder = changed(tmp_path / "raises-in-init", "chatglm-tiny", code=raises)
    settings = Settings(
        subjects=(str(folder),),
        precision=("fp32",),
        attn=("eager",),
        checks=("load.complete", "forward.finite"),
        device="cpu",
        task="sequence-classification",
        trust_remote_code=True,
        origins={"precision": "command line"},
    )
    first, second = answered(SuiteSession(settings)).checks
    assert first.finding.cause == "model-raises"
    assert first.finding.evidence["line"].startswith("modeling_chatglm.py:")
    assert second.finding.consequence_of == first.id
