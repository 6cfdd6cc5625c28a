"""The SARIF file: valid by the schema of the standard, the same in every run, within what code scanning takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from unit.sample_documents import (
    HOSTILE,
    bisect_document,
    comparison_document,
    everything,
    hostile_finding,
    matrix_document,
    run_of,
    uninitialised,
)
from unit.sample_run import finding, result, sample_run

from numerics_suite.core.records import SubjectFacts
from numerics_suite.core.registry import own_check_ids
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.sarif import LONGEST_MESSAGE, LONGEST_RULE, question_of, sarif_log, sarif_text
from numerics_suite.reports.sources import Sources, in_packages

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[1] / "schemas" / "sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft4Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


def of_run(run) -> Documents:
    return Documents(runs=(CheckRun(label="x", result=run),))


def results(documents: Documents, **options) -> list[dict]:
    return sarif_log(documents, **options)["runs"][0]["results"]


def test_everything_is_valid_and_the_same_again():
    text = sarif_text(everything())
    VALIDATOR.validate(json.loads(text))
    assert sarif_text(everything()) == text


def test_the_schema_refuses_a_fix_without_an_edit():
    log = sarif_log(everything())
    log["runs"][0]["results"][0]["fixes"] = [{"description": {"text": "initialise the head"}}]
    assert not VALIDATOR.is_valid(log)


def test_a_result_says_what_where_and_what_to_do():
    (found,) = results(of_run(run_of(uninitialised("5.8.0"))))
    assert (found["ruleId"], found["level"]) == ("load.head-init", "error")
    text = found["message"]["text"]
    assert text.startswith(
        "No code initialised score.weight of 5.8.0: no code writes to the memory of score.weight, so it holds whatever was there before: NaN in one process, zeros in another (uninitialised-parameters)."
    )
    assert "load.head-init on glm4-tiny-classifier · bf16 · sdpa · cpu." in text
    assert "fix: initialise the head by hand -- tried, works: finite." in text
    (location,) = found["locations"]
    assert location["physicalLocation"] == {
        "artifactLocation": {"uri": "transformers/models/glm4/modeling_glm4.py", "uriBaseId": "SITE_PACKAGES"},
        "region": {"startLine": 123},
    }
    assert location["logicalLocations"] == [{"fullyQualifiedName": "score", "name": "score", "kind": "module"}]
    assert found["properties"]["remedies"][0] == {
        "name": "init-head",
        "description": "initialise the head by hand",
        "verified": True,
    }


def test_a_finding_without_a_line_is_at_its_check():
    (found,) = results(
        of_run(run_of(result("load.head-init", "bf16", status="failed", finding=finding("unknown", "x"))))
    )
    artifact = found["locations"][0]["physicalLocation"]["artifactLocation"]
    assert artifact == {"uri": "numerics_suite/checks/load/head_init.py", "uriBaseId": "SITE_PACKAGES"}
    assert (Path(__file__).resolve().parents[2] / artifact["uri"]).is_file()


def test_one_rule_for_each_check_with_its_question_and_its_budgets():
    (run,) = sarif_log(of_run(sample_run()))["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["load.head-init", "forward.finite", "train.finite", "train.clip"]
    assert all(rules[found["ruleIndex"]]["id"] == found["ruleId"] for found in run["results"])
    assert rules[1]["shortDescription"]["text"] == "Is every output finite, at real tokens and at padding alike?"
    assert "non-finite: at most 0." in rules[1]["help"]["markdown"]


def test_every_check_has_its_question():
    assert all(question_of(check).endswith("?") for check in own_check_ids())
    assert question_of("acme.unknown") == "acme.unknown"


def test_cells_and_versions_are_told_once():
    (found,) = results(Documents(matrices=(matrix_document(),)))
    assert (
        "versions: first bad transformers 5.8.0; last good transformers 5.7.0; good again transformers 5.9.0."
        in found["message"]["text"]
    )
    assert found["properties"]["runs"] == ["5.8.0", "5.8.1"]
    assert found["properties"]["cells"] == ["glm4-tiny-classifier/bf16/sdpa/cpu"]


def test_accepted_is_a_note_suppressed_with_its_reason():
    run = run_of(
        result("train.clip", "bf16", status="accepted", reason="known since 5.8", finding=finding("divergence", "x"))
    )
    (found,) = results(of_run(run))
    assert found["level"] == "note"
    assert found["suppressions"] == [{"kind": "external", "status": "accepted", "justification": "known since 5.8"}]


def test_errors_are_notifications_and_the_run_was_no_success():
    (run,) = sarif_log(of_run(run_of(result("forward.padding", "fp16", status="error", reason="out of memory"))))[
        "runs"
    ]
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    (told,) = invocation["toolExecutionNotifications"]
    assert told["level"] == "error"
    assert told["message"]["text"] == (
        "forward.padding could not be carried out on glm4-tiny-classifier in fp16: out of memory"
    )
    good = sarif_log(of_run(run_of(result("load.config", "fp32"))))["runs"][0]["invocations"][0]
    assert good == {"executionSuccessful": True, "toolExecutionNotifications": []}


def test_a_fingerprint_is_of_the_problem_and_of_nothing_else():
    first = uninitialised("5.8.0")
    again = replace(first, cell=replace(first.cell, precision="fp16"), duration_s=9.0)
    moved = replace(first, finding=replace(first.finding, module="other", title="x", source="modeling_glm4.py:999"))
    other_line = replace(first, finding=replace(first.finding, title="x", source="modeling_glm4.py:999"))
    prints = [results(of_run(run_of(check)))[0]["partialFingerprints"] for check in (first, again, other_line, moved)]
    assert prints[0] == prints[1] == prints[2]
    assert prints[0] != prints[3]


def test_what_code_scanning_does_not_take_is_counted():
    documents = of_run(sample_run())
    log = sarif_log(documents, most=2)
    assert len(log["runs"][0]["results"]) == 2
    assert log["runs"][0]["results"] == results(documents)[:2]
    assert "2 more results" in log["runs"][0]["invocations"][0]["toolExecutionNotifications"][-1]["message"]["text"]
    VALIDATOR.validate(log)


def test_texts_are_as_long_as_they_are_shown():
    long = replace(uninitialised("5.8.0"), finding=hostile_finding(title="x" * 5000))
    log = sarif_log(of_run(run_of(long)))["runs"][0]
    assert len(log["results"][0]["message"]["text"]) == LONGEST_MESSAGE
    for documents in (everything(), of_run(sample_run())):
        for rule in sarif_log(documents)["runs"][0]["tool"]["driver"]["rules"]:
            assert max(len(rule[key]["text"]) for key in ("shortDescription", "fullDescription")) <= LONGEST_RULE


def test_a_link_in_a_title_is_no_link():
    hostile = replace(uninitialised("x"), finding=hostile_finding(title="[press](https://evil.example)"))
    assert "](" not in results(of_run(run_of(hostile)))[0]["message"]["text"]


def test_no_path_of_the_machine_is_told(tmp_path):
    assert str(Path.cwd()) not in sarif_text(everything())
    assert "site-packages/" not in sarif_text(everything())


def test_differences_that_fail_are_results():
    found = results(Documents(comparisons=(comparison_document(),)))
    assert [one["ruleId"] for one in found] == [
        "compare.missing",
        "compare.changed",
        "compare.worse",
        "compare.contract",
    ]
    assert found[2]["message"]["text"].startswith(
        "glm-worse in bf16: worse, first in model.layers.0. The same function"
    )


def test_a_bisection_is_a_result():
    (found,) = results(Documents(bisections=(bisect_document(),)))
    assert found["message"]["text"].startswith(
        "transformers 5.8.0 is the first bad version, 5.7.0 is good: No code initialised"
    )


# --- which file a source line is in ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "my_model.py").write_text("")
    monkeypatch.chdir(tmp_path / "src")
    return tmp_path


def place(source: str, documents: Documents | None = None) -> tuple | None:
    found = Sources(documents or Documents()).find(source)
    return None if found is None else (found.root, found.path, found.line)


def test_a_file_of_the_repository_is_named_from_its_root(repository):
    assert place("my_model.py:7") == ("repository", "src/my_model.py", 7)


@pytest.mark.parametrize("where", [".venv/lib", "node_modules/x", "env"])
def test_environments_and_hidden_folders_are_no_sources(repository, where):
    folder = repository / where
    folder.mkdir(parents=True)
    (repository / "env").mkdir(exist_ok=True)
    (repository / "env" / "pyvenv.cfg").write_text("")
    (folder / "hidden.py").write_text("")
    assert place("hidden.py:7") is None


def test_two_files_of_one_name_are_none(repository):
    (repository / "my_model.py").write_text("")
    assert place("my_model.py:7") is None


def test_the_code_of_a_checkpoint_comes_first(repository):
    (repository / "ckpt").mkdir()
    (repository / "ckpt" / "modeling_glm4.py").write_text("")
    facts = sample_run().subjects[0]
    kept = {name: getattr(facts, name) for name in SubjectFacts.__dataclass_fields__}
    documents = of_run(run_of(subjects=(SubjectFacts(**{**kept, "source": "../ckpt"}),)))
    assert place("modeling_glm4.py:7", documents) == ("repository", "ckpt/modeling_glm4.py", 7)
    assert place("modeling_glm4.py:7") == ("site-packages", "transformers/models/glm4/modeling_glm4.py", 7)


@pytest.mark.parametrize(
    "source",
    [None, "", "x", "../my_model.py:7", "/etc/passwd:1", "my_model.py:0", "my_model.py:x", HOSTILE, "gone.py:1"],
)
def test_what_is_no_source_is_none(repository, source):
    assert place(source) is None


def test_a_large_repository_is_left_alone(repository, monkeypatch):
    monkeypatch.setattr("numerics_suite.reports.sources.MOST_FILES", 1)
    assert place("my_model.py:7") is None


def test_an_optimizers_line_is_torchs():
    assert in_packages("adamw.py") == ("torch/optim/adamw.py",)
