"""Series: one entry for each point, judged without deciding, of the worst batch, and whole in the results file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import pytest
from unit.sample_run import sample_run

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Budget, Measurement, Series
from numerics_suite.core.registry import CheckSpec
from numerics_suite.judgement.verdicts import with_limits
from numerics_suite.reports.results import dump, from_json, load_schema, to_json
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.driver import Outcome, ask
from numerics_suite.suite.planning import Question
from numerics_suite.suite.session import SuiteSession

NORMS = Series(
    name="error",
    unit="roundoffs",
    along="module",
    at=("model.norm", "model.rotary_emb", "model.act"),
    values=(0.9, math.nan, 0.1),
    groups=("norm", "rotary", "other"),
    budgets=("norm", "rotary", ""),
)


def bits(*values: float) -> Series:
    at = tuple(f"m{index}" for index in range(len(values)))
    return Series(name="bits", unit="bits", along="module", at=at, values=values)


def judged(name: str, limit: float) -> dict[str, Budget]:
    return {name: Budget(check="c", measurement=name, limit=limit, cause="unknown", title="", reason="")}


@pytest.mark.parametrize("short", ["values", "groups", "budgets", "limits"])
def test_what_is_not_one_entry_for_each_point_is_refused(short):
    with pytest.raises(ValueError, match="series error: 3 places"):
        replace(NORMS, **{short: (0.5,)})


def test_judging_fills_in_the_limits_of_the_named_budgets():
    assert with_limits("c", NORMS, judged("norm", 0.75)).limits == (0.75, None, None)
    assert with_limits("reference.local", NORMS).limits == (0.75, 0.6, None)
    assert with_limits("c", bits(1.0, 2.0)).limits == ()


def test_the_series_of_the_worst_batch_is_kept():
    outcome = Outcome()
    for least in (9.0, 3.0, 5.0):
        outcome.add([Measurement(name="bits", value=least, unit="bits"), bits(least, 10.0)])
    assert outcome.series["bits"].values == (3.0, 10.0)
    outcome.add([Measurement(name="bits", value=math.nan, unit="bits"), bits(math.nan, 1.0)])
    outcome.add([Measurement(name="bits", value=1.0, unit="bits"), bits(1.0, 2.0)])
    assert math.isnan(outcome.series["bits"].values[0])


def test_a_series_without_a_measurement_of_its_name_is_the_last_batchs():
    outcome = Outcome()
    for value in (9.0, 3.0):
        measured = outcome.add([bits(value), Measurement(name="m", value=value, unit="ratio")])
    assert outcome.series["bits"].values == (3.0,)
    assert [item.name for item in measured] == ["m"], "a series is no measurement and is not judged"


@pytest.fixture(scope="module")
def session():
    return SuiteSession(Settings(subjects=("fixture:glm4-tiny",), precision=("amp-fp16",), attn=("sdpa",)))


def series_of(session, check):
    question = Question(check=check, cell=session.plan.cells[0])
    result, trace = session.answer(question)
    assert result.status == "passed", result.reason or trace
    return result, {series.name: series for series in result.series}


def test_headroom_by_module_is_the_batchs_with_the_least_bits(session):
    result, found = series_of(session, "forward.headroom")
    assert min(found["bits"].values) == result.measurements["bits"]
    assert dict(zip(found["bits"].at, found["bits"].groups, strict=True))["model.layers.1.self_attn"] == "attention"
    assert {"norm", "rotary", "linear", "embedding", "mlp", "block"} <= set(found["bits"].groups)


def test_training_tells_its_curves(session):
    finite, curves = series_of(session, "train.finite")
    assert curves["loss"].at == (1, 2, 3, 4, 5, 6)
    assert curves["loss"].values[0] == finite.measurements["first-loss"]
    assert curves["loss"].values[-1] == finite.measurements["last-loss"]
    assert curves["gradient-norm"].at == (1, 2, 3, 4, 5)
    _, scales = series_of(session, "train.amp")
    assert scales["loss-scale"].values == (65536.0,) * 5
    _, clipped = series_of(session, "train.clip")
    assert max(clipped["clipped-norm"].values) <= 1.0 + 1e-3 < min(clipped["gradient-norm"].values)


def test_a_driven_check_may_yield_series_beside_what_is_judged(session):
    def look(_evidence, batch):
        rows = float(len(batch.tensors["input_ids"]))
        yield Series(name="rows", unit="rows", along="module", at=("m",), values=(rows,))
        yield Measurement(name="rows", value=rows, unit="rows")
        yield Measurement(name="non-finite", value=0, unit="elements")

    spec = CheckSpec(id="forward.finite", function=look, batches=True)
    outcome = ask(spec, session.context(session.plan.cells[0]), seed=0, max_examples=10)
    assert outcome.series["rows"].values == (outcome.worst["rows"].value,)
    assert outcome.breaches == []


# --- results file


def with_series(*series: Series):
    run = sample_run()
    return replace(run, checks=(replace(run.checks[0], series=series), *run.checks[1:]))


def test_a_series_survives_the_results_file_with_nan_and_infinity():
    curve = Series(name="loss", unit="nats", along="step", at=(1, 2, 3, 4), values=(0.7, math.inf, -math.inf, math.nan))
    written = dump(to_json(with_series(curve, with_limits("reference.local", NORMS))))
    assert '"values": [0.7, "Infinity", "-Infinity", "NaN"]' in written
    assert '"at": ["model.norm", "model.rotary_emb", "model.act"]' in written
    assert '"limits": [0.75, 0.6, null]' in written
    content = json.loads(written)
    assert to_json(from_json(content)) == content
    first, second = from_json(content).checks[0].series
    assert first.values[1:3] == (math.inf, -math.inf)
    assert math.isnan(first.values[3])
    assert (second.at, second.groups, second.limits) == (NORMS.at, NORMS.groups, (0.75, 0.6, None))


def test_a_module_may_be_called_nan():
    odd = Series(name="bits", unit="bits", along="module", at=("NaN",), values=(1.0,), groups=("Infinity",))
    (again,) = from_json(json.loads(dump(to_json(with_series(odd))))).checks[0].series
    assert (again.at, again.groups) == (("NaN",), ("Infinity",))


def test_a_file_from_before_there_were_series_is_read():
    content = to_json(sample_run())
    for check in content["checks"]:
        del check["series"]
    assert all(check.series == () for check in from_json(content).checks)
    jsonschema.validate(content, load_schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda series: series.update(along="time"),
        lambda series: series.update(values=["nan"]),
        lambda series: series.update(limits=["low"]),
        lambda series: series.update(at=[0.5]),
        lambda series: series.pop("unit"),
    ],
)
def test_the_schema_refuses_what_is_no_series(spoil):
    content = to_json(with_series(bits(1.0)))
    jsonschema.validate(content, load_schema(), cls=jsonschema.Draft202012Validator)
    spoil(content["checks"][0]["series"][0])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, load_schema(), cls=jsonschema.Draft202012Validator)


def test_a_torn_series_is_refused_in_one_line():
    content = to_json(with_series(bits(1.0, 2.0)))
    content["checks"][0]["series"][0]["values"].pop()
    with pytest.raises(BadInputError, match=r"^not a results file of this tool: .*series bits: 2 places"):
        from_json(content)


def test_lists_of_numbers_and_words_are_a_line_and_texts_are_left_alone():
    content = {"n": [[1, -4.5e-7], []], "w": ["a.b", "NaN"], "t": ["two words", "[\n 1\n]"], "o": [{"k": [None, 2]}]}
    text = dump(content)
    assert json.loads(text) == content
    for line in ("  [1, -4.5e-07],", ' "w": ["a.b", "NaN"],', '  "two words",', '   "k": [null, 2]'):
        assert line in text.splitlines()
