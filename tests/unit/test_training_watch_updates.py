"""Training that stays finite and does not move its parameters: each way is named by the watch, and what is meant so is not."""

# ruff: noqa: PT012 - a whole loop is what raises

from __future__ import annotations

import copy
import functools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from unit.watched_models import VOCAB, Decoder, ids, train

from numerics_suite import NumericsError, NumericsWarning, watch


class Checkpointed(Decoder):
    """Reentrant checkpoints, whose blocks get no gradient where their input needs none; kept as transformers keeps them."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.embed.weight.requires_grad_(requires_grad=False)
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)

    def forward(self, input_ids, labels=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = self._gradient_checkpointing_func(layer, hidden)
        logits = self.lm_head(hidden)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def caught(model, optimizer, steps=4, **options):
    with pytest.raises(NumericsError) as told, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of a checkpoint without gradients
        with watch(model, optimizer, **options):
            train(model, optimizer, steps)
    return told.value.finding


def quiet(model, optimizer, steps=5, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericsWarning)
        with watch(model, optimizer, **options) as it:
            train(model, optimizer, steps)
    assert it.finding is None
    assert not it.warnings


def narrow():
    """In bfloat16, without weights at 0, which hold every step however small it is."""
    model = Decoder(dtype=torch.bfloat16)
    for layer in model.layers:
        nn.init.constant_(layer.norm.bias, 0.1)
    return model


def verified(finding):
    return {remedy.name: remedy.verified for remedy in finding.remedies}


def test_reentrant_checkpoints_behind_frozen_embeddings():
    model = Checkpointed(reentrant=True)
    finding = caught(model, torch.optim.AdamW(trained(model), lr=1e-3))
    assert (finding.cause, finding.step) == ("untrained-parameters", 3)
    assert set(finding.parameters) == {name for name, _ in model.named_parameters() if name.startswith("layers.")}
    assert verified(finding)["non-reentrant-checkpointing"] is True
    assert verified(finding)["rebuild-optimizer"] is None


def test_checkpoints_that_are_not_reentrant():
    model = Checkpointed(reentrant=False)
    quiet(model, torch.optim.AdamW(trained(model), lr=1e-3))


class Varied(Decoder):
    """What gets no gradient by design: a pooler that nothing reads, an output for another task, a layer that was dropped."""

    def __init__(self, dropped=None):
        super().__init__()
        self.pooler, self.other_head, self.dropped = nn.Linear(32, 32), nn.Linear(32, 4), dropped
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids, labels=None):
        hidden = self.dropout(self.embed(input_ids))
        for index, layer in enumerate(self.layers):
            hidden = hidden if index == self.dropped else layer(hidden)
        self.pooler(hidden[:, 0].detach())
        logits = self.lm_head(hidden)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("dropped", [None, 1])
def test_what_gets_no_gradient_by_design(dropped):
    model = Varied(dropped).train()
    quiet(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


class NoGradient(torch.autograd.Function):
    """Hands its input on, and zeros back."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0


@pytest.mark.parametrize("cut", [torch.detach, NoGradient.apply])
def test_a_detached_branch_that_the_loss_depends_on(cut):
    model = Decoder()
    model.layers[1].up.register_forward_hook(lambda _module, _args, output: cut(output))
    finding = caught(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert (finding.cause, finding.step, finding.module) == ("dead-gradient", 3, "layers.1.up")
    assert set(finding.parameters) == {
        f"layers.1.{name}" for name in ("norm.weight", "norm.bias", "up.weight", "up.bias")
    }
    assert finding.remedies == ()


class Mixture(nn.Module):
    """Adds nothing of its parts, as loops do that must give every parameter a gradient; its router only picks."""

    def __init__(self):
        super().__init__()
        self.unused, self.router, self.gate = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 32, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, hidden):
        picked = self.router(hidden).topk(2).indices.sum(-1, keepdim=True)
        routed = 0.0 * self.router(hidden).sum() + 0.01 * picked
        return hidden + 0.0 * self.unused(hidden).sum() + routed + self.gate(hidden)


@pytest.mark.parametrize("way", ["parts that add nothing", "gradients that the loop clears", "hooks that freeze"])
def test_gradients_of_zero_that_are_meant(way):
    model = Decoder()
    if way == "parts that add nothing":
        model.layers.append(Mixture())
    if way == "hooks that freeze":
        model.embed.weight.register_hook(torch.zeros_like)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with watch(model, optimizer) as it:
        for step in range(1, 6):
            optimizer.zero_grad()
            model(input_ids=ids(step), labels=ids(step))["loss"].backward()
            if way == "gradients that the loop clears":
                model.embed.weight.grad.zero_()
            optimizer.step()
    assert it.finding is None
    assert not it.warnings


def test_an_adapter_whose_second_half_is_zero_while_the_rate_warms_up():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["up"], lora_dropout=0.1), Decoder())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (step - 4) / 10))
    with watch(model, optimizer) as it:
        for step in range(1, 7):
            train(model, optimizer, 1, start=step)
            scheduler.step()
    assert it.finding is None
    assert not it.warnings


