"""The script of a finding runs alone, with torch and transformers only, and fails with the finding's symptom."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mutants.driver import MutantSession, settings_of

from numerics_suite.diagnosing.reproducer import LONGEST, SYMPTOM, cut_down, fails, reproducer
from numerics_suite.suite import session as suite_session


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def found(check, *, fixture="glm4-tiny", precision="bf16", attn="sdpa", patch=None, **changes):
    session = MutantSession(settings_of(fixture, precision, attn, max_examples=2, **changes), patch)
    session.tries_remedies = True
    (question,) = [question for question in session.plan.questions if question.check == check]
    result, trace = session.answer(question)
    assert result.finding is not None, f"{result.status} {result.reason} {trace}"
    return result.finding


def run_alone(path):
    """In a process that cannot import this package."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-I", str(path)], env=kept, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("fixture", ["glm4-tiny", "glm-tiny", "chatglm-tiny"])
def test_training_in_pure_float16(fixture):
    finding = found("train.finite", fixture=fixture, precision="pure-fp16")
    assert finding.reproducer == f".numerics/reproducers/train.finite-{fixture}-pure-fp16.py"
    text = Path(finding.reproducer).read_text(encoding="utf-8")
    assert len(text.splitlines()) < LONGEST
    roots = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert roots <= {"torch", "transformers", "tempfile"}
    # A tiny model from the config where the class is transformers' own; the checkpoint where its code comes with it.
    assert ("CONFIG = {" in text) == (fixture != "chatglm-tiny")
    ran = run_alone(finding.reproducer)
    assert ran.returncode == 1
    assert f"AssertionError: {SYMPTOM}: " in ran.stderr
    assert "after step 1" in ran.stderr


def test_a_script_for_a_head_that_nobody_initialised_passes_where_the_release_initialises_it():
    """The defect is in a patched loader here, so a script of torch and transformers cannot show it: none is kept."""

    def patch(model):
        with torch.no_grad():
            model.score.weight.fill_(float("nan"))

    finding = found("load.head-init", patch=patch, task="sequence-classification")
    assert finding.reproducer is None


def test_floating_ids_that_a_model_uses(monkeypatch):
    """A release whose embedding casts its ids would be shown by the script; here the embedding of torch is made to."""
    from torch.nn import functional

    own = functional.embedding
    monkeypatch.setattr(functional, "embedding", lambda ids, *args, **kwargs: own(ids.long(), *args, **kwargs))
    finding = found("inputs.ids-dtype")
    assert finding.cause == "wrong-input-dtype"
    assert finding.reproducer is not None
    text = Path(finding.reproducer).read_text(encoding="utf-8")
    assert fails(text)
    monkeypatch.undo()
    assert not fails(text)


def test_only_a_symptom_of_its_own_counts_and_switches_are_restored():
    assert fails(f"assert False, '{SYMPTOM}: so it is'")
    assert not fails("assert False, 'something else'")
    assert not fails("raise RuntimeError('broken')")
    assert not fails("print('fine')")
    state = torch.get_rng_state()
    fails("import torch\ntorch.manual_seed(7)\ntorch.use_deterministic_algorithms(True)\ntorch.rand(3)")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_config_is_cut_down_where_it_is_larger_and_ids_stay_within():
    small = cut_down(
        {"vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 40, "pad_token_id": 151329, "x": 1}
    )
    assert small == {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "pad_token_id": 511, "x": 1}
    assert cut_down({"padded_vocab_size": 10}) is None


def test_a_check_without_a_script_of_its_own_has_none():
    subject = SimpleNamespace(path=Path(), adapter_base=None, quantized=False)
    evidence = SimpleNamespace(subject=subject, takes_ids=True)
    finding = SimpleNamespace(evidence={"measurement": "true"})
    assert reproducer("forward.padding", finding, evidence, None) is None


def test_a_folder_that_cannot_be_written_hides_no_finding(monkeypatch, tmp_path):
    (tmp_path / ".numerics").write_text("a file", encoding="utf-8")
    monkeypatch.setattr(suite_session, "REPRODUCERS", suite_session.REPRODUCERS)
    assert found("train.finite", precision="pure-fp16").reproducer is None
