"""Defects that make a value non-finite, each with where it begins: module, op, pass, source line, cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mutants.editing import Patch, edited, on, other_loss, overridden

HERE = Path(__file__)
GLM_FILE, GLM4_FILE, CHATGLM_FILE = "modeling_glm.py", "modeling_glm4.py", "modeling_chatglm.py"
MLP, GLM_PRODUCT = "model.layers.1.mlp", "up_states = up_states * self.activation_fn(gate)"
CHATGLM_MLP, CHATGLM_PRODUCT = "transformer.encoder.layers.1.mlp", "F.silu(gate) * up"
SCORES = "attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling"
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One defect and what a right answer names.

    Every expectation follows from what was changed, not from what any tool says.

    Attributes:
        id: unique, lower case with hyphens.
        why: the mistake.
        fixture: the checkpoint.
        apply: changes a freshly loaded model.
        check: that must find it.
        module: dotted name; "" where no module but the model itself is at fault; None where no place is foreseen.
        ops: names that are right; empty where none is foreseen.
        file: name of the source file.
        text: of the line at fault, searched for in that file; None where no line is foreseen.
        causes: that are right, by the vocabulary of the contract.
        backward: it happens in the backward pass.
        nodes: autograd nodes that `detect_anomaly` may name; forward defects have none, as it watches backward only.
        which: index of the line among those that hold the text.
        config: keys of config.json to change, in a copy of the checkpoint.
        settings: more of the command's options.
    """

    id: str
    why: str
    fixture: str
    check: str
    module: str | None
    ops: tuple[str, ...]
    file: str
    text: str | None
    causes: tuple[str, ...]
    apply: Patch | None = None
    precision: str = "fp32"
    attn: str = "eager"
    backward: bool = False
    nodes: tuple[str, ...] = ()
    which: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def both(*patches: Patch) -> Patch:
    """One patch after the other."""

    def patch(model: nn.Module) -> None:
        for one in patches:
            one(model)

    return patch


def scaled(factor: float, *paths: str) -> Patch:
    """Weights times a factor."""

    def patch(model: nn.Module) -> None:
        with torch.no_grad():
            for path in paths:
                model.get_submodule(path).weight.mul_(factor)

    return patch


