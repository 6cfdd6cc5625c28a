"""The public assertions: each passes on a right module and fails, with what a person needs, on a wrong one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import numerics_suite
from numerics_suite.observations.coarse_arithmetic import _CoarserOps

VOCAB = 40


class Decoder(nn.Module):
    """A causal model of one attention layer, small enough to break in one place at a time."""

    def __init__(self, *, masked=True, causal=True, leak=False, detach=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.head = nn.Linear(32, VOCAB)
        self.masked, self.causal, self.leak, self.detach = masked, causal, leak, detach

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.embed(input_ids)
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / 32**0.5
        length = input_ids.shape[1]
        allowed = (
            torch.ones(length, length).tril().bool()[None] if self.causal else torch.ones(1, length, length).bool()
        )
        if self.masked:
            allowed = allowed & attention_mask.bool()[:, None, :] | torch.eye(length).bool()[None]
        mixed = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value
        if self.leak:
            mixed = mixed + 1e-6 * mixed.mean(0, keepdim=True)
        hidden = hidden + (mixed.detach() if self.detach else mixed)
        logits = self.head(hidden)
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return out


@pytest.fixture
def batch():
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_right_module_passes_every_assertion(batch):
    model = Decoder()
    numerics_suite.assert_finite(model)
    numerics_suite.assert_padding_invariant(model, batch)
    numerics_suite.assert_batch_invariant(model, batch)
    numerics_suite.assert_causal(model, batch, vocab_size=VOCAB)
    labelled = {**batch, "labels": batch["input_ids"]}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numerics_suite.assert_matches_reference(copy.deepcopy(model).to(dtype), batch)
        numerics_suite.assert_gradients_match(copy.deepcopy(model).to(dtype), labelled)
    numerics_suite.assert_matches_reference(model, batch, autocast=torch.bfloat16)


def test_an_ignored_mask_is_told_with_side_measure_and_place(batch):
    with pytest.raises(
        AssertionError, match=r"padding on the left: .*\n  measured .* allowed 1e-10; greatest difference .* at index"
    ):
        numerics_suite.assert_padding_invariant(Decoder(masked=False), batch)


def test_a_leak_between_rows_of_one_in_a_million_is_seen(batch):
    with pytest.raises(AssertionError, match="row 0 alone"):
        numerics_suite.assert_batch_invariant(Decoder(leak=True), batch)


def test_a_look_into_the_future_is_seen(batch):
    with pytest.raises(AssertionError, match="tokens from column 3 on changed"):
        numerics_suite.assert_causal(Decoder(causal=False), batch, vocab_size=VOCAB)


def inaccurate_kernel(value, by):
    """A kernel that errs when it runs for real, and not where a twin computes the op in float64 in its place."""
    return value * by if isinstance(_get_current_dispatch_mode(), (_CoarserOps, type(None))) else value


def test_a_kernel_less_accurate_than_its_dtype_is_over_the_reference_budget(batch):
    class Inaccurate(Decoder):
        def forward(self, input_ids, attention_mask):
            return {"logits": inaccurate_kernel(super().forward(input_ids, attention_mask)["logits"], 1 + 1e-3)}

    with pytest.raises(AssertionError, match=r"error of 'logits'.*precision makes unavoidable"):
        numerics_suite.assert_matches_reference(Inaccurate(), batch)


def test_an_inaccurate_backward_kernel_is_over_its_budget_and_named(batch):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return inaccurate_kernel(grad, 1.25)

    model = Decoder().to(torch.bfloat16)
    inner = model.head.forward
    model.head.forward = lambda hidden: inner(Scale.apply(hidden))
    with pytest.raises(AssertionError, match=r"gradient of (embed|norm|qkv)"):
        numerics_suite.assert_gradients_match(model, {**batch, "labels": batch["input_ids"]})


def test_a_value_that_is_not_finite_is_told_with_its_index():
    value = torch.zeros(2, 3)
    value[1, 2] = float("nan")
    with pytest.raises(
        AssertionError, match=r"logits is not finite: 1 of 6 elements of float32 \(2, 3\), first nan at index \(1, 2\)"
    ):
        numerics_suite.assert_finite(value, "logits")
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), float("inf"))
    with pytest.raises(AssertionError, match=r"weight\.grad is not finite"):
        numerics_suite.assert_finite(model)


class RoundTrip(Decoder):
    """A float32 decoder whose head goes through float16 and back: every value has float32's dtype and float16's bits."""

    def __init__(self, passes_through=torch.float16):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, VOCAB))
        self.head[0].register_forward_hook(lambda module, args, out: out.to(passes_through).to(out.dtype))


def test_a_float16_round_trip_inside_a_float32_module_is_named_with_mode_and_dtype(batch):
    said = (
        r"coarser floats: head\.0 computes in a coarser float.*\n.*ops by module: head\.0 \(1\); "
        r"run in evaluation mode, float32 parameters"
    )
    with pytest.raises(AssertionError, match=said):
        numerics_suite.assert_matches_reference(RoundTrip(), batch)
    with pytest.raises(AssertionError, match=r"coarser floats: .* first in head\.0"):
        numerics_suite.assert_gradients_match(RoundTrip(), {**batch, "labels": batch["input_ids"]})
    numerics_suite.assert_matches_reference(RoundTrip(torch.float64), batch)
    numerics_suite.assert_matches_reference(RoundTrip().half(), batch)


def test_the_message_names_autocast_and_the_mode_is_put_back(batch):
    model = RoundTrip(torch.bfloat16).train()
    with pytest.raises(AssertionError, match="float32 parameters under autocast to float16"):
        numerics_suite.assert_matches_reference(model, batch, autocast=torch.float16)
    assert model.training
    with pytest.raises(AssertionError, match="run in evaluation mode, in true fp64"):
        numerics_suite.assert_batch_invariant(Decoder(leak=True), batch)
