"""What a loop freezes stays as it is, and what the config ties is trained together; the watch names loops in which it is otherwise."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import nn
from unit.watched_models import Decoder, ids

from numerics_suite import NumericsError, NumericsWarning, watch


def trained(model, optimizer, steps=6, *, before=None, set_to_none=True):
    for step in range(1, steps + 1):
        if before is not None:
            before(step)
        optimizer.zero_grad(set_to_none=set_to_none)
        model(input_ids=ids(step), labels=ids(step))["loss"].backward()
        optimizer.step()


def frozen_after(model, step, part):
    def before(now):
        if now == step:
            part(model).requires_grad_(requires_grad=False)

    return before


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_base_frozen_after_its_gradients_were_made(make):
    model = Decoder()
    optimizer = make(model.parameters(), lr=1e-3)
    with pytest.raises(NumericsError) as told, watch(model, optimizer):
        trained(model, optimizer, before=frozen_after(model, 2, lambda m: m.layers), set_to_none=False)
    finding = told.value.finding
    assert finding.cause == "wrong-gradient"
    assert finding.step == 3
    assert set(finding.parameters) == {name for name, _ in model.named_parameters() if name.startswith("layers.")}
    assert finding.remedies == ()
    assert "12 frozen parameters move" in finding.title


@pytest.mark.parametrize(("step", "set_to_none"), [(1, False), (2, True)])
def test_a_base_frozen_in_time(step, set_to_none):
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(), watch(model, optimizer) as it:
        warnings.simplefilter("error", NumericsWarning)
        trained(model, optimizer, before=frozen_after(model, step, lambda m: m.layers), set_to_none=set_to_none)
    assert it.finding is None


def test_gradients_that_a_script_writes_itself():
    model = Decoder().requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, optimizer) as it:
        for step in range(5):
            noise = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=noise)
            optimizer.step()
    assert it.finding is None


class Tied(Decoder):
    """Input and output embedding are one tensor, as its config says, until somebody puts another layer in place of one."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(tie_word_embeddings=True)
        self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head


def with_a_new_head(*, freeze, adapter=False):
    model = Tied()
    model.lm_head = nn.Linear(32, 1000)
    if freeze:
        model.embed.requires_grad_(requires_grad=False)
    if adapter:
        model.peft_config = {}
    return model


def test_a_tied_pair_of_which_one_is_trained():
    model = with_a_new_head(freeze=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(NumericsError) as told, watch(model, optimizer):
        trained(model, optimizer)
    assert (told.value.finding.cause, told.value.finding.step) == ("untied-weights", 3)
    assert told.value.finding.parameters == ("lm_head.weight", "embed.weight")
    assert "only the first is trained" in told.value.finding.title


def test_a_tied_pair_of_which_an_adapter_saves_one():
    model = with_a_new_head(freeze=True, adapter=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.warns(NumericsWarning, match="merged, one of them is lost"), watch(model, optimizer) as it:
        trained(model, optimizer)
    assert it.finding is None


def test_a_tied_pair_that_is_one_tensor():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer) as it:
        trained(model, optimizer)
    assert it.finding is None
    assert not it.warnings
