"""Do quantised weights have their scales? Decided from names and dtypes of the stored tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numerics_suite.subjects.files import TensorHeader

SCALED = frozenset(
    {"awq", "bitsandbytes", "bitnet", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gptq", "mxfp4"}
)
"""Values of `quant_method` whose every quantised weight is stored with a scale. Source: the layers of transformers' integrations."""

_SCALE = ("scale", "absmax", "scb")
"""Parts of the names that scales have: `weight_scale_inv` (fp8), `scales` (gptq, awq, mxfp4), `SCB` and `weight.absmax` (bitsandbytes)."""

_WHOLE_MODULE = frozenset({"weight", "qweight", "weight_packed"})
"""Names of codes that are their module's only weight, so any scale of the module belongs to them."""

_BLOCKS = "_blocks"


def without_scales(stored: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the stored weights that are codes without a scale.

    Only where a scale must be: the config names a method that has one for each weight, or other weights of the checkpoint have
    theirs, or whole numbers are stored for what the model holds as floats.

    Args:
        stored: dtype and shape by name.
        config: raw `config.json`.
    """
    codes = [name for name, header in stored.items() if _is_code(name, header)]
    scales = [name for name in stored if _is_scale(name)]
    by_module: dict[str, list[str]] = {}
    for name in scales:
        by_module.setdefault(_module(name), []).append(name)
        # `weight.absmax` belongs to the weight, one level up.
        by_module.setdefault(_module(_module(name)), []).append(name)
    lacking = tuple(name for name in codes if not _has_scale(name, by_module.get(_module(name), ())))
    quantisation = config.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    if method in SCALED or len(lacking) < len(codes):
        return lacking
    return tuple(name for name in lacking if quantisation is None and not stored[name][0].startswith("float8"))


def _is_code(name: str, header: TensorHeader) -> bool:
    dtype, shape = header
    last = name.rpartition(".")[2]
    if len(shape) < 2 or _is_scale(name):
        return False
    if dtype.startswith("float8"):
        return True
    return (dtype in {"int8", "uint8"} and (last in _WHOLE_MODULE or last.endswith(_BLOCKS))) or (
        dtype == "int32" and last in _WHOLE_MODULE
    )


def _is_scale(name: str) -> bool:
    return any(part in name.rpartition(".")[2].lower() for part in _SCALE)


def _has_scale(name: str, scales: Iterable[str]) -> bool:
    last = name.rpartition(".")[2]
    if last in _WHOLE_MODULE:
        return any(True for _ in scales)
    # Fused experts: several weights in one module, each with a scale of its name.
    return any(scale.rpartition(".")[2].startswith(last.removesuffix(_BLOCKS)) for scale in scales)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
