"""Files written before this release are still read: one results file, baseline, bundle and section of pyproject.toml.

`written_before/` holds them as the commit before the renaming of the package's parts wrote them, with the model that they
are about; names of machines are cut.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import shutil
from pathlib import Path

import pytest

from numerics_suite.core.errors import BadInputError
from numerics_suite.reports.documents import read_check, read_documents
from numerics_suite.reports.report import write_report
from numerics_suite.settings.sources import read_pyproject
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.bundle_replay import reopen
from numerics_suite.suite.session import SuiteSession

WRITTEN = Path(__file__).with_name("written_before")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A copy of them, in the folder in which their commands ran."""
    folder = tmp_path / "written"
    shutil.copytree(WRITTEN, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def answers_of(**settings):
    session = SuiteSession(Settings(precision=("fp32",), steps=2, diagnose=False, **settings))
    return {question.check: session.answer(question)[0] for question in session.plan.questions}


def test_a_results_file_is_read_with_its_finding(files, tmp_path):
    _, run = read_check(files / "results.json", "--resume")
    failed = [check for check in run.checks if check.status == "failed"]
    assert [check.id for check in failed] == ["forward.finite/broken/fp32/default/cpu"]
    assert failed[0].finding is not None
    assert failed[0].measurements["non-finite"] > 0
    write_report(tmp_path / "report", read_documents([files / "results.json"]), None, "--out")
    assert "forward.finite" in (tmp_path / "report" / "summary.md").read_text(encoding="utf-8")


def test_a_baseline_is_compared_with(files):
    answers = answers_of(
        subjects=("factory:small_model:whole",), names=("whole",), baseline=files / "baselines", checks=("baseline.*",)
    )
    assert answers["baseline.semantics"].status == "passed", answers
    assert answers["baseline.contract"].status == "passed"


def test_a_baseline_of_another_model_still_fails(files):
    source = (files / "small_model.py").read_text(encoding="utf-8")
    (files / "small_model.py").unlink()
    (files / "other_model.py").write_text(source.replace("manual_seed(0)", "manual_seed(1)"), encoding="utf-8")
    answers = answers_of(
        subjects=("factory:other_model:whole",),
        names=("whole",),
        baseline=files / "baselines",
        checks=("baseline.semantics",),
    )
    assert answers["baseline.semantics"].status == "failed"


def test_a_bundle_fails_again(files):
    found = reopen(Settings(diagnose=False), files / "bundle")
    assert [check.status for check in found.checks] == ["failed"]


def test_a_section_of_pyproject_is_read():
    stated, accepted = read_pyproject(WRITTEN / "pyproject.toml")
    assert stated["checks"] == ("load.*", "forward.finite", "baseline.*")
    assert stated["precision"] == ("fp32", "bf16")
    assert math.isclose(stated["lr"], 1e-4)
    assert [(entry.check, entry.until) for entry in accepted] == [("load.head-init", dt.date(2099, 3, 31))]


def test_a_file_of_a_later_schema_is_refused(files):
    later = json.loads((files / "results.json").read_text(encoding="utf-8")) | {"schema_version": 99}
    (files / "later.json").write_text(json.dumps(later), encoding="utf-8")
    with pytest.raises(BadInputError, match="99"):
        read_check(files / "later.json", "--resume")
