"""Precision recipes: what each name of `--precision` means for loading, forward pass and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from numerics_suite.core.errors import BadInputError, nearest

DTypeName = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One recipe.

    Attributes:
        name: as typed.
        parameters: the dtype in which the parameters are loaded and held.
        autocast: the dtype of autocast regions, None without autocast.
        loss_scaling: training goes through a GradScaler.
        trains: it is meant for training; `fp16` is for serving.
        tf32: float32 matrix products may round their inputs to 10 bits.
    """

    name: str
    parameters: DTypeName
    autocast: DTypeName | None = None
    loss_scaling: bool = False
    trains: bool = True
    tf32: bool = False

    @property
    def computes_in(self) -> DTypeName:
        """The dtype whose unit roundoff the results are measured in."""
        return self.autocast or self.parameters


PRECISIONS: dict[str, Precision] = {
    recipe.name: recipe
    # Significand bits, hidden bit included: float64 53, float32 24, tf32 and float16 11, bfloat16 8.
    # float16 ends at 65504 and its smallest subnormal is 6e-8, so AdamW's eps of 1e-8 is 0 there: pure-fp16 shows it.
    for recipe in (
        Precision(name="fp64", parameters="float64"),
        Precision(name="fp32", parameters="float32"),
        # tf32 holds float32 numbers and rounds the factors of matrix products to 11 bits; sums stay in float32.
        Precision(name="tf32", parameters="float32", tf32=True),
        Precision(name="bf16", parameters="bfloat16"),
        Precision(name="fp16", parameters="float16", trains=False),
        Precision(name="amp-bf16", parameters="float32", autocast="bfloat16"),
        Precision(name="amp-fp16", parameters="float32", autocast="float16", loss_scaling=True),
        Precision(name="pure-fp16", parameters="float16"),
    )
}

SERVING_REASON = "fp16 is for serving: training in it is pure-fp16 or amp-fp16"


def precision(name: str) -> Precision:
    """The recipe of that name.

    Raises:
        BadInputError: no such precision; the message has the nearest name.
    """
    if name not in PRECISIONS:
        message = f"unknown precision '{name}'{nearest(name, PRECISIONS)} known: {', '.join(PRECISIONS)}"
        raise BadInputError(message)
    return PRECISIONS[name]
