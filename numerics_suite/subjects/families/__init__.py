"""The families of models: where the head is, which row is pooled, which sides may be padded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from numerics_suite.core.extensions import FAMILIES as GROUP
from numerics_suite.core.extensions import Extension, extensions, load_as
from numerics_suite.subjects.families.chatglm import CHATGLM
from numerics_suite.subjects.families.family import AddedFamily, Family
from numerics_suite.subjects.families.generic import GENERIC, generic_family
from numerics_suite.subjects.families.glm import GLM
from numerics_suite.subjects.families.glm4 import GLM4
from numerics_suite.subjects.families.glm4_moe import GLM4_MOE

__all__ = ["FAMILIES", "AddedFamily", "Family", "added_families", "family_of"]

FAMILIES: tuple[Family, ...] = (GLM, GLM4, CHATGLM, GLM4_MOE)
"""Our own families that are known by name; every other model is generic, unless another package adds its family."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint: one of ours, one that another package adds, or generic.

    Args:
        config: raw `config.json`; an empty one gives the generic family.

    Raises:
        BadInputError: a family of another package cannot be used.
    """
    model_type = config.get("model_type")
    known = _with(FAMILIES, model_type) or _with((added.family for added in added_families().values()), model_type)
    return known or generic_family(config)


def _with(families: Iterable[Family], model_type: object) -> Family | None:
    return next((family for family in families if model_type in family.model_types), None)


def added_families() -> Mapping[str, AddedFamily]:
    """The families of other packages, by name.

    Raises:
        BadInputError: one cannot be loaded, or claims a name or model type of another.
    """
    return _loaded(tuple(extensions(GROUP, taken={family.name for family in (*FAMILIES, GENERIC)}).values()))


@cache
def _loaded(found: tuple[Extension, ...]) -> Mapping[str, AddedFamily]:
    owners = {kind: "numerics-suite" for family in FAMILIES for kind in family.model_types}
    families: dict[str, AddedFamily] = {}
    for extension in found:
        added = load_as(extension, AddedFamily)
        if added.family.name != extension.name:
            extension.refuse(f"the family's name is '{added.family.name}', and must be the entry point's")
        if not added.family.model_types:
            extension.refuse("the family has no model_types, so no checkpoint can be of it")
        for kind in added.family.model_types:
            if kind in owners:
                extension.refuse(f"the model type '{kind}' belongs to {owners[kind]} already")
            owners[kind] = extension.distribution
        if added.family.has_oracle != (added.oracle is not None):
            extension.refuse("has_oracle and oracle must go together")
        families[extension.name] = added
    return families
