"""Mistakes in the output layer, the classification head and the pooled row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, on, overridden

CLASSIFIER = "sequence-classification"
POOLED = ".argmax(-1)"
CHATGLM_POOLED = "body.last_hidden_state[:, -1]"


def _in_bf16(own: Any, self: Any, x: Any) -> Any:
    return own(self, x).bfloat16().to(x.dtype)


def _tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _pooled(new: str) -> Any:
    return edited("", "forward", POOLED, new)


def _mean(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = own(self, *args, **kwargs)
    states = output.last_hidden_state
    output.last_hidden_state = states.mean(1, keepdim=True).expand_as(states)
    return output


MUTANTS = (
    Mutant(
        id="head-tied-by-mistake",
        family="glm",
        apply=_tie,
        expected_checks=("load.tied",),
        module_pattern=r"lm_head",
        why="input and output embeddings are tied although config.json says not",
    ),
    Mutant(
        id="head-scaled",
        family="glm4",
        apply=overridden("lm_head", forward=lambda own, self, x: own(self, x) * 0.5),
        expected_checks=(ORACLE,),
        module_pattern=r"lm_head",
        why="a logit scale of one half",
    ),
    Mutant(
        id="head-in-bf16",
        kind="worse",
        family="glm",
        apply=overridden("lm_head", forward=_in_bf16),
        expected_checks=("reference.local",),
        module_pattern=r"lm_head",
        why="logits pass through bfloat16 in an fp32 model",
    ),
    Mutant(
        id="head-in-fp16-chatglm",
        kind="worse",
        family="chatglm",
        apply=overridden("transformer.output_layer", forward=lambda own, self, x: own(self, x).half().to(x.dtype)),
        expected_checks=("reference.local",),
        module_pattern=r"transformer\.output_layer",
        why="logits pass through float16 in an fp32 model",
    ),
    Mutant(
        id="head-reads-previous-state",
        family="glm",
        apply=overridden("lm_head", forward=lambda own, self, x: own(self, x.roll(1, 1))),
        expected_checks=(ORACLE, "forward.causal"),
        module_pattern=r"lm_head",
        why="logits of the token before",
    ),
    Mutant(
        id="head-vocabulary-shifted",
        family="glm4",
        apply=overridden("lm_head", forward=lambda own, self, x: own(self, x).roll(1, -1)),
        expected_checks=(ORACLE,),
        module_pattern=r"lm_head",
        why="rows of the output layer stand one id late, as after a token was added in front",
    ),
    Mutant(
        id="head-soft-cap",
        family="glm",
        apply=overridden("lm_head", forward=lambda own, self, x: 30 * torch.tanh(own(self, x) / 30)),
        expected_checks=(ORACLE,),
        module_pattern=r"lm_head",
        why="Gemma's soft cap on the logits",
    ),
    Mutant(
        id="head-float16-under-bf16",
        kind="contract",
        family="chatglm",
        task=CLASSIFIER,
        precision="bf16",
        apply=on("classifier_head", lambda head: head.to(torch.float16)),
        expected_checks=("load.dtype",),
        module_pattern=r"classifier_head",
        why="2024's code keeps the head in float16 under a bfloat16 body",
    ),
    Mutant(
        id="pooled-last-column",
        family="glm",
        task=CLASSIFIER,
        apply=_pooled(".argmax(-1) * 0 - 1"),
        expected_checks=("forward.pooling",),
        module_pattern=r"score",
        why="the last column, which is padding where a row is padded on the right",
    ),
    Mutant(
        id="pooled-one-early",
        family="glm4",
        task=CLASSIFIER,
        apply=_pooled(".argmax(-1) - 1"),
        expected_checks=("forward.pooling",),
        module_pattern=r"score",
        why="the token before the last, as where the length is taken for the index and subtracted twice",
    ),
    Mutant(
        id="pooled-first-token",
        family="chatglm",
        task=CLASSIFIER,
        apply=edited("", "forward", CHATGLM_POOLED, "body.last_hidden_state[:, 0]"),
        expected_checks=("forward.pooling", "forward.padding"),
        module_pattern=r"classifier_head",
        why="the first column, as encoders pool",
    ),
    Mutant(
        id="pooled-mean",
        family="glm",
        task=CLASSIFIER,
        apply=overridden("model", forward=_mean),
        expected_checks=(ORACLE, "forward.padding"),
        module_pattern=r"model|score",
        why="the mean of all columns, padding too",
    ),
    Mutant(
        id="pooled-by-the-wrong-pad-id",
        family="glm4",
        task=CLASSIFIER,
        apply=on("", lambda model: setattr(model.config, "pad_token_id", 0)),
        expected_checks=("load.config",),
        why="rows end where id 0 ends, not where padding begins; the config is at fault, no module",
    ),
    Mutant(
        id="classifier-bias-dropped",
        family="chatglm",
        task=CLASSIFIER,
        apply=overridden("classifier_head", forward=lambda own, self, x: nn.functional.linear(x, self.weight)),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=r"classifier_head",
        why="the head's bias is not added",
    ),
    Mutant(
        id="classifier-dropout-left-on",
        family="chatglm",
        task=CLASSIFIER,
        apply=overridden("dropout", forward=lambda own, self, x: nn.functional.dropout(x, 0.1, training=True)),
        expected_checks=("forward.deterministic",),
        module_pattern="dropout",
        why="dropout before the head in eval mode",
    ),
    Mutant(
        id="classifier-labels-reversed",
        family="glm4",
        task=CLASSIFIER,
        apply=overridden("score", forward=lambda own, self, x: own(self, x).flip(-1)),
        expected_checks=(ORACLE,),
        module_pattern=r"score",
        why="labels in the other order",
    ),
    Mutant(
        id="classifier-head-in-bf16",
        kind="worse",
        family="glm",
        task=CLASSIFIER,
        apply=overridden("score", forward=_in_bf16),
        expected_checks=("reference.local",),
        module_pattern=r"score",
        why="the head's logits pass through bfloat16 in an fp32 model",
    ),
    Mutant(
        id="classifier-softmax-in-head",
        family="chatglm",
        task=CLASSIFIER,
        apply=overridden("classifier_head", forward=lambda own, self, x: own(self, x).softmax(-1)),
        expected_checks=(ORACLE,),
        module_pattern=r"classifier_head",
        why="probabilities instead of logits: the loss takes the softmax a second time",
    ),
)
