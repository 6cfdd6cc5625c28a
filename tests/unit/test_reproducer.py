"""The script of a finding runs alone, with torch and transformers only, and fails with the finding's symptom."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mutants.driver import MutantSession, settings_of
from unit.script_of import shown
from unit.script_process import surroundings

from numerics_suite.core.records import Batch
from numerics_suite.diagnosis import reproducer as module
from numerics_suite.diagnosis.reproducer import SYMPTOM, cut_down, fails, reproducer
from numerics_suite.diagnosis.scripts import BODIES
from numerics_suite.diagnosis.scripts.parts import LONGEST
from numerics_suite.suite import run_findings


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def found(check, *, fixture="glm4-tiny", precision="bf16", attn="sdpa", patch=None, **changes):
    session = MutantSession(settings_of(fixture, precision, attn, max_examples=2, **changes), patch)
    session.findings.tries_remedies = True
    (question,) = [question for question in session.plan.questions if question.check == check]
    result, trace = session.answer(question)
    assert result.finding is not None, f"{result.status} {result.reason} {trace}"
    return result.finding


def run_alone(path, folder):
    """In a process of its own, as a user would."""
    return subprocess.run(
        [sys.executable, "-I", str(path)],
        env=surroundings(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("fixture", ["glm-tiny", pytest.param("chatglm-tiny", marks=pytest.mark.slow)])
def test_training_in_pure_float16(fixture, tmp_path):
    finding = found("train.finite", fixture=fixture, precision="pure-fp16")
    assert finding.reproducer == f".numerics/reproducers/train.finite-{fixture}-pure-fp16.py"
    text = Path(finding.reproducer).read_text(encoding="utf-8")
    assert len(text.splitlines()) < LONGEST
    # A tiny model from the config where the class is transformers' own; the checkpoint where its code comes with it.
    assert ("CONFIG = {" in text) == (fixture != "chatglm-tiny")
    ran = run_alone(finding.reproducer, tmp_path)
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


# --- running a script here ----------------------------------------------------------------------------------------


def test_only_a_symptom_of_its_own_counts():
    assert fails(f"assert False, '{SYMPTOM}: so it is'")
    assert not fails("assert False, 'something else'")
    assert not fails("raise RuntimeError('broken')")
    assert not fails("print('fine')")


def test_what_a_script_changes_is_restored():
    state, path = torch.get_rng_state(), sys.path[:]
    fails(
        "import sys, torch\ntorch.manual_seed(7)\ntorch.use_deterministic_algorithms(True)\ntorch.rand(3)\n"
        "torch.set_default_dtype(torch.float64)\nsys.path.append('elsewhere')\n"
        "torch.backends.cuda.matmul.allow_tf32 = not torch.backends.cuda.matmul.allow_tf32"
    )
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert sys.path == path


def test_a_script_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert fails(
        "import pathlib, tempfile\nFOLDER = tempfile.TemporaryDirectory()\n"
        f"assert not pathlib.Path(FOLDER.name).is_dir(), '{SYMPTOM}: it is there'"
    )
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith("tmp")]


# --- when there is none -------------------------------------------------------------------------------------------


def test_a_clean_run_writes_and_runs_no_script(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(run_findings, "reproducer", never)
    session = MutantSession(settings_of("glm-tiny", "fp32", "eager", ("load.*",)))
    session.findings.tries_remedies = True
    statuses = {session.answer(question)[0].status for question in session.plan.questions if question.skip is None}
    assert statuses == {"passed"}


def test_code_of_a_checkpoint_that_is_not_trusted_is_not_run(monkeypatch):
    seen = shown("fixture:chatglm-tiny", "train.finite", precision="pure-fp16", seq_len=8, batch_size=2)
    assert seen.script is not None
    assert "trust_remote_code=True" in seen.script
    monkeypatch.setattr(module, "fails", lambda _: pytest.fail("it was run"))
    seen.context.subject = replace(seen.context.subject, trust_remote_code=False)
    assert reproducer("train.finite", seen.finding, seen.context, seen.batch) is None


def test_trust_is_not_asked_for_where_no_code_comes_with_the_checkpoint():
    seen = shown("fixture:glm-tiny", "train.finite", precision="pure-fp16", seq_len=8, batch_size=2)
    assert seen.script is not None
    assert "trust" not in seen.script


def test_a_model_that_has_no_room_twice_is_not_loaded_again(monkeypatch):
    seen = shown("factory:mutants.article_models:detached_branch", "train.grad-flow", seq_len=8, batch_size=2)
    assert seen.script is not None
    monkeypatch.setattr(module, "free_bytes", lambda _: 1)
    assert reproducer("train.grad-flow", seen.finding, seen.context, seen.batch) is None


def test_no_larger_batch_is_tried_after_a_while(monkeypatch):
    tried = []
    monkeypatch.setattr(module, "fails", lambda text: bool(tried.append(text)))
    seen = shown("fixture:glm-tiny", "train.finite", precision="pure-fp16")
    assert seen.script is None
    assert len(tried) > 2
    tried.clear()
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert reproducer("train.finite", seen.finding, seen.context, seen.batch) is None
    assert not tried


def test_a_check_without_a_script_of_its_own_has_none():
    finding = SimpleNamespace(evidence={"measurement": "answers", "also weights": 3.0, "also weights allowed": 0})
    assert reproducer("baseline.semantics", finding, SimpleNamespace(), None) is None


def test_a_script_that_cannot_be_written_hides_no_finding(monkeypatch):
    def broken(_):
        raise KeyError

    body = replace(BODIES["train.finite", "non-finite"], facts=broken)
    monkeypatch.setattr(module, "BODIES", {("train.finite", "non-finite"): body})
    seen = shown("fixture:glm-tiny", "train.finite", precision="pure-fp16", seq_len=8, batch_size=2)
    assert seen.script is None


def test_where_nothing_short_shows_the_worst_measurement_another_one_is_shown(monkeypatch):
    monkeypatch.setattr(module, "BODIES", {key: body for key, body in BODIES.items() if key[1] != "excess"})
    seen = shown(
        "factory:unit.script_models:product_kernel_coarse",
        "reference.gradient",
        precision="bf16",
        seq_len=12,
        batch_size=2,
    )
    assert seen.finding.evidence["measurement"] == "excess"
    assert "also median-excess" in seen.finding.evidence
    assert seen.script is not None
    assert "statistics.median" in seen.script
    assert "<= 2" in seen.script  # its own limit, not that of the worst


def test_a_comparison_that_came_out_as_nan_is_shown_by_what_is_nan(monkeypatch):
    """The finding of a norm's error names the attention where the NaN begins, which no norm's budget judges."""
    seen = shown(
        "factory:mutants.factories:attention_softmax_in_fp16",
        "reference.local",
        precision="amp-bf16",
        seq_len=12,
        batch_size=2,
    )
    assert math.isnan(float(seen.finding.evidence["measured"]))
    assert seen.script is not None
    assert "are NaN or infinite" in seen.script
    assert fails(seen.script)
    assert not fails(seen.script.replace(".attention_softmax_in_fp16()", ".clean_glm_tiny()"))


def test_a_folder_that_cannot_be_written_hides_no_finding(tmp_path):
    (tmp_path / ".numerics").write_text("a file", encoding="utf-8")
    assert found("train.finite", precision="pure-fp16").reproducer is None


# --- what it is made of -------------------------------------------------------------------------------------------


def test_a_config_is_cut_down_where_it_is_larger_and_ids_stay_within():
    small = cut_down(
        {"vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 40, "pad_token_id": 151329, "x": 1}
    )
    assert small == {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "pad_token_id": 511, "x": 1}
    assert cut_down({"padded_vocab_size": 10}) is None


def context_of(pad=9, task="causal-lm"):
    return SimpleNamespace(subject=SimpleNamespace(task=task), space=SimpleNamespace(pad_id=pad))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_keeps_padding_where_it_was_and_labels_that_count(side):
    ids = torch.arange(1, 25).reshape(2, 12) % 8
    mask = torch.ones_like(ids)
    place = slice(0, 4) if side == "left" else slice(8, 12)
    mask[1, place] = 0
    ids[1, place] = 9
    labels = torch.full_like(ids, -100)
    cut = module._cut({"input_ids": ids, "attention_mask": mask, "labels": labels}, (6, 3), context_of())
    assert cut is not None
    assert cut["input_ids"].shape == (2, 6)
    real = [1] * 3 + [0] * 3
    assert cut["attention_mask"].tolist() == [[1] * 6, real[::-1] if side == "left" else real]
    assert (cut["input_ids"][cut["attention_mask"] == 0] == 9).all()
    kept = mask[1].nonzero().flatten()[:3]
    assert cut["input_ids"][1][cut["attention_mask"][1].bool()].tolist() == ids[1, kept].tolist()
    counted = cut["labels"] != -100
    assert (cut["labels"][counted] == cut["input_ids"][counted]).all()
    assert counted.sum().item() == 5 + 2  # the first real token of a row has nothing before it
    assert not (counted & (cut["attention_mask"] == 0)).any()


def test_there_is_no_cut_of_what_is_as_small():
    ids = torch.ones(1, 8, dtype=torch.int64)
    assert module._cut({"input_ids": ids, "attention_mask": ids}, (8,), context_of()) is None
    assert module._cut({"input_ids": ids, "attention_mask": ids}, (8, 5), context_of()) is None
    assert module._cut({"input_ids": ids}, (4,), context_of()) is None


def test_a_cut_without_a_label_that_counts_is_not_tried():
    """The mean over no label is NaN by definition, on a sound model too."""
    ids = torch.ones(2, 12, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    labels[1, -1] = 1
    batch = Batch(tensors={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    context = context_of(task="token-classification")
    cuts = list(module._batches("train.finite", context, batch, BODIES["train.finite", "non-finite"]))
    assert [tuple(cut["labels"].shape) for cut in cuts] == [(2, 12)]


def test_the_page_tells_of_every_check_that_has_a_script():
    page = Path(__file__).resolve().parents[2] / "docs" / "reproducers.md"
    if not page.is_file():
        pytest.skip("docs is not in this checkout")
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    told = {word for line in table for word in re.findall(r"`([a-z]+\.[a-z-]+)`", line.split("|")[1])}
    assert told == {check for check, _ in BODIES}
