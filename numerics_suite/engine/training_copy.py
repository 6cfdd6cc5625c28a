"""A copy of a model for training, in which what is not trained shares the memory of the model: it may be a file larger than memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from numerics_suite.engine.blocks import freeze_to_scope
from numerics_suite.engine.room import require_room
from numerics_suite.subjects.memory import STEP_COPIES, TRAINING_COPIES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numerics_suite.subjects.families.family import Family


def copy_sharing(
    model: nn.Module, own: Callable[[nn.Module], Collection[nn.Parameter]] | None, *, device: str
) -> nn.Module:
    """A copy of a model.

    Args:
        model: left as it was.
        own: picks the copy's parameters that get memory of their own; None for all.
        device: where they are.

    Raises:
        NotApplicableError: those do not fit in memory.
    """
    # A class of its own, as of quantised weights, knows best how it is copied.
    plain = (parameter for parameter in model.parameters() if type(parameter) is nn.Parameter)
    copied = copy.deepcopy(model, {id(parameter): _alias(parameter) for parameter in plain})
    changed = list(copied.parameters() if own is None else own(copied))
    count = sum(parameter.numel() for parameter in changed)
    require_room(device, sum(parameter.nbytes for parameter in changed), f"a copy of {count:,} parameters")
    for parameter in changed:
        parameter.data = parameter.data.clone()
    return copied


def trained_by(model: nn.Module, scope: str, family: Family, device: str) -> list[nn.Parameter]:
    """Freeze all but what the scope trains, and return that.

    Args:
        model: changed in place.
        scope: of `--train-scope`.
        family: knows the head's names.
        device: where it is trained.

    Raises:
        NotApplicableError: the scope names nothing in this model, or its copies do not fit in memory.
    """
    freeze_to_scope(model, scope, family)
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.nbytes for parameter in found]
    needed = TRAINING_COPIES * sum(sizes) + STEP_COPIES * max(sizes, default=0)
    count = sum(parameter.numel() for parameter in found)
    require_room(device, needed, f"training {count:,} parameters (--train-scope {scope})")
    return found


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter in the same memory."""
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
