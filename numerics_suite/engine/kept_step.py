"""A caught training step as stored in a bundle: model, batches, random states, and how its loop stepped.

Needs torch, safetensors and transformers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class NoModelError(Exception):
    """The code or checkpoint that makes the model is missing."""


class Kept:
    """What the folder holds."""

    def __init__(self, folder: Path) -> None:
        """Read it."""
        self.told: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        names = ("batches", "parameters", "buffers", "gradients", "optimizer")
        files = {name: folder / f"{name}.safetensors" for name in names}
        read = {name: load_file(path) if path.is_file() else {} for name, path in files.items()}
        self.inputs, self.parameters, self.buffers, self.gradients, self.states = (read[name] for name in names)
        self.model: dict[str, Any] = self.told["model"]
        self.finding: dict[str, Any] = self.told["finding"]
        self.step = int(self.told["step"])
        self.loop: dict[str, Any] | None = self.told.get("loop") if self.parameters else None

    def steps(self) -> dict[int, list[dict[str, Any]]]:
        """The calls of each step that can be taken, oldest first."""
        first = self.loop["start"] if self.loop else self.step
        found: dict[int, list[dict[str, Any]]] = {}
        for call in self.told["calls"]:
            if first <= call["step"] <= self.step:
                found.setdefault(call["step"], []).append(call)
        return found


def build(kept: Kept, source: str | None = None) -> nn.Module:
    """Return the watched model; edit this function to make a model of your own.

    Args:
        kept: what the folder holds.
        source: a checkpoint, or `factory:MODULE:FUNCTION`; None for what the folder holds.

    Raises:
        NoModelError: it is of a class that this script cannot make.
    """
    if source is not None and source.startswith("factory:"):
        _, module, function = source.split(":")
        sys.path.insert(0, str(Path.cwd()))
        made = getattr(importlib.import_module(module), function)()
        return filled(kept, made[0] if isinstance(made, tuple) else made)
    adapter, told = kept.model["adapter"], kept.model
    name, found = adapter["base"] if adapter else told["class"], None
    if told["config"] is not None:
        import transformers  # heavy

        found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        message = f"{told['class']} is no class of transformers; give what makes it: factory:module:function"
        raise NoModelError(message)
    if not kept.parameters and source is None:
        message = "the bundle holds no parameters (snapshot_every); give a checkpoint"
        raise NoModelError(message)
    model = _of_transformers(kept, found, source)
    return model if source is not None else filled(kept, _with_inputs(kept, model))


def _of_transformers(kept: Kept, found: Any, source: str | None) -> Any:
    """A model of a class of transformers, with the adapters that peft had put on it."""
    told, adapter = kept.model, kept.model["adapter"]
    options = {"torch_dtype": getattr(torch, told["dtype"]), "attn_implementation": told["attn"]}
    if source is not None and adapter and (Path(source) / "adapter_config.json").is_file():
        import peft

        base = peft.PeftConfig.from_pretrained(source).base_model_name_or_path
        return peft.PeftModel.from_pretrained(found.from_pretrained(base, **options), source, is_trainable=True)
    if source is not None:
        model = found.from_pretrained(source, **options)
    else:
        config = found.config_class.from_dict(numbers(told["config"]))
        config._attn_implementation = told["attn"]  # noqa: SLF001 - as from_pretrained sets it
        with torch.device("meta"):  # a config of any size costs nothing there
            size = sum(p.numel() for p in found(config).parameters())
        if size > sum(value.numel() for value in kept.parameters.values()):
            message = f"the parameters in the bundle are not those of {told['class']} as this release builds it"
            raise NoModelError(message)
        model = found(config)
    if adapter:
        import peft

        for name, (kind, options) in adapter["configs"].items():
            found_kind = getattr(peft, kind, None)
            if not isinstance(found_kind, type) or not issubclass(found_kind, peft.PeftConfig):
                message = f"peft has no adapter of the kind {kind}"
                raise NoModelError(message)
            made = found_kind(**options)
            if hasattr(model, "add_adapter") and hasattr(model, "get_base_model"):
                model.add_adapter(name, made)
            else:
                model = peft.get_peft_model(model, made, name)
        model.set_adapter(adapter["active"])
    return model


def _with_inputs(kept: Kept, model: Any) -> Any:
    """The model with its checkpoints, and with inputs that need a gradient where the loop's did."""
    if kept.model.get("checkpointing") is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept.model["checkpointing"])
    embedding = model.get_input_embeddings()
    embedding._forward_hooks.clear()  # noqa: SLF001 - peft and transformers put one there of their own accord, or do not
    if kept.model.get("inputs_require_grads"):
        embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    return model


