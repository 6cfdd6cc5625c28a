"""Each GLM-4 family's definition in plain float64, computed from its files without transformers.

A wrong model is consistent with itself, so neither a law nor a reference run detects a swapped gate or a wrong eps. The
oracle does: it is written from the config's meaning and the published description, not from the code that it judges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numerics_suite.definitions.chatglm import ChatGlm
from numerics_suite.definitions.config import OracleUnavailable
from numerics_suite.definitions.definition import rotary_boundary_of, rotary_of
from numerics_suite.definitions.glm import Glm
from numerics_suite.definitions.glm4 import Glm4
from numerics_suite.definitions.parts import RotaryTable, roundoffs_apart
from numerics_suite.definitions.run import ANSWER, OracleRun, Overlay, run_definition
from numerics_suite.definitions.trace import capture_states, first_difference
from numerics_suite.definitions.weights import Weights, file_weights, tensor_weights
from numerics_suite.subjects.families import added_families

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from numerics_suite.core.records import Task
    from numerics_suite.definitions.definition import Oracle

__all__ = [
    "ANSWER",
    "OracleRun",
    "OracleUnavailable",
    "RotaryTable",
    "Weights",
    "capture_states",
    "exact_inv_freq",
    "exact_rotary",
    "file_weights",
    "first_difference",
    "oracle_for",
    "rotary_boundary",
    "rotary_budget",
    "rotary_roundoffs",
    "run_oracle",
    "tensor_weights",
]

_ORACLES: dict[str, type[Oracle]] = {"glm": Glm, "glm4": Glm4, "chatglm": ChatGlm}


def oracle_for(family: str) -> type[Oracle] | None:
    """The definition of that family, None where there is none (the check is then skipped with that reason)."""
    if family in _ORACLES:
        return _ORACLES[family]
    added = added_families().get(family)
    return None if added is None else added.oracle


def _read(family: str, config: Mapping[str, Any]) -> Oracle:
    oracle = oracle_for(family)
    if oracle is None:
        message = f"no definition of the family '{family}' is written down"
        raise OracleUnavailable(message)
    return oracle.from_config(config)


def exact_rotary(family: str, config: Mapping[str, Any], length: int | None = None) -> RotaryTable:
    """The rotary frequencies and the scale of cosines and sines that the config defines, unrounded.

    Args:
        family: `glm`, `glm4` or `chatglm`.
        config: the raw `config.json`, in the 4.x or the 5.x layout.
        length: of the sequence, on which some scalings depend: the greatest position plus 1. None means a short one.

    Raises:
        OracleUnavailable: another family, or a config that its definition does not cover.
    """
    return rotary_of(_read(family, config), length)


def exact_inv_freq(family: str, config: Mapping[str, Any], length: int | None = None) -> Tensor:
    """The frequencies of :func:`exact_rotary`, `[rotary dimension / 2]` float64, radians per position."""
    return exact_rotary(family, config, length).inv_freq


def rotary_boundary(family: str, config: Mapping[str, Any]) -> int | None:
    """The longest sequence that has the rotary table of short ones; None where the length changes nothing.

    Raises:
        OracleUnavailable: another family, or a config that its definition does not cover.
    """
    return rotary_boundary_of(_read(family, config))


def rotary_budget(family: str, config: Mapping[str, Any], length: int | None = None) -> float:
    """Upper limit of :func:`rotary_roundoffs` for a right table: 2 for a plain one of a power of two pairs."""
    return exact_rotary(family, config, length).allowed


def rotary_roundoffs(family: str, config: Mapping[str, Any], inv_freq: Tensor, length: int | None = None) -> float:
    """How far a model's rotary table is from :func:`exact_inv_freq`, in unit roundoffs of its dtype.

    Args:
        family: `glm`, `glm4` or `chatglm`.
        config: the raw `config.json`.
        inv_freq: the model's table as it holds it, `[pairs]`.
        length: of the sequence that it is used for; None for a short one.

    Returns:
        Infinite for a table of another length.
    """
    return roundoffs_apart(inv_freq, exact_inv_freq(family, config, length))


def run_oracle(  # noqa: PLR0913 - one question with its options
    family: str,
    config: Mapping[str, Any],
    weights: Weights,
    batch: Mapping[str, Tensor],
    *,
    task: Task,
    inv_freq: Tensor | None = None,
    rotary: str | None = None,
    head: Mapping[str, Tensor] | None = None,
    gradients: bool = False,
    on_gradient: Callable[[str, Tensor], None] | None = None,
    trace: bool = False,
) -> OracleRun:
    """The definition's logits, loss, gradients and states for this batch.

    Args:
        family: `glm`, `glm4` or `chatglm`.
        config: the raw `config.json`, in the 4.x or the 5.x layout.
        weights: of the checkpoint's files or of a state dict, by the checkpoint's names.
        batch: `input_ids` `[B, T]`; where given, `attention_mask` `[B, T]` of 0 and 1, `position_ids` `[B or 1, T]`,
            and `labels` (`[B, T]`, or `[B]` for sequence classification).
        task: which head is on top.
        inv_freq: the model's own rotary frequencies, which are rounded when a model is built. The exact ones are used
            if None, and if its :func:`rotary_roundoffs` are over :func:`rotary_budget`, so that a wrong table shows.
        rotary: module path of the model's rotary embedding; with `trace` its cosines and sines are kept under `PATH:turn`.
        head: tensors of a new head that the files lack, by name, such as `{"score.weight": …}`.
        gradients: also the gradient of the loss for every weight that the definition reads; needs labels.
        on_gradient: takes each gradient as soon as it is complete; else `OracleRun.gradients` holds them all.
        trace: keep the output (and some inputs, under `PATH:input`) of every module, by transformers' module path.

    Raises:
        OracleUnavailable: the definition does not cover this config, or a weight that it needs is not there.
    """
    return run_definition(
        _read(family, config),
        config,
        Overlay(head, weights) if head else weights,
        batch,
        task=task,
        inv_freq=inv_freq,
        rotary=rotary,
        gradients=gradients,
        on_gradient=on_gradient,
        trace=trace,
    )
