"""What the templates of `reference.oracle` say: of a module by its family's definition, and of the rotary table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numerics_suite.definitions import OracleUnavailable, exact_rotary, oracle_for, rotary_boundary
from numerics_suite.definitions.config import rope_kind
from numerics_suite.definitions.definition import rotary_of
from numerics_suite.diagnosis.scripts.scene import Facts, ScriptContext

PARTS: Mapping[str, tuple[str, ...]] = {
    "glm": ("self_attn", "gate_up_proj", "down_proj"),
    "glm4": ("self_attn", "gate_up_proj", "down_proj"),
    "chatglm": ("self_attention", "dense_h_to_4h", "dense_4h_to_h"),
}
"""What a family calls its attention and the two matrices of its gated unit."""

ROLES = ("norm", "mlp", "attention", "block", "Linear", "Embedding")
"""Modules whose definition is short enough for a script."""

_LENGTH = 64
"""Of the sequence that a script has in mind where the length changes nothing."""


def _config(scene: ScriptContext) -> Mapping[str, Any]:
    return scene.config or scene.context.subject.config


def defined_module(scene: ScriptContext) -> Facts | None:
    """The role of the module that the finding names, with its family's definition."""
    kind, path = oracle_for(scene.context.family.name), scene.finding.module
    if kind is None or not path:
        return None
    try:
        oracle: Any = kind.from_config(_config(scene))
    except OracleUnavailable:
        return None
    name = type(scene.context.model.get_submodule(path)).__name__
    role = scene.context.family.kind_of(name) or name
    if role not in ROLES or (role == "mlp" and getattr(oracle, "hidden_act", "silu") != "silu"):
        return None
    return {"oracle": oracle, "role": role, "parts": PARTS[oracle.family], "rotary_of": rotary_of, "at": ""}


def is_rotary(scene: ScriptContext) -> bool:
    """Whether the finding names the rotary embedding: of a table that is wrong itself all else follows."""
    classes = scene.context.family.rotary_classes or ("RotaryEmbedding",)
    module = scene.finding.module
    return bool(module) and type(scene.context.model.get_submodule(module or "")).__name__.endswith(classes)


def rotary_table(scene: ScriptContext) -> Facts | None:
    """The tables that the config defines, by the length of the sequence, and where the model keeps its own."""
    family, held, config = scene.context.family.name, scene.context.rotary_table, _config(scene)
    try:
        boundary = rotary_boundary(family, config)
        lengths = [_LENGTH] if boundary is None else [boundary, boundary + max(1, boundary // 4)]
        tables = {length: exact_rotary(family, config, length) for length in lengths}
        kind = "default" if family == "chatglm" else rope_kind(config)
    except OracleUnavailable:
        return None
    if held is None:
        return None
    return {
        "family": family,
        "kind": kind,
        "tables": tables,
        "scale": tables[lengths[0]].scale,
        "path": held[0].rpartition(".")[0],
        # Of chatglm's remote code no call of the embedding is known; its frequencies do not depend on one.
        "called": family != "chatglm",
    }


def logits(scene: ScriptContext) -> Facts | None:
    """Of the rotary table where the finding names it, else of the module."""
    return rotary_table(scene) if is_rotary(scene) else defined_module(scene)
