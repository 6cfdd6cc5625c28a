"""What each family of models is like: where its head is, which row it pools, which sides it may be padded on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numerics_suite.subjects.families.chatglm import CHATGLM
from numerics_suite.subjects.families.family import Family
from numerics_suite.subjects.families.generic import generic_family
from numerics_suite.subjects.families.glm import GLM
from numerics_suite.subjects.families.glm4 import GLM4
from numerics_suite.subjects.families.glm4_moe import GLM4_MOE

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: tuple[Family, ...] = (GLM, GLM4, CHATGLM, GLM4_MOE)
"""The families that are known by name; every other model is generic."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint.

    Args:
        config: raw `config.json`; an empty one gives the generic family.
    """
    model_type = config.get("model_type")
    return next((family for family in FAMILIES if model_type in family.model_types), None) or generic_family(config)
