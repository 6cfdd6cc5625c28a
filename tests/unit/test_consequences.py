"""Findings form a tree: what follows from another finding points to it, and two defects stay two roots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutants.driver import MutantSession
from mutants.driver import settings_of as mutant_settings
from unit.sample_run import finding, result

from numerics_suite.core.records import Remedy, RunResult
from numerics_suite.core.tree import is_root
from numerics_suite.diagnosis import roots
from numerics_suite.diagnosis.consequences import as_tree
from numerics_suite.diagnosis.remedies import Attempt
from numerics_suite.diagnosis.remedy_trials import CheckAnswer
from numerics_suite.reports import markup
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.github import annotation_lines
from numerics_suite.reports.junit import junit_xml
from numerics_suite.reports.markdown import summary_markdown
from numerics_suite.reports.sarif import sarif_log
from numerics_suite.reports.summary import summary
from numerics_suite.reports.view.places import places_of
from numerics_suite.reports.view.problems import problems_of
from numerics_suite.settings.accept import AcceptEntry
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.collector import Gate
from numerics_suite.suite.session import SuiteSession

TESTS = Path(__file__).resolve().parent.parent
UNSOUND = "uninitialised-parameters"


def failed(check, cause, precision="fp32", status="failed", reason=None, **fields):
    return result(check, precision, status=status, reason=reason, finding=finding(cause, f"{check} fails", **fields))


def tree(*results, covers=lambda _root, _result: True):
    """Id of the root of each, None for a root."""
    return [each.finding.consequence_of for each in as_tree(results, covers)]


def settings_of(factory, **changes):
    return Settings(
        subjects=(f"factory:unit.same_defects:{factory}",),
        precision=("fp32",),
        attn=("default",),
        checks=("load.*", "forward.finite", "train.finite"),
        device="cpu",
        origins={"precision": "command line"},
        **changes,
    )


def run_of(factory, **changes) -> RunResult:
    """The whole run as the gate puts it together."""
    session = SuiteSession(settings_of(factory, **changes))
    session.findings.tries_remedies = False
    return answered(session)


def answered(session) -> RunResult:
    """Every question of the session, put together by the gate."""
    gate = Gate(session, run=None)
    for question in session.plan.questions:
        answer = session.answer(question)[0]
        gate.answers[answer.id] = answer
    gate.finish(0, others_failed=False)
    assert gate.result is not None
    return gate.result


def causes(run):
    return {(each.check, each.finding.cause, each.finding.consequence_of) for each in run.checks if each.finding}


def test_what_an_uninitialised_head_makes_fail_follows_from_it():
    root = "load.head-init/uninitialised_head/fp32/default/cpu"
    assert causes(run_of("uninitialised_head")) == {
        ("load.head-init", UNSOUND, None),
        ("forward.finite", UNSOUND, root),
        ("train.finite", UNSOUND, root),
    }


def test_two_defects_of_one_model_are_two_roots():
    run = run_of("uninitialised_head_and_damaged_weight")
    roots = {each.check: each.finding.parameters for each in run.checks if is_root(each)}
    assert roots == {"load.finite": ("layers.1.up.weight",), "load.head-init": ("lm_head.weight",)}


def test_parameters_that_no_root_names_make_a_root():
    head = failed("load.head-init", UNSOUND, parameters=("head.weight",))
    assert tree(head, failed("train.finite", UNSOUND, parameters=("head.weight", "body.weight"))) == [None, None]
    body = failed("load.finite", "corrupt-weights", parameters=("body.weight",))
    both = failed("train.finite", "corrupt-weights", parameters=("head.weight", "body.weight"))
    assert tree(body, head, both) == [None, None, body.id]
    assert tree(head, failed("train.finite", "overflow", parameters=("head.weight",))) == [None, None]


def test_a_loss_that_takes_no_logits_of_each_token():
    shape = failed("forward.pooling", "wrong-output-shape")
    seen = {"exception": "ValueError: Expected input batch_size (8)", "line": "modeling_x.py:12"}
    trained = failed("train.finite", "model-raises", evidence=seen | {"call": "forward and backward"})
    assert tree(shape, trained) == [None, shape.id]
    assert tree(shape, failed("train.finite", "model-raises", evidence=seen | {"call": "forward"})) == [None, None]


def test_stored_weights_that_overflow_in_the_dtype_of_the_load():
    loaded = failed("load.finite", "overflow", parameters=("norm.weight",))
    run = failed("forward.finite", "corrupt-weights", parameters=("norm.weight",))
    assert tree(loaded, run) == [None, loaded.id]
    at_an_op = failed("forward.finite", "overflow", parameters=("norm.weight",), op="aten.mul.Tensor")
    assert tree(at_an_op, run) == [None, None]


def test_what_the_roots_remedy_does_not_cure_is_a_root():
    def told(check, verified, *together):
        remedy = Remedy(name="init-head", description="d", verified=verified, together=together)
        return failed(check, UNSOUND, parameters=("head.weight",), remedies=(remedy,))

    root = told("load.head-init", True)
    assert tree(root, told("train.finite", True)) == [None, root.id]
    assert tree(root, told("train.finite", None)) == [None, root.id]
    assert tree(root, told("train.finite", False)) == [None, None]
    assert tree(root, told("train.finite", True, "larger-optimizer-eps")) == [None, None]


def test_one_exception_is_one_root():
    one = {"exception": "TypeError: f() got 3", "line": "modeling_x.py:12"}
    first = failed("forward.finite", "model-raises", evidence=one)
    again = failed(
        "train.finite", "model-raises", precision="bf16", evidence=one | {"exception": "TypeError: f() got 4"}
    )
    elsewhere = failed("train.finite", "model-raises", evidence=one | {"line": "modeling_x.py:13"})
    other = failed("train.labels", "model-raises", evidence=one | {"exception": "IndexError: f() got 3"})
    assert tree(first, again, elsewhere, other) == [None, first.id, None, None]


@pytest.mark.parametrize("remedy", [None, Remedy(name="cast-after-loading", description="d", verified=False)])
def test_what_shows_the_same_as_a_consequence_has_its_root(remedy):
    """A half-precision head: one check shows that its exception follows from the dtype, the others meet the same exception."""
    one = {"exception": "RuntimeError: mat1 and mat2", "line": "modeling_x.py:12"}
    cast = Remedy(name="cast-after-loading", description="d", verified=True)
    dtype = failed("load.dtype", "low-precision-section", remedies=(cast,))
    first = failed("inputs.ids-dtype", "model-raises", evidence=one)
    shown = replace(first, finding=replace(first.finding, consequence_of=dtype.id))
    again = failed("forward.finite", "model-raises", evidence=one, remedies=(remedy,) if remedy else ())
    elsewhere = failed("train.finite", "model-raises", evidence=one | {"line": "modeling_x.py:13"})
    follows = dtype.id if remedy is None else None
    assert tree(dtype, shown, again, elsewhere) == [None, dtype.id, follows, None]


def test_one_op_at_which_a_value_ends_is_one_root():
    place = {"module": "layers.0", "op": "aten.mul.Tensor", "source": "modeling_x.py:12"}
    first = failed("forward.finite", "overflow", **place)
    assert tree(first, failed("train.finite", "overflow", **place)) == [None, first.id]
    assert tree(first, failed("train.finite", "overflow", **place | {"module": "layers.1"})) == [None, None]
    assert tree(first, failed("train.finite", "invalid-operation", **place)) == [None, None]
    nowhere = [failed(check, "overflow") for check in ("forward.finite", "train.finite")]
    assert tree(*nowhere) == [None, None]


def test_a_root_that_a_trial_showed_is_followed_to_the_first():
    first = failed("load.finite", UNSOUND, parameters=("head.weight",))
    second = failed("load.head-init", UNSOUND, parameters=("head.weight",))
    third = failed("train.descends", "divergence")
    shown = replace(third, finding=replace(third.finding, consequence_of=second.id))
    assert tree(first, second, shown) == [None, first.id, first.id]
    assert tree(first, shown) == [None, None], "its root is not there"


def test_accepting_a_root_accepts_what_follows_from_it():
    entry = AcceptEntry(check="load.head-init", reason="known")
    run = run_of("uninitialised_head", accept=(entry,))
    assert {(each.status, each.reason) for each in run.checks if each.finding} == {("accepted", "known")}
    assert run.exit_status == 0
    assert run_of("uninitialised_head_and_damaged_weight", accept=(entry,)).exit_status == 1


def test_accepting_a_consequence_accepts_no_more():
    run = run_of("uninitialised_head", accept=(AcceptEntry(check="forward.finite", reason="known"),))
    assert {each.check: each.status for each in run.checks if each.finding} == {
        "load.head-init": "failed",
        "forward.finite": "accepted",
        "train.finite": "failed",
    }


def test_what_an_entry_does_not_reach_has_a_root_of_its_own():
    names = {"parameters": ("head.weight",)}
    root = failed("load.head-init", UNSOUND, "bf16", "accepted", "known", **names)
    inside = failed("train.finite", UNSOUND, "bf16", **names)
    outside = failed("load.head-init", UNSOUND, "fp32", **names)
    after = failed("train.finite", UNSOUND, "fp32", **names)
    told = as_tree([root, inside, outside, after], lambda one, two: one.cell.precision == two.cell.precision)
    assert [each.finding.consequence_of for each in told] == [None, root.id, None, outside.id]
    assert [each.status for each in told] == ["accepted", "accepted", "failed", "failed"]


def test_printers_show_one_card_for_each_root():
    run = run_of("uninitialised_head")
    documents = Documents(runs=(CheckRun(label="check", result=run),))
    follows = [
        f"{each.check}: {each.finding.title}" for each in run.checks if each.finding and each.finding.consequence_of
    ]
    assert [line.partition(":")[0] for line in follows] == ["forward.finite", "train.finite"]
    lines = [line.text for line in summary(run)]
    begin = lines.index(f"  leads to  {follows[0]}")
    assert lines[begin + 1] == f"{'':12}{follows[1]}"
    assert any("1 finding " in line for line in lines)
    (problem,) = problems_of(places_of(documents))
    assert [place.result.check for place in problem.consequences] == ["forward.finite", "train.finite"]
    markdown = summary_markdown(documents)
    assert all(f"- **leads to** {markup.text(line)}" in markdown for line in follows)
    (sarif,) = sarif_log(documents)["runs"][0]["results"]
    assert [one.partition("/")[0] for one in sarif["properties"]["consequences"]] == ["forward.finite", "train.finite"]
    (annotation,) = annotation_lines(documents)
    assert all(f"leads to: {line}" in annotation.replace("%25", "%") for line in follows)
    xml = junit_xml(documents).decode()
    assert xml.count("<failure") == 3
    assert xml.count('message="follows from load.head-init/uninitialised_head/fp32/default/cpu: ') == 2


@pytest.mark.slow
def test_cells_of_several_workers_have_one_root(tmp_path):
    words = ["check", "factory:unit.same_defects:uninitialised_head", "--precision", "fp32,bf16", "--attn", "default"]
    words += ["--checks", "load.head-init,forward.finite", "-n", "2", "--json", "r.json", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "numerics_suite", *words], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    written = json.loads((tmp_path / "r.json").read_text())
    follows = [each["finding"]["consequence_of"] for each in written["checks"] if each["finding"]]
    assert follows.count(None) == written["counts"]["findings"] == 1
    assert {*follows} == {None, written["checks"][0]["id"]}


class Cured:
    """Stands for a copy under a remedy."""

    holds_large_model = False

    def release(self):
        pass


@pytest.fixture
def one_attempt(monkeypatch):
    """Every remedy can be applied in one way."""

    def cure(_evidence, _finding):
        yield Attempt(context=Cured())

    monkeypatch.setattr(roots, "cures", lambda: dict.fromkeys(("init-head", "use-amp-bf16"), cure))


def told_by(remedy, passes):
    """The second finding, where the root's remedy lets its check pass, or not."""
    root = failed("load.head-init", "bad-initialisation", remedies=(remedy,))
    second = failed("train.descends", "divergence")

    def ask(check, cured):
        assert (check, type(cured)) == ("train.descends", Cured)
        return CheckAnswer(breaches=() if passes else ("worse",), measurements={})

    return roots.following(second.check, second.finding, None, [root], ask), root


