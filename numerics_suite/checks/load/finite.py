"""load.finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.observations.finiteness import nan_count, nonfinite_count
from numerics_suite.subjects.files import read_tensor, tensor_headers
from numerics_suite.subjects.zeroed_memory import Zeroed


@check(scope="precision")
def finite(context: CellContext) -> Iterable[Measurement]:
    """Is every weight finite once it is loaded, and every buffer initialised?"""
    loaded = context.loaded
    # `load.head-init` judges uninitialised parameters; a NaN there does not come from the checkpoint.
    fresh = set(loaded.new_head) | set(loaded.missing) | set(context.unwritten)
    bad = {
        name: count
        for name, parameter in loaded.model.named_parameters()
        if name not in fresh and (count := nonfinite_count(parameter.detach()))
    }
    uninitialised = _uninitialised(context)
    # A buffer of -inf is a mask; NaN is never meant.
    bad.update(
        {
            name: count
            for name, buffer in loaded.model.named_buffers()
            if name not in uninitialised and (count := nan_count(buffer))
        }
    )
    stored_finite = [name for name in bad if _finite_in_file(context, name)]
    yield Measurement(
        name="non-finite",
        value=sum(bad.values()),
        unit="elements",
        module=next(iter(bad)).rpartition(".")[0] if bad else None,
        parameters=tuple(bad),
        cause="overflow" if bad and len(stored_finite) == len(bad) else None,
        facts={"finite in the file": ", ".join(stored_finite)} if stored_finite else {},
    )

    yield Measurement(
        name="uninitialised-buffers",
        value=len(uninitialised),
        unit="buffers",
        module=uninitialised[0].rpartition(".")[0] if uninitialised else None,
        parameters=uninitialised,
        facts={"over memory of zeros": "other values"} if uninitialised else {},
    )


def _uninitialised(context: CellContext) -> tuple[str, ...]:
    """Buffers that keep what their memory held: poison over poisoned memory, other values over zeros."""
    path = context.subject.path
    stored = tensor_headers(path) if path is not None and not context.subject.adapter_base else {}
    suspects = [name for name, buffer in context.model.named_buffers() if name not in stored and _is_poison(buffer)]
    if not suspects:
        return ()
    with Zeroed():  # type: ignore[no-untyped-call]
        plain = dict(context.load(seed=context.request.seed).model.named_buffers())
    return tuple(name for name in suspects if name in plain and not _is_poison(plain[name]))


def _is_poison(buffer: Tensor) -> bool:
    """Whether the tensor holds the fill value of uninitialised memory: NaN, or the largest integer."""
    if buffer.is_floating_point():
        return nan_count(buffer) > 0
    if buffer.dtype == torch.bool or buffer.is_complex() or buffer.numel() == 0:
        return False
    return bool((buffer == torch.iinfo(buffer.dtype).max).any())


def _finite_in_file(context: CellContext, name: str) -> bool:
    """Whether the checkpoint stores that tensor and stores it finite, so that the cast to this dtype broke it."""
    path = context.subject.path
    if path is None or context.subject.adapter_base or name not in tensor_headers(path):
        return False
    return nonfinite_count(read_tensor(path, name)) == 0
