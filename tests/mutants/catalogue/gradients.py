"""Mistakes that the forward pass does not show: detached tensors, spoiled buffers, checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import NoSuchPlaceError, edit, edited, on, overridden, override

ATTENTION, MLP, BLOCK = "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1"
CHATGLM_STACK, CHATGLM_MLP = "transformer.encoder", "transformer.encoder.layers.1.mlp"
RUN = "self._gradient_checkpointing_func(run, hidden_states, allowed, rotary, None)"


def _name(path: str, *below: str) -> str:
    return path.replace(".", r"\.") + (rf"(\.({'|'.join(below)}))?" if below else "")


def _without_graph(own: Any, self: Any, x: Any) -> Any:
    with torch.no_grad():
        return own(self, x)


def _spoiled_afterwards(own: Any, self: Any, x: Any) -> Any:
    """The product, and then its saved input is changed behind autograd's back."""
    kept = x.clone()
    output = own(self, kept)
    kept.data.mul_(1.5)
    return output


def _doubled(own: Any, self: Any, x: Any) -> Any:
    output = own(self, x)
    return output + (output - output.detach())


def _against_the_loss(own: Any, self: Any, x: Any) -> Any:
    output = own(self, x)
    return 2 * output.detach() - output


def _with_its_first_value(linear: nn.Linear) -> None:
    """The weight is copied from elsewhere before each call: what the optimizer did to it is gone."""
    linear.first = linear.weight.detach().clone()  # type: ignore[assignment]
    override(linear, forward=_rewritten)


def _rewritten(own: Any, self: Any, x: Any) -> Any:
    self.weight.data.copy_(self.first)
    return own(self, x)


def _nan_backwards(own: Any, self: Any, x: Any) -> Any:
    """The root of a clamped value: 0 in the forward pass, 0 times infinity in the backward pass."""
    output = own(self, x)
    return output + 0.0 * torch.sqrt((output - output).clamp(min=0))


def _clipped_backwards(own: Any, self: Any, x: Any) -> Any:
    """A straight-through estimator around a clamp: forward as it was, gradient zero where the state is large."""
    output = own(self, x)
    return output.detach() + (output.clamp(-1, 1) - output.clamp(-1, 1).detach())


def _residual_detached_when_checkpointed(block: nn.Module) -> None:
    if not hasattr(block, "gradient_checkpointing"):
        message = "before 4.53 a block does not know whether it is checkpointed"
        raise NoSuchPlaceError(message)
    detached = "residual = hidden_states.detach() if self.gradient_checkpointing and self.training else hidden_states"
    edit(block, "forward", "residual = hidden_states", detached, which=1)


