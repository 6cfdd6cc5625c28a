"""Loads a subject at a precision: a model in eval mode, and how its names matched the checkpoint.

A checkpoint is loaded at a dtype and never cast: `model.to(dtype)` would round buffers that a load keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import UnsupportedError
from numerics_suite.core.records import Subject
from numerics_suite.devices.arithmetic import deterministic_algorithms, torch_default_dtype
from numerics_suite.devices.kinds import parts_of
from numerics_suite.devices.random_state import seeded
from numerics_suite.subjects import compat, validate
from numerics_suite.subjects.built_model import built_buffers, is_outside_body, without_adapter
from numerics_suite.subjects.compat import LoadingInfo
from numerics_suite.subjects.factory import call_factory
from numerics_suite.subjects.families import family_of
from numerics_suite.subjects.files import pickle_files, safetensors_files, tensor_headers
from numerics_suite.subjects.load_failures import adapter_failures, load_failures
from numerics_suite.subjects.memory import refuse_too_large
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.remote_code import modules_folder, private_modules
from numerics_suite.subjects.tasks import CLASSIFICATION, TASKS, head_tensors, task_of_class

__all__ = ["Loaded", "default_dtype", "load", "quiet_transformers"]

IDS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
"""Inputs of a factory's batch that no precision converts: a wrong dtype there is a finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model as loaded.

    Attributes:
        model: in eval mode.
        batch: a factory's own batch, floating tensors in the requested dtype; None for other subjects.
        missing: names that the model has and the checkpoint lacks, a new head's included.
        unexpected: names that the checkpoint has and the model has no place for; not the head of another task.
        mismatched: names whose stored shape differs, so that the load initialised them.
        new_head: parameters of the head that was made for the task.
        tied: groups of parameter names that share one tensor.
        attn: the attention implementation that the model computes with; `default` where it has no switch.
        dtype: as requested, such as `bfloat16`.
        remote_modules_dir: the private folder that its own code was loaded from, None without such code.
    """

    model: nn.Module
    batch: dict[str, Any] | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    new_head: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    attn: str
    dtype: str
    remote_modules_dir: Path | None = None


def load(  # noqa: PLR0913  # keywords, each an axis of a cell
    subject: Subject,
    *,
    dtype: str,
    attn: str,
    device: str = "cpu",
    seed: int = 0,
    poison: bool = False,
) -> Loaded:
    """Load a subject; a factory is called anew.

    Args:
        subject: resolved.
        dtype: of its floating parameters, as torch names it (`bfloat16`).
        attn: `default` is the release's choice; else `eager`, `sdpa`, …
        device: where the model ends up.
        seed: draws the weights that the checkpoint lacks.
        poison: uninitialised memory is NaN while the model is built.

    Raises:
        UnsupportedError: this release or this class cannot (architecture, attention); the text is the reason.
        BadInputError: a factory fails.
        UnusableError: no model can be loaded from the checkpoint's files.
        CheckError: a fixture, whose files are right, cannot be loaded, or memory ran out.
    """
    with ExitStack() as switches:
        if subject.kind != "factory":
            switches.enter_context(quiet_transformers())
            switches.enter_context(private_modules())
        switches.enter_context(torch_default_dtype())  # releases up to 4.56 leave it changed when a load fails
        switches.enter_context(seeded(seed))
        if poison:
            switches.enter_context(deterministic_algorithms(fill=True))
        loaded = _build(subject, dtype=dtype, attn=attn, device=device)
    loaded.model.eval()
    if dtype == "float64":
        compat.use_plain_experts(loaded.model)
    return replace(loaded, tied=_tied(loaded.model), attn=compat.attention_of(loaded.model))


def _build(subject: Subject, *, dtype: str, attn: str, device: str) -> Loaded:
    if subject.kind == "factory":
        return _from_factory(subject, dtype=dtype, attn=attn, device=device)
    assert subject.path is not None
    folder = Path(subject.adapter_base or subject.path)
    refuse_too_large(subject, dtype, device)
    # A cell of a subject that this release lacks ends here, and is skipped with this reason.
    validate.check_model_type(folder, subject.config, trust_remote_code=subject.trust_remote_code)
    with load_failures(subject, attn):
        model, info = _from_folder(subject, folder, dtype=dtype, attn=attn, device=device)
        if subject.adapter_base:
            with adapter_failures(subject):
                model, info = _with_adapter(subject, model, info)
        if not subject.quantized:
            place(model, device)
    own_code = validate.needs_remote_code(subject.config)
    return Loaded(
        model=model,
        batch=None,
        missing=info.missing,
        unexpected=_unexpected(subject, info),
        mismatched=info.mismatched,
        new_head=_new_head(subject, model, info),
        tied=(),
        attn="",
        dtype=dtype,
        remote_modules_dir=modules_folder() if own_code else None,
    )


def default_dtype(subject: Subject, dtype: str | None = None) -> str:
    """The dtype of most parameters after a load without a dtype, or with one but without a config object.

    Args:
        subject: a checkpoint; of an adapter, the base.
        dtype: requested without a config object; None requests none, which gives the stored one from 5.0.0 on.

    Raises:
        UnusableError: the load fails; CheckError of a fixture.
    """
    assert subject.path is not None
    folder = Path(subject.adapter_base or subject.path)
    with quiet_transformers(), private_modules(), torch_default_dtype(), seeded(0), load_failures(subject, "default"):
        model, _ = _from_folder(subject, folder, dtype=dtype, attn="default", device="cpu", config=dtype is None)
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name])


def _from_folder(  # noqa: PLR0913 - keywords, as of `load`
    subject: Subject, folder: Path, *, dtype: str | None, attn: str, device: str, config: bool = True
) -> tuple[nn.Module, LoadingInfo]:
    """`from_pretrained` at the dtype, with every missing or mis-shaped weight reported and none refused."""
    # Only `resolve` lets a folder of pickles pass, and only on the user's word.
    pickled = not safetensors_files(folder) and bool(pickle_files(folder))
    options: dict[str, Any] = {
        "trust_remote_code": subject.trust_remote_code,
        "use_safetensors": not pickled,
        "ignore_mismatched_sizes": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if config:
        options["config"] = _config(subject, folder)
    if dtype is not None:
        options[compat.dtype_keyword()] = getattr(torch, dtype)
    if pickled:
        options["weights_only"] = True
    if attn != "default":
        options["attn_implementation"] = attn
    if subject.quantized and device != "cpu":
        options["device_map"] = device
    model, info = compat.auto_class(subject.task, subject.config.get("model_type")).from_pretrained(folder, **options)
    if attn != "default" and compat.attention_of(model) != attn:
        message = f"{type(model).__name__} cannot use {attn} attention; it computes with {compat.attention_of(model)}"
        raise UnsupportedError(message)
    return model, compat.loading_info(info)


def _config(subject: Subject, folder: Path) -> Any:
    """The config as the release reads it, with the requested number of labels, if any."""
    from transformers import AutoConfig  # heavy

    config = AutoConfig.from_pretrained(folder, trust_remote_code=subject.trust_remote_code, local_files_only=True)
    if subject.task in CLASSIFICATION and config.num_labels != subject.num_labels:
        config.num_labels = subject.num_labels
    return config


def _new_head(subject: Subject, model: nn.Module, info: LoadingInfo) -> tuple[str, ...]:
    """Names of the parameters that were made anew for the task."""
    if not subject.new_head:
        return ()
    made = (*info.missing, *info.mismatched)
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    heads = set(head_tensors(made, family_of(subject.config), subject.task))
    outside = {name for name in made if subject.task in CLASSIFICATION and is_outside_body(model, name)}
    return tuple(name for name in made if name in heads | outside and name in held)


def _unexpected(subject: Subject, info: LoadingInfo) -> tuple[str, ...]:
    """Stored names with no place in the model, except another task's head, which is left out on purpose."""
    if subject.task in {task_of_class(name) for name in subject.architectures}:
        return info.unexpected
    family = family_of(subject.config)
    others = {name for task in TASKS if task != subject.task for name in head_tensors(info.unexpected, family, task)}
    own = set(head_tensors(info.unexpected, family, subject.task))
    return tuple(name for name in info.unexpected if name not in others - own)


