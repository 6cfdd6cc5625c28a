"""load.roundtrip."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence
from numerics_suite.subjects.load import quiet_transformers


@check(scope="precision")
def roundtrip(evidence: Evidence) -> Iterable[Measurement]:
    """Does saving the model and loading it again give the same bits?"""
    if evidence.subject.adapter_base or evidence.subject.quantized:
        reason = "an adapter or a quantised checkpoint is saved in another form than it is loaded in"
        raise NotApplicableError(reason)
    before = evidence.model.state_dict()
    with tempfile.TemporaryDirectory(prefix="numerics-suite-") as folder:
        after = _saved_and_loaded(evidence, Path(folder))
    differing = tuple(name for name in before if name not in after or not same_bits(before[name], after[name]))
    extra = tuple(name for name in after if name not in before)
    names = differing + extra
    yield Measurement(
        name="differing",
        value=len(names),
        unit="tensors",
        module=names[0].rpartition(".")[0] if names else None,
        parameters=names,
    )


def _saved_and_loaded(evidence: Evidence, folder: Path) -> Mapping[str, Tensor]:
    model = evidence.model
    if evidence.subject.path is None or not hasattr(model, "save_pretrained"):
        return _state_through_file(model, folder)
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    # The code of a fixture or a trusted checkpoint is trusted in its copy too: it is the same code.
    again = replace(evidence.subject, kind="directory", source=str(folder), path=folder, new_head=False)
    loaded = evidence._loader(  # noqa: SLF001 - same loader, other folder
        again, dtype=evidence.recipe.parameters, attn=evidence.cell.attn, device=evidence.cell.device, seed=2
    )
    return loaded.model.state_dict()


def _state_through_file(model: nn.Module, folder: Path) -> Mapping[str, Tensor]:
    """A factory's module cannot be rebuilt from files alone, so its tensors take the way through safetensors."""
    from safetensors.torch import load_file, save_model

    save_model(model, str(folder / "model.safetensors"))
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    # save_model leaves out all but one name of tensors that share memory; give those their partner's value.
    partners = {value.data_ptr(): stored[name] for name, value in state.items() if name in stored}
    return {name: stored.get(name, partners.get(value.data_ptr(), value)) for name, value in state.items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.numel() == 0:
        return True
    left, right = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
