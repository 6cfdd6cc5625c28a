"""load.config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from numerics_suite.checks.load._effects import (
    ROWS,
    has_effect,
    is_built_from,
    is_converted,
    is_derived,
    is_read,
    other_word_counts,
    rope_is_built,
)
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.definitions import OracleUnavailable, oracle_for, rotary_budget, rotary_roundoffs
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.compat import known_config_keys

DEFINING = frozenset(
    [
        "vocab_size",
        "padded_vocab_size",
        "hidden_size",
        "intermediate_size",
        "ffn_hidden_size",
        "num_hidden_layers",
        "num_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "multi_query_attention",
        "multi_query_group_num",
        "head_dim",
        "kv_channels",
        "hidden_act",
        "rms_norm_eps",
        "layernorm_epsilon",
        "layer_norm_eps",
        "rope_theta",
        "rope_ratio",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "attention_bias",
        "add_qkv_bias",
        "add_bias_linear",
        "mlp_bias",
        "tie_word_embeddings",
        "sliding_window",
        "layer_types",
        "max_position_embeddings",
        "seq_length",
        "attention_dropout",
        "num_local_experts",
        "num_experts_per_tok",
        "n_routed_experts",
        "n_shared_experts",
        "first_k_dense_replace",
        "norm_topk_prob",
        "routed_scaling_factor",
        "use_qk_norm",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "torch_dtype",
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
        "post_layer_norm",
        "rmsnorm",
        "fp32_residual_connection",
        "original_rope",
        "apply_residual_connection_post_layernorm",
    ]
)
"""Keys that define what is computed. A key outside this list that a release does not know (a tool's own note) does no harm."""

NEUTRAL = {"rope_ratio": 1}
"""Values without effect: code that lacks the key computes the same. ChatGLM's ratio multiplies the rotary base."""

TEXT = "text_config"
"""The section of a multimodal config that describes the language model."""

RENAMED = {"dtype": "torch_dtype", "torch_dtype": "dtype"}
"""Two names of one key: harmless if both agree or this release reads the other name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A section of config.json (the file, or a multimodal model's `text_config`) and the model built from it.

    Attributes:
        prefix: before each of its keys, empty for the file itself.
        raw: the file's content.
        model: built from the section; its config is the converted section.
        right_table: the rotary table is the one that the file defines, though a release may not read every key.
    """

    prefix: str
    raw: Mapping[str, Any]
    model: nn.Module
    right_table: bool

    @property
    def built(self) -> Any:
        """The config object of the section."""
        return self.model.config


@check(scope="subject", needs=("checkpoint",))
def config(context: CellContext) -> Iterable[Measurement]:
    """Was the model built with the values in config.json?

    A key counts as ignored if this release does not read it and the model lacks its effect.
    """
    ignored: list[str] = []
    differing: dict[str, tuple[Any, Any]] = {}
    for section in _sections(context):
        ignored += sorted(f"{section.prefix}{key}" for key in _ignored(section))
        differing |= {f"{section.prefix}{key}": values for key, values in _differing(section)}
    yield Measurement(
        name="ignored",
        value=len(ignored),
        unit="keys",
        facts={"keys": ", ".join(ignored)} if ignored else {},
        parameters=tuple(ignored),
    )
    yield Measurement(
        name="differing",
        value=len(differing),
        unit="keys",
        parameters=tuple(differing),
        facts={key: f"the file says {said!r}, the model has {has!r}" for key, (said, has) in differing.items()},
    )


def _sections(context: CellContext) -> Iterator[_Section]:
    """The file, and its `text_config` if a part of the model is built from it."""
    model, raw = context.model, context.subject.config
    yield _Section(prefix="", raw=raw, model=model, right_table=_rotary_table_is_right(context))
    inner, made = raw.get(TEXT), getattr(model.config, TEXT, None)
    part = next(
        (part for part in model.modules() if made is not None and type(getattr(part, "config", None)) is type(made)),
        None,
    )
    if isinstance(inner, Mapping) and part is not None:
        yield _Section(prefix=f"{TEXT}.", raw=inner, model=part, right_table=False)


def _ignored(section: _Section) -> Iterator[str]:
    known = known_config_keys(type(section.built))
    for key in section.raw:
        unread = key in DEFINING and key not in known
        if unread and not _harmless(section, key, known) and not _arrived(section, key, known):
            yield key


def _differing(section: _Section) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key, value in _as_built(section.raw, section.built, known_config_keys(type(section.built))):
        if not _equal(section.raw[key], value) and not _meant(section, key, value):
            yield key, (section.raw[key], value)


def _arrived(section: _Section, key: str, known: set[str]) -> bool:
    """Whether a key that no class declares is read anyway, or the model has its value without reading it."""
    raw, model = section.raw, section.model
    if key == "rope_parameters" and isinstance(raw[key], Mapping) and rope_is_built(model, raw[key], known):
        return True
    if other_word_counts(model, raw, key):
        return True
    made_by = type(section.built)
    if has_effect(model, key, raw[key]) or is_derived(made_by, raw, key) or is_read(made_by, raw, key):
        return True
    return is_built_from(model, key, raw[key])


def _meant(section: _Section, key: str, value: Any) -> bool:
    """Whether a value that differs is the release's conversion of the file's, or the model has the file's anyway."""
    raw, model = section.raw, section.model
    return is_converted(type(section.built), raw, key, value) or (key in ROWS and has_effect(model, key, raw[key]))


def _rotary_table_is_right(context: CellContext) -> bool:
    """Whether the model's rotary table is the one that the file defines, though a release may not read every key."""
    name = context.family.name
    table = context.rotary_table
    if oracle_for(name) is None or table is None:
        return False
    try:
        roundoffs = rotary_roundoffs(name, context.subject.config, table[1])
        return roundoffs <= rotary_budget(name, context.subject.config)
    except OracleUnavailable:
        return False


def _harmless(section: _Section, key: str, known: set[str]) -> bool:
    """A null says nothing, a renamed key is read under its other name, and a release may hard-code the file's value."""
    raw = section.raw
    if (
        raw[key] is None
        or raw[key] == NEUTRAL.get(key)
        or (key in {"partial_rotary_factor", "rope_theta", "rope_ratio"} and section.right_table)
    ):
        return True
    if key in RENAMED:
        return RENAMED[key] in raw
    # GLM-4's 5.x layout repeats what the 4.x keys say; a file with both is read right by either.
    if key == "rope_parameters" and isinstance(raw[key], Mapping):
        inner = {name: value for name, value in raw[key].items() if name != "rope_type"}
        return all(name in raw and raw[name] == value and name in known for name, value in inner.items())
    return False


def _as_built(raw: Mapping[str, Any], built: object, known: set[str]) -> Iterable[tuple[str, Any]]:
    """What the model holds for each defining key; the rope keys of either layout are compared by meaning."""
    rope = getattr(built, "rope_parameters", None)
    for key in sorted(set(raw) & DEFINING & known - {"rope_parameters", "rope_scaling", "dtype", "torch_dtype"}):
        # The task and its labels are the user's to change.
        if raw[key] is None or key in {"num_labels", "id2label", "label2id", "problem_type"}:
            continue
        if isinstance(rope, Mapping) and key in rope:
            yield key, rope[key]
        elif hasattr(built, key):
            yield key, getattr(built, key)


def _equal(said: Any, has: Any) -> bool:
    if isinstance(said, (list, tuple)) and isinstance(has, (list, tuple)):
        return list(said) == list(has)
    return bool(said == has)
