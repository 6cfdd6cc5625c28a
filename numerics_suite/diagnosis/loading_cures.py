"""Remedies for what a load did to dtypes, parameters cast once more and buffers as the class builds them; and for a head that was not saved."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from numerics_suite.checks.load._buffers import rounded_buffers
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Finding
from numerics_suite.core.text import listed
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.built_model import built_buffers, without_adapter
from numerics_suite.subjects.files import read_json, read_tensor, tensor_headers
from numerics_suite.subjects.load import Loaded

Change = Callable[[Loaded], Loaded]

OF_BUFFERS = "rounded-buffers"
"""The measurement of load.dtype that counts buffers."""

CONFIG = "config.json"

PEFT = "base_model.model."
"""How peft begins the names of what it saves."""

IGNORED = "ignored-dtype"
"""The measurement of load.dtype that counts what is held where nothing has the dtype asked for."""

WIDE = (torch.float32, torch.float64)

FROM_FILES = (
    "cannot be tried: the files hold the rounded values, and no load brings back what they lack; save again from a model that was "
    "loaded with from_pretrained(dtype=...) and never cast by model.to(dtype)"
)


def cast_copies(context: CellContext, finding: Finding) -> Iterator[tuple[CellContext, str]]:
    """The cell with the finding's parameters in the dtype asked for, and what was done.

    What the other dtype could not hold is lost to a cast: the second attempt loads the stored values once more, buffers too. A
    new head has none yet; what is saved and loaded again has them in the folder that it then came from.
    """
    names = [name for name in finding.parameters if name in dict(context.model.named_parameters())]
    if not names:
        return
    names += _buffers_beside(context, finding)
    dtype = context.recipe.parameters
    modules = sorted({name.rpartition(".")[0] for name in names})
    how = f"{listed(tuple(modules), 2)} cast to {dtype}"
    cast = context.variant(change=_cast(names, getattr(torch, dtype)))
    yield cast, how
    if context.subject.path is not None and not context.subject.adapter_base:
        buffers = _buffers(context, rounded_buffers(context))
        again = cast.variant(change=_with_stored(names)).variant(change=_with_values(buffers))
        yield again, f"{how}, then load_state_dict with the stored values"


def _buffers_beside(context: CellContext, finding: Finding) -> list[str]:
    """The saved buffers that a load which ignored the dtype holds in the same other one as the weights."""
    if finding.evidence.get("measurement") != IGNORED:
        return []
    held = {parameter.dtype for name, parameter in context.model.named_parameters() if name in finding.parameters}
    saved = context.model.state_dict().keys()
    return [name for name, buffer in context.model.named_buffers() if name in saved and buffer.dtype in held]


def _cast(names: Iterable[str], dtype: torch.dtype) -> Change:
    chosen = tuple(names)

    def change(loaded: Loaded) -> Loaded:
        tensors = {**dict(loaded.model.named_parameters()), **dict(loaded.model.named_buffers())}
        for tensor in (tensors[name] for name in chosen):
            tensor.data = tensor.data.to(dtype)
        return loaded

    return change


def loaded_with_dtype(context: CellContext, finding: Finding) -> Iterator[tuple[CellContext, str]]:
    """The cell with its rounded buffers as a load at the dtype leaves them.

    Raises:
        NotApplicableError: their values are in the files only, and are rounded there.
    """
    if finding.evidence.get("measurement") != OF_BUFFERS:
        return
    values = _buffers(context, finding.parameters)
    if values.keys() != set(finding.parameters):
        raise NotApplicableError(FROM_FILES)
    yield context.variant(change=_with_values(values)), f"{listed(finding.parameters, 2)} as the class builds it"


def saved_head(context: CellContext, finding: Finding) -> Iterator[tuple[CellContext, str]]:
    """The adapter as it is saved with its head, loaded again: what was lost stays lost, and the head is a new one.

    Raises:
        NotApplicableError: its tensors are in no safetensors file.
    """
    names = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in finding.parameters})
    folder, file = context.subject.path, "adapter_model.safetensors"
    if folder is None or not (folder / file).is_file():
        reason = f"not tried: {file} is not there; train again with modules_to_save={names} in the LoraConfig"
        raise NotApplicableError(reason)
    heads = {name: _head(context, name) for name in finding.parameters}
    with tempfile.TemporaryDirectory(prefix="numerics-suite-") as scratch:
        saved = Path(scratch) / folder.name
        saved.mkdir()
        told = read_json(folder / "adapter_config.json")
        kept = sorted({*(told.get("modules_to_save") or ()), *names})
        text = json.dumps({**told, "base_model_name_or_path": context.subject.adapter_base, "modules_to_save": kept})
        (saved / "adapter_config.json").write_text(text, encoding="utf-8")
        tensors = {**load_file(folder / file), **{_in_file(name): value for name, value in heads.items()}}
        save_file(tensors, saved / file, metadata={"format": "pt"})
        how = f"saved with modules_to_save={names} and loaded again, with a new head: the trained one is in no file and must be trained again"
        yield context.variant(subject=replace(context.subject, path=saved)), how


def _in_file(name: str) -> str:
    """The name under which peft saves a parameter of a module that it saves whole."""
    plain = name.replace(".modules_to_save.default", "").replace(".original_module", "")
    return plain if plain.startswith(PEFT) else f"{PEFT}{plain}"


def _head(context: CellContext, name: str) -> torch.Tensor:
    """What the loaded model holds there."""
    held: dict[str, torch.Tensor] = context.model.state_dict()
    found = next(value for key, value in reversed(held.items()) if _in_file(key) == _in_file(name))
    return found.detach().to("cpu", copy=True).contiguous()


def _stored(context: CellContext, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The stored values of these tensors of the model; those of an adapter's base have other names in its files."""
    path = context.subject.path
    if path is None or context.subject.adapter_base:
        return {}
    headers = tensor_headers(path)
    return {name: read_tensor(path, name) for name in names if name in headers}


def _buffers(context: CellContext, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """What a load leaves in buffers that it does not round: the stored value where the file has it in full, else the class's own."""
    model = without_adapter(context.model)
    saved, built = model.state_dict().keys(), built_buffers(model, getattr(torch, context.recipe.parameters)) or {}
    stored = _stored(context, (name for name in names if name in saved))
    wide = {
        name: value.to(built[name].dtype) for name, value in stored.items() if value.dtype in WIDE and name in built
    }
    return wide | {name: built[name] for name in names if name in built and name not in saved}


def _with_stored(names: Iterable[str]) -> Change:
    """Give the parameters the values of the files that the model was loaded from."""
    chosen = tuple(names)

    def change(loaded: Loaded) -> Loaded:
        folder = Path(getattr(loaded.model, "name_or_path", ""))
        headers = tensor_headers(folder) if (folder / CONFIG).is_file() else {}
        return _with_values({name: read_tensor(folder, name) for name in chosen if name in headers})(loaded)

    return change


def _with_values(values: Mapping[str, torch.Tensor]) -> Change:
    def change(loaded: Loaded) -> Loaded:
        model = without_adapter(loaded.model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, value in values.items():
            if name in parameters:
                parameters[name].data.copy_(value)
            else:
                owner, _, last = name.rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, last, value.clone().to(module.get_buffer(last).device))
        return loaded

    return change
