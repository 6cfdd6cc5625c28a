"""load.dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.evidence import Evidence


@check(scope="precision")
def dtype(evidence: Evidence) -> Iterable[Measurement]:
    """Is the dtype asked for the dtype held, but for what the model declares to keep in float32?"""
    loaded = evidence.loaded
    asked = dtype_of(evidence.recipe.parameters)
    kept = _declared_fp32(loaded.model)
    other: dict[str, str] = {}
    declared: list[str] = []
    for name, parameter in loaded.model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype == asked:
            continue
        if str(parameter.dtype) == "torch.float32" and any(part in name for part in kept):
            declared.append(name)
        elif not evidence.subject.quantized:
            other[name] = str(parameter.dtype).removeprefix("torch.")
    facts: dict[str, float | str] = {"asked": evidence.recipe.parameters}
    if other:
        facts["held"] = ", ".join(f"{name}: {held}" for name, held in list(other.items())[:5])
    if declared:
        facts["kept in fp32 as the model declares"] = ", ".join(declared[:5])
    yield Measurement(
        name="other-dtype",
        value=len(other),
        unit="parameters",
        module=next(iter(other)).rpartition(".")[0] if other else None,
        parameters=tuple(other),
        # What is held wider than asked for loses nothing; it costs memory, and answers differ from those of the dtype asked.
        cause="contract-change" if other and all(_is_wider(held, asked) for held in other.values()) else None,
        facts=facts,
    )


def _declared_fp32(model: object) -> tuple[str, ...]:
    names = [*(getattr(model, "_keep_in_fp32_modules", None) or [])]
    names += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or [])]
    return tuple(names)


def _is_wider(held: str, asked: torch.dtype) -> bool:
    """Whether the dtype holds every number of the one asked for."""
    one, other = torch.finfo(dtype_of(held)), torch.finfo(asked)
    return one.eps <= other.eps and one.max >= other.max
