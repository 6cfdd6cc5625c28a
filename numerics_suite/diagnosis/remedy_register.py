"""Every remedy that can be named: those of the contract, and those that other packages add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from numerics_suite.core.extensions import OWN_NAME, REMEDIES, Extension, extensions, load_as
from numerics_suite.core.records import Remedy
from numerics_suite.diagnosis.remedies import CURES, Cure
from numerics_suite.diagnosis.remedy_words import COST, DESCRIPTIONS, FOR_CAUSE
from numerics_suite.settings.choices import CAUSES


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedRemedy:
    """A remedy of another package: the value of an entry point of `numerics_suite.remedies`.

    Attributes:
        cure: yields ways to apply it to a fresh copy, cheapest for the user first; nothing where it does not apply.
        causes: those for which it is tried, whatever check found them; budgets may name it besides.
    """

    name: str
    description: str
    cure: Cure
    causes: tuple[str, ...] = ()


def added_remedies() -> Mapping[str, AddedRemedy]:
    """The remedies of other packages, by name.

    Raises:
        BadInputError: one cannot be loaded, or is for an unknown cause.
    """
    return _loaded(tuple(extensions(REMEDIES).values()))


@cache
def _loaded(found: tuple[Extension, ...]) -> Mapping[str, AddedRemedy]:
    remedies = {}
    for extension in found:
        added = load_as(extension, AddedRemedy)
        if added.name != extension.name:
            extension.refuse(f"the remedy's name is '{added.name}', and must be the entry point's")
        for cause in added.causes:
            if cause not in CAUSES and not OWN_NAME.fullmatch(cause):
                extension.refuse(f"the cause '{cause}' is none of numerics-suite's")
        remedies[extension.name] = added
    return remedies


def remedies_of(cause: str) -> tuple[str, ...]:
    """Names of the added remedies that are tried for that cause."""
    return tuple(name for name, added in added_remedies().items() if cause in added.causes)


def cures() -> Mapping[str, Cure]:
    """How each remedy that can be tried here is applied to a fresh copy: ours, then those of other packages."""
    return {**CURES, **{name: added.cure for name, added in added_remedies().items()}}


def cost_of(name: str) -> float:
    """Where a remedy stands among all, cheapest for the user first; another package's is behind what can be tried here."""
    return COST.index(name) if name in COST else COST.index("reload-weights") - 0.5


def is_remedy(name: str) -> bool:
    """Whether a budget may name it: a remedy of the contract, or one that another package adds."""
    return name in DESCRIPTIONS or name in added_remedies()


def description_of(name: str, cause: str = "") -> str:
    """What the user does, in a line."""
    if (name, cause) in FOR_CAUSE:
        return FOR_CAUSE[name, cause]
    return DESCRIPTIONS[name] if name in DESCRIPTIONS else added_remedies()[name].description


def useful_first(remedies: Iterable[Remedy]) -> tuple[Remedy, ...]:
    """Those that were seen to work, then those that could not be tried, then those that do not help; else as they stood.

    Args:
        remedies: of one finding.
    """
    rank = {True: 0, None: 1, False: 2}
    return tuple(sorted(remedies, key=lambda remedy: rank[remedy.verified]))


def untried(names: tuple[str, ...], cause: str = "") -> tuple[Remedy, ...]:
    """The remedies of these names, not tried yet (`verified` is None)."""
    return tuple(Remedy(name=name, description=description_of(name, cause)) for name in names)