def _with_adapter(subject: Subject, base: nn.Module, info: LoadingInfo) -> tuple[nn.Module, LoadingInfo]:
    """The base with the adapter on it, trainable; names of the base get peft's prefix."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    assert subject.path is not None
    held = set(tensor_headers(subject.path))
    config: Any = PeftConfig.from_pretrained(subject.path)
    if subject.task in CLASSIFICATION and held and not head_tensors(held, family_of(subject.config), subject.task):
        # peft looks for the head of a classifier's adapter, and for the methods of a language model in a classifier.
        config.task_type, kept = None, getattr(config, "modules_to_save", None)
        config.modules_to_save = [name for name in kept or () if any(name in each.split(".") for each in held)] or None
    # Without this peft would keep the adapter in float32 whatever was requested.
    options: dict[str, Any] = {"is_trainable": True, "autocast_adapter_dtype": False, "local_files_only": True}
    model = PeftModel.from_pretrained(base, subject.path, config=config, **options)
    wanted = set(get_peft_model_state_dict(model))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Before 0.18 peft says that an embedding is saved with the adapter, and it is not.
    lacking = {name for name in wanted - held if held and not _is_embedding(name)}

    def renamed(found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"base_model.model.{name}" for name in found if f"base_model.model.{name}" in names)

    return model, LoadingInfo(
        missing=(*renamed(info.missing), *sorted(lacking)),
        unexpected=(*info.unexpected, *sorted(held - wanted)),
        mismatched=renamed(info.mismatched),
    )


def _is_embedding(name: str) -> bool:
    return "lora_" not in name and name.endswith(("embed_tokens.weight", "lm_head.weight", "word_embeddings.weight"))


# --- factories -----------------------------------------------------------------------------------------------------


def _from_factory(subject: Subject, *, dtype: str, attn: str, device: str) -> Loaded:
    model, batch = call_factory(subject.source)
    convert(model, getattr(torch, dtype))
    if compat.is_language_model(model) and attn != "default":
        compat.set_attention(model, attn)
    place(model, device)
    return Loaded(
        model=model,
        batch=None if batch is None else _converted_batch(batch, getattr(torch, dtype)),
        missing=(),
        unexpected=(),
        mismatched=(),
        new_head=(),
        tied=(),
        attn="",
        dtype=dtype,
    )


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Give floating parameters and saved buffers a dtype in place, as a load at that dtype would.

    Unsaved buffers, rotary frequencies, buffers whose dtype the class itself names, and what the model declares to keep
    in float32 stay unchanged.

    Args:
        model: changed in place; tied parameters stay tied.
        dtype: a floating one.
    """
    kept = _kept_in_fp32(model, dtype)
    saved = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            wide = any(part in name.split(".") for part in kept)
            parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    cast = [
        b for name, b in model.named_buffers() if name in saved and b.is_floating_point() and "inv_freq" not in name
    ]
    named = _named_by_class(without_adapter(model), dtype) if cast else set()
    for buffer in cast:
        if id(buffer) not in named:
            buffer.data = buffer.data.to(dtype)


