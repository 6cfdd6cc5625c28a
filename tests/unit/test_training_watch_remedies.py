"""What the watch caught is run again with each remedy: cures are verified, what only hides is not, and nothing without a replay."""

# ruff: noqa: PT012 - a whole loop is what raises or warns

from __future__ import annotations

import json
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch
from preloaded import python
from torch import nn
from unit.watched_models import Decoder, Loud, ids, train

from numerics_suite import NumericsError, watch
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.diagnosis.remedy_register import untried
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.suite.bundle_replay import reopen
from numerics_suite.training_watch import ring
from numerics_suite.training_watch.bundle_reader import read_bundle
from numerics_suite.training_watch.caught_step import CaughtStep, Start, copied, recipe_of
from numerics_suite.training_watch.diagnosis import CaughtContext
from numerics_suite.training_watch.optimizer_states import Loop, loop_from_json, state_of
from numerics_suite.training_watch.remedies import with_remedies_tried
from numerics_suite.training_watch.ring import Ring
from numerics_suite.training_watch.snapshots import Snapshots


def caught(model, optimizer, *, steps=12, clip=None, before=None, **kwargs):
    """The finding of a plain loop, and its remedies by name."""
    with warnings.catch_warnings(), pytest.raises(NumericsError) as error:
        warnings.simplefilter("ignore")
        with watch(model, optimizer, **kwargs):
            train(model, optimizer, steps, clip=clip, before=before)
    finding = error.value.finding
    return finding, {remedy.name: remedy for remedy in finding.remedies}


def scaled_steps(model, optimizer, steps, **scaling):
    """A loop with autocast to float16 and a GradScaler."""
    scaler = torch.amp.GradScaler("cpu", **scaling)
    for step in range(1, steps):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=ids(step), labels=ids(step))["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def scaled_loop(model, optimizer, **scaling):
    """As :func:`caught`, of such a loop."""
    with warnings.catch_warnings(), pytest.raises(NumericsError) as error:
        warnings.simplefilter("ignore")
        with watch(model, optimizer):
            scaled_steps(model, optimizer, 60, **scaling)
    finding = error.value.finding
    return finding, {remedy.name: remedy for remedy in finding.remedies}


def half():
    model = Decoder(dtype=torch.float16)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def diverging(lr=300.0):
    model = Decoder()
    return model, torch.optim.SGD(model.parameters(), lr=lr)


# --- from a snapshot ---------------------------------------------------------------------------------------------------


def test_an_eps_of_0_is_cured_by_a_larger_one_from_the_snapshot():
    finding, remedies = caught(*half(), snapshot_every=1)
    assert (finding.cause, finding.op) == ("optimizer-underflow", "aten.addcdiv_")
    assert finding.evidence["pass"] == "optimizer"
    assert remedies["larger-optimizer-eps"].verified is True
    assert remedies["larger-optimizer-eps"].effect.startswith("eps 0.0001: finite; loss 7.")
    assert remedies["larger-optimizer-eps"].effect.endswith("in 6 steps, with the snapshot from before step 1")
    assert remedies["use-amp-bf16"].verified is True


def test_a_learning_rate_is_cured_by_a_lower_one_and_clipping_is_said_to_hide():
    finding, remedies = caught(*diverging(), snapshot_every=4)
    assert (finding.step, finding.cause) == (3, "divergence")
    assert finding.evidence["replay"] == "with the snapshot from before step 1, trained on to step 3"
    lower = remedies["lower-learning-rate"]
    assert lower.verified is True
    assert float(lower.effect.split()[1]) < 30
    assert "(was 3e+02) is the largest that works: finite; loss 7." in lower.effect
    assert remedies["clip-grad-norm"].verified is False
    assert remedies["clip-grad-norm"].effect.startswith("train.descends fails: the loss rises")
    assert finding.remedies[0] == lower


def test_one_batch_whose_gradient_blows_up_is_cured_by_clipping():
    model = Loud(ids(4))
    finding, remedies = caught(model, torch.optim.SGD(model.parameters(), lr=0.1), snapshot_every=3)
    assert (finding.cause, finding.step) == ("divergence", 5)
    assert remedies["clip-grad-norm"].verified is True


def test_a_loop_that_clips_already_is_not_told_to():
    model = Decoder()
    finding, remedies = caught(
        model, torch.optim.SGD(model.parameters(), lr=3e21), clip=0.5, snapshot_every=1, steps=20
    )
    assert finding.cause == "divergence"
    assert remedies["clip-grad-norm"].verified is None
    assert remedies["clip-grad-norm"].effect == "does not apply: the loop clips the gradient norm to 0.5 already"


def test_what_ruined_the_model_before_the_snapshot_is_not_cured_from_there():
    """The loss falls at a rate a hundred times lower, from 5e16 to 3e11."""
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 10.0**step)
    _, remedies = caught(
        model, optimizer, steps=30, before=lambda step: step > 1 and schedule.step(), snapshot_every=4, ring=8
    )
    assert remedies["lower-learning-rate"].verified is False


