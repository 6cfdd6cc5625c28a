"""The record that describes a family of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["norm", "rotary", "attention", "mlp", "block"]
Role = Literal[Kind, "linear", "embedding", "other"]
Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Properties of an architecture that are known before a model is built.

    Class names are matched as the end of `type(module).__name__`, so the generic family can say `RMSNorm` for all.

    Attributes:
        name: `glm`, `glm4`, `chatglm`, `glm4_moe`, `generic`, or another package's.
        model_types: values of `model_type` in `config.json` that belong to it.
        first_release: the first transformers release that has it, None for remote code and for `generic`.
        head_names: attribute names of a classification head.
        lm_head_names: attribute names of the output layer of a language model.
        backbone_names: attribute names of the body inside the model with a head.
        pooling: how a sequence classifier finds its row: by the pad id in `input_ids`, the last column, or unknown.
        padding_sides: the sides that it may be padded on; laws apply to these only.
        causal: a token sees only those before it; an encoder sees both sides.
        norm_classes: class names of its norms.
        rotary_classes: class names of its rotary embedding.
        attention_classes: class names of its attention.
        mlp_classes: class names of its feed-forward part.
        block_classes: class names of its decoder block.
        embedding_suffixes: how the name of the stored input embedding ends.
        packs: its class in transformers keeps packed rows apart by `position_ids` where the release can, and by a block-diagonal mask in any.
        has_oracle: its definition is written in `definitions/`, or comes with it in :class:`AddedFamily`.
    """

    name: str
    model_types: tuple[str, ...]
    first_release: str | None = None
    head_names: tuple[str, ...] = ("score",)
    lm_head_names: tuple[str, ...] = ("lm_head",)
    backbone_names: tuple[str, ...] = ("model",)
    pooling: Literal["pad-id", "last-column", "unknown"] = "pad-id"
    padding_sides: tuple[Side, ...] = ("left", "right")
    causal: bool = True
    norm_classes: tuple[str, ...] = ()
    rotary_classes: tuple[str, ...] = ()
    attention_classes: tuple[str, ...] = ()
    mlp_classes: tuple[str, ...] = ()
    block_classes: tuple[str, ...] = ()
    embedding_suffixes: tuple[str, ...] = ("embed_tokens.weight",)
    packs: bool = False
    has_oracle: bool = False

    def kind_of(self, class_name: str) -> Kind | None:
        """Which part of a decoder a module of that class is; None for any other.

        Args:
            class_name: `type(module).__name__`.
        """
        named: tuple[tuple[Kind, tuple[str, ...]], ...] = (
            ("block", self.block_classes),
            ("attention", self.attention_classes),
            ("mlp", self.mlp_classes),
            ("rotary", self.rotary_classes),
            ("norm", self.norm_classes),
        )
        return next((kind for kind, names in named if names and class_name.endswith(names)), None)

    def role_of(self, class_name: str) -> Role:
        """The role by which a module class is judged and grouped: its kind, one of torch's own layers, else `other`.

        Args:
            class_name: `type(module).__name__`.
        """
        own: dict[str, Role] = {"Linear": "linear", "Embedding": "embedding"}
        return self.kind_of(class_name) or own.get(class_name, "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedFamily:
    """A family of another package: the value of an entry point of `numerics_suite.families`.

    Attributes:
        family: its name is the entry point's, and no other family has its model types.
        oracle: a class that fulfils :class:`numerics_suite.definitions.definition.Oracle`, None without a definition.
    """

    family: Family
    oracle: type[Any] | None = None
