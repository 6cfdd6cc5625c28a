"""Long work says what it is at: loading, batches, remedies, what a job in an environment has come to; short work says nothing."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest

from numerics_suite.core import activity
from numerics_suite.core.activity import at, doing, listening, telling
from numerics_suite.diagnosing import remedy_trials
from numerics_suite.reporting.terminal import Terminal
from numerics_suite.settings.options import from_command_line
from numerics_suite.suite.run import run_check
from numerics_suite.versions.job import LOG
from numerics_suite.versions.matrix import _said_last


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hundredth of a second is long."""
    monkeypatch.setattr(activity, "FIRST", 0.01)


def test_short_work_says_nothing():
    said: list[str] = []
    with listening(said.append), doing("loading"):
        pass
    assert not said


@pytest.mark.usefixtures("impatient")
def test_the_innermost_work_is_told_of_and_how_far_it_is():
    said: list[str] = []
    with listening(said.append), doing("check"):
        with doing("loading glm in bf16"):
            time.sleep(0.05)
        at("check, batch 3")
        time.sleep(0.05)
    told = list(dict.fromkeys(line.partition(":")[0] for line in said))
    assert told == ["loading glm in bf16", "check, batch 3"]
    assert all(line.endswith(" s so far") for line in said)


def test_it_is_told_more_and_more_seldom():
    said: list[float] = []
    with telling(said.append, first=0.02):
        time.sleep(0.5)
    assert 3 <= len(said) <= 6
    assert said[-1] > 2 * said[-3]


def test_work_that_nobody_follows_starts_no_thread():
    with doing("loading"):
        assert not activity._at


@pytest.mark.usefixtures("impatient")
def test_a_run_tells_of_loading_and_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    given = {"subjects": ["fixture:glm-tiny-classifier"], "precision": "fp16", "attn": "eager", "checks": "forward.headroom",
             "workers": "0", "max_examples": "3"}  # fmt: skip
    run_check(from_command_line(given), Terminal(stream=stream))
    said = stream.getvalue()
    assert "reading fixture:glm-tiny-classifier: " in said
    assert "loading glm-tiny-classifier in float16: " in said
    assert "forward.headroom/glm-tiny-classifier/fp16/eager/cpu, batch " in said


def test_what_a_job_said_last_is_told_of(tmp_path):
    assert _said_last(tmp_path) == ""
    (tmp_path / LOG).write_text("numerics-suite 1\n12 of 63 checks, 0 not passed, 30 s\nwarning: x\n")
    assert _said_last(tmp_path) == ": 12 of 63 checks, 0 not passed, 30 s"


@pytest.mark.usefixtures("impatient")
def test_a_remedy_that_is_tried_is_told_of(monkeypatch):
    from unit.sample_run import finding

    said: list[str] = []
    evidence = SimpleNamespace(cell=SimpleNamespace(id="glm-tiny/bf16"))
    trial = remedy_trials._Trial(check="load.head-init", finding=finding("x", "x"), evidence=evidence, ask=None)
    monkeypatch.setattr(remedy_trials._Trial, "_first_that_works", lambda *_: time.sleep(0.05))
    with listening(said.append):
        trial.remedy("init-head")
    assert said[0].startswith("load.head-init on glm-tiny/bf16: trying init-head: ")
