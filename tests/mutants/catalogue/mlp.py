"""Mistakes in the feed-forward part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, on, overridden

GLM, CHATGLM = "model.layers.1.mlp", "transformer.encoder.layers.1.mlp"
GLM_NAME, CHATGLM_NAME = GLM.replace(".", r"\."), CHATGLM.replace(".", r"\.")
PRODUCT, CHATGLM_PRODUCT = "up_states = up_states * self.activation_fn(gate)", "F.silu(gate) * up"


class QuickGelu(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Any) -> Any:
        return x * torch.sigmoid(1.702 * x)


def _in_bf16(own: Any, self: Any, x: Any) -> Any:
    return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


def _ten_bits(own: Any, self: Any, x: Any) -> Any:
    """What TF32 makes of a product: inputs keep 10 bits, sums are float32."""
    return nn.functional.linear(x.half().to(x.dtype), self.weight.half().to(x.dtype))


def _rounded_sums(own: Any, self: Any, x: Any) -> Any:
    """The product in four pieces whose sum is kept in the model's dtype."""
    total = torch.zeros((), dtype=x.dtype)
    for part, weight in zip(x.chunk(16, dim=-1), self.weight.chunk(16, dim=-1), strict=True):
        total = total + nn.functional.linear(part, weight)
    return total


def _coarse_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype == torch.float32:
        left, right = left.half().float(), right.half().float()
    return torch.bmm(left[None], right[None])[0]


def _coarse_kernel(own: Any, self: Any, x: Any) -> Any:
    """torch's product replaced, while this module runs, by one that keeps 10 bits of float32 inputs as TF32 does.

    The program asks for the same op, and in float64 the kernel is exact: only the kernel is at fault.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm", _coarse_product, "CPU")
        return own(self, x)


MUTANTS = (
    Mutant(
        id="mlp-gate-and-up-swapped",
        family="glm4",
        apply=edited(GLM, "forward", "gate, up_states = up_states.chunk", "up_states, gate = up_states.chunk"),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="the rows of gate_up_proj are read as up | gate",
    ),
    Mutant(
        id="mlp-gate-and-up-swapped-chatglm",
        family="chatglm",
        apply=edited(CHATGLM, "forward", "gate, up = self", "up, gate = self"),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="the rows of dense_h_to_4h are read as up | gate",
    ),
    Mutant(
        id="mlp-gate-and-up-interleaved",
        family="glm",
        apply=edited(
            GLM,
            "forward",
            "gate, up_states = up_states.chunk(2, dim=-1)",
            "gate, up_states = up_states[..., 0::2], up_states[..., 1::2]",
        ),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="gate and up are read as neighbouring rows, as some checkpoints store them",
    ),
    Mutant(
        id="mlp-gelu",
        family="glm",
        apply=on(GLM, lambda mlp: setattr(mlp, "activation_fn", nn.GELU())),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME + r"(\.activation_fn)?",
        why="GELU instead of SiLU",
    ),
    Mutant(
        id="mlp-quick-gelu",
        family="glm4",
        apply=on(GLM, lambda mlp: setattr(mlp, "activation_fn", QuickGelu())),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME + r"(\.activation_fn)?",
        why="x · sigmoid(1.702 x) instead of x · sigmoid(x)",
    ),
    Mutant(
        id="mlp-relu-chatglm",
        family="chatglm",
        apply=edited(CHATGLM, "forward", CHATGLM_PRODUCT, "F.relu(gate) * up"),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="ReLU instead of SiLU",
    ),
    Mutant(
        id="mlp-gate-without-activation",
        family="glm",
        apply=edited(GLM, "forward", PRODUCT, "up_states = up_states * gate"),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="a bilinear gate",
    ),
    Mutant(
        id="mlp-up-dropped",
        family="glm",
        apply=edited(GLM, "forward", PRODUCT, "up_states = self.activation_fn(gate)"),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="the plain feed-forward part of older models: half of gate_up_proj is not used",
    ),
    Mutant(
        id="mlp-clipped",
        family="glm4",
        apply=edited(GLM, "forward", PRODUCT, PRODUCT + ".clamp(max=7.0)"),
        expected_checks=(),
        why="the product is clipped at 7, which no state of these small weights reaches; it takes a checkpoint with large "
        "activations to see it",
    ),
    Mutant(
        id="mlp-clipped-at-one",
        family="glm4",
        apply=edited(GLM, "forward", PRODUCT, PRODUCT + ".clamp(max=1.0)"),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="the gate is clipped at 1",
    ),
    Mutant(
        id="mlp-down-in-bf16",
        kind="worse",
        family="glm4",
        apply=overridden(GLM + ".down_proj", forward=_in_bf16),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME + r"\.down_proj",
        why="one product in bfloat16 in an fp32 model",
    ),
    Mutant(
        id="mlp-down-at-ten-bits",
        kind="worse",
        family="glm",
        apply=overridden(GLM + ".down_proj", forward=_ten_bits),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME + r"\.down_proj",
        why="inputs of one product are rounded to 10 bits, as TF32 does",
    ),
    Mutant(
        id="mlp-kernel-at-ten-bits",
        kind="worse",
        family="glm4",
        apply=overridden(GLM + ".down_proj", forward=_coarse_kernel),
        expected_checks=("reference.end-to-end", "reference.local"),
        module_pattern=GLM_NAME + r"\.down_proj",
        why="a kernel of one product rounds its inputs to 10 bits, as TF32 left on: the program is right",
    ),
    Mutant(
        id="mlp-sums-in-bf16",
        kind="worse",
        family="glm",
        precision="bf16",
        apply=overridden(GLM + ".down_proj", forward=_rounded_sums),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME + r"\.down_proj",
        why="partial sums of one product are kept in bfloat16, as a split-K kernel without float32 accumulation does",
    ),
    Mutant(
        id="mlp-activation-in-fp16",
        kind="worse",
        family="chatglm",
        apply=edited(CHATGLM, "forward", CHATGLM_PRODUCT, "F.silu(gate.half()).to(gate.dtype) * up"),
        expected_checks=("reference.local",),
        module_pattern=CHATGLM_NAME,
        why="the activation runs in float16 in an fp32 model",
    ),
)
