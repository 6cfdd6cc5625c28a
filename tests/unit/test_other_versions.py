"""newer-version and pin-version are tried in other releases: the newest, then the nearest, and below where none helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from packaging.version import Version
from unit.sample_run import finding, result, sample_run

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Remedy
from numerics_suite.settings.tree import Settings
from numerics_suite.versions import release_remedies

RELEASES = ("5.6.0", "5.7.0", "5.8.0", "5.8.1", "5.9.0", "5.10.0", "5.24.0")


@pytest.fixture
def world(monkeypatch):
    """Verdicts by release; asking one is noted."""
    asked: list[str] = []
    verdicts: dict[str, str | None] = {}

    def statuses(self, version, ids):
        asked.append(version)
        verdict = verdicts.get(version, "failed")
        return {} if verdict is None else dict.fromkeys(ids, verdict)

    monkeypatch.setattr(release_remedies, "released", lambda _: [Version(release) for release in RELEASES])
    monkeypatch.setattr(release_remedies._ReleaseTrial, "statuses", statuses)
    return verdicts, asked


def run_with(*names: str):
    remedies = tuple(Remedy(name=name, description=name) for name in names)
    bad = result(
        "load.head-init", "bf16", status="failed", finding=finding("uninitialised-parameters", "t", remedies=remedies)
    )
    good = result("load.finite", "bf16")
    environment = {"packages": {"transformers": "5.8.0"}}
    return replace(sample_run(), checks=(bad, good), environment=environment)


def tried(run):
    found = release_remedies.try_versions(run, Settings(), kept=None, execute=None, tell=lambda _: None)
    return {remedy.name: remedy for remedy in found.checks[0].finding.remedies}


def test_the_newest_release_is_tried_first_and_is_enough(world):
    verdicts, asked = world
    verdicts["5.24.0"] = "passed"
    remedies = tried(run_with("init-head", "newer-version"))
    assert asked == ["5.24.0"]
    assert remedies["newer-version"].verified is True
    assert remedies["newer-version"].effect == "passes under transformers 5.24.0"
    assert remedies["init-head"].verified is None


def test_then_the_nearest_newer_ones_and_then_those_below(world):
    verdicts, asked = world
    verdicts["5.7.0"] = "passed"
    remedies = tried(run_with("newer-version", "pin-version"))
    assert asked == ["5.24.0", "5.8.1", "5.9.0", "5.7.0"]
    assert remedies["newer-version"].verified is False
    assert remedies["newer-version"].effect == "still fails under transformers 5.24.0, 5.8.1, 5.9.0"
    assert remedies["pin-version"].verified is True
    assert list(remedies) == ["pin-version", "newer-version"]


def test_nothing_below_is_tried_where_a_newer_one_cures(world):
    verdicts, asked = world
    verdicts["5.8.1"] = "passed"
    remedies = tried(run_with("newer-version", "pin-version"))
    assert asked == ["5.24.0", "5.8.1"]
    assert remedies["pin-version"].verified is None


def test_a_release_that_cannot_run_says_nothing(world):
    verdicts, _ = world
    verdicts.update(dict.fromkeys(RELEASES))
    assert {remedy.verified for remedy in tried(run_with("newer-version", "pin-version")).values()} == {None}


def test_a_skipped_check_is_not_cured(world):
    verdicts, _ = world
    verdicts.update(dict.fromkeys(RELEASES, "skipped"))
    assert tried(run_with("newer-version"))["newer-version"].verified is False


def test_without_such_a_remedy_no_index_is_asked(monkeypatch):
    def refuse(_):
        message = "no network"
        raise BadInputError(message)

    monkeypatch.setattr(release_remedies, "released", refuse)
    assert tried(run_with("init-head"))["init-head"].verified is None
