"""Does a definition cover this `config.json`, and what does its rotary section mean in either layout?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import NotApplicableError

if TYPE_CHECKING:
    from collections.abc import Mapping


class OracleUnavailable(NotApplicableError):  # noqa: N818 - a reason to skip, not a failure
    """The definition does not cover this checkpoint; the text is the reason that the skip shows."""


_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_intermediate_size")


def refuse_what_is_not_defined(config: Mapping[str, Any]) -> None:
    """Refuse a config that asks for more than the published GLM-4 text models have.

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


def read_rope(config: Mapping[str, Any], *, theta: float, fraction: float) -> tuple[float, float]:
    """Base of the rotary frequencies and the rotated fraction of a head, from the 5.x or else the 4.x layout.

    transformers 5 writes both into `rope_parameters`; 4.x has them at the top, and scaling in `rope_scaling`.

    Args:
        config: the raw `config.json`.
        theta: the family's default base.
        fraction: the family's default fraction.

    Raises:
        OracleUnavailable: a rotary type other than the plain one.
    """
    layout5: Mapping[str, Any] = config.get("rope_parameters") or {}
    for section in (layout5, config.get("rope_scaling") or {}):
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in section.values()):
            message = f"the oracle does not cover the rotary type '{kind}'"
            raise OracleUnavailable(message)
    return (
        float(layout5.get("rope_theta", config.get("rope_theta", theta))),
        float(layout5.get("partial_rotary_factor", config.get("partial_rotary_factor", fraction))),
    )