@pytest.mark.usefixtures("one_attempt")
def test_what_the_roots_remedy_cures_follows_from_it():
    local = Remedy(name="init-head", description="d", verified=True)
    found, root = told_by(local, passes=True)
    assert found.consequence_of == root.id
    assert [(each.name, each.verified, each.effect) for each in found.remedies] == [
        ("init-head", True, "train.descends passes too, as load.head-init does")
    ]
    assert told_by(local, passes=False)[0] is None


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    "remedy",
    [
        {"name": "use-amp-bf16", "verified": True},
        {"name": "init-head", "verified": None},
        {"name": "init-head", "verified": False},
        {"name": "init-head", "verified": True, "together": ("larger-optimizer-eps",)},
    ],
)
def test_a_remedy_that_changes_the_whole_run_shows_nothing(remedy):
    assert told_by(Remedy(description="d", **remedy), passes=True)[0] is None


def test_a_loud_head_explains_the_overflow_behind_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def loud_head(model):
        with torch.no_grad():
            model.score.weight.normal_(std=5000.0, generator=torch.Generator().manual_seed(1))

    asked = ("load.head-init", "forward.finite")
    session = MutantSession(
        mutant_settings("glm4-tiny", "fp16", "eager", asked, task="sequence-classification", max_examples=2), loud_head
    )
    session.findings.tries_remedies = True
    first, second = answered(session).checks
    assert first.finding.cause == "bad-initialisation"
    assert (second.finding.cause, second.finding.consequence_of) == ("overflow", first.id)


