"""Scripts of `reference.oracle` about the rotary embedding: its table, and what it makes of one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from numerics_suite.definitions import OracleUnavailable, exact_rotary, rotary_boundary
from numerics_suite.definitions.config import rope_kind
from numerics_suite.diagnosis.scripts.parts import raw_config
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, ScriptContext

_GLM_ROPE = (
    'rope = raw.get("rope_parameters") or {}',
    'theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))',
    'head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]',
    'width = int(head * rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5)))',
)
_CHATGLM_ROPE = ('theta, width = 10000.0 * raw.get("rope_ratio", 1.0), raw["kv_channels"] // 2',)
"""Base of the frequencies and how many numbers of a head are rotated, by the family's own words."""

_LENGTH = 64
"""Of the sequence that a script has in mind where the length changes nothing."""


def rotary_lines(scene: ScriptContext, config: Mapping[str, Any]) -> list[str] | None:
    """The table of frequencies against the config's, and where transformers' embedding is called, its cosines and sines."""
    family = scene.context.family.name
    held = scene.context.rotary_table
    try:
        boundary = rotary_boundary(family, config)
        lengths = [_LENGTH] if boundary is None else [boundary, boundary + max(1, boundary // 4)]
        tables = {length: exact_rotary(family, config, length) for length in lengths}
        kind = "default" if family == "chatglm" else rope_kind(config)
    except OracleUnavailable:
        return None
    if held is None:
        return None
    # Of chatglm's remote code no call of the embedding is known; its frequencies do not depend on one.
    called = family != "chatglm"
    plain = kind == "default"
    scale = tables[lengths[0]].scale
    return [
        *(_plain(scene, lengths[0]) if plain else _scaled({n: t.inv_freq.tolist() for n, t in tables.items()}, kind)),
        f"rotary = model.get_submodule({held[0].rpartition('.')[0]!r})",
        "for length, exact in meant.items():",
        *(_CALL if called else ()),
        *_table_lines(max(table.allowed for table in tables.values())),
        *(_turn_lines(scale) if called else ()),
        'print(f"not reproduced: the rotary table is right to {apart:.2g} roundoffs")',
    ]


def _plain(scene: ScriptContext, length: int) -> list[str]:
    family = scene.context.family.name
    return [
        f"raw = {'model.config.to_dict()' if scene.source == 'factory' else raw_config(scene)}",
        *(_CHATGLM_ROPE if family == "chatglm" else _GLM_ROPE),
        f"meant = {{{length}: theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)}}",
    ]


def _scaled(tables: Mapping[int, list[float]], kind: str) -> list[str]:
    """The numbers themselves: a scaling's formula is longer than a script may be."""
    lines = [f"# Radians per position that config.json means by {kind!r}, by the length of the sequence.", "meant = {"]
    for length, values in tables.items():
        lines += [f"    {length}: [", *textwrap.wrap(", ".join(map(repr, values)), 104, **_INDENTED), "    ],"]
    return [*lines, "}", "meant = {length: torch.tensor(row, dtype=torch.float64) for length, row in meant.items()}"]


_INDENTED: dict[str, Any] = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}

_CALL = (
    "    with torch.no_grad():",
    "        like = next(model.parameters()).new_zeros(1, 1, 1)",
    "        rotary(like, torch.tensor([[length - 1]], device=like.device))",
)
"""The last position of the sequence: some embeddings change their table with the greatest one."""


def _table_lines(allowed: float) -> list[str]:
    off = "the rotary table is {apart:.3g} roundoffs from what the config defines"
    return [
        "    table = next(buffer for name, buffer in rotary.named_buffers() if name.endswith('inv_freq'))",
        f'    assert table.shape == exact.shape, f"{SYMPTOM}: {{2 * len(table)}} numbers are rotated, not {{2 * len(exact)}}"',
        "    roundoff = torch.finfo(torch.float32 if table.dtype == torch.float64 else table.dtype).eps / 2",
        "    apart = float(((table.cpu().double() - exact) / exact).abs().max()) / roundoff",
        f'    assert apart <= {allowed!r}, f"{SYMPTOM}: {off}"',
    ]


def _turn_lines(scale: float) -> list[str]:
    """At position 1, where an angle is its frequency and is rounded once."""
    return [
        "    # Computed in float32 and rounded to the model's dtype.",
        "    with torch.no_grad():",
        "        given = rotary(like, torch.ones(1, 1, dtype=torch.long, device=like.device))",
        "    angle = next(buffer for name, buffer in rotary.named_buffers() if name.endswith('inv_freq')).cpu().double()",
        "    for value, name in zip(given, ('cos', 'sin')):",
        f"        wanted = {scale!r} * getattr(angle, name)()",
        "        off = float((value.cpu().double().flatten()[: len(angle)] - wanted).abs().max())",
        f'        assert off <= 4 * torch.finfo(value.dtype).eps, f"{SYMPTOM}: {{name}} is {{off:.3g}} from {scale:.6g} times that of the angle"',
    ]