def _named_by_class(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """The buffers (by identity) that the class builds in a dtype of its own, whatever was requested."""
    built = built_buffers(model, dtype) or {}
    return {id(b) for name, b in model.named_buffers() if name in built and built[name].dtype != dtype}


def place(model: nn.Module, device: str) -> nn.Module:
    """Move the model to its device in place, without conversion; to several devices block by block.

    Args:
        model: on the CPU.
        device: one, or several with commas, which accelerate fills evenly.

    Raises:
        UnsupportedError: several devices and no accelerate.
    """
    parts = parts_of(device)
    if len(parts) == 1:
        return model.to(device)
    try:
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError:
        reason = "a model is spread over several devices by accelerate: pip install 'numerics-suite[accelerate]'"
        raise UnsupportedError(reason) from None
    # An equal share for each, plus room for the one block that may lie on the border.
    blocks = getattr(model, "_no_split_modules", None)
    largest = max(
        (
            sum(p.nbytes for p in block.parameters())
            for name, block in model.named_modules()
            if type(block).__name__ in (blocks or ())
        ),
        default=0,
    )
    share = sum(p.nbytes for p in model.parameters()) // len(parts) + largest
    # accelerate knows devices by number.
    room: dict[Any, Any] = dict.fromkeys(range(len(parts) - 1), share) | {len(parts) - 1: 2**60}
    spread = infer_auto_device_map(model, max_memory=room, no_split_module_classes=list(blocks or ()))
    placed = {name: parts[number] for name, number in spread.items()}
    dispatched: nn.Module = dispatch_model(model, placed, main_device=parts[0], force_hooks=True)
    return dispatched


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Module names that a load would keep in float32: some under float16 only, some under bfloat16 too."""
    names: list[str] = []
    if dtype == torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype in (torch.float16, torch.bfloat16):
        names += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return tuple(names)


def _converted_batch(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and name not in IDS else value
        for name, value in batch.items()
    }


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
