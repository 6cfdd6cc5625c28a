"""Where a change starts: the first module, innermost and in the order of returning, whose inputs agree and whose output does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numerics_suite.baselines.batch_match import Matching, sketch_deviation
from numerics_suite.core.exact import AGREED

if TYPE_CHECKING:
    from numerics_suite.baselines.records import ModuleRecord, Sketch


def module_place(
    old: Sequence[ModuleRecord], new: Sequence[ModuleRecord], matching: Matching, *, root: bool = True
) -> str | None:
    """The module of the new version at which true fp64 states part, None where none does.

    Args:
        old: in the order of returning.
        new: the other.
        matching: which is which.
        root: whether the model's own code may be at fault.
    """
    pairs = [(i, j) for i, j in matching.pairs if root or new[j].name]
    apart = [(old[i], new[j]) for i, j in pairs if _differ(old[i].gave, new[j].gave)]
    agreed = (theirs.name for ours, theirs in apart if not _differ(ours.given, theirs.given))
    place = next(agreed, apart[0][1].name if apart else None)
    shells = _shells(new)
    if place in shells:
        # The model's own code, behind the last module that it calls: a person finds it by that one.
        return next((module.name for module in reversed(new) if module.name not in shells), None)
    return place


def _shells(modules: Sequence[ModuleRecord]) -> set[str]:
    """The model itself, and a model that it does nothing but hold: whatever differs, differs in them too."""
    names = [module.name for module in modules if module.name]
    around = {outer for name in names for outer in [name.rpartition(".")[0]] if outer in names}
    return {"", *(name for name in around if all(other == name or other.startswith(f"{name}.") for other in names))}


def gradient_place(modules: Sequence[ModuleRecord], parameters: Sequence[str]) -> str | None:
    """The module at which gradients part: backwards, the first whose own parameters differ, so the last one to return."""
    order = {module.name: index for index, module in enumerate(modules)}
    owners = {name.rpartition(".")[0] for name in parameters}
    return max(owners, key=lambda owner: order.get(owner, -1), default=None)


def _differ(old: Sketch | None, new: Sketch | None) -> bool:
    """Whether both are known and differ."""
    return old is not None and new is not None and not sketch_deviation(old, new) <= AGREED
