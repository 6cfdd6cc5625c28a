"""load.config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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
from numerics_suite.engine.evidence import Evidence
from numerics_suite.oracles import OracleUnavailable, oracle_for, rotary_budget, rotary_roundoffs
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

RENAMED = {"dtype": "torch_dtype", "torch_dtype": "dtype"}
"""One thing under two names: harmless where the other name says the same or is what this release reads."""


@check(scope="subject", needs=("checkpoint",))
def config(evidence: Evidence) -> Iterable[Measurement]:
    """Is what config.json says what the model was built with?

    A key counts as ignored if this release does not read it and the model lacks its effect.
    """
    built = evidence.model.config
    raw = evidence.subject.config
    known = known_config_keys(type(built))
    right_table = _rotary_table_is_right(evidence)
    ignored = tuple(
        sorted(
            key
            for key in raw
            if key in DEFINING
            and key not in known
            and not _harmless(key, raw, known, right_table=right_table)
            and not _arrived(evidence, key, known)
        )
    )
    yield Measurement(
        name="ignored",
        value=len(ignored),
        unit="keys",
        facts={"keys": ", ".join(ignored)} if ignored else {},
        parameters=ignored,
    )
    differing = {
        key: (raw[key], value)
        for key, value in _as_built(raw, built, known)
        if not _equal(raw[key], value) and not _meant(evidence, key, value)
    }
    yield Measurement(
        name="differing",
        value=len(differing),
        unit="keys",
        parameters=tuple(differing),
        facts={key: f"the file says {said!r}, the model has {has!r}" for key, (said, has) in differing.items()},
    )


def _arrived(evidence: Evidence, key: str, known: set[str]) -> bool:
    """Whether a key that no class declares is read all the same, or the model has what it says without reading it."""
    raw, model = evidence.subject.config, evidence.model
    if key == "rope_parameters" and isinstance(raw[key], Mapping) and rope_is_built(model, raw[key], known):
        return True
    if other_word_counts(model, raw, key):
        return True
    made_by = type(model.config)
    if has_effect(model, key, raw[key]) or is_derived(made_by, raw, key) or is_read(made_by, raw, key):
        return True
    return is_built_from(model, key, raw[key])


def _meant(evidence: Evidence, key: str, value: Any) -> bool:
    """Whether another value than the file's is what the release makes of it, or the model has the file's all the same."""
    raw, model = evidence.subject.config, evidence.model
    return is_converted(type(model.config), raw, key, value) or (key in ROWS and has_effect(model, key, raw[key]))


def _rotary_table_is_right(evidence: Evidence) -> bool:
    """Whether the model's rotary table is the one that the file defines, though a release may not read every key."""
    name = evidence.family.name
    table = evidence.rotary_table
    if oracle_for(name) is None or table is None:
        return False
    try:
        roundoffs = rotary_roundoffs(name, evidence.subject.config, table[1])
        return roundoffs <= rotary_budget(name, evidence.subject.config)
    except OracleUnavailable:
        return False


def _harmless(key: str, raw: Mapping[str, Any], known: set[str], *, right_table: bool) -> bool:
    """A null says nothing, a renamed key is read under its other name, and a release may hard-code the file's value."""
    if raw[key] is None or (key in {"partial_rotary_factor", "rope_theta"} and right_table):
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
