"""The JUnit file: valid by the schema that Jenkins uses, complete, and never a pass where something is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import xmlschema
from junitparser import Error, Failure, JUnitXml, Skipped
from unit.sample_documents import HOSTILE, bisect_document, comparison_document, everything, matrix_document, run_of
from unit.sample_run import result, sample_run

from numerics_suite.core.versions import MatrixResult
from numerics_suite.reports.documents import CheckRun, Documents, Matrix
from numerics_suite.reports.junit import fit, junit_xml

SCHEMA = Path(__file__).resolve().parents[1] / "schemas" / "junit-10.xsd"


@pytest.fixture(scope="module")
def schema():
    return xmlschema.XMLSchema(SCHEMA)


def suites(documents: Documents) -> dict:
    """Suites by name; each a dict of cases by class and name."""
    read = JUnitXml.fromstring(junit_xml(documents))
    return {suite.name: {(case.classname, case.name): case for case in suite} for suite in read}


def of_run(run, label="x") -> Documents:
    return Documents(runs=(CheckRun(label=label, result=run),))


def outcome(case) -> tuple:
    found = case.result
    return tuple((type(one).__name__, one.type, one.message) for one in found)


def test_everything_is_valid(schema):
    schema.validate(junit_xml(everything()).decode())


@pytest.mark.parametrize(
    "wrong",
    [
        b"<testsuites skipped='1'/>",
        b"<testsuites><testsuite name='x' tests='1' failures='0' errors='0' time='1e-05'/></testsuites>",
        b"<testsuites><testsuite name='x' tests='1' failures='0' errors='0'><testcase name='a' file='b.py'/></testsuite></testsuites>",
    ],
    ids=["skipped-at-the-root", "exponent", "file-of-a-case"],
)
def test_the_schema_refuses_what_the_printer_avoids(schema, wrong):
    assert not schema.is_valid(wrong.decode())


def test_each_answer_is_a_case_of_its_outcome():
    cases = suites(of_run(sample_run()))["glm4-tiny-classifier"]
    assert len(cases) == len(sample_run().checks) == 25
    cell = "glm4-tiny-classifier/{}/{}/cpu"
    failed = cases["forward.finite", cell.format("fp16", "sdpa")]
    assert outcome(failed) == (
        (
            "Failure",
            "overflow",
            "6 output elements are NaN or infinite: aten.mul.Tensor of finite inputs exceeds the largest number of its dtype (overflow).",
        ),
    )
    text = failed.result[0].text
    for part in (
        "where     model.layers.3.mlp; aten.mul.Tensor at modeling_glm4.py:123",
        "(overflow).",
        "tried, works: 0 elements",
        "evidence  largest finite input: 41,000",
        "numerics-suite check",
    ):
        assert part in text
    assert outcome(cases["forward.padding", cell.format("fp16", "eager")]) == (
        ("Error", "error", "out of memory: 3.20 GiB asked, 1048576 bytes free"),
    )
    assert outcome(cases["train.clip", cell.format("bf16", "eager")]) == (
        ("Skipped", "accepted", "accepted: known since 5.8"),
    )
    assert outcome(cases["train.amp", cell.format("fp16", "sdpa")])[0][:2] == ("Skipped", "skipped")
    assert outcome(cases["load.config", cell.format("fp32", "eager")]) == ()


def test_counts_are_those_of_the_run():
    read = JUnitXml.fromstring(junit_xml(of_run(sample_run())))
    (suite,) = read
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (25, 12, 1, 9)
    assert (read.tests, read.failures, read.errors) == (25, 12, 1)


def test_numbers_that_are_not_finite_are_words():
    cases = suites(of_run(sample_run()))["glm4-tiny-classifier"]
    told = cases["train.finite", "glm4-tiny-classifier/pure-fp16/sdpa/cpu"]
    assert told.system_out == "non-finite = NaN\nlast-loss = -Infinity"
    assert "NaN tensors" in told.result[0].text


def test_versions_are_properties():
    (suite,) = JUnitXml.fromstring(junit_xml(of_run(sample_run())))
    facts = {one.name: one.value for one in suite.properties()}
    assert (facts["transformers"], facts["torch"], facts["python"], facts["digest"]) == (
        "5.24.0",
        "2.13.0",
        "3.11.7",
        "sha256:00",
    )
    assert "revision" not in facts


def test_a_matrix_is_a_suite_for_each_version_and_subject():
    found = suites(Documents(matrices=(matrix_document(),)))
    subject = "glm4-tiny-classifier"
    versions = ["5.7.0", "5.8.0", "5.8.1", "5.9.0", "5.10.0"]
    assert list(found) == [*(f"{version}: {subject}" for version in versions), "5.11.0"]
    failing = [
        name
        for name, cases in found.items()
        if any(isinstance(one, Failure) for case in cases.values() for one in case.result)
    ]
    assert failing == [f"5.8.0: {subject}", f"5.8.1: {subject}"]
    (lost,) = found["5.11.0"].values()
    assert isinstance(lost.result[0], Error)
    assert lost.result[0].message.startswith("no wheel of it")


def test_the_summary_of_a_matrix_tells_what_its_lost_results_would():
    whole = matrix_document()
    found = suites(Documents(matrices=(replace(whole, runs=(None,) * len(whole.runs)),)))
    (case,) = found["5.8.0: glm4-tiny-classifier"].values()
    ((kind, cause, message),) = outcome(case)
    assert (kind, cause) == ("Failure", "uninitialised-parameters")
    assert message.startswith("No code initialised score.weight: no code writes to the memory of a parameter, so it")
    (passed,) = found["5.7.0"].values()
    assert passed.result == []
    assert "results file is gone" in passed.system_out


def test_a_version_that_lacks_the_family_is_skipped():
    cell = replace(
        matrix_document().result.cells[0], status="unsupported", results=None, rows=(), reason="no such family"
    )
    found = suites(Documents(matrices=(Matrix(result=MatrixResult(cells=(cell,), folder=Path()), runs=(None,)),)))
    (case,) = found["numerics-suite"].values()
    assert outcome(case) == (("Skipped", "unsupported", "no such family"),)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"verdict": "fail", "exit_status": 1, "notes": ("accept entry matched nothing",)},
            Failure,
            "accept entry matched nothing",
        ),
        ({"verdict": "error", "exit_status": 3}, Error, "the run ended with exit status 3"),
        ({"exit_status": 5}, Error, "not all that was asked for was carried out"),
    ],
)
def test_a_run_that_fails_without_a_failing_check_is_not_green(schema, changes, kind, message):
    documents = of_run(run_of(result("load.config", "fp32"), **changes))
    cases = suites(documents)["numerics-suite"]
    (outcome_of_run,) = cases["run", "verdict"].result
    assert isinstance(outcome_of_run, kind)
    assert outcome_of_run.message == message
    schema.validate(junit_xml(documents).decode())
    assert "numerics-suite" not in suites(of_run(run_of(result("load.config", "fp32"))))


def test_a_comparison_fails_by_its_kinds():
    found = suites(Documents(comparisons=(comparison_document(),)))
    kinds = {name: [type(one) for case in cases.values() for one in case.result] for name, cases in found.items()}
    failing = {name for name, outcomes in kinds.items() if outcomes == [Failure]}
    assert failing == {
        "compare: glm-missing",
        "compare: glm-worse",
        "compare: glm-contract",
        f"compare: {fit(' '.join(HOSTILE.split()))}",
    }
    (worse,) = found["compare: glm-worse"].values()
    assert worse.result[0].message == "worse in model.layers.0"
    assert "error ratio: Infinity" in worse.result[0].text


def test_a_bisection_tells_its_boundary():
    (case,) = suites(Documents(bisections=(bisect_document(),)))["bisect: glm4-tiny"].values()
    assert (case.classname, case.name) == ("load.head-init", "transformers 5.8.0")
    text = case.result[0].text
    assert "last good: 5.7.0\nfirst bad: 5.8.0\n" in text
    assert "where: score.weight; modeling_glm4.py:123\n" in text


def test_what_xml_forbids_is_gone_and_the_rest_is_kept():
    assert fit("a\x00\x08\x0b\x1f\ud800\udfff\ufffe\uffffb\t\n\r é 中 😀") == "ab\t\n\r é 中 😀"
    (case,) = suites(of_run(run_of(result("train.amp", "bf16", status="skipped", reason=HOSTILE))))[
        "glm4-tiny-classifier"
    ].values()
    assert isinstance(case.result[0], Skipped)
    assert "<script>alert(1)</script> ]]> -->" in case.result[0].message


def test_two_runs_are_told_apart_and_one_needs_no_name():
    one = CheckRun(label="a", result=sample_run())
    assert list(suites(Documents(runs=(one, replace(one, label="b"))))) == [
        "a: glm4-tiny-classifier",
        "b: glm4-tiny-classifier",
    ]
    assert list(suites(Documents(runs=(one,)))) == ["glm4-tiny-classifier"]