def test_a_model_that_is_too_large_to_copy_is_warned_of(monkeypatch):
    from numerics_suite.training_watch import diagnosis

    monkeypatch.setattr(diagnosis.CaughtContext, "caught", functools.partialmethod(_refused))
    model = Checkpointed(reentrant=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    with (
        pytest.warns(
            NumericsWarning, match="12 of 14 parameters .* got no gradient .* could not be found out: too large"
        ),
        pytest.warns(UserWarning, match="None of the inputs"),
        watch(model, optimizer) as it,
    ):
        train(model, optimizer, 5)
    assert it.finding is None
    assert [alarm.kind for alarm in it.warnings] == ["unreached"]


def _refused(_scene, _start):
    from numerics_suite.core.errors import NotApplicableError

    message = "too large"
    raise NotApplicableError(message)


def test_an_optimizer_of_copies():
    model = Decoder()
    finding = caught(model, torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=1e-3))
    assert (finding.cause, len(finding.parameters)) == ("untrained-parameters", len(list(model.parameters())))
    assert verified(finding) == {"rebuild-optimizer": True, "non-reentrant-checkpointing": None}


def test_an_optimizer_from_before_a_resize():
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.embed = nn.Embedding(VOCAB + 8, 32)
    finding = caught(model, optimizer)
    assert (finding.cause, finding.parameters) == ("untrained-parameters", ("embed.weight",))
    assert verified(finding)["rebuild-optimizer"] is True


def test_an_optimizer_from_before_an_adapter():
    from peft import LoraConfig, inject_adapter_in_model

    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model = inject_adapter_in_model(LoraConfig(target_modules=["up"]), model)
    finding = caught(model, optimizer)
    assert (finding.cause, len(finding.parameters)) == ("untrained-parameters", 4)
    assert verified(finding)["rebuild-optimizer"] is True


def test_a_part_that_is_trained_alone_without_being_frozen():
    model = Decoder()
    quiet(model, torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3))


def test_two_optimizers_of_one_model():
    model = Decoder()
    first = torch.optim.AdamW([*model.embed.parameters(), *model.layers.parameters()], lr=1e-3)
    second = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    with watch(model, [first, second]) as it:
        for step in range(5):
            model.zero_grad()
            model(input_ids=ids(step), labels=ids(step))["loss"].backward()
            first.step()
            second.step()
    assert it.finding is None


def test_an_optimizer_of_float32_masters_of_the_users_own():
    model = Decoder(dtype=torch.bfloat16)
    masters = [p.detach().float().clone() for p in model.parameters()]
    for master in masters:
        master.requires_grad_()
    optimizer = torch.optim.AdamW(masters, lr=6e-7)
    with watch(model, optimizer) as it:
        for step in range(5):
            model.zero_grad()
            model(input_ids=ids(step), labels=ids(step))["loss"].backward()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, model.parameters(), strict=True):
                    parameter.copy_(master)
    assert it.finding is None


def test_updates_that_round_away():
    model = narrow()
    finding = caught(model, torch.optim.AdamW(model.parameters(), lr=1e-7), steps=4)
    assert (finding.cause, finding.step) == ("rounded-update", 3)
    assert finding.evidence["share of the steps that is held"] < 2**-8
    assert verified(finding)["fp32-master-weights"] is True
    assert verified(finding)["stochastic-rounding"] is True
    assert verified(finding)["raise-learning-rate"] is True
    (raised,) = (remedy.effect for remedy in finding.remedies if remedy.name == "raise-learning-rate")
    assert re.search(r"that is held: 0\.\d+ % before, now [\d.]+ %$", raised)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 1e-4), (torch.bfloat16, 1e-5), (torch.float32, 1e-7)])
def test_updates_that_are_held(dtype, lr):
    model = Decoder(dtype=dtype)
    quiet(model, torch.optim.AdamW(model.parameters(), lr=lr))


def test_a_warm_up_from_tiny_rates_is_no_loss():
    model = Decoder(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 1000))
    with watch(model, optimizer, every_parameters=2) as it:
        for step in range(1, 12):
            train(model, optimizer, 1, start=step)
            scheduler.step()
    assert it.finding is None


def test_a_loss_that_is_computed_outside_is_still_watched_for_rounding():
    model = narrow()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    with pytest.raises(NumericsError, match="updates round away"), watch(model, optimizer):
        for step in range(4):
            logits = model(input_ids=ids(step))["logits"]
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids(step).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_the_loop_is_what_it_would_be_without_the_watch():
    """The meter steps on copies: neither parameters, nor states, nor random numbers differ."""
    results = []
    for watched in (False, True):
        model = Decoder(dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if watched:
            quiet(model, optimizer, every_parameters=1)
        else:
            train(model, optimizer, 5)
        results.append([*(p.detach().clone() for p in model.parameters()), torch.rand(())])
        torch.manual_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(results[0][:-1], results[1][:-1], strict=True))


class HalfHead(Decoder):
    """A head in bfloat16 behind a float32 body, as `modules_to_save` of an adapter over a bfloat16 base."""

    def __init__(self):
        super().__init__()
        self.lm_head.to(torch.bfloat16)

    def forward(self, input_ids, labels=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.lm_head(hidden.to(torch.bfloat16)).float()
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_head_in_half_precision_beside_float32():
    model = HalfHead()
    finding = caught(model, torch.optim.AdamW(model.parameters(), lr=6e-7), steps=4)
    assert (finding.cause, finding.evidence["dtype"]) == ("rounded-update", "bfloat16")
    assert 0 < finding.evidence["share of the steps that is held"] < 2**-8
    assert verified(finding)["fp32-master-weights"] is True
    model = HalfHead()
    quiet(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
