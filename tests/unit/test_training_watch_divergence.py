"""A loss that rises and stays finite: named where the loop's own steps raised it, and only there."""

# ruff: noqa: PT012 - a whole loop is what raises

from __future__ import annotations

import json
import warnings

import pytest
import torch
from unit.watched_models import Decoder, Loud, train

from numerics_suite import NumericsError, watch
from numerics_suite.cli import watch as command_line
from numerics_suite.training_watch.alarms import Reading
from numerics_suite.training_watch.judge import ROSE, Judge


def caught(model, optimizer, steps=12, clip=None):
    with warnings.catch_warnings(), pytest.raises(NumericsError) as error:
        warnings.simplefilter("ignore")
        with watch(model, optimizer):
            train(model, optimizer, steps, clip=clip)
    finding = error.value.finding
    return finding, {remedy.name: remedy for remedy in finding.remedies}


def test_a_rate_that_carries_the_loss_away_without_a_nan():
    model = Decoder()
    finding, remedies = caught(model, torch.optim.AdamW(model.parameters(), lr=1.0))
    assert (finding.cause, finding.step) == ("divergence", 5)
    assert remedies["lower-learning-rate"].verified is True
    assert float(remedies["lower-learning-rate"].effect.split()[1]) < 1
    grew = finding.evidence["update that grew first"]
    assert finding.module == grew.rpartition(".")[0]
    assert finding.evidence["in step"] == 1
    assert finding.evidence["loss on them with the older state"] < finding.evidence["loss on the kept batches now"] / 2


def test_a_rate_that_ends_in_an_overflow_is_divergence_without_being_asked_for_snapshots():
    model = Decoder()
    finding, remedies = caught(model, torch.optim.SGD(model.parameters(), lr=300.0))
    assert finding.cause == "divergence"
    assert not finding.evidence["caused by"].startswith("the batch:"), "it is finite with the older state"
    assert finding.evidence["in step"] == 1
    assert remedies["lower-learning-rate"].verified is True


SGD = """
import torch
from unit.watched_models import Decoder, train

model = Decoder()
train(model, torch.optim.SGD(model.parameters(), lr=30), 12, clip=None)
"""


def test_the_command_line_says_what_python_says(tmp_path, monkeypatch):
    """SGD at 30: warned of at the first step, before the loss has moved, and the rate that would have worked."""
    model = Decoder()
    finding, remedies = caught(model, torch.optim.SGD(model.parameters(), lr=30.0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SGD, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert command_line.run(["--json", "watched.json", "train.py"]) == 1
    told = json.loads((tmp_path / "watched.json").read_text(encoding="utf-8"))
    (same,) = told["findings"]
    assert (same["cause"], same["step"], same["module"]) == (finding.cause, finding.step, finding.module)
    assert same["cause"] == "divergence"
    assert same["evidence"]["caused by"].startswith("the state: another batch is not finite either")
    assert same["evidence"]["update that grew first"] == finding.evidence["update that grew first"]
    lower = remedies["lower-learning-rate"]
    assert lower.verified is True
    assert 1 < float(lower.effect.split()[1]) < 10
    assert [(each["verified"], each["effect"]) for each in same["remedies"] if each["name"] == lower.name] == [
        (True, lower.effect)
    ]
    assert [(each["step"], each["kind"]) for each in told["warnings"]] == [(1, "update-ratio")]


def test_batches_that_are_harder_are_no_divergence():
    """From the third step on every loss is four times what it was, whatever the parameters are."""
    model = Loud(None, factor=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, optimizer) as it:
        for step in range(1, 16):
            train(model, optimizer, 1, start=step)
            model.factor = 4.0 if step >= 2 else 1.0
    assert it.finding is None
    assert not it.warnings


def readings(losses):
    return [Reading(step=step, values={"loss": (loss,)}) for step, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([2.0, 2.5, 2.4, 2.6, 2.7, 2.3, 2.2, 2.0], []),  # high at first, and less than a factor of 2 of the likelihood
        ([5.5, 5.2, 5.4, 6.1, 5.6, 6.5, 5.6, 5.1], []),
        ([2.0, 9.0, 2.0, 9.0, 2.0, 9.0, 2.0, 9.0], []),  # spikes of single batches
        ([2.0, 7.0, 7.0, 7.0, 7.0], [5]),
        ([2.0] * 20 + [7.0] * 16, [36]),
    ],
)
def test_how_long_and_how_high(losses, steps):
    judge = Judge()
    alarms = [alarm for reading in readings(losses) for alarm in judge.judge(reading)]
    assert [alarm.step for alarm in alarms if alarm.kind == ROSE] == steps


def test_where_no_older_state_is_at_hand_it_is_a_warning(monkeypatch):
    monkeypatch.setattr("numerics_suite.training_watch.snapshots.Snapshots.is_small", False)
    model = Decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with watch(model, optimizer := torch.optim.AdamW(model.parameters(), lr=1.0)) as it:
            train(model, optimizer, 6, clip=None)
    assert it.finding is None
    assert ["no older state is at hand" in alarm.text for alarm in it.warnings] == [False, True]