def checkpointed(*, reentrant: bool) -> Patch:
    """Activation checkpointing of every block."""

    def patch(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()  # the suite trains in the mode that it finds, and only training mode checkpoints

    return patch


def _spoiled(path: str, value: float) -> Patch:
    def patch(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_submodule(path).weight[3, 5] = value

    return patch


class NanBackward(torch.autograd.Function):
    """A hand-written backward that divides 0 by 0."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient / (gradient - gradient)  # NanBackward


def _zero_by_zero(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x)
    return states / (states - states)  # _zero_by_zero


def _log(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x)
    return torch.log(states - states.detach().amax() - 1)  # _log


def _log_of_zero(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x)
    return torch.log(states * 0) * 0  # _log_of_zero


def _root(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x)
    return states + 0.0 * torch.sqrt((states - states).clamp(min=0))  # _root


def _exponential(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x).half()
    return torch.exp(states - states.detach() + 12)  # _exponential


def _hand_written(own: Any, self: Any, x: Any) -> Any:
    return NanBackward.apply(own(self, x))


def _steep(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x)
    return states + 1e9 * (states - states.detach())  # _steep


def _loud(own: Any, self: Any, x: Any) -> Any:
    return own(self, x) * 1e7  # _loud


def _through_half(own: Any, self: Any, x: Any) -> Any:
    return (own(self, x) * 0 + 1e5).half().to(x.dtype)  # _through_half


def _in_place(own: Any, self: Any, x: Any) -> Any:
    states = own(self, x).clone()
    states.sub_(states).div_(0.0)  # _in_place
    return states


def _thrown_away(own: Any, self: Any, x: Any) -> Any:
    """A division by zero whose result is not used: right in the forward pass, and no origin of anything there."""
    states = own(self, x)
    return torch.where(torch.ones_like(states, dtype=torch.bool), states, states / (states - states))


def _near(value: float) -> Callable[..., Any]:
    def forward(own: Any, self: Any, x: Any) -> Any:
        return own(self, x) * 0 + value

    return forward


def _attends_to(value: float) -> Callable[..., Any]:
    def forward(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        states, *rest = own(self, *args, **kwargs)
        return (states * 0 + value, *rest)

    return forward


def _mean_over_none(own: Any, *, logits: Any, labels: Any, **kwargs: Any) -> Any:
    counted = (labels < 0) & (labels != -100)
    return (logits.float().sum(-1) * counted).sum() / counted.sum()  # _mean_over_none


def _infinite_table(model: Any) -> None:
    model.model.rotary_emb.inv_freq.fill_(float("inf"))


def _zero_pad(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = 0


FULLY_MASKED = edited(
    "model.layers.1.self_attn",
    "eager_attention_forward",
    "softmax(attn_weights, dim=-1",
    "softmax(attn_weights.masked_fill(attn_weights < -1e30, float('-inf')), dim=-1",
)
DIVISIONS = ("aten.div.Tensor",)
OVERRIDES = HERE.name
LOUD_QUERIES = edited(
    "transformer.encoder.layers.1.self_attention",
    "forward",
    "query, key = apply_rotary_pos_emb(query, *rotary), apply_rotary_pos_emb(key, *rotary)",
    "query, key = apply_rotary_pos_emb(query, *rotary) * 1e22, apply_rotary_pos_emb(key, *rotary) * 1e22",
)

DEFECTS = (
    Defect(
        id="head-uninitialised",
        why="nobody writes the new head",
        fixture="chatglm-tiny",
        config={"legacy_skip_head_init": True},
        settings={"task": "sequence-classification"},
        precision="bf16",
        check="forward.finite",
        module="classifier_head",
        ops=PRODUCTS,
        file=CHATGLM_FILE,
        text="self.classifier_head(",
        causes=("uninitialised-parameters",),
    ),
    Defect(
        id="head-uninitialised-in-training",
        why="nobody writes the new head; seen from training",
        fixture="chatglm-tiny",
        config={"legacy_skip_head_init": True},
        settings={"task": "sequence-classification"},
        check="train.finite",
        module="classifier_head",
        ops=PRODUCTS,
        file=CHATGLM_FILE,
        text="self.classifier_head(",
        causes=("uninitialised-parameters",),
    ),
    Defect(
        id="mlp-product-fp16",
        why="gate times up leaves float16's range",
        fixture="glm-tiny",
        precision="fp16",
        apply=scaled(300, MLP + ".gate_up_proj"),
        check="forward.finite",
        module=MLP,
        ops=("aten.mul.Tensor",),
        file=GLM_FILE,
        text=GLM_PRODUCT,
        causes=("overflow",),
    ),
    Defect(
        id="mlp-product-amp-fp16",
        why="gate times up leaves float16's range under autocast",
        fixture="glm4-tiny",
        precision="amp-fp16",
        attn="sdpa",
        apply=scaled(2000, MLP + ".gate_up_proj"),
        check="forward.finite",
        module=MLP,
        ops=("aten.mul.Tensor",),
        file=GLM4_FILE,
        text=GLM_PRODUCT,
        causes=("overflow",),
    ),
    Defect(
        id="scores-fp16-eager",
        why="queries times keys leave float16's range",
        fixture="glm4-tiny",
        precision="fp16",
        apply=scaled(1000, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"),
        check="forward.finite",
        module="model.layers.1.self_attn",
        ops=PRODUCTS,
        file=GLM4_FILE,
        text=SCORES,
        causes=("overflow",),
    ),
    Defect(
        id="scores-bf16-sdpa",
        why="scores leave float32's range inside the fused kernel",
        fixture="chatglm-tiny",
        precision="bf16",
        attn="sdpa",
        apply=LOUD_QUERIES,
        check="forward.finite",
        module="transformer.encoder.layers.1.self_attention",
        ops=("aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_efficient_attention"),
        file=CHATGLM_FILE,
        text="return F.scaled_dot_product_attention(",
        causes=("overflow",),
    ),
    Defect(
        id="norm-without-fp32",
        why="squares of small states are 0 in float16 and eps is too small for it: the root of 0",
        fixture="glm4-tiny",
        precision="fp16",
        apply=both(
            edited(
                "model.layers.1.input_layernorm", "forward", "hidden_states.to(torch.float32)", "hidden_states * 1e-5"
            ),
            on("model.layers.1.input_layernorm", lambda norm: setattr(norm, "variance_epsilon", 1e-8)),
        ),
        check="forward.finite",
        module="model.layers.1.input_layernorm",
        ops=("aten.rsqrt",),
        file=GLM4_FILE,
        text="torch.rsqrt(variance + self.variance_epsilon)",
        causes=("underflow", "low-precision-section"),
    ),
    Defect(
        id="masked-row-eager",
        why="a padded query sees no key",
        fixture="glm-tiny",
        precision="bf16",
        apply=FULLY_MASKED,
        check="forward.finite",
        module="model.layers.1.self_attn",
        ops=("aten._softmax", "aten.softmax.int"),
        file=GLM_FILE,
        text="nn.functional.softmax(attn_weights, dim=-1",
        causes=("fully-masked-row",),
    ),
    Defect(
        id="masked-row-chatglm",
        why="the first query may not see itself",
        fixture="chatglm-tiny",
        apply=edited("transformer", "_allowed_keys", "(keys <= queries)[None, None]", "(keys < queries)[None, None]"),
        check="forward.finite",
        module="transformer.encoder.layers.0.self_attention",
        ops=("aten._softmax", "aten.softmax.int"),
        file=CHATGLM_FILE,
        text='weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)',
        causes=("fully-masked-row",),
    ),
    Defect(
        id="zero-by-zero-embedding",
        why="states are divided by 0",
        fixture="glm-tiny",
        apply=overridden("model.embed_tokens", forward=_zero_by_zero),
        check="forward.finite",
        module="model.embed_tokens",
        ops=DIVISIONS,
        file=OVERRIDES,
        text="# _zero_by_zero",
        causes=("invalid-operation",),
    ),
    Defect(
        id="reciprocal-root-of-zero",
        why="a norm without eps meets the pad id's row of zeros",
        fixture="glm4-tiny",
        apply=both(_zero_pad, on("model.layers.0.input_layernorm", lambda n: setattr(n, "variance_epsilon", 0.0))),
        check="forward.finite",
        module="model.layers.0.input_layernorm",
        ops=("aten.rsqrt",),
        file=GLM4_FILE,
        text="torch.rsqrt(variance + self.variance_epsilon)",
        causes=("invalid-operation",),
    ),
    Defect(
        id="log-of-a-negative",
        why="the logarithm of what has none",
        fixture="chatglm-tiny",
        precision="bf16",
        attn="sdpa",
        apply=overridden(CHATGLM_MLP, forward=_log),
        check="forward.finite",
        module=CHATGLM_MLP,
        ops=("aten.log",),
        file=OVERRIDES,
        text="# _log",
        causes=("invalid-operation",),
    ),
    Defect(
        id="log-of-zero",
        why="minus infinity times 0: the logarithm made it",
        fixture="glm-tiny",
        apply=overridden(MLP, forward=_log_of_zero),
        check="forward.finite",
        module=MLP,
        ops=("aten.log",),
        file=OVERRIDES,
        text="# _log_of_zero",
        causes=("invalid-operation",),
    ),
    Defect(
        id="root-of-zero-backward",
        why="the root's derivative at 0 is infinite, and 0 times it is NaN",
        fixture="glm-tiny",
        apply=overridden(MLP, forward=_root),
        check="train.finite",
        module=MLP,
        ops=DIVISIONS,
        file=OVERRIDES,
        text="# _root",
        causes=("invalid-operation",),
        backward=True,
        nodes=("SqrtBackward0",),
    ),
    Defect(
        id="exponential-amp-fp16",
        why="e**12 in float16",
        fixture="glm4-tiny",
        precision="amp-fp16",
        apply=overridden(MLP, forward=_exponential),
        check="forward.finite",
        module=MLP,
        ops=("aten.exp",),
        file=OVERRIDES,
        text="# _exponential",
        causes=("overflow",),
    ),
    Defect(
        id="weight-nan",
        why="one NaN in one weight",
        fixture="glm4-tiny",
        precision="bf16",
        apply=_spoiled(MLP + ".down_proj", float("nan")),
        check="forward.finite",
        module=MLP + ".down_proj",
        ops=PRODUCTS,
        file=GLM4_FILE,
        text="return self.down_proj(up_states)",
        causes=("corrupt-weights",),
    ),
    Defect(
        id="weight-infinite-training",
        why="one infinity in one weight, seen from training",
        fixture="chatglm-tiny",
        apply=_spoiled(CHATGLM_MLP + ".dense_4h_to_h", float("inf")),
        check="train.finite",
        module=CHATGLM_MLP + ".dense_4h_to_h",
        ops=PRODUCTS,
        file=CHATGLM_FILE,
        text="return self.dense_4h_to_h(F.silu(gate) * up)",
        causes=("corrupt-weights",),
    ),
    Defect(
        id="buffer-infinite",
        why="the table of frequencies is infinite",
        fixture="glm-tiny",
        attn="sdpa",
        apply=_infinite_table,
        check="forward.finite",
        module="model.rotary_emb",
        ops=("aten.mul.Tensor",),
        file=GLM_FILE,
        text="freqs = position_ids[..., None].float() * self.inv_freq",
        causes=("corrupt-weights",),
    ),
    Defect(
        id="loss-over-no-labels",
        why="a mean over labels of which none counts",
        fixture="glm-tiny",
        apply=other_loss(_mean_over_none),
        check="train.finite",
        module="",
        ops=DIVISIONS,
        file=OVERRIDES,
        text="# _mean_over_none",
        causes=("invalid-operation", "wrong-loss"),
    ),
    Defect(
        id="hand-written-backward",
        why="a custom autograd.Function whose backward divides 0 by 0",
        fixture="glm4-tiny",
        apply=overridden(MLP, forward=_hand_written),
        check="train.finite",
        module=MLP,
        ops=DIVISIONS,
        file=OVERRIDES,
        text="# NanBackward",
        causes=("invalid-operation",),
        backward=True,
        nodes=("NanBackwardBackward",),
    ),
    Defect(
        id="gradient-beyond-any-scale",
        why="a gradient that float16 cannot hold at any loss scale",
        fixture="glm-tiny",
        precision="amp-fp16",
        apply=overridden(MLP, forward=_steep),
        check="train.amp",
        module=MLP,
        ops=("aten.mul.Tensor", "aten.mul.Scalar"),
        file=OVERRIDES,
        text="# _steep",
        causes=("loss-scaling",),
        backward=True,
        nodes=("MulBackward0",),
    ),
    *(
        Defect(
            id=f"checkpointing-{word}-forward",
            why=f"0/0 within a checkpointed block ({word})",
            fixture=fixture,
            apply=both(overridden(path, forward=_zero_by_zero), checkpointed(reentrant=reentrant)),
            check="train.finite",
            module=path,
            ops=DIVISIONS,
            file=OVERRIDES,
            text="# _zero_by_zero",
            causes=("invalid-operation",),
        )
        for word, reentrant, fixture, path in (
            ("reentrant", True, "glm-tiny", MLP),
            ("not-reentrant", False, "chatglm-tiny", CHATGLM_MLP),
        )
    ),
    *(
        Defect(
            id=f"checkpointing-{word}-backward",
            why=f"the root of 0 within a checkpointed block ({word})",
            fixture=fixture,
            apply=both(overridden(path, forward=_root), checkpointed(reentrant=reentrant)),
            check="train.finite",
            module=path,
            ops=DIVISIONS,
            file=OVERRIDES,
            text="# _root",
            causes=("invalid-operation",),
            backward=True,
            nodes=("SqrtBackward0",),
        )
        for word, reentrant, fixture, path in (
            ("reentrant", True, "glm4-tiny", MLP),
            ("not-reentrant", False, "glm-tiny", MLP),
        )
    ),
    Defect(
        id="remote-code",
        why="gate divided by 0 in the checkpoint's own code",
        fixture="chatglm-tiny",
        attn="sdpa",
        apply=edited(CHATGLM_MLP, "forward", CHATGLM_PRODUCT, "F.silu(gate) / (up - up)"),
        check="forward.finite",
        module=CHATGLM_MLP,
        ops=DIVISIONS,
        file=CHATGLM_FILE,
        text=CHATGLM_PRODUCT,
        causes=("invalid-operation",),
    ),
    Defect(
        id="embedding-fp16",
        why="embedded states leave float16's range",
        fixture="glm-tiny",
        precision="fp16",
        apply=overridden("model.embed_tokens", forward=_loud),
        check="forward.finite",
        module="model.embed_tokens",
        ops=("aten.mul.Tensor", "aten.mul.Scalar"),
        file=OVERRIDES,
        text="# _loud",
        causes=("overflow",),
    ),
    Defect(
        id="residual-fp16",
        why="state plus change leaves float16's range",
        fixture="glm-tiny",
        precision="fp16",
        attn="sdpa",
        apply=both(
            overridden("model.layers.1.self_attn", forward=_attends_to(4e4)), overridden(MLP, forward=_near(4e4))
        ),
        check="forward.finite",
        module="model.layers.1",
        ops=("aten.add.Tensor",),
        file=GLM_FILE,
        text="hidden_states = residual + hidden_states",
        which=1,
        causes=("overflow",),
    ),
    Defect(
        id="outside-every-module",
        why="the model's own forward pass takes a logarithm of what has none",
        fixture="chatglm-tiny",
        apply=edited(
            "",
            "forward",
            "logits = self.transformer.output_layer(body.last_hidden_state[:, -logits_to_keep:])",
            "logits = (self.transformer.output_layer(body.last_hidden_state[:, -logits_to_keep:]).abs() * -1 - 1).log()",
        ),
        check="forward.finite",
        module="",
        ops=("aten.log",),
        file=CHATGLM_FILE,
        text="logits = self.transformer.output_layer(",
        causes=("invalid-operation",),
    ),
    Defect(
        id="thrown-away-before",
        why="0/0 that a where throws away in block 0, and the one that matters in block 1",
        fixture="glm4-tiny",
        apply=both(
            overridden("model.layers.0.mlp", forward=_thrown_away),
            overridden(MLP, forward=_log),
        ),
        check="forward.finite",
        module=MLP,
        ops=("aten.log",),
        file=OVERRIDES,
        text="# _log",
        causes=("invalid-operation",),
    ),
    Defect(
        id="cast-to-fp16",
        why="100,000 passes through float16 in an fp32 model",
        fixture="chatglm-tiny",
        apply=overridden(CHATGLM_MLP, forward=_through_half),
        check="forward.finite",
        module=CHATGLM_MLP,
        ops=("aten._to_copy",),
        file=OVERRIDES,
        text="# _through_half",
        causes=("overflow",),
    ),
    Defect(
        id="in-place",
        why="0/0 in place",
        fixture="glm-tiny",
        precision="bf16",
        apply=overridden(MLP, forward=_in_place),
        check="forward.finite",
        module=MLP,
        ops=("aten.div_.Tensor", "aten.div_.Scalar"),
        file=OVERRIDES,
        text="# _in_place",
        causes=("invalid-operation",),
    ),
    Defect(
        id="optimizer-eps-fp16",
        why="AdamW's eps is 0 in float16, so rows that no gradient reaches become 0/0",
        fixture="glm-tiny",
        precision="pure-fp16",
        check="train.finite",
        module="model.embed_tokens",
        ops=("aten.addcdiv_", "aten.div_.Tensor", "aten.div.Tensor"),
        file="adam.py",
        text=None,
        causes=("optimizer-underflow",),
    ),
    Defect(
        id="learning-rate-too-large",
        why="SGD with a learning rate of 1e30",
        fixture="glm-tiny",
        check="train.finite",
        module=None,
        ops=(),
        file="",
        text=None,
        causes=("divergence",),
        settings={"optimizer": "sgd", "lr": 1e30},
    ),
)


def line_of(defect: Defect, file: Path) -> int:
    """The number of the line at fault, searched for in the source."""
    wanted = defect.text or ""
    ends = wanted.startswith("# ")  # a mark behind the line; those of the catalogue itself stand in quotes
    numbers = [
        number
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if (line.endswith("  " + wanted) if ends else wanted in line)
    ]
    return numbers[defect.which]
