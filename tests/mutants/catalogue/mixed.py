"""Weights in the wrong place or spoiled, dtypes, reductions without an order, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import on, overridden

ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
CHATGLM_QKV = "transformer.encoder.layers.1.self_attention.query_key_value"


def _name(path: str) -> str:
    return path.replace(".", r"\.")


def _weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """A change of a module's weight in place."""

    def patch(module: Any) -> None:
        with torch.no_grad():
            module.weight.copy_(change(module.weight.clone()))

    return patch


def _swap(left: str, right: str) -> Callable[[nn.Module], None]:
    def patch(model: nn.Module) -> None:
        one, other = model.get_parameter(left), model.get_parameter(right)
        with torch.no_grad():
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    return patch


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    return change


def _rows_by_head(weight: torch.Tensor) -> torch.Tensor:
    """`heads | groups | groups` read as if each group held its own queries, keys and values."""
    head, heads, groups = 16, 4, 2
    query, key, value = weight.split([heads * head, groups * head, groups * head])
    per = heads // groups * head
    return torch.cat(
        [torch.cat((query[i * per :][:per], key[i * head :][:head], value[i * head :][:head])) for i in range(groups)]
    )


def _random_order(own: Any, self: Any, x: Any) -> Any:
    """The product's sum in another order at each call, as atomic additions give it."""
    order = torch.randperm(x.shape[-1])
    return nn.functional.linear(x[..., order], self.weight[:, order])


