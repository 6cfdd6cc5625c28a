"""Where do a model and its definition diverge? Compares the states of both by module path, in order of computation."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

TOLERANCE = 1e-10
"""Of the root mean square: a reordered float64 sum differs by 1e-14, a wrong formula by 1e-6 and more."""

TURN = ":turn"
"""Behind the path of a rotary embedding: its cosines and sines as one complex number for each position and pair."""

_INPUT = ":input"


def _first_tensor(values: Any) -> Tensor | None:
    """The tensor itself, or the first one in a tuple, a mapping or a model output."""
    if isinstance(values, Tensor):
        return values
    parts = values.values() if hasattr(values, "values") else values if isinstance(values, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)


def _turn(values: Any) -> Tensor | None:
    """`cos + i sin` of what a rotary embedding gives, `[B, T, pairs or twice as many]`; None for anything else.

    ChatGLM's published code gives one tensor `[positions, pairs, 2]` for all positions from 0 on: `[positions, pairs]` here.
    """
    if isinstance(values, Tensor) and values.is_floating_point() and values.dim() > 2 and values.shape[-1] == 2:
        return torch.view_as_complex(values.double().contiguous())
    tensors = [value for value in values if isinstance(value, Tensor)] if isinstance(values, (tuple, list)) else []
    if len(tensors) != 2 or tensors[0].shape != tensors[1].shape or not tensors[0].is_floating_point():
        return None
    cosines, sines = tensors
    turn = torch.complex(cosines.double(), sines.double())
    return turn.squeeze(1) if turn.dim() == 4 else turn


def _each_pair_once(turn: Tensor, pairs: int) -> Tensor | None:
    """The turns of `pairs` pairs: most programs hold each twice, one half behind the other or neighbour by neighbour."""
    if turn.shape[-1] == pairs:
        return turn
    if turn.shape[-1] != 2 * pairs:
        return None
    first, second = turn.chunk(2, dim=-1)
    if torch.equal(first, second):
        return first
    return turn[..., ::2] if torch.equal(turn[..., ::2], turn[..., 1::2]) else None


@contextmanager
def capture_states(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of those modules of `model` while the context lasts.

    Args:
        model: the model as transformers builds it.
        names: module paths, `PATH:input` for what a module gets, `PATH:turn` for the cosines and sines of a rotary
            embedding: the keys of an oracle's states. Unknown ones are left out.

    Yields:
        The states so far, detached copies by the same names; a module that was not called has none.
    """
    modules = dict(model.named_modules())
    states: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, values: Any) -> None:
        tensor = _turn(values) if name.endswith(TURN) else _first_tensor(values)
        if tensor is not None:
            states[name] = tensor.detach().clone()

    def before(name: str) -> Any:
        return lambda _module, args, kwargs: keep(name, args or kwargs)

    def after(name: str) -> Any:
        return lambda _module, _args, output: keep(name, output)

    try:
        for name in names:
            path = name.removesuffix(_INPUT).removesuffix(TURN)
            if path in modules and name.endswith(_INPUT):
                handles.append(modules[path].register_forward_pre_hook(before(name), with_kwargs=True))
            elif path in modules:
                handles.append(modules[path].register_forward_hook(after(name)))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def agree(value: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether `max|value - reference|` is within `tolerance` root mean squares of the reference; NaN never is."""
    if value.shape != reference.shape:
        return False
    difference = (value.to(reference) - reference).abs().max()
    return bool(difference <= tolerance * reference.abs().square().mean().sqrt())


def first_difference(
    model_states: Mapping[str, Tensor],
    oracle_states: Mapping[str, Tensor],
    *,
    mask: Tensor | None = None,
) -> str | None:
    """The first module in which model and definition diverge, None if they agree.

    A module whose output differs is named itself; one whose *input* differs, though all before it agreed, got wrong
    inputs, so the module around it is named: the block for a misplaced residual, the attention for a wrong score.

    Args:
        model_states: of the model's true float64 run, as :func:`capture_states` gives them.
        oracle_states: `OracleRun.states`; its order is the order of computation. Names that the model lacks are passed
            over.
        mask: `[B, T]`, 0 at padding, whose states no definition fixes.
    """
    for name, reference in oracle_states.items():
        value = model_states.get(name)
        if value is not None and name.endswith(TURN):
            value, reference = _comparable(value, reference)  # noqa: PLW2901 - both in one shape
        if value is None:
            continue
        if mask is not None and value.shape == reference.shape and reference.shape[:2] == mask.shape:
            value, reference = value[mask.bool()], reference[mask.bool()]  # noqa: PLW2901 - the real tokens of both
        if not agree(value, reference):
            return name.removesuffix(_INPUT).rpartition(".")[0] if name.endswith(_INPUT) else name.removesuffix(TURN)
    return None


def _comparable(turn: Tensor, reference: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both turns with the same number of rows and pairs; None for a layout that is not known, which is passed over."""
    once = _each_pair_once(turn, reference.shape[-1])
    if once is None or once.dim() != reference.dim() or once.shape[1:] != reference.shape[1:]:
        return None, reference
    rows = max(len(once), len(reference))
    return once.expand(rows, -1, -1), reference.expand(rows, -1, -1)


def table_of(turn: Tensor | None) -> Tensor | None:
    """The frequencies `[pairs]` float64 of turns `[positions, pairs]`: the angle at position 1; None for another layout."""
    if turn is None or turn.dim() != 2 or len(turn) < 2 or bool((turn[0].angle() != 0).any()):
        return None
    return turn[1].angle()


def turn_scale(turn: Tensor) -> tuple[float, float]:
    """The least and the greatest length of the turns: what cosines and sines are multiplied by."""
    lengths = turn.abs()
    return lengths.min().item(), lengths.max().item()
