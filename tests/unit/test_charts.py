"""Charts in a finding's block: the step that broke is marked, the lowest modules are shown, 80 columns, ASCII where need be."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from unit.sample_run import by_module, evidence, finding, over_steps, result, sample_run

from numerics_suite.reports.charts import STEPS, side_by_side, sparkline, told
from numerics_suite.reports.findings import block
from numerics_suite.reports.lines import sayable
from numerics_suite.reports.terminal import Terminal
from numerics_suite.reports.view.cards import card_of
from numerics_suite.reports.view.places import CheckCell, Source


def verbose_lines(told_result, width=80):
    card = card_of(CheckCell(source=Source(label="", run=None), result=told_result))
    return [line.text for line in block(card, width=width, verbose=True)]


def charts(*series, step=None, status="failed", width=80, **fields):
    """The lines of the block between the evidence and the reason."""
    found = finding("divergence", "it fails", step=step, evidence=evidence("m", 1, 0, "tensors", **fields))
    lines = verbose_lines(result("train.finite", "bf16", status=status, finding=found, series=series), width)
    begin = next(i for i, line in enumerate(lines) if line.startswith(("  evidence", "  measured")))
    end = next(i for i, line in enumerate(lines) if line.startswith("  why"))
    return lines[begin + 1 : end]


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ((1, 2, 3, 4, 5, 6, 7, 8), "▁▂▃▄▅▆▇█"),
        ((3.0, 3.0), "▄▄"),
        ((0.5, math.nan, 1.0, math.inf), "▁×█×"),
        ((math.nan,), "×"),
        ((1, 10, 100), "▁▅█"),
        ((-1.0, 0.0, 1000.0), "▁▁█"),
        ((1e-320, 1e308), "▁█"),
        ((), ""),
    ],
)
def test_a_curve_is_a_block_for_each_value(values, drawn):
    assert sparkline(values) == drawn


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.7, math.nan), "0.7 NaN"),
        ((7, 6, 5, 4, 3, 2, 1), "7 → 1"),
        ((7, 9, 5, 4, 3, 2, 4), "7 → 4, up to 9, down to 2"),
        ((7, 90, 5, 4, 3, 9000, math.nan), "7 → NaN, up to 9,000, down to 3"),
    ],
)
def test_a_long_curve_is_told_by_its_ends_and_what_lies_beyond(values, text):
    assert told(values) == text


def test_the_step_that_broke_is_marked_below_the_curves():
    lines = charts(
        over_steps("loss", "nats", 0.7, 0.9, 3.5, math.nan), over_steps("gradient-norm", "norm", 1, 2, 3), step=4
    )
    assert lines == [
        "  loss      ▁▂█×  0.7 0.9 3.5 NaN",
        "  grad norm ▁▅█   1 2 3",
        "               ^ step 4",
    ]


def test_a_step_without_a_value_is_blank():
    clipped = replace(over_steps("clipped-norm", "norm", 1, 1), at=(2, 4))
    assert charts(over_steps("loss-scale", "factor", 8, 4, 2, 1), clipped, step=5) == [
        "  scale     █▄▂▁   8 4 2 1",
        "  clipped    ▄ ▄   1 1",
        "                ^ step 5",
    ]


@pytest.mark.parametrize("steps", [STEPS, STEPS + 1, 1000, 123_457])
def test_a_long_run_has_several_steps_in_a_column_and_loses_no_break(steps):
    values = [1.0] * steps
    values[steps // 2] = math.nan
    loss, mark = charts(over_steps("loss", "nats", *values), step=steps // 2 + 1)
    drawn = loss[12:].split("  ")[0]
    assert drawn.count("×") == 1
    assert len(drawn) <= STEPS
    assert loss.index("×") == mark.index("^")
    assert max(len(loss), len(mark)) <= 80


def test_two_curves_share_a_scale_and_their_columns():
    assert side_by_side((1.0, 8.0), (8.0, math.nan, 4.5)) == ("▁█", "█×▅")
    old, new = side_by_side([1.0] * 100, [2.0] * 50)
    assert (old, new) == ("▁" * 20, "█" * 10)


def test_facts_that_the_curves_tell_are_not_told_twice():
    told_of = {"losses": "0.7, 0.6", "gradient norms": "1", "first": "gradient x"}
    found = finding("divergence", "it fails", evidence=evidence("m", 1, 0, "tensors", **told_of))
    plain = result("train.finite", "bf16", status="failed", finding=found)
    for series, facts in (
        ((), ["losses: 0.7, 0.6", "gradient norms: 1", "first: gradient x"]),
        ((over_steps("loss", "nats", 0.7),), ["gradient norms: 1", "first: gradient x"]),
    ):
        lines = verbose_lines(replace(plain, series=series))
        begin = lines.index(f"  evidence  {facts[0]}")
        assert lines[begin + 1 : begin + len(facts)] == [f"{'':12}{fact}" for fact in facts[1:]]


def test_the_modules_with_the_least_headroom_are_shown_after_the_one_that_left_the_range():
    values = {"embed": 12.0, "a.mlp": 1.0, "b": 6.0, "c": math.nan, "d": -math.inf, "": 8.0, "e": math.inf, "f": 8.0}
    assert charts(by_module("bits", "bits", values)) == [
        "  headroom  c        ×                 left the range, and 1 after it",
        "            a.mlp    ██░░░░░░░░░░░░░░  1 bits",
        "            b        ████████████░░░░  6 bits",
        "            (model)  ████████████████  8 bits",
        "            f        ████████████████  8 bits",
    ]


def test_modules_over_their_limits_are_shown_where_there_are_several():
    over = by_module(
        "error",
        "roundoffs",
        {"a": 0.8, "b": math.nan, "c": 0.5, "d": 9.0, "e": 0.1},
        limits=(0.75, 0.75, 0.75, None, 0.0),
    )
    assert charts(over) == [
        "  over      b  NaN roundoffs; at most 0.75",
        "            e  0.1 roundoffs; none is allowed",
        "            a  0.8 roundoffs; at most 0.75",
    ]
    assert charts(replace(over, values=(0.8, 0.1, 0.1, 9.0, 0.0))) == [], "the finding names the only one"


def test_of_a_name_too_long_the_end_is_shown():
    name = "base_model.model.transformer.encoder.layers.39.mlp.experts.127.dense_4h_to_h"
    lines = charts(by_module("bits", "bits", {name: 0.25, "lm_head": 14.0}))
    assert max(map(len, lines)) <= 80
    assert "...encoder.layers.39.mlp.experts.127.dense_4h_to_h" not in lines[0]
    assert lines[0].startswith("  headroom  ...")
    assert "dense_4h_to_h  ░░░░░░░░░░░░░░░░  0.25 bits" in lines[0]


def test_charts_are_ascii_where_the_stream_says_nothing_else():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(stream=stream, verbose=True).summary(sample_run())
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "  loss      -x  0.6931 NaN\n  grad norm -   8124\n             ^ step 2\n" in text
    assert "\\u" not in text


def test_only_what_a_stream_cannot_say_is_made_simpler():
    assert sayable("▁█× a → b", io.StringIO()) == "▁█× a → b"
    assert sayable("× modèle", io.TextIOWrapper(io.BytesIO(), encoding="latin-1")) == "× modèle"
    assert sayable("▁█× modèle → b", io.TextIOWrapper(io.BytesIO(), encoding="latin-1")) == "_#x modèle -> b"


def test_quiet_stays_quiet():
    stream = io.StringIO()
    Terminal(stream=stream, quiet=True).summary(sample_run())
    assert not set(stream.getvalue()) & set("▁▂▃▄▅▆▇█░×^")
