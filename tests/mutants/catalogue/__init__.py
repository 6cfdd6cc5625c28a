"""Every mutant, by area."""

from __future__ import annotations

from mutants.catalogue import attention, cache, gradients, heads, losses, mixed, mlp, norms, packing, residuals, rotary
from mutants.catalogue.record import ORACLE, Mutant

__all__ = ["MUTANTS", "ORACLE", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (
    *norms.MUTANTS,
    *rotary.MUTANTS,
    *attention.MUTANTS,
    *packing.MUTANTS,
    *mlp.MUTANTS,
    *residuals.MUTANTS,
    *heads.MUTANTS,
    *losses.MUTANTS,
    *gradients.MUTANTS,
    *cache.MUTANTS,
    *mixed.MUTANTS,
)
