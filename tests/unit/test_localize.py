"""The place of a change is a module that a person can look into: no shell around the model, no bystander inside one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from unit.sample_baseline import baseline, moved_sketch, renamed

from numerics_suite.baselines.batch_match import modules_matched
from numerics_suite.baselines.compare import difference
from numerics_suite.baselines.localize import module_place
from numerics_suite.baselines.records import ModuleRecord
from numerics_suite.baselines.trace import watched
from numerics_suite.judgement.classify import judge_difference

ROWS, TOKENS, WIDTH = 2, 5, 6


class Attention(nn.Module):
    """Scores of its own, and a dropout of them, as models of the BERT kind have it."""

    def __init__(self, scale):
        super().__init__()
        self.query, self.dropout, self.scale = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), scale

    def forward(self, hidden_states):
        query = self.query(hidden_states)
        scores = (query @ query.transpose(-1, -2) * self.scale).softmax(-1)
        return self.dropout(scores[:, None]).squeeze(1) @ hidden_states


class Translator(nn.Module):
    """An encoder of some tokens and a decoder of others, within a shell."""

    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Module()
        self.inner.embed, self.inner.encoder = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner.decoder, self.inner.head = Attention(scale), nn.Linear(WIDTH, 3)
        self.inner.forward = self.run

    def forward(self, **batch):
        return self.inner(**batch)

    def run(self, input_ids, decoder_input_ids):
        seen = self.inner.encoder(self.inner.embed(input_ids)).mean(1, keepdim=True)
        return {"logits": self.inner.head(self.inner.decoder(self.inner.embed(decoder_input_ids) + seen))}


def states(model, tensors):
    """The records of its modules, without errors."""
    found = {}
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        watched(lambda inner, given: inner(**given), tensors, found)(model.double().eval(), tensors)

    def held(sketcher):
        return sketcher.sketch() if sketcher.count else None

    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return tuple(
        ModuleRecord(name=name, kind=kinds[name], given=held(trace.given), gave=held(trace.gave))
        for name, trace in found.items()
    )


def place(old, new):
    return module_place(old, new, modules_matched(old, new))


def test_a_scale_in_the_attention_is_placed_in_the_attention_and_not_in_the_dropout_of_its_scores():
    def model(scale):
        block = nn.Module()
        block.embed, block.attention, block.head = nn.Embedding(9, WIDTH), Attention(scale), nn.Linear(WIDTH, 3)
        block.forward = lambda input_ids: block.head(block.attention(block.embed(input_ids)))
        return block

    tensors = {"input_ids": torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 9}
    old, new, same = (states(model(scale), tensors) for scale in (0.4, 0.5, 0.4))
    assert place(old, new) == "attention"
    assert place(old, same) is None


def test_a_change_in_a_decoder_behind_an_encoder_is_placed_in_it_and_not_in_the_shell():
    tensors = {
        "input_ids": torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 9,
        "decoder_input_ids": torch.arange(ROWS * 3).reshape(ROWS, 3) % 9,
    }
    old, new = (states(Translator(scale), tensors) for scale in (0.4, 0.5))
    assert place(old, new) == "inner.decoder"


def test_what_the_code_of_a_shelled_model_changes_is_placed_in_the_last_module_that_it_calls():
    old = renamed(baseline(), {"model": "inner.model", "lm_head": "inner.lm_head"})
    shells = [replace(old.modules[-1], name=name, given=None) for name in ("inner", "")]
    old = replace(old, modules=(*old.modules, *shells))
    modules = [
        replace(item, gave=moved_sketch(item.gave, 1e-3)) if item.name in {"inner", ""} else item
        for item in old.modules
    ]
    answers = (replace(old.answers[0], values=old.answers[0].values * 1.001),)
    found = judge_difference(difference(old, replace(old, modules=tuple(modules), answers=answers)))
    assert (found.kind, found.module) == ("changed", "inner.lm_head")
