"""The view that every printer shares: a sentence for each cause, values beside their limits, the same lines everywhere."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest
from unit.sample_run import evidence, finding, result, sample_run

from numerics_suite.core.records import Finding, Remedy
from numerics_suite.core.versions import MatrixCell, MatrixResult, Versions
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.findings import block
from numerics_suite.reports.github import annotation_lines
from numerics_suite.reports.html.page import render
from numerics_suite.reports.junit import junit_xml
from numerics_suite.reports.markdown import summary_markdown
from numerics_suite.reports.markup import text as escaped
from numerics_suite.reports.matrix import verdict_lines
from numerics_suite.reports.sarif import sarif_log
from numerics_suite.reports.summary import summary
from numerics_suite.reports.terminal import Terminal
from numerics_suite.reports.view.advice import LOOK
from numerics_suite.reports.view.cards import card_of, cards_of
from numerics_suite.reports.view.causes import WHY, sentence_of, why
from numerics_suite.reports.view.finding_text import shown_text, value_text, where_text
from numerics_suite.reports.view.formats import plural
from numerics_suite.reports.view.places import CheckCell, Source, places_of
from numerics_suite.reports.view.problems import problems_of
from numerics_suite.settings.choices import CAUSES

UNDERFLOW = Finding(
    cause="optimizer-underflow",
    title="training is not finite from step 1 on",
    explanation="From this step on the model is lost.",
    module="model.embed_tokens",
    op="aten.addcdiv_",
    source="adam.py:546",
    step=1,
    parameters=("model.embed_tokens.weight",),
    evidence=evidence(
        "non-finite", 33, 0, "tensors",
        **{
            "first": "parameter model.embed_tokens.weight", "and others": 32, "dtype": "float16", "pass": "optimizer",
            "the same op in float64": "not finite", "with eps 0.0001": "passes", "in fp32": "passes",
            "confidence": "high: the experiment agrees",
        },
    ),
    remedies=(
        Remedy(name="larger-optimizer-eps", description="AdamW(eps=1e-4)", verified=True, effect="finite"),
        Remedy(name="keep-in-fp32", description="keep it wide", verified=False, effect="still fails"),
        Remedy(name="newer-version", description="a newer release"),
        Remedy(name="eager-attention", description="load eagerly", effect="does not apply here"),
    ),
    reproducer=".numerics/reproduce.py",
)  # fmt: skip


def failed(found=UNDERFLOW, check="train.finite", **fields):
    return result(check, "pure-fp16", "sdpa", "failed", finding=found, **fields)


def card(found=UNDERFLOW, **fields):
    return card_of(CheckCell(source=Source(label="", run=None), result=failed(found, **fields)))


def documents(*checks, **changes):
    return Documents(runs=(CheckRun(label="", result=sample_run(checks=checks, notes=(), **changes)),))


# --- sentences ---------------------------------------------------------------------------------------------------------


def test_every_cause_has_its_sentence_and_needs_no_fact_for_it():
    assert set(WHY) == set(CAUSES)
    for cause in CAUSES:
        said = why(cause, {})
        assert said, cause
        assert "{" not in said, cause
        assert sentence_of(replace(UNDERFLOW, cause=cause, evidence={})).endswith(f" ({cause}).")


def test_a_sentence_takes_the_findings_facts_and_names_no_cause_that_nobody_looked_for():
    assert sentence_of(UNDERFLOW) == (
        "Training is not finite from step 1 on: the optimizer's eps (1e-8 by default) is 0 in float16, so its step divides by 0 "
        "(optimizer-underflow)."
    )
    assert "is 0 in the dtype of its state" in sentence_of(replace(UNDERFLOW, evidence={}))
    assert sentence_of(UNDERFLOW, diagnosed=False) == "Training is not finite from step 1 on."
    unsure = replace(UNDERFLOW, evidence={"confidence": "low: the experiment disagrees"})
    assert sentence_of(unsure).endswith("(perhaps optimizer-underflow).")
    foreign = replace(UNDERFLOW, cause="acme.coarse-logits", title="logits are apart")
    assert sentence_of(foreign) == "Logits are apart (acme.coarse-logits)."


@pytest.mark.parametrize(
    ("title", "facts", "begin"),
    [
        ("never initialised: a.weight, b.bias", {}, "Never initialised: no code writes"),
        ("it differs (0.3 in true fp64)", {"allowed": 1e-10}, "It differs: "),
        ("the loss of the true fp64 run differs (0.3), first in x", {"allowed": 1e-10}, "The loss in float64 differs, first in x: "),
        ("outputs hold NaN (6)", {"allowed": 0}, "Outputs hold NaN (6): "),
        ("the code raises TypeError: no", {}, "The code raises TypeError: no. No code writes"),
        ("input_ids are rounded", {}, "input_ids are rounded: "),
        ("it is NaN in x: uninitialised-parameters", {}, "It is NaN in x: no code writes"),
    ],
)  # fmt: skip
def test_a_title_says_nothing_that_another_line_says(title, facts, begin):
    found = Finding(
        cause="uninitialised-parameters", title=title, explanation="", parameters=("a.weight", "b.bias"), evidence=facts
    )
    assert sentence_of(found).startswith(begin)


# --- lines -------------------------------------------------------------------------------------------------------------


def test_the_lines_of_a_finding():
    assert dict(card().lines) == {
        "where": "optimizer step 1, model.embed_tokens.weight and 32 more parameters; aten.addcdiv_ at adam.py:546",
        "shown by": "the same operation in float64 on float16's values (eps is already 0) is not finite either, so it is no overflow; the check passes with eps 0.0001 and in fp32",
    }
    assert card().fixes == ("AdamW(eps=1e-4) -- tried, works: finite", "a newer release -- not tried")
    helpless = replace(UNDERFLOW, remedies=UNDERFLOW.remedies[1:2])
    assert card(helpless).fixes == ("keep it wide -- tried, no help: still fails",)
    none = replace(UNDERFLOW, remedies=UNDERFLOW.remedies[3:])
    assert card(none).fixes == ("no automatic remedy applies: read the code at the place above; run the script",)


def test_parameters_that_are_all_there_are_is_said_so():
    every = replace(UNDERFLOW, evidence={**UNDERFLOW.evidence, "trained parameters": 33})
    assert "step 1, all 33 trained parameters, first model.embed_tokens.weight;" in where_text(every)
    some = replace(UNDERFLOW, evidence={**UNDERFLOW.evidence, "trained parameters": 40})
    assert "model.embed_tokens.weight and 32 more parameters of 40 trained;" in where_text(some)


def test_where_no_remedy_works_a_cause_says_where_to_look():
    assert set(LOOK) <= set(CAUSES)
    wrong = replace(UNDERFLOW, cause="wrong-gradient", remedies=UNDERFLOW.remedies[2:3])
    assert card(wrong).fixes[0].startswith("look for detach()")
    cured = replace(wrong, remedies=(replace(UNDERFLOW.remedies[0], name="eager-attention"),))
    assert card(cured).fixes == ("AdamW(eps=1e-4) -- tried, works: finite",)


def test_a_remedy_that_works_may_name_the_reason():
    still = replace(UNDERFLOW, cause="untrained-parameters", evidence={})
    remedy = replace(UNDERFLOW.remedies[0], name="non-reentrant-checkpointing")
    assert "reentrant gradient checkpointing cuts" in sentence_of(replace(still, remedies=(remedy,)))
    assert "reentrant" not in sentence_of(replace(still, remedies=(replace(remedy, verified=False),)))


def test_a_large_error_in_unit_roundoffs_is_said_in_percent_too():
    found = replace(UNDERFLOW, evidence=evidence("norm", 2048.0, 0.75, "roundoffs"))
    assert (
        card(found, check="reference.local").measured
        == "2,048 unit roundoffs of float16 (an error of 100 %); at most 0.75"
    )
    small = replace(UNDERFLOW, evidence=evidence("norm", 2.5, 0.75, "roundoffs"))
    assert card(small, check="reference.local").measured == "2.5 unit roundoffs of float16; at most 0.75"


def test_what_shows_a_cause_says_how_sure_it_is():
    seen = {"where": "the batch", "config ties them": True, "confidence": "high: seen, not concluded"}
    assert shown_text(replace(UNDERFLOW, evidence=seen)) == "seen in the batch; config ties them: yes"
    low = {"in fp32": "fails", "confidence": "low: the experiment disagrees"}
    assert shown_text(replace(UNDERFLOW, evidence=low)) == "the check fails in fp32 too; the experiment disagrees"


def test_a_place_names_a_module_where_no_parameter_is_of_it():
    assert where_text(finding("overflow", "x", module="a.mlp", parameters=("b.weight",))) == "a.mlp, b.weight"
    assert where_text(finding("overflow", "x", source="m.py:3")) == "m.py:3"
    assert where_text(finding("overflow", "x")) == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("norm", 0.79, 0.75, "roundoffs"), "0.79 roundoffs; at most 0.75"),
        (
            ("true", 4.73, 1e-10, "ratio"),
            "4.73 times the root mean square of the logits, in float64, whose rounding explains at most 1e-10",
        ),
        (
            ("true-gradient", 1.03, 1e-10, "ratio"),
            "1.03 times the gradient's largest value, in float64, whose rounding explains at most 1e-10",
        ),
        (("excess", 3, 1.5, "ratio"), "3 times the rounding error that the precision makes unavoidable; at most 1.5"),
        (("wrongly-tied", 1, 0, "pairs"), "1 pair; none is allowed"),
        (("empty", 3, 0, "batches"), "3 batches; none is allowed"),
        (("rise", -8.7, 0, "resolutions", 0.48), "loss fell by 0.48; it must not rise"),
        (("rise", 2, 0, "resolutions", -0.1), "loss rose by 0.1; it must not rise"),
        (("non-finite", math.nan, 0, "tensors"), "NaN tensors; none is allowed"),
    ],
)
def test_a_value_stands_beside_its_limit_in_words(arguments, text):
    assert value_text(*arguments) == text


def test_units_in_the_singular():
    assert [plural(unit, 1) for unit in ("batches", "losses", "exceptions")] == ["batch", "loss", "exception"]


# --- printers ----------------------------------------------------------------------------------------------------------


def test_every_printer_says_the_same_in_the_same_order():
    told = documents(failed())
    expected = [card().sentence, *(text for _, text in card().lines), *(cure.action for cure in card().cures)]
    page = render(told)
    annotation = (
        annotation_lines(told)[0].replace("%0A", "\n").replace("%2C", ",").replace("%3A", ":").replace("%25", "%")
    )
    junit = " ".join(junit_xml(told).decode().replace("&apos;", "'").split())
    texts = {
        "terminal": " ".join(" ".join(line.text for line in summary(told.runs[0].result)).split()),
        "sarif": sarif_log(told)["runs"][0]["results"][0]["message"]["text"],
        "github": annotation,
        "junit": junit,
        "html": page[page.index('<article class="card') :].replace("&#39;", "'"),
    }
    markdown = summary_markdown(told).partition("### 1. ")[2]
    assert is_ordered([escaped(words) for words in expected], markdown), markdown
    assert [name for name, text in texts.items() if not is_ordered(expected, text)] == []


def is_ordered(parts, text):
    """Whether the text has every part, one behind the other."""
    places = [text.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def test_the_short_block_has_no_dump_and_the_verbose_one_has_everything():
    short, verbose = (" ".join(line.text for line in block(card(), verbose=value)) for value in (False, True))
    assert len(block(card())) <= 12
    for fact in ("pass: optimizer", "33 tensors; none is allowed", "From this step on the model is lost."):
        assert fact not in short
        assert fact in verbose


def test_without_a_diagnosis_no_printer_names_a_cause():
    run = sample_run(checks=(failed(),), notes=())
    told = documents(failed(), settings={**run.settings, "diagnose": False})
    texts = {
        "terminal": "\n".join(line.text for line in summary(told.runs[0].result)),
        "annotation": annotation_lines(told)[0],
        "junit": junit_xml(told).decode(),
        "markdown": summary_markdown(told),
        "html": render(told).partition('<article class="card')[2].partition("</article>")[0],
        "sarif": json.dumps(sarif_log(told)["runs"][0]["results"][0]["message"]),
    }
    assert [name for name, text in texts.items() if "optimizer-underflow" in text or "eps (1e-8" in text] == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_block_fits_its_width_but_for_what_is_copied(width):
    lines = [line.text for line in block(card(), width=width)]
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("FAIL  train.finite   ")


def test_on_a_terminal_and_in_a_pipe_the_words_are_the_same(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for stream in (io.StringIO(), Screen()):
        Terminal(stream=stream).summary(sample_run())
        texts.append(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()))
    assert texts[0] == texts[1]


def test_roots_come_first_and_what_follows_is_a_line_of_theirs():
    root = failed(
        replace(UNDERFLOW, cause="uninitialised-parameters", title="never initialised"), check="load.head-init"
    )
    after = failed(replace(UNDERFLOW, cause="uninitialised-parameters", consequence_of=root.id))
    (problem,) = problems_of(places_of(documents(after, root)))
    (only,) = cards_of([problem])
    assert only.check == "load.head-init"
    assert ("leads to", "train.finite: training is not finite from step 1 on") in only.lines


# --- verdicts ----------------------------------------------------------------------------------------------------------


def environment(release, status):
    held = Versions(transformers=release, torch="2.13.0", python="3.11")
    return MatrixCell(wanted=held, held=held, status=status)


@pytest.mark.parametrize(
    ("statuses", "text"),
    [
        ({"4.57.6": "failed", "5.24.0": "passed"}, "FAIL: 1 of 2 environments failed: 4.57.6 (exit 1)"),
        (
            {"4.57.6": "failed", "5.0.0": "error", "5.24.0": "failed"},
            "FAIL: 2 of 3 environments failed: 4.57.6, 5.24.0; 1 could not be checked: 5.0.0 (exit 1)",
        ),
        ({"5.24.0": "passed"}, "PASS (exit 0)"),
    ],
)
def test_the_verdict_of_a_matrix_names_its_environments(tmp_path, statuses, text):
    cells = tuple(environment(release, status) for release, status in statuses.items())
    lines = verdict_lines(MatrixResult(cells=cells, folder=tmp_path), 200)
    assert lines[-1].text == text
