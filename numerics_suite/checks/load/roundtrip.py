"""load.roundtrip."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.checks.load._dtypes import named_by_class
from numerics_suite.checks.load.config import DEFINING
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import agreeing, caller, without_labels
from numerics_suite.engine.roundtrip import saved_and_loaded
from numerics_suite.engine.runner import Runner
from numerics_suite.observations.roundoff import relative_error

TRIPS = 2
"""Saves: only a second one shows a value that each load converts again."""

NOT_KEPT = frozenset({"dtype", "torch_dtype"})
"""Keys that may differ: the load sets the dtype of the cell, whatever the file says."""


@check(scope="precision")
def roundtrip(context: CellContext) -> Iterable[Measurement]:
    """Does saving the model and loading it again, twice, give the same bits, the same config and the same answers?"""
    if context.subject.adapter_base or context.subject.quantized:
        reason = "an adapter or a quantised checkpoint is saved in another form than it is loaded in"
        raise NotApplicableError(reason)
    _require_disk(context.model)
    with tempfile.TemporaryDirectory(prefix="numerics-suite-") as folder:
        model: nn.Module | Mapping[str, Tensor] = context.model
        trip, changes = 0, _Changes()
        while trip < TRIPS and not changes.names and not changes.dtypes:
            trip += 1
            model = _saved_and_loaded(context, model, Path(folder))
            changes = _changes(context, model, answers=trip == TRIPS)
    tensor = next(iter(changes.tensors), "")
    yield Measurement(
        name="differing",
        value=len(changes.names),
        unit="values",
        module=tensor.rpartition(".")[0] if tensor else None,
        parameters=changes.names,
        # Every weight came back, and the model was built otherwise: the value in the file is not the one it means.
        cause="ignored-config" if changes.config and not changes.tensors else None,
        facts={} if not changes.names else {"seen at save and load number": trip, **changes.config},
    )
    held = context.model.state_dict() if changes.dtypes else {}
    yield Measurement(
        name="other-dtype",
        value=len(changes.dtypes),
        unit="tensors",
        module=next(iter(changes.dtypes)).rpartition(".")[0] if changes.dtypes else None,
        parameters=tuple(changes.dtypes),
        facts={
            **{name: f"{held[name].dtype} before, {dtype} after" for name, dtype in changes.dtypes.items()},
            **(named_by_class(context, changes.dtypes) if changes.dtypes else {}),
        },
    )


def _require_disk(model: nn.Module) -> None:
    """Refuse to fill the disk; the file of each trip stays while the next model is read from it."""
    folder, needed = tempfile.gettempdir(), TRIPS * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        reason = f"saving the model {TRIPS} times would take {needed} bytes in {folder}, {free} bytes free; TMPDIR names another folder"
        raise NotApplicableError(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """What saving and loading changed.

    Attributes:
        tensors: names of those whose values or shape changed.
        dtypes: the new dtype, by name, of tensors whose values agree as far as both dtypes allow.
        config: old and new value, by key.
        answers: by how much the true fp64 answers moved, relative to their root mean square; 0 where they did not.
    """

    tensors: tuple[str, ...] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    answers: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of changed tensors, `config.KEY`, and `answers` if nothing else explains why they moved."""
        found = (*self.tensors, *(f"config.{key}" for key in self.config))
        return found or (() if self.answers <= AGREED else ("answers",))


def _changes(context: CellContext, after: nn.Module | Mapping[str, Tensor], *, answers: bool) -> _Changes:
    """What changed; outputs, which cost a pass, are compared after the last trip only."""
    before = context.model.state_dict()
    state = after if isinstance(after, Mapping) else after.state_dict()
    differing = tuple(name for name in before if name not in state or not same_bits(before[name], state[name]))
    dtypes = {name: state[name].dtype for name in differing if name in state and _is_cast(before[name], state[name])}
    differing = tuple(name for name in differing if name not in dtypes)
    extra = tuple(name for name in state if name not in before)
    if isinstance(after, Mapping):
        return _Changes(tensors=differing + extra, dtypes=dtypes)
    was, now = (_defining(model.config.to_dict()) for model in (context.model, after))  # type: ignore[operator, union-attr]
    config = {
        key: f"{was.get(key)!r} before, {now.get(key)!r} after"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    }
    same = answers and not (differing or extra or config or dtypes)
    return _Changes(
        tensors=differing + extra, dtypes=dtypes, config=config, answers=_moved(context, after) if same else 0.0
    )


def _defining(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys that define what is computed, nested configs included."""
    found = {f"{prefix}{key}": config[key] for key in (DEFINING - NOT_KEPT) & config.keys()}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            found |= _defining(value, f"{prefix}{key}.")
    return found


def _moved(context: CellContext, model: nn.Module) -> float:
    """By how much true fp64 answers moved; a table that is neither stored nor in the config shows only here."""
    if not context.takes_ids or context.broken:  # what is not finite already says nothing about the files
        return 0.0
    # Of a planned batch, whose answer every law reads, one row: what moved in the files moves each of them.
    batch = next(iter(context.planned_batches), context.gradient_batch)
    rows = slice(1 if context.planned_batches else None)
    tensors = {name: value[rows] for name, value in without_labels(batch.tensors).items()}
    call = caller(context, by_token=False)
    other = Runner(model, context.condition).true_fp64(tensors, call=call)
    if other.left_out:
        return 0.0
    moved = other.outputs["answer"].cpu()
    try:
        before, _ = agreeing(
            moved,
            lambda answer: answer(context, batch.tensors, by_token=False)[rows],
            lambda answer: answer(context, tensors, by_token=False),
        )
    except NotApplicableError:
        return 0.0
    return relative_error(moved, before) if bool(before.isfinite().all()) else 0.0


def _saved_and_loaded(
    context: CellContext, model: nn.Module | Mapping[str, Tensor], folder: Path
) -> nn.Module | Mapping[str, Tensor]:
    if isinstance(model, Mapping):
        return model
    if context.subject.path is None or not hasattr(model, "save_pretrained"):
        return _state_through_file(model, folder)
    return saved_and_loaded(context, model, folder)


def _state_through_file(model: nn.Module, folder: Path) -> Mapping[str, Tensor]:
    """Save and load the tensors only: a factory's module cannot be rebuilt from files alone."""
    from safetensors.torch import load_file, save_model

    save_model(model, str(folder / "model.safetensors"))
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    # save_model leaves out all but one name of tensors that share memory; give those their partner's value.
    partners = {value.data_ptr(): stored[name] for name, value in state.items() if name in stored}
    return {name: stored.get(name, partners.get(value.data_ptr(), value)) for name, value in state.items()}


def _is_cast(saved: Tensor, loaded: Tensor) -> bool:
    """Whether the loaded tensor is the saved one in another floating dtype."""
    if not (saved.is_floating_point() and loaded.is_floating_point()) or saved.dtype == loaded.dtype:
        return False
    if saved.shape != loaded.shape:
        return False
    cast, loaded = saved.detach().cpu().to(loaded.dtype), loaded.detach().cpu()
    return bool(((cast == loaded) | (cast.isnan() & loaded.isnan())).all())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.numel() == 0:
        return True
    left, right = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