@pytest.mark.parametrize(("names", "follows"), [(("a.weight",), True), (("a.weight", "b.weight"), False), ((), False)])
def test_what_gets_no_gradient_does_not_move(names, follows):
    """A parameter that does not move although it has a gradient is another defect."""
    root = failed("train.grad-flow", "dead-gradient", parameters=("a.weight", "c.weight"))
    told = as_tree([root, failed("train.updates", "untrained-parameters", parameters=names)], lambda *_: True)[1]
    assert told.finding.consequence_of == (root.id if follows else None)


@pytest.mark.parametrize(
    ("law", "measurement", "follows"),
    [
        ("forward.padding", "true", True),
        ("forward.causal", "true", True),
        ("forward.pooling", "wrong-rows", True),
        ("forward.padding", "rounded", False),  # as fine as the precision: the tokenizer's padding moves more
        ("forward.attention", "true", False),
    ],
)
def test_the_tokenizers_padding_follows_from_a_law_that_is_broken_in_itself(law, measurement, follows):
    first, second = (
        failed("inputs.pipeline", "padding-leak", evidence={"measurement": "padding-moves", "measured": 0.5}),
        failed(law, "future-leak", evidence={"measurement": measurement}),
    )
    assert tree(first, second) == [second.id if follows else None, None]
    assert [each.id for each in as_tree([first, second], lambda *_: True)] == [first.id, second.id]
