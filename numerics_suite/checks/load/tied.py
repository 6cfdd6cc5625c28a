"""load.tied."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.built_model import without_adapter
from numerics_suite.subjects.files import read_tensor, tensor_headers


@check(scope="precision", needs=("token-ids",))
def tied(context: CellContext) -> Iterable[Measurement]:
    """Are input and output embeddings one tensor exactly where the config ties them, in the model and in the files?"""
    model: Any = without_adapter(context.model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        reason = "this model has no output embedding"
        raise NotApplicableError(reason)
    entry = model.get_input_embeddings()
    declared = bool(getattr(model.config, "tie_word_embeddings", False))
    unlike = _stored_apart(context, entry, output) if declared else {}
    yield _measured("stored-apart", bool(unlike), unlike)
    shared = _one_tensor(entry, output)
    # What two different stored tensors become is the release's choice, and neither is right.
    apart = declared and not shared and not unlike
    # Undeclared sharing is a mistake only if the file holds two tensors.
    merged = shared and not declared and context.subject.path is not None
    facts: dict[str, Fact] = {"config ties them": str(declared), "one tensor": str(shared)}
    yield _measured("wrongly-tied", apart or merged, facts)


def _measured(name: str, failed: bool, facts: dict[str, Fact]) -> Measurement:  # noqa: FBT001
    parameters = ("lm_head.weight",) if failed else ()
    return Measurement(name=name, value=int(failed), unit="pairs", module="lm_head", parameters=parameters, facts=facts)


def _stored_apart(context: CellContext, entry: nn.Module, output: nn.Module) -> dict[str, Fact]:
    """How the stored output embedding differs from the input embedding; nothing if they are equal or one is missing."""
    subject = context.subject
    if subject.path is None or subject.quantized:
        return {}
    folder = Path(subject.adapter_base or subject.path)
    names = {module: name for name, module in without_adapter(context.model).named_modules()}
    one, other = (f"{names.get(module, '')}.weight" for module in (entry, output))
    stored = tensor_headers(folder)
    if one not in stored or other not in stored:
        return {}
    if stored[one][1] != stored[other][1]:
        return {"stored": f"{other} has the shape {list(stored[other][1])}, {one} {list(stored[one][1])}"}
    left, right = read_tensor(folder, one), read_tensor(folder, other)
    differing = int((left != right).sum())
    return {"stored": f"{other} differs from {one} in {differing} of {left.numel()} values"} if differing else {}


def _one_tensor(entry: nn.Module, output: nn.Module) -> bool:
    left, right = entry.weight, output.weight
    assert isinstance(left, torch.Tensor)
    assert isinstance(right, torch.Tensor)
    return left is right or (left.data_ptr() == right.data_ptr() and left.shape == right.shape)
