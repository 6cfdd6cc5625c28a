"""load.tied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence


@check(scope="precision", needs=("token-ids",))
def tied(evidence: Evidence) -> Iterable[Measurement]:
    """Are input and output embeddings one tensor exactly where the config ties them, also after an update?"""
    model = evidence.model
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if output is None:
        reason = "this model has no output embedding"
        raise NotApplicableError(reason)
    entry = model.get_input_embeddings()  # type: ignore[operator]
    declared = bool(getattr(model.config, "tie_word_embeddings", False))
    shared = _one_tensor(entry, output)
    apart = declared and not shared
    # Sharing that nobody declared is a mistake only where the file holds two tensors.
    merged = shared and not declared and evidence.subject.path is not None
    yield Measurement(
        name="wrongly-tied",
        value=int(apart or merged),
        unit="pairs",
        module="lm_head",
        parameters=("lm_head.weight",) if apart or merged else (),
        facts={"config ties them": str(declared), "one tensor": str(shared)},
    )


def _one_tensor(entry: nn.Module, output: nn.Module) -> bool:
    left, right = entry.weight, output.weight
    assert isinstance(left, torch.Tensor)
    assert isinstance(right, torch.Tensor)
    return left is right or (left.data_ptr() == right.data_ptr() and left.shape == right.shape)
