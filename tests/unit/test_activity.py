"""Long work says what it is at: loading, batches, remedies, what a job in an environment has come to; short work says nothing."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest

from numerics_suite.core import activity
from numerics_suite.core.activity import at, doing, listening, telling
from numerics_suite.diagnosis import remedy_trials
from numerics_suite.reports.terminal import Terminal
from numerics_suite.settings.options import from_command_line
from numerics_suite.subjects import resolve
from numerics_suite.suite.run import run_check
from numerics_suite.suite.session import SuiteSession
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


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing was said"
        time.sleep(0.005)


@pytest.mark.usefixtures("impatient")
def test_the_innermost_work_is_told_of_and_how_far_it_is():
    said: list[str] = []

    def told() -> list[str]:
        return [line.removesuffix(" s so far").rpartition(":")[0] for line in said]

    with listening(said.append), doing("check"):
        with doing("loading glm in bf16"):
            until(lambda: "loading glm in bf16" in told())
        at("check, batch 3")
        until(lambda: "check, batch 3" in told())
    found = told()
    assert set(found[found.index("loading glm in bf16") : found.index("check, batch 3")]) == {"loading glm in bf16"}


def test_it_is_told_more_and_more_seldom():
    said: list[float] = []
    with telling(said.append, first=0.01):
        until(lambda: len(said) > 3)
    assert all(later > 1.9 * earlier for earlier, later in pairwise(said))


def test_work_that_nobody_follows_starts_no_thread(monkeypatch):
    monkeypatch.setattr(activity, "_listeners", [])  # the plugin of this very run may listen
    with doing("loading"):
        assert not activity._at


@pytest.mark.usefixtures("impatient")
def test_a_run_tells_of_loading_and_batches_on_standard_error_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    own = resolve.resolve
    monkeypatch.setattr(resolve, "resolve", lambda *args, **words: (time.sleep(0.05), own(*args, **words))[1])
    stream = io.StringIO()
    given = {"subjects": ["fixture:glm-tiny-classifier"], "precision": "fp16", "attn": "eager", "checks": "forward.headroom",
             "workers": "0", "max_examples": "3"}  # fmt: skip
    run_check(SuiteSession(from_command_line(given)), Terminal(stream=stream))
    assert "s so far" not in stream.getvalue()
    said = capfd.readouterr().err
    assert "1 of 1 checks, " in said
    assert "1 of 1 checks, " not in stream.getvalue()
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
    context = SimpleNamespace(cell=SimpleNamespace(id="glm-tiny/bf16"))
    trial = remedy_trials._Trial(check="load.head-init", finding=finding("x", "x"), context=context, ask=None)
    monkeypatch.setattr(remedy_trials._Trial, "_first_that_works", lambda *_: until(lambda: said))
    with listening(said.append):
        trial.remedy("init-head")
    assert said[0].startswith("load.head-init on glm-tiny/bf16: trying init-head: ")
