"""Defects that `check`, a watched loop and a reopened bundle all can see; each factory gives a module and its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

VOCAB, WIDTH = 1000, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One row of the table.

    Attributes:
        factory: name of the function here.
        cause: that all three must name.
        remedies: that all three must verify, in this order.
        check: whose finding shows it.
        precision: recipe that the loop follows too.
        optimizer: of check and loop.
        lr: of check and loop.
    """

    factory: str
    cause: str
    remedies: tuple[str, ...] = ()
    check: str = "train.finite"
    precision: str = "fp32"
    optimizer: str = "adamw"
    lr: float = 1e-4


TABLE = (
    Defect(factory="uninitialised_head", cause="uninitialised-parameters", remedies=("init-head",)),
    Defect(
        factory="uninitialised_head",
        cause="uninitialised-parameters",
        precision="pure-fp16",
        remedies=("init-head", "larger-optimizer-eps"),
    ),
    Defect(factory="damaged_weight", cause="corrupt-weights"),
    Defect(
        factory="sound",
        cause="optimizer-underflow",
        precision="pure-fp16",
        remedies=("larger-optimizer-eps", "use-amp-bf16"),
    ),
    Defect(
        factory="loud_activation",
        cause="overflow",
        precision="amp-fp16",
        remedies=("use-amp-bf16", "keep-in-fp32"),
    ),
    Defect(
        factory="scores_beyond_float16",
        cause="overflow",
        precision="amp-fp16",
        remedies=("use-amp-bf16", "keep-in-fp32"),
    ),
    Defect(factory="masked_row", cause="fully-masked-row", remedies=("fix-padding",)),
    Defect(factory="sound", cause="divergence", optimizer="sgd", lr=300.0, remedies=("lower-learning-rate",)),
    Defect(
        factory="steep",
        cause="divergence",
        optimizer="sgd",
        lr=0.1,
        remedies=("clip-grad-norm", "lower-learning-rate"),
    ),
    Defect(
        factory="gradient_beyond_any_scale",
        cause="loss-scaling",
        check="train.amp",
        precision="amp-fp16",
        remedies=("use-amp-bf16", "disable-amp"),
    ),
    Defect(
        factory="floating_ids", cause="wrong-input-dtype", check="inputs.pipeline", remedies=("default-input-dtypes",)
    ),
    Defect(factory="root_of_zero", cause="invalid-operation"),
    Defect(factory="detached", cause="dead-gradient", check="train.grad-flow"),
    Defect(factory="nan_in_the_batch", cause="out-of-range-input"),
    Defect(factory="broken_sdpa", cause="invalid-operation", remedies=("eager-attention",)),
    Defect(
        factory="exponential_scores",
        cause="overflow",
        precision="amp-fp16",
        remedies=("use-amp-bf16", "keep-in-fp32"),
    ),
)


class Layer(nn.Module):
    """A gated feed-forward layer behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, hidden):
        return hidden + self.down(nn.functional.silu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """Two layers between an embedding and a head; the loss is computed in float32."""

    def __init__(self, layer=Layer, factor=1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([layer() for _ in range(2)])
        self.lm_head = nn.Linear(WIDTH, VOCAB)
        self.factor = factor

    def forward(self, input_ids, labels, attention_mask=None):
        hidden = self.embed(input_ids.long())
        for layer in self.layers:
            hidden = layer(hidden) if attention_mask is None else layer(hidden, attention_mask)
        logits = self.lm_head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) * self.factor
        return {"logits": logits, "loss": loss}


def batch():
    ids = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def sound():
    return Model(), batch()


def uninitialised_head():
    model = Model()
    model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, WIDTH))
    return model, batch()


def damaged_weight():
    model = Model()
    with torch.no_grad():
        model.layers[1].up.weight[3, 3] = float("nan")
    return model, batch()


def uninitialised_head_and_damaged_weight():
    model, tensors = damaged_weight()
    model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, WIDTH))
    return model, tensors


class Product(nn.Module):
    """A product that leaves float16 on the way; what is handed on does not."""

    def forward(self, inner):
        loud = inner * 1000.0
        return loud * loud * 1e-6


class Gated(Layer):
    """A feed-forward layer with such a product as its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act = Product()

    def forward(self, hidden):
        return hidden + self.down(self.act(self.up(self.norm(hidden))))


def loud_activation():
    return Model(Gated), batch()


class Attention(nn.Module):
    """Causal attention; a query whose every key is padding has a softmax over nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, attention_mask):
        scores = hidden @ hidden.transpose(1, 2) / WIDTH**0.5
        length = hidden.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask[:, None, :].bool()
        return hidden + self.out(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ hidden)


def masked_row():
    tensors = batch()
    mask = torch.ones_like(tensors["input_ids"])
    mask[0, :3] = 0
    return Model(Attention), {**tensors, "attention_mask": mask}


class Softmax(nn.Module):
    """Its exponential is taken without subtracting the largest score first."""

    def forward(self, scores):
        weights = scores.exp()
        return weights / weights.sum(-1, keepdim=True)


class Exponential(Layer):
    """Attention of every position to every other."""

    def __init__(self, core=Softmax) -> None:
        super().__init__()
        self.core = core()

    def forward(self, hidden):
        query = self.norm(hidden)
        return hidden + self.down(self.up(self.core(query @ query.transpose(1, 2)) @ query))


def exponential_scores():
    return Model(Exponential), batch()


class Scores(nn.Module):
    """Scores of queries and keys that were never divided by the root of their width."""

    def forward(self, scores):
        loud = scores * 4000.0
        return (loud - loud.amax(-1, keepdim=True)).softmax(-1)


def scores_beyond_float16():
    return Model(lambda: Exponential(Scores)), batch()


def steep():
    """A loss ten thousand times as large: the first step at this rate leaves every weight far behind."""
    return Model(factor=1e4), batch()


def gradient_beyond_any_scale():
    return Model(factor=1e9), batch()


def floating_ids():
    tensors = batch()
    return Model(), {**tensors, "input_ids": tensors["input_ids"].float()}


class Root(Layer):
    """The derivative of the root at 0 is infinite."""

    def forward(self, hidden):
        inner = super().forward(hidden)
        return inner + (hidden * 0).sqrt()


def root_of_zero():
    return Model(Root), batch()


class Regression(nn.Module):
    """One layer on features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, features):
        output = self.layer(features)
        return {"logits": output, "loss": output.square().mean()}


class Detached(Layer):
    """What the layer adds is cut off from the loss."""

    def forward(self, hidden):
        return hidden + (super().forward(hidden) - hidden).detach()


def detached():
    return Model(Detached), batch()


def nan_in_the_batch():
    features = torch.ones(3, 4)
    features[1, 2] = float("nan")
    return Regression(), {"features": features}


def broken_sdpa():
    """A language model of transformers whose attention is 0/0 where it is computed with sdpa."""
    from transformers import AutoModelForCausalLM

    from numerics_suite.subjects.fixtures import fixture_path

    model = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny"), attn_implementation="sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(_zero_by_zero)
    tensors = {name: value % model.config.vocab_size for name, value in batch().items()}
    return model, {**tensors, "attention_mask": torch.ones_like(tensors["input_ids"])}


def _zero_by_zero(module, _args, output):
    zero = output[0] * 0
    return (output[0] + zero / zero, *output[1:]) if module.config._attn_implementation == "sdpa" else output