def filled(kept: Kept, model: nn.Module) -> nn.Module:
    """The model with the folder's parameters, `requires_grad` and training mode set as in the loop.

    Args:
        kept: what the folder holds.
        model: of the watched class.

    Raises:
        NoModelError: the folder does not hold its parameters.
    """
    if not fits(kept, model):
        message = f"the parameters in the bundle are not those of {kept.model['class']} as it is made here"
        raise NoModelError(message)
    for name, value in kept.parameters.items():
        _put(model, name, value)
    for name, buffer in model.named_buffers():
        if name in kept.buffers and kept.buffers[name].shape == buffer.shape:
            buffer.data = kept.buffers[name].clone()
    trained = kept.model.get("trained_names")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (trained is None or name in trained))
    return model.train(bool(kept.model["training"]))


def fits(kept: Kept, model: nn.Module) -> bool:
    """Whether the folder holds every parameter of the model, in its shape, and no other.

    Args:
        kept: what the folder holds.
        model: of any class.
    """
    own = dict(model.named_parameters())
    return own.keys() <= kept.parameters.keys() and all(
        getattr(_at(model, name), "shape", None) == value.shape for name, value in kept.parameters.items()
    )


def _at(model: nn.Module, name: str) -> Any:
    """The parameter of that name, tied or not; None where there is none."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter; one that the model ties and the folder holds separately becomes its own tensor."""
    if name in dict(model.named_parameters()):
        model.get_parameter(name).data = value.clone()
    else:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value.clone()))


def numbers(value: Any) -> Any:
    """Undo JSON's limits: a text that names a non-finite number becomes that number; tuples stay lists."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def groups_of(written: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Options of an optimizer's groups; its betas are a tuple."""
    read = ({key: numbers(v) for key, v in group.items()} for group in written)
    return [{key: tuple(v) if isinstance(v, list) else v for key, v in group.items()} for group in read]


