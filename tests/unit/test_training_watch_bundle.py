"""What the watch leaves on disk: whole or not at all, no pickle, and enough to fail again elsewhere."""

# ruff: noqa: PT012 - a whole loop is what raises or warns

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from preloaded import python
from safetensors.torch import load_file
from unit.watched_models import Decoder, ids, train

from numerics_suite import NumericsError, NumericsWarning, watch
from numerics_suite.cli.main import main
from numerics_suite.core.errors import BadInputError
from numerics_suite.reports.view.finding_text import rerun_words
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.suite.bundle_replay import reopen
from numerics_suite.training_watch import bundle as bundles
from numerics_suite.training_watch.bundle_reader import read_bundle, scene_of
from numerics_suite.training_watch.diagnosis import run_again


def replay(bundle, model):
    return run_again(scene_of(bundle, model, ()), {}, backward=True)


def pair():
    model = Decoder()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def caught(folder, *, k=3, **kwargs):
    model, optimizer = pair()

    def break_it(step):
        model.layers[1].broken = step == k

    with pytest.raises(NumericsError) as error, watch(model, optimizer, bundle=folder, **kwargs):
        train(model, optimizer, k + 2, before=break_it)
    return model, error.value


def test_a_bundle_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("numerics_suite.training_watch.snapshots.Snapshots.is_small", False)
    model, error = caught(tmp_path / "b", ring=2)
    assert error.bundle == str(tmp_path / "b")
    assert str(error).endswith(f"(bundle: {tmp_path / 'b'})")
    read = read_bundle(tmp_path / "b")
    assert repr(read.finding) == repr(error.finding), "by text: NaN is not equal to itself"
    assert [call.step for call in read.calls] == [1, 2, 3], "the first steps are all kept"
    assert torch.equal(read.calls[-1].kwargs["input_ids"], ids(3))
    assert read.content["digests"]["parameters"].startswith("sha256:")
    assert read.content["environment"]["packages"]["torch"]
    assert (tmp_path / "b" / "reproduce.py").read_text(encoding="utf-8").startswith('"""Runs the caught step again')
    stored = load_file(tmp_path / "b" / "parameters.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())
    assert sorted(path.suffix for path in (tmp_path / "b").iterdir()) == [
        ".json",
        ".py",
        ".py",
        ".safetensors",
        ".safetensors",
        ".safetensors",
    ]


def test_its_calls_fail_again_on_the_same_model_and_not_on_a_cured_one(tmp_path):
    model, error = caught(tmp_path / "b")
    read = read_bundle(tmp_path / "b")
    model.layers[1].broken = True
    origin = replay(read, model)
    assert (origin.module, origin.op, origin.backward) == ("layers.1", error.finding.op, True)
    model.layers[1].broken = False
    assert replay(read, model) is None


def test_a_dropout_that_fails_is_drawn_again(tmp_path):
    class Sometimes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, value):
            return (value * self.weight / (torch.rand(()) > 0.25)).sum()

    model = Sometimes()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    torch.manual_seed(0)
    with pytest.raises(NumericsError) as error, watch(model, optimizer, bundle=tmp_path / "b") as w:
        for _ in range(100):
            model(torch.ones(3)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert w.step > 1, "the first draws were good"
    assert (error.value.finding.cause, error.value.finding.op) == ("invalid-operation", "aten.div.Tensor")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert replay(read_bundle(tmp_path / "b"), model) is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bundle_never_overwrites(tmp_path):
    (tmp_path / "b").mkdir()
    caught(tmp_path / "b")
    _, second = caught(tmp_path / "b")
    assert second.bundle == str(tmp_path / "b-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b-2"]


def test_what_cannot_be_written_leaves_nothing_and_hides_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "save_file", full)
    with pytest.warns(NumericsWarning, match="No space left"):
        _, error = caught(tmp_path / "b")
    assert error.bundle is None
    assert error.finding.module == "layers.1"
    assert not list(tmp_path.iterdir())


