"""Which modules left without anything being lost: what they did is done, and watched, inside a module that stayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numerics_suite.baselines.batch_match import sketch_deviation
from numerics_suite.core.exact import AGREED

if TYPE_CHECKING:
    from numerics_suite.baselines.batch_match import Matching
    from numerics_suite.baselines.fused_experts import Fusion
    from numerics_suite.baselines.records import CellBaseline


def inlined(
    old: CellBaseline, new: CellBaseline, modules: Matching, parameters: Matching, fused: Sequence[Fusion]
) -> frozenset[str]:
    """Old modules that are no longer called and whose work is still seen.

    The parameters that such a module had are all there, under their names or fused with others, and the nearest module
    around it that both versions call gives the same in true fp64: experts that became one tensor, a convolution or an
    activation that is now a call of a function. What has no parameters counts with the module right around it.
    """
    partner = {old.modules[i].name: (old.modules[i].gave, new.modules[j].gave) for i, j in modules.pairs}
    names = [record.name for record in old.tensors or old.gradients]
    lost = {*parameters.vanished, *parameters.moved} - {name for fusion in fused for name in fusion.old}
    if not new.gradients and old.gradients:
        lost = set(names)

    def seen(module: str) -> bool:
        around = module
        while around and around not in partner:
            around = around.rpartition(".")[0]
        ours, theirs = partner.get(around, (None, None))
        return ours is not None and theirs is not None and sketch_deviation(ours, theirs) <= AGREED

    def kept(module: str) -> bool:
        own = _below(module, names) or _below(module.rpartition(".")[0], names)
        return bool(own) and lost.isdisjoint(own)

    return frozenset(module for module in modules.vanished if kept(module) and seen(module))


def _below(module: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{module}.")]