class Steps:
    """Takes the kept steps one by one; they change the model."""

    def __init__(self, kept: Kept, model: nn.Module) -> None:
        """Make the optimizers as they were."""
        self.kept, self.model, self.calls = kept, model, kept.steps()
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.named = dict(model.named_parameters())
        self.optimizers = [self._optimizer(each) for each in kept.loop["optimizers"]] if kept.loop else []
        self.scale = float(kept.loop["scale"] if kept.loop else kept.told["loss_scale"])
        self.scaled = bool(kept.loop["scaled"]) if kept.loop else self.scale != 1
        self.factor: float | None = None
        self.without_loss = False

    def _optimizer(self, written: Mapping[str, Any]) -> torch.optim.Optimizer:
        options = zip(groups_of(written["groups"]), written["names"], strict=True)
        groups = [{**group, "params": [self.named[name] for name in names]} for group, names in options]
        made: torch.optim.Optimizer = getattr(torch.optim, written["kind"])(groups)
        for name, values in written["state"].items():
            made.state[self.named[name]] = {key: self._value(v, self.named[name]) for key, v in values.items()}
        return made

    def _value(self, written: Mapping[str, Any], parameter: Tensor) -> Any:
        if "tensor" not in written:
            return numbers(written["value"])
        value = self.kept.states[written["tensor"]].clone()
        return value.to(parameter.device) if value.shape == parameter.shape else value

    def value(self, written: Mapping[str, Any]) -> Any:
        """An input of a call, on the model's device.

        Args:
            written: its entry in the bundle.
        """
        kind, inner = next(iter(written.items()))
        if kind == "tensor":
            return self.kept.inputs[inner].to(self.device)
        if kind == "dict":
            return {name: self.value(item) for name, item in inner.items()}
        if kind in ("list", "tuple"):
            return [self.value(item) for item in inner]
        return numbers(inner) if kind == "value" else None

    def forward(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """One call with its random state and its autocast sections."""
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(call["rng"]["cpu"]), dtype=torch.uint8))
        with contextlib.ExitStack() as stack:
            for kind, dtype in call["autocast"].items():
                kind = self.device.type if kind != "cpu" else kind  # noqa: PLW2901 - where the model is now
                stack.enter_context(torch.autocast(kind, dtype=getattr(torch, dtype)))
            kwargs = {name: self.value(value) for name, value in call["kwargs"].items()}
            output = self.model(*[self.value(value) for value in call["args"]], **kwargs)
        if hasattr(output, "items"):
            return dict(output)
        several = isinstance(output, (tuple, list))
        return {f"output{place}": item for place, item in enumerate(output)} if several else {"output": output}

    def passes(self, step: int) -> list[str]:
        """Run the forward and backward passes of a step and return what is not finite in them."""
        self.model.zero_grad()
        bad, calls = [], self.calls[step]
        for number, call in enumerate(calls, 1):
            named = self.forward(call)
            bad += [f"{name} of forward pass {number}" for name, value in named.items() if not finite(value)]
            loss = named.get("loss")
            if isinstance(loss, Tensor) and loss.requires_grad:
                torch.autograd.backward(loss * self.scale / len(calls))
            elif sent := {name: self.value(kept) for name, kept in call.get("cotangents", {}).items() if name in named}:
                # The loop computed its loss outside of the model: what it sent back is as it was then.
                torch.autograd.backward([named[name] for name in sent], list(sent.values()))
            else:
                self.without_loss = True
        self._as_multiplied(step)
        for name, value in self.kept.gradients.items():  # left over from before, and never cleared
            self.named[name].grad = value.to(self.named[name])
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        bad += [f"gradient of {name}" for name, value in gradients.items() if not finite(value)]
        return bad if bad or finite(norm_of(gradients.values())) else ["the gradient norm"]

    def _as_multiplied(self, step: int) -> None:
        """What the loop multiplied its losses by beside their mean: read off the gradient norm of its first step."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        if self.factor is None:
            read = numbers((self.kept.loop or {}).get("norms", {}).get(str(step), 0.0))
            own = float(norm_of(gradients))
            known = len(self.optimizers) == 1 and 0 < read < math.inf and 0 < own < math.inf
            self.factor = read / own if known and not self.scaled else 1.0
        if self.factor != 1:
            torch._foreach_mul_(gradients, self.factor)

    def update(self, step: int, around: Callable[[torch.optim.Optimizer], Any] = contextlib.nullcontext) -> None:
        """The optimizers' part of a step, as the loop did it; a GradScaler skips gradients that are not finite."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        if self.scaled:
            torch._foreach_mul_(gradients, 1 / self.scale)
            if not all(map(finite, gradients)):
                self.scale *= float(self.kept.loop["backoff"]) if self.kept.loop else 0.5
                return
        loop = self.kept.loop or {"max_norm": None, "rates": {}}
        if loop["max_norm"] is not None:
            nn.utils.clip_grad_norm_(self.named.values(), loop["max_norm"])
        for index, optimizer in enumerate(self.optimizers):
            rates = groups_of(loop["rates"].get(str(step), [[]] * (index + 1))[index])
            for group, now in zip(optimizer.param_groups, rates, strict=False):
                group.update(now)
            with around(optimizer):
                optimizer.step()


def finite(value: Any) -> bool:
    """Whether every element is finite."""
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def norm_of(tensors: Any) -> Tensor:
    """The Euclidean norm of all of them, in at least float32."""
    wide = [t.detach().float() if t.element_size() < 4 else t.detach() for t in tensors if t.is_floating_point()]
    return nn.utils.get_total_norm(wide)