def test_inputs_that_a_loop_refills_are_kept_as_they_were(tmp_path):
    model, optimizer = pair()
    buffer = torch.zeros(4, 8, dtype=torch.long)
    with pytest.raises(NumericsError), watch(model, optimizer, bundle=tmp_path / "b"):
        for step in range(1, 4):
            buffer.copy_(ids(step))
            model.layers[0].broken = step == 3
            model(input_ids=buffer, labels=buffer)["loss"].backward()
            buffer.zero_()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(read_bundle(tmp_path / "b").calls[-1].kwargs["input_ids"], ids(3))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda b: (b / "bundle.json").write_text("{", encoding="utf-8"), "is torn: it is not whole JSON"),
        (lambda b: (b / "bundle.json").write_text("{}", encoding="utf-8"), "is no bundle of the watch"),
        (lambda b: (b / "bundle.json").write_text("[]", encoding="utf-8"), "is no bundle of the watch"),
        (lambda b: (b / "bundle.json").unlink(), "is no bundle of the watch: bundle.json: No such file"),
        (lambda b: (b / "batches.safetensors").unlink(), "is torn: batches.safetensors is missing"),
        (lambda b: (b / "batches.safetensors").write_bytes(b"xx"), "was changed or is torn"),
        (lambda b: (b / "reproduce.py").write_text("print()", encoding="utf-8"), "was changed or is torn"),
        (lambda b: rewrite(b, schema_version=9), "has schema_version 9; this release reads 1"),
        (lambda b: rewrite(b, finding={"cause": "overflow"}), "finding.title is missing"),
        (lambda b: rewrite(b, calls=[{"step": 1}]), "calls[0].args is missing"),
    ],
)
def test_a_torn_or_foreign_bundle_is_refused_in_one_line(tmp_path, damage, text):
    caught(tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(BadInputError) as error:
        read_bundle(tmp_path / "b")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def rewrite(folder, **changes):
    content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")


def test_the_script_runs_alone_and_fails_with_the_same_symptom(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(float("inf"))
    batch = ids(0) % model.config.vocab_size
    with pytest.raises(NumericsError) as error, watch(model, optimizer, bundle=tmp_path / "b"):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert error.value.finding.cause == "corrupt-weights"
    done = subprocess.run(
        [python(), str(tmp_path / "b" / "reproduce.py")],
        text=True, capture_output=True, check=False, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "not finite: loss of forward pass 1, logits of forward pass 1" in done.stdout
    healthy = subprocess.run(
        [python(), str(tmp_path / "b" / "reproduce.py"), str(fixture_path("glm-tiny"))],
        text=True, capture_output=True, check=False, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert (healthy.returncode, healthy.stdout.splitlines()[-1]) == (0, "every value is finite")


def script_of(folder, *words):
    return subprocess.run(
        [python(), str(folder / "reproduce.py"), *words],
        text=True, capture_output=True, check=False, timeout=120, cwd=folder.parent,
    )  # fmt: skip


@pytest.mark.slow
def test_the_script_of_an_adapter_puts_it_on_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny"))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "sound")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(float("inf"))
    batch = ids(0) % base.config.vocab_size
    with pytest.raises(NumericsError), watch(model, optimizer, bundle=tmp_path / "b"):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    done = script_of(tmp_path / "b")
    assert done.returncode == 1, done.stderr
    assert "not finite: " in done.stdout
    healthy = script_of(tmp_path / "b", str(tmp_path / "sound"))
    assert (healthy.returncode, healthy.stdout.splitlines()[-1]) == (0, "every value is finite"), healthy.stderr


@pytest.mark.slow
def test_a_script_that_cannot_run_does_not_say_that_it_reproduced(tmp_path):
    caught(tmp_path / "b")
    assert script_of(tmp_path / "b").returncode == 4, "the user's own class"
    content = json.loads((tmp_path / "b" / "bundle.json").read_text(encoding="utf-8"))
    rewrite(tmp_path / "b", model={**content["model"], "class": "GlmForCausalLM", "config": {"hidden_size": "wide"}})
    done = script_of(tmp_path / "b")
    assert done.returncode == 3
    assert "Traceback" in done.stderr


def test_the_command_to_see_a_bundle_again_works(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(float("inf"))
    batch = ids(0) % model.config.vocab_size
    with pytest.raises(NumericsError), watch(model, optimizer, bundle=tmp_path / "b"):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    for subjects in ((), ("fixture:glm-tiny",)):
        run = reopen(Settings(subjects=subjects, device="cpu", diagnose=False), tmp_path / "b")
        words = rerun_words(run.checks[0], run)
        assert words[:2] == ["numerics-suite", "check"]
        assert "--bundle" in words
        if not subjects:
            assert run.checks[0].status == "failed"
            assert main([*words[1:], "--no-diagnose", "--quiet"]) == 1
