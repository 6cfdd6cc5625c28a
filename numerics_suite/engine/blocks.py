"""The parts of a model that training may be limited to: its head, its last blocks, adapters beside its weights."""

from __future__ import annotations

from torch import nn

from numerics_suite.core.errors import NotApplicableError, UnsupportedError
from numerics_suite.subjects.families.family import Family


def freeze_to_scope(model: nn.Module, scope: str, family: Family) -> None:
    """Set `requires_grad` only on the parameters that the scope trains.

    Args:
        model: changed in place.
        scope: `full`, `head`, `last:K`, or `lora`, which puts peft's adapters on every linear layer of the body.
        family: knows the head's names.

    Raises:
        NotApplicableError: the scope names nothing in this model.
    """
    if scope == "full":
        return
    heads = (*family.head_names, *family.lm_head_names)
    names = [name for name, _ in model.named_parameters()]
    kept = {name for name in names if any(part in heads for part in name.split("."))}
    if scope.startswith("last:"):
        blocks = decoder_blocks(model)
        for path in blocks[-int(scope.partition(":")[2]) :]:
            kept.update(name for name in names if name.startswith(f"{path}."))
    if scope == "lora":
        kept = _add_lora(model)
    if not kept:
        reason = f"--train-scope {scope} names no parameter of this model"
        raise NotApplicableError(reason)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)


def _add_lora(model: nn.Module) -> set[str]:
    """Inject peft's LoRA in place and return the names of its parameters.

    Raises:
        UnsupportedError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        reason = "--train-scope lora needs peft: pip install 'numerics-suite[peft]'"
        raise UnsupportedError(reason) from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    body = sorted({name.rpartition(".")[2] for name in linear if "." in name})
    inject_adapter_in_model(LoraConfig(target_modules=body), model)
    return {name for name, _ in model.named_parameters() if "lora_" in name}


def decoder_blocks(model: nn.Module) -> list[str]:
    """Dotted names of the repeated blocks: the members of the longest `nn.ModuleList`, in order."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{index}" for index in range(len(longest))]