def _outside_autocast(own: Any, self: Any, x: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return own(self, x.float())


def _through_float8(own: Any, self: Any, x: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return (
            nn.functional.linear((x.float() / 64).to(torch.float8_e4m3fn).to(torch.bfloat16), self.weight.bfloat16())
            * 64
        )


MUTANTS = (
    Mutant(
        id="weights-of-keys-and-values-swapped",
        family="glm4",
        apply=_swap(f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"),
        expected_checks=("load.complete", ORACLE),
        module_pattern=_name(ATTENTION) + r"(\.[kv]_proj)?",
        why="k_proj and v_proj are mapped to each other",
    ),
    Mutant(
        id="weights-of-two-norms-swapped",
        family="glm",
        apply=_swap("model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
        expected_checks=("load.complete", ORACLE),
        module_pattern=r"model\.layers\.1\.(input|post_attention)_layernorm",
        why="two norms are mapped to each other",
    ),
    Mutant(
        id="weights-of-two-blocks-swapped",
        family="glm",
        apply=_swap("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"),
        expected_checks=("load.complete", ORACLE),
        module_pattern=r"model\.layers\.[12]\.mlp(\.down_proj)?",
        why="one weight goes to the neighbouring block",
    ),
    Mutant(
        id="weight-transposed",
        family="glm4",
        apply=on(f"{ATTENTION}.o_proj", _weight(lambda weight: weight.T)),
        expected_checks=("load.complete", ORACLE),
        module_pattern=_name(ATTENTION) + r"(\.o_proj)?",
        why="a square weight is stored as Conv1D stores it",
    ),
    Mutant(
        id="weight-rows-by-group",
        family="chatglm",
        apply=on(CHATGLM_QKV, _weight(_rows_by_head)),
        expected_checks=("load.complete", ORACLE),
        module_pattern=_name(CHATGLM_QKV).removesuffix(r"\.query_key_value") + r"(\.query_key_value)?",
        why="query_key_value is taken to be laid out by group, as Megatron does",
    ),
    Mutant(
        id="weight-rotary-rows-permuted-twice",
        family="glm",
        apply=on(
            f"{ATTENTION}.k_proj", _weight(lambda weight: weight.view(2, 8, 2, 64).transpose(1, 2).reshape(32, 64))
        ),
        expected_checks=("load.complete", ORACLE),
        module_pattern=_name(ATTENTION) + r"(\.k_proj)?",
        why="rows of the keys are permuted for Llama's rotation, which this model does not have",
    ),
    Mutant(
        id="weight-not-loaded",
        family="glm4",
        apply=on("model.layers.1.post_mlp_layernorm", _weight(torch.ones_like)),
        expected_checks=("load.complete", ORACLE),
        module_pattern=r"model\.layers\.1\.post_mlp_layernorm",
        why="a gain stays at its initial ones",
    ),
    Mutant(
        id="weight-through-fp8",
        family="glm",
        precision="bf16",
        apply=on(f"{MLP}.down_proj", _weight(lambda weight: weight.to(torch.float8_e4m3fn).to(weight.dtype))),
        expected_checks=("load.complete", ORACLE),
        module_pattern=_name(MLP) + r"(\.down_proj)?",
        why="a weight passed through float8",
    ),
    Mutant(
        id="weight-through-bf16",
        family="glm",
        apply=on(f"{MLP}.down_proj", _weight(lambda weight: weight.bfloat16().to(weight.dtype))),
        expected_checks=(),
        equivalent=True,
        why="the stored weights are bfloat16 already, so rounding them to it changes no bit",
    ),
    Mutant(
        id="weight-nan",
        family="glm4",
        precision="bf16",
        apply=on(f"{MLP}.down_proj", _weight(_with(float("nan")))),
        expected_checks=("load.finite",),
        module_pattern=_name(MLP) + r"\.down_proj",
        why="one NaN in one weight",
    ),
    Mutant(
        id="weight-infinite",
        family="chatglm",
        precision="fp16",
        apply=on(CHATGLM_QKV, _weight(_with(float("inf")))),
        expected_checks=("load.finite",),
        module_pattern=_name(CHATGLM_QKV),
        why="one infinity in one weight",
    ),
    Mutant(
        id="weight-in-fp32-under-bf16",
        kind="contract",
        family="chatglm",
        task="sequence-classification",
        precision="bf16",
        apply=on("classifier_head", lambda head: head.float()),
        expected_checks=("load.dtype",),
        module_pattern=r"classifier_head",
        why="one module stays in float32 and does not say so",
    ),
    Mutant(
        id="sum-without-an-order",
        kind="rounding",
        family="glm",
        apply=overridden(f"{ATTENTION}.o_proj", forward=_random_order),
        expected_checks=("forward.deterministic",),
        module_pattern=_name(ATTENTION) + r"\.o_proj",
        why="the order of a sum changes from call to call",
    ),
    Mutant(
        id="sum-without-an-order-bf16",
        kind="rounding",
        family="glm4",
        precision="bf16",
        apply=overridden(f"{MLP}.down_proj", forward=_random_order),
        expected_checks=(),
        why="the order of a sum of 128 bfloat16 products changes from call to call: their float32 sum is exact but for one "
        "in thousands, and the rounding to bfloat16 hides that one",
    ),
    Mutant(
        id="amp-product-in-float8",
        kind="worse",
        family="glm",
        precision="amp-bf16",
        apply=overridden(f"{MLP}.down_proj", forward=_through_float8),
        expected_checks=("reference.local", "reference.gradient"),
        module_pattern=_name(MLP) + r"\.down_proj",
        why="under autocast one product's input passes through float8",
    ),
    Mutant(
        id="amp-norm-in-bf16",
        kind="worse",
        family="chatglm",
        precision="amp-bf16",
        apply=overridden(
            "transformer.encoder.layers.1.post_attention_layernorm",
            forward=lambda own, self, x: own(self, x.bfloat16()).bfloat16().to(x.dtype),
        ),
        expected_checks=(),
        why="under autocast a norm's input and output are rounded to bfloat16, where they are kept in float32: a program "
        "that autocast may choose, so only a baseline shows it",
    ),
    Mutant(
        id="amp-product-kept-in-fp32",
        family="glm4",
        precision="amp-bf16",
        apply=overridden(MLP, forward=_outside_autocast),
        expected_checks=(),
        equivalent=True,
        why="one part runs outside autocast, in float32: slower, and nearer to the truth",
    ),
)
