"""Reads a `config.json` for a definition: whether it is covered, and its rotary section in either layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import NotApplicableError

if TYPE_CHECKING:
    from collections.abc import Mapping


class OracleUnavailable(NotApplicableError):  # noqa: N818 - a reason to skip, not a failure
    """The definition does not cover this checkpoint; the text is the reason that the skip shows."""


_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_intermediate_size")


def refuse_what_is_not_defined(config: Mapping[str, Any]) -> None:
    """Refuse a config with features that the published GLM-4 text models lack.

    Raises:
        OracleUnavailable: quantised weights, experts, or a sliding window.
    """
    if config.get("quantization_config") or config.get("quantization_bit"):
        message = "the oracle does not cover quantised weights"
        raise OracleUnavailable(message)
    if any(config.get(key) for key in _EXPERTS):
        message = "the oracle does not cover a mixture of experts"
        raise OracleUnavailable(message)
    windowed = set(config.get("layer_types") or ()) - {"full_attention"}
    if windowed or (config.get("sliding_window") and config.get("use_sliding_window", True)):
        message = "the oracle does not cover sliding-window or other special attention"
        raise OracleUnavailable(message)


def rope_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary section of `config.json`; empty if it has none.

    transformers 5 has `rope_parameters`, which a `rope_scaling` of the 4.x layout replaces where a file has both.
    """
    section: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return section


def rope_kind(config: Mapping[str, Any]) -> str:
    """The rotary type, `default` for the plain one; `type` is what files before 4.45 call it.

    Raises:
        OracleUnavailable: a section for each type of layer, which no GLM-4 has.
    """
    section = rope_section(config)
    kind = section.get("rope_type", section.get("type")) or "default"
    if any(isinstance(value, dict) for value in section.values()):
        message = f"the oracle does not cover the rotary type '{kind}' in a section for each type of layer"
        raise OracleUnavailable(message)
    return str(kind)


def read_rope(config: Mapping[str, Any], *, theta: float, fraction: float) -> tuple[float, float]:
    """Base of the plain rotary frequencies and the rotated fraction of a head, for a definition without scaling.

    Args:
        config: the raw `config.json`, in the 4.x or the 5.x layout.
        theta: the family's default base.
        fraction: the family's default fraction.

    Raises:
        OracleUnavailable: a rotary type other than the plain one.
    """
    if (kind := rope_kind(config)) != "default":
        message = f"the oracle does not cover the rotary type '{kind}'"
        raise OracleUnavailable(message)
    return read_base(config, theta=theta, fraction=fraction)


def read_base(config: Mapping[str, Any], *, theta: float, fraction: float) -> tuple[float, float]:
    """Base of the rotary frequencies before any scaling and the rotated fraction of a head, as :func:`read_rope`.

    transformers 5 writes both into its section; 4.x has them at the top. A null says nothing.
    """

    def value(key: str, default: float) -> float:
        said = (place[key] for place in (rope_section(config), config) if place.get(key) is not None)
        return float(next(said, default))

    return value("rope_theta", theta), value("partial_rotary_factor", fraction)