MUTANTS = (
    Mutant(
        id="gradient-of-keys-detached",
        family="glm",
        apply=edited(ATTENTION, "forward", "self.k_proj(hidden_states)", "self.k_proj(hidden_states).detach()"),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=_name(ATTENTION, "k_proj"),
        why="keys are detached, as for a frozen cache",
    ),
    Mutant(
        id="gradient-of-gate-detached",
        family="glm4",
        apply=edited(MLP, "forward", "self.activation_fn(gate)", "self.activation_fn(gate.detach())"),
        expected_checks=(ORACLE,),
        module_pattern=_name(MLP, "gate_up_proj"),
        why="the gate is detached: half of gate_up_proj's gradient is zero",
    ),
    Mutant(
        id="gradient-of-residual-detached",
        family="glm",
        apply=edited(BLOCK, "forward", "residual = hidden_states", "residual = hidden_states.detach()", which=0),
        expected_checks=(ORACLE,),
        module_pattern=_name(BLOCK) + r"(\..*)?|model\.layers\.0(\..*)?|model\.embed_tokens",
        why="the residual is detached: earlier layers learn through attention only",
    ),
    Mutant(
        id="gradient-of-embedding-detached",
        family="glm4",
        apply=overridden("model.embed_tokens", forward=lambda own, self, ids: own(self, ids).detach()),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=r"model\.embed_tokens",
        why="the embedding is detached",
    ),
    Mutant(
        id="gradient-off-in-mlp",
        family="chatglm",
        apply=overridden(CHATGLM_MLP, forward=_without_graph),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=_name(CHATGLM_MLP, "dense_h_to_4h", "dense_4h_to_h"),
        why="no_grad left around a feed-forward part",
    ),
    Mutant(
        id="gradient-of-norm-s-gain-detached",
        family="glm",
        apply=edited(
            "model.layers.1.input_layernorm", "forward", "return self.weight *", "return self.weight.detach() *"
        ),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=r"model\.layers\.1\.input_layernorm",
        why="the gain is detached",
    ),
    Mutant(
        id="gradient-of-norm-s-statistic-detached",
        family="glm4",
        apply=edited(
            "model.layers.1.input_layernorm", "forward", ".mean(-1, keepdim=True)", ".mean(-1, keepdim=True).detach()"
        ),
        expected_checks=(ORACLE,),
        module_pattern=r"model\.layers\.1\.input_layernorm|model\.layers\.0(\..*)?|model\.embed_tokens",
        why="the root mean square is taken for a constant in the backward pass",
    ),
    Mutant(
        id="gradient-frozen-weight",
        family="glm",
        apply=on(MLP + ".down_proj", lambda linear: linear.weight.requires_grad_(False)),
        expected_checks=(ORACLE, "train.grad-flow"),
        module_pattern=_name(MLP, "down_proj"),
        why="one weight was left frozen",
    ),
    Mutant(
        id="gradient-undone-by-a-copy",
        family="glm4",
        apply=on(MLP + ".down_proj", _with_its_first_value),
        expected_checks=("train.updates",),
        module_pattern=_name(MLP, "down_proj"),
        why="each call copies the weight from elsewhere, so that no step of the optimizer lasts",
    ),
    Mutant(
        id="gradient-spoiled-in-place",
        family="glm4",
        apply=overridden(MLP + ".down_proj", forward=_spoiled_afterwards),
        expected_checks=(ORACLE,),
        module_pattern=_name(MLP, "down_proj"),
        why="a buffer that the backward pass needs is reused behind autograd's back",
    ),
    Mutant(
        id="gradient-doubled",
        family="glm",
        apply=overridden(MLP + ".down_proj", forward=_doubled),
        expected_checks=(ORACLE,),
        module_pattern=_name(MLP, "down_proj"),
        why="a hand-written backward counts one path twice",
    ),
    Mutant(
        id="gradient-against-the-loss",
        family="glm4",
        apply=overridden("lm_head", forward=_against_the_loss),
        expected_checks=("train.descends", ORACLE),
        module_pattern=r"lm_head",
        why="a hand-written backward has the wrong sign, so every step climbs",
    ),
    Mutant(
        id="gradient-nan-in-backward",
        family="glm4",
        apply=overridden(MLP, forward=_nan_backwards),
        expected_checks=("train.finite",),
        module_pattern=_name(MLP, "down_proj"),
        why="the root of zero: the forward pass is right, the backward pass is 0 times infinity",
    ),
    Mutant(
        id="gradient-through-clamp",
        family="chatglm",
        apply=overridden(CHATGLM_MLP, forward=_clipped_backwards),
        expected_checks=(ORACLE,),
        module_pattern=_name(CHATGLM_MLP, "dense_h_to_4h", "dense_4h_to_h"),
        why="a straight-through estimator left in from quantisation-aware training",
    ),
    Mutant(
        id="gradient-of-classifier-body-detached",
        family="glm",
        task="sequence-classification",
        apply=overridden("score", forward=lambda own, self, x: own(self, x.detach())),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=r"model\..*|score",
        why="the head reads detached states, so the body never learns",
    ),
    Mutant(
        id="gradient-through-fp16",
        kind="worse",
        family="glm",
        apply=overridden(
            ATTENTION + ".o_proj",
            forward=lambda own, self, x: own(self, x.detach() + (x - x.detach()).half().to(x.dtype)),
        ),
        expected_checks=("reference.gradient",),
        module_pattern=_name(ATTENTION, "o_proj"),
        why="the gradient passes through float16 on its way back",
    ),
    Mutant(
        id="checkpointing-detaches",
        family="chatglm",
        apply=edited(CHATGLM_STACK, "forward", RUN, RUN.replace("hidden_states,", "hidden_states.detach(),")),
        expected_checks=("train.checkpointing",),
        module_pattern=r"transformer\.(embedding\.word_embeddings|encoder(\..*)?)",
        why="under checkpointing each block starts from a detached state",
    ),
    Mutant(
        id="checkpointing-loses-mask",
        family="chatglm",
        apply=edited(CHATGLM_STACK, "forward", RUN, RUN.replace("allowed", "None")),
        expected_checks=("train.checkpointing",),
        module_pattern=r"transformer\.(embedding\.word_embeddings|encoder(\..*)?|output_layer)",
        why="under checkpointing the padding mask is not handed on",
    ),
    Mutant(
        id="checkpointing-drops-residual-gradient",
        family="glm",
        apply=on(BLOCK, _residual_detached_when_checkpointed),
        expected_checks=("train.checkpointing",),
        module_pattern=_name(BLOCK) + r"(\..*)?|model\.layers\.0(\..*)?|model\.embed_tokens",
        why="under checkpointing the residual passes no gradient",
    ),
    Mutant(
        id="training-scales-states",
        family="glm4",
        apply=overridden(MLP, forward=lambda own, self, x: own(self, x) * (0.9 if self.training else 1.0)),
        expected_checks=("train.checkpointing",),
        why="another function in training mode than in eval mode (a layer scale that is only on in training); gradients "
        "are compared, and no module is looked for",
    ),
)