def test_spoiled_parameters_do_not_replace_a_good_snapshot():
    """The parameters are looked at each 20th step only: what a step spoils is seen in the next one's logits."""

    class Spoiling(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if self.param_groups[0]["params"][0].abs().max() > 0 and next(self.count) == 3:
                self.param_groups[0]["params"][0].data[0, 0] = float("nan")

    model = Decoder()
    optimizer = Spoiling(model.parameters(), lr=0.1)
    optimizer.count = iter(range(1, 99))
    with pytest.raises(NumericsError), watch(model, optimizer, snapshot_every=1) as w:
        for step in range(1, 9):
            batch = ids(step).clamp(max=3)
            model(input_ids=batch * 0, labels=batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert w.step == 4
    assert w._kept.step == 3
    assert all(torch.isfinite(value).all() for value in w._kept.parameters.values())


def test_a_ring_that_lacks_steps_is_said(monkeypatch):
    monkeypatch.setattr(ring, "EARLY", 0)
    _, remedies = caught(*diverging(60.0), steps=60, snapshot_every=100, ring=2)
    assert "with the snapshot from before step 1 and the steps from 3 on" in remedies["clip-grad-norm"].effect


@pytest.mark.parametrize(("adapter", "precision"), [(torch.float32, "fp32"), (torch.float16, "pure-fp16")])
def test_what_is_trained_names_the_recipe(adapter, precision):
    model = Decoder(dtype=torch.float16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad=name.startswith("lm_head"))
    model.lm_head.to(adapter)
    assert recipe_of(model, Start(words="", calls=())).name == precision


def test_the_rates_of_each_step_are_those_of_the_schedule():
    """At the last rate alone the first step would already go bad."""
    model, optimizer = diverging(1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e6 if step > 3 else 1.0)
    finding, remedies = caught(
        model, optimizer, before=lambda step: step > 1 and schedule.step(), snapshot_every=10, ring=10
    )
    assert finding.cause == "divergence"
    assert finding.evidence["replay"] == f"with the snapshot from before step 1, trained on to step {finding.step}"
    assert finding.step > 4
    assert remedies["lower-learning-rate"].verified is True


def test_what_a_loop_multiplies_its_losses_by_is_read_off_its_gradient_norm(tmp_path):
    """It sums what it accumulates, where a mean is what is assumed."""
    model, optimizer = diverging(150.0)
    with warnings.catch_warnings(), pytest.raises(NumericsError):
        warnings.simplefilter("ignore")
        with watch(model, optimizer, snapshot_every=9, ring=9, bundle=tmp_path / "b"):
            for step in range(1, 9):
                for part in range(2):
                    batch = ids(10 * step + part)
                    model(input_ids=batch, labels=batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
    start = read_bundle(tmp_path / "b").start()
    assert CaughtStep(model, start).factor == pytest.approx(2, rel=1e-4)


# --- without one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_first_snapshot(monkeypatch):
    """As of a model that is too large to be copied unasked."""
    monkeypatch.setattr(Snapshots, "is_small", False)


def test_without_a_snapshot_what_a_step_spoiled_is_not_tried(no_first_snapshot):
    _, remedies = caught(*half())
    assert {remedy.verified for remedy in remedies.values()} == {None}
    assert "no snapshot was kept (snapshot_every)" in remedies["larger-optimizer-eps"].effect


def test_without_a_snapshot_the_steps_own_passes_are_tried_and_what_acts_before_is_not(no_first_snapshot):
    model = Decoder(dtype=torch.float16)
    with torch.no_grad():
        for name, value in (("up.weight", 100.0), ("norm.weight", 6000.0), ("norm.bias", 30000.0)):
            model.layers[1].get_parameter(name).fill_(value)
        model.layers[1].down.weight.mul_(1e-6)
    finding, remedies = caught(model, torch.optim.SGD(model.parameters(), lr=1e-20))
    assert finding.cause == "overflow"
    assert remedies["use-amp-bf16"].verified is True
    assert remedies["clip-grad-norm"].verified is False, "there is no step before the first"
    _, remedies = caught(*diverging(60.0))
    assert remedies["clip-grad-norm"].verified is None
    assert "it acts on the steps before step 4, and no snapshot" in remedies["clip-grad-norm"].effect


def test_a_head_that_nobody_wrote_is_initialised_and_trains():
    model, optimizer = Decoder(), None
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _, remedies = caught(model, optimizer)
    assert remedies["init-head"].verified is True
    assert "in 6 steps, with the snapshot from before step 1" in remedies["init-head"].effect
    assert torch.isnan(model.lm_head.weight).all(), "a copy was initialised"


def test_a_loss_that_the_loop_computes_leaves_the_forward_pass():
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Decoder()

        def forward(self, input_ids):
            return self.inner(input_ids)["logits"]

    model = Headless()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e3)
    with warnings.catch_warnings(), pytest.raises(NumericsError) as error:
        warnings.simplefilter("ignore")
        with watch(model, optimizer, snapshot_every=2):
            for step in range(1, 30):
                nn.functional.cross_entropy(model(ids(step)).flatten(0, 1), ids(step).flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
    remedies = {remedy.name: remedy for remedy in error.value.finding.remedies}
    assert remedies["clip-grad-norm"].verified is None


def test_what_goes_wrong_only_once_verifies_nothing():
    model = Decoder()
    calls = iter(range(1, 99))
    model.lm_head.register_forward_hook(lambda _m, _a, out: out * float("inf") if next(calls) == 3 else out)
    finding, _ = caught(model, torch.optim.SGD(model.parameters(), lr=0.1), snapshot_every=2)
    assert finding.cause == "unknown"
    asked = replace(finding, remedies=untried(("lower-learning-rate", "use-amp-bf16", "keep-in-fp32")))
    kept = Ring(1)
    kept.add(3, (), {"input_ids": ids(3), "labels": ids(3)}, torch.device("cpu"))
    start = Start(words="the parameters of step 3", calls=kept.calls)
    scene = CaughtContext(model=model, optimizer=None, calls=list(kept.calls), starts=(start,))
    tried = with_remedies_tried(asked, scene).remedies
    assert {remedy.verified for remedy in tried} == {None}
    assert "stays finite when it runs again, from the parameters of step 3" in tried[0].effect


# --- loss scales, inputs, padding --------------------------------------------------------------------------------------


def test_gradients_beyond_float16_are_cured_by_a_wider_format_and_by_no_scale():
    model = Loud(None, factor=1e9)
    finding, remedies = scaled_loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    assert (finding.cause, finding.step) == ("loss-scaling", 10)
    assert remedies["tune-loss-scale"].verified is False
    assert "the loss scaler skips every step" in remedies["tune-loss-scale"].effect
    assert remedies["disable-amp"].verified is True
    assert remedies["use-amp-bf16"].verified is True


@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_that_never_comes_down_is_cured_by_a_lower_one(fused):
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    finding, remedies = scaled_loop(model, optimizer, init_scale=2.0**40, backoff_factor=0.9999)
    assert (finding.cause, finding.step) == ("loss-scaling", 17)
    assert remedies["tune-loss-scale"].verified is True
    assert remedies["tune-loss-scale"].effect.startswith("scale 4096: finite")
    assert remedies["use-amp-bf16"].verified is True


def test_a_scale_that_began_far_too_high_is_left_to_come_down():
    model = Decoder()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with watch(model, optimizer := torch.optim.AdamW(model.parameters(), lr=1e-4)) as it:
            scaled_steps(model, optimizer, 30, init_scale=2.0**36)
    assert it.finding is None
    assert [str(each.message) for each in told] == [
        "step 10: the loss scale was halved 9 times in a row, to 1.34218e+08"
    ]


def test_gradients_that_are_never_finite_are_cured_by_nothing():
    model = Decoder()
    model.layers[1].broken = True
    _, remedies = scaled_loop(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    assert {name: remedy.verified for name, remedy in remedies.items()} == {
        "tune-loss-scale": False,
        "disable-amp": False,
        "use-amp-bf16": False,
    }


@pytest.mark.parametrize(
    ("dtype", "verified", "told"),
    [(torch.float32, True, "ids in int64: finite"), (torch.bfloat16, None, "which were meant is lost")],
)
def test_floating_ids_are_cured_where_they_were_not_rounded_yet(dtype, verified, told):
    model = Decoder()
    with pytest.raises(NumericsError) as error, watch(model, torch.optim.AdamW(model.parameters(), lr=1e-4)):
        model(input_ids=ids(0).to(dtype), labels=ids(0))
    (remedy,) = error.value.finding.remedies
    assert remedy.verified is verified
    assert told in remedy.effect


class Attending(nn.Module):
    """One head of causal attention; a query whose every key is padding has a softmax over nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.embed(input_ids)
        scores = hidden @ hidden.transpose(1, 2)
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask[:, None, :].bool()
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ hidden
        logits = self.head(mixed)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_padding_before_the_tokens_is_cured_by_padding_behind_them():
    model = Attending()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.arange(1, 9).reshape(2, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(NumericsError) as error, watch(model, optimizer):
        model(input_ids=batch, attention_mask=mask, labels=batch)["loss"].backward()
        optimizer.step()
    remedies = {remedy.name: remedy for remedy in error.value.finding.remedies}
    assert error.value.finding.cause == "fully-masked-row"
    assert remedies["fix-padding"].verified is True
    assert remedies["fix-padding"].effect.startswith("padding on the right only: finite; loss ")
    assert remedies["eager-attention"].verified is None


# --- what the loop keeps -----------------------------------------------------------------------------------------------


def test_the_loop_is_as_it_was_and_no_other_watch_hears():
    model, optimizer = diverging()
    other = Decoder(1)
    their = torch.optim.SGD(other.parameters(), lr=1e-3)
    with watch(other, their) as second:
        train(other, their, 2)
        read, rng = len(second.readings), torch.get_rng_state()
        _, remedies = caught(model, optimizer, snapshot_every=4)
        assert remedies["lower-learning-rate"].verified is True
        assert len(second.readings) == read
        assert torch.equal(torch.get_rng_state(), rng)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert optimizer.param_groups[0]["lr"] == 300.0


def test_a_loop_that_goes_on_is_not_kept_waiting():
    model, optimizer = diverging()
    with warnings.catch_warnings(), watch(model, optimizer, snapshot_every=4, on_bad="warn") as w:
        warnings.simplefilter("ignore")
        train(model, optimizer, 4, clip=None)
    assert {remedy.verified for remedy in w.finding.remedies} == {None}
    assert w.finding.remedies[0].effect == "not tried while training goes on: numerics-suite check --bundle does"


def test_a_large_model_is_not_copied_in_its_loop():
    with pytest.raises(NotApplicableError, match="numerics-suite check --bundle does"):
        copied(Decoder(), Start(words="", calls=()), largest=1000)


def test_a_loop_is_kept_for_a_minute_and_no_longer():
    model = Decoder()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    finding, _ = caught(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = Ring(1)
    kept.add(1, (), {"input_ids": ids(1), "labels": ids(1)}, torch.device("cpu"))
    start = Start(words="the parameters of step 1", calls=kept.calls)
    asked = replace(finding, remedies=untried(("init-head",)))
    bad = ("lm_head.weight",)
    scene = CaughtContext(model=model, optimizer=None, calls=list(kept.calls), starts=(start,), initially_bad=bad)
    (remedy,) = with_remedies_tried(asked, scene).remedies
    assert remedy.verified is True
    (remedy,) = with_remedies_tried(asked, replace(scene, seconds=0)).remedies
    assert remedy.verified is None
    assert "the 0 seconds for it were over" in remedy.effect


def test_a_script_whose_optimizer_is_found_at_its_first_step_is_replayed(tmp_path):
    """The snapshot of step 1 is taken before the optimizer is known, and replays open no watch of their own."""
    from numerics_suite.training_watch.script import Finder, run_script
    from numerics_suite.training_watch.watch_settings import WatchSettings

    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from unit.watched_models import Decoder, train\n"
        "model = Decoder()\n"
        "train(model, torch.optim.SGD(model.parameters(), lr=300.0), 12, clip=None)\n",
        encoding="utf-8",
    )
    finder = Finder(WatchSettings(snapshot_every=4), on_bad="stop", bundle=None)
    with warnings.catch_warnings(), pytest.raises(NumericsError) as error:
        warnings.simplefilter("ignore")
        run_script(script, (), finder)
    assert len(finder.watches) == 1
    assert error.value.finding.cause == "divergence"
    assert (error.value.finding.remedies[0].name, error.value.finding.remedies[0].verified) == (
        "lower-learning-rate",
        True,
    )


# --- the bundle --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Of a checkpoint whose loop accumulates, and decides for itself to stop, so that no remedy was tried there."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("watched") / "b"
    model = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny")).float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e4, momentum=0.1)
    with warnings.catch_warnings(), pytest.raises(NumericsError):
        warnings.simplefilter("ignore")
        with watch(model, optimizer, snapshot_every=9, bundle=folder, on_bad=lambda _: "stop"):
            for step in range(1, 9):
                for part in range(2):
                    batch = ids(10 * step + part) % model.config.vocab_size
                    (model(input_ids=batch, labels=batch).loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
    return folder


def test_reopened_the_steps_are_taken_from_the_snapshot_with_each_remedy(bundle):
    read = read_bundle(bundle)
    assert read.step > 2
    assert read.finding.cause == "divergence"
    assert {remedy.verified for remedy in read.finding.remedies} == {None}
    assert read.content["replay"].startswith(f"steps 1 to {read.step}, with the parameters in parameters.safetensors")
    (check,) = reopen(Settings(), bundle).checks
    remedies = {remedy.name: remedy for remedy in check.finding.remedies}
    assert remedies["lower-learning-rate"].verified is True
    assert remedies["clip-grad-norm"].verified is False
    assert check.finding.remedies[0].name == "lower-learning-rate"


def test_without_diagnosis_nothing_is_tried(bundle):
    (check,) = reopen(Settings(diagnose=False), bundle).checks
    assert {remedy.verified for remedy in check.finding.remedies} == {None}


def test_on_a_checkpoint_that_stays_finite_it_passes_and_on_one_that_does_not_the_remedies_are_its_own(
    bundle, tmp_path
):
    from transformers import AutoModelForCausalLM

    (check,) = reopen(Settings(subjects=("fixture:glm-tiny",)), bundle).checks
    assert check.status == "passed"
    model = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny")).float()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "spoiled")
    (check,) = reopen(Settings(subjects=(str(tmp_path / "spoiled"),)), bundle).checks
    assert check.finding.module == "model.layers.1.mlp.down_proj"
    assert {remedy.verified for remedy in check.finding.remedies} == {None}
    assert "only the forward pass, or forward and backward, can be run again" in check.finding.remedies[0].effect


def test_the_script_takes_the_steps_from_the_snapshot(bundle):
    done = subprocess.run(
        [python(), str(bundle / "reproduce.py")], text=True, capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "not finite: " in done.stdout


def test_a_factory_makes_the_module_and_the_bundle_what_it_held(tmp_path):
    _, remedies = caught(*diverging(), snapshot_every=4, bundle=tmp_path / "b", on_bad=lambda _: "stop")
    assert {remedy.verified for remedy in remedies.values()} == {None}
    (check,) = reopen(Settings(), tmp_path / "b").checks
    assert "Decoder is no class of transformers; give what makes it" in check.finding.remedies[0].effect
    (check,) = reopen(Settings(subjects=("factory:unit.watched_models:Decoder",)), tmp_path / "b").checks
    assert check.status == "failed"
    assert check.finding.evidence["replay"].endswith("with the snapshot from before step 1, trained on to step 3")
    remedies = {remedy.name: remedy for remedy in check.finding.remedies}
    assert remedies["lower-learning-rate"].verified is True
    assert remedies["clip-grad-norm"].verified is False


def test_what_was_tried_in_the_loop_is_in_the_bundle(tmp_path):
    finding, _ = caught(*half(), snapshot_every=1, bundle=tmp_path / "b")
    assert read_bundle(tmp_path / "b").finding.remedies == finding.remedies


def test_a_loop_comes_back_from_json():
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9))
    train(model, optimizer, 2)
    stepping = state_of(model, optimizer)
    loop = Loop(start=3, optimizers=(stepping,), rates={3: [({"lr": 0.1, "betas": (0.8, 0.9)},)]}, norms={3: 1.5})
    tensors = {}
    back = loop_from_json(json.loads(json.dumps(loop.to_json(tensors))), tensors)
    assert back.rates == {3: [[{"lr": 0.1, "betas": (0.8, 0.9)}]]}
    assert (back.start, back.max_norm, back.norms, back.lr) == (3, None, {3: 1.5}, 0.1)
    twin = Decoder()
    twin.load_state_dict(model.state_dict())
    again = back.optimizers[0].rebuilt(twin)
    for one, its in ((model, optimizer), (twin, again)):
        train(one, its, 2, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_of_somebody_elses_is_not_stepped_again():
    class Own(torch.optim.SGD):
        pass

    model = Decoder()
    assert state_of(model, Own(model.parameters(), lr=1.0)) is None
    assert state_of(Decoder(1), torch.optim.SGD(model.parameters(), lr=1.0)) is None
