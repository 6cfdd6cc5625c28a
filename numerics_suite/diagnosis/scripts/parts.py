"""A script: the heading, the model, the batch, and what shows the symptom."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.text import harmless
from numerics_suite.diagnosis.scripts.scene import Body, ScriptContext
from numerics_suite.diagnosis.scripts.templates import rendered, spaced, written
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.observations.finiteness import nan_count
from numerics_suite.subjects import compat
from numerics_suite.subjects.factory import PREFIX

LONGEST = 80
"""Lines of a script, fewer than."""

WIDTH = 116
"""Characters of a script's line, about."""

OTHERS = {"accelerate": "accelerate.Accelerator(", "peft": "peft.get_peft_model("}
"""Packages that few scripts need, and the call by which they do."""

STANDARD = ("contextlib", "copy", "importlib", "json", "math", "pathlib", "statistics", "sys", "tempfile")
"""Modules of the standard library that a script imports where it uses them."""

WIDE = """
LOWER = (torch.float32, torch.bfloat16, torch.float16)


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in LOWER else value
    return torch.float64 if isinstance(value, torch.dtype) and value in LOWER else value
"""

FLOAT64 = '''
class Float64(TorchDispatchMode):
    """Every op in float64, a program's float32 sections too: no rounding is left to hide behind."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {}))
'''

ROUNDED = '''
class Rounded(TorchDispatchMode):
    """Every op in float64 and rounded once to its own dtype: the error that the precision makes unavoidable."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kept = not isinstance(result, torch.Tensor) or result.dtype not in LOWER
        if kept or any(argument.alias_info for argument in func._schema.arguments):
            return result
        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {})).to(result.dtype)
'''

RMS = """
def rms(values):
    return float(values.double().square().mean().sqrt())
"""

HELPERS = {"rms": RMS, "Rounded": ROUNDED, "Float64": FLOAT64, "wide": WIDE}
"""What a script defines where it uses the name; a later one serves those before it."""


def script(scene: ScriptContext, body: Body) -> str | None:
    """The whole text; None where this scene cannot show the symptom."""
    facts = body.facts(scene)
    if facts is None:
        return None
    known = {**_known(scene, body), **facts}
    text = rendered("_model.py.j2", known) if body.model or scene.source != "factory" else ""
    if body.batch:
        text += "\n" + "\n".join(batch_lines(scene)) + "\n"
    text += "\n" + spaced(rendered(body.template, known))
    for word, definition in HELPERS.items():
        if re.search(rf"\b{word}\b", text):
            text = f"{definition}\n\n{text}"
    text = "\n".join([*_opening(scene), *_imports(text), "", text])
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"
    return text if text.count("\n") < LONGEST else text.replace("\n\n\n", "\n\n")


def _known(scene: ScriptContext, body: Body) -> dict[str, Any]:
    """The names that every template may use; those of a single one come from its `facts`."""
    context = scene.context
    known: dict[str, Any] = {
        "scene": scene,
        "body": body,
        "context": context,
        "subject": context.subject,
        "finding": scene.finding,
        "check": scene.check,
        "measurement": scene.measurement,
        "plan": context.request.plan,
        "recipe": context.recipe,
        "task": context.subject.task,
        "device": context.condition.main_device,
        "fills": body.fills and _holds_what_nobody_wrote(context),
        "pad_id": _pad_id(scene),
        "uncached": _uncached(context),
        "trust": _trust(scene),
        "trusted": "".join(f", {key}={value}" for key, value in _trust(scene).items()),
        "raw_config": _raw_config(scene),
        "under": partial(_under, scene),
        "lifted": "Float64()" if context.recipe.parameters == "float64" else "",
    }
    if scene.source == "factory":
        known["module"], _, known["function"] = context.subject.source.removeprefix(PREFIX).partition(":")
        known["root"] = _root_of(known["module"])
        known["integral"] = any(not parameter.is_floating_point() for parameter in context.model.parameters())
    else:
        known["auto_class"] = compat.auto_class_name(context.subject.task, context.subject.config.get("model_type"))
    return {**known, "loading": partial(_loading, known), "ready": partial(_ready, known["device"])}


# --- the heading ---------------------------------------------------------------------------------------------------


def _opening(scene: ScriptContext) -> list[str]:
    cell, finding = scene.context.cell, scene.finding
    told = textwrap.wrap(
        harmless(" ".join(f"{finding.title}.".split())).replace('"""', "'''").replace("\\", "/"), WIDTH
    )
    needs = "the function that makes the model" if scene.source == "factory" else "these two alone"
    needs = "accelerate beside these two" if scene.check == "train.trainer" else needs
    return [
        '"""' + told[0],
        *told[1:],
        "",
        f"Found by numerics-suite: {scene.check} in {cell.precision} with {cell.attn} attention on {cell.device}, cause {finding.cause},",
        f"torch {torch.__version__}, transformers {compat.version()}. Needs {needs}, and fails where the defect is.",
        '"""',
        "",
    ]


def _imports(text: str) -> list[str]:
    standard = [f"import {name}" for name in STANDARD if re.search(rf"\b{name}\.", text)]
    outside = ["import torch", *(["import transformers"] if "transformers." in text else [])]
    outside += [f"import {name}" for name, call in OTHERS.items() if call in text]
    if "safe_open(" in text:
        outside.append("from safetensors import safe_open")
    if "TorchDispatchMode" in text:
        outside.append("from torch.utils._python_dispatch import TorchDispatchMode")
    trees = [name for name in ("tree_leaves", "tree_map") if f"{name}(" in text]
    if trees:
        outside.append(f"from torch.utils._pytree import {', '.join(trees)}")
    return [*standard, *([""] if standard else []), *outside]


# --- the model -----------------------------------------------------------------------------------------------------


def _raw_config(scene: ScriptContext) -> str:
    """What gives the config as it is written."""
    if scene.config is not None:
        return "CONFIG"
    return 'json.loads((pathlib.Path(CHECKPOINT) / "config.json").read_text(encoding="utf-8"))'


def _root_of(module: str) -> str:
    """The folder from which that module is imported."""
    path = Path(str(sys.modules[module].__file__)).resolve()
    depth = len(module.split(".")) + (path.name == "__init__.py")
    return str(path.parents[depth - 1])


def _loading(known: Mapping[str, Any], name: str = "model", attn: str = "", **more: str) -> str:
    """Lines that load a model.

    Args:
        known: the names of the templates.
        name: of the variable, or of several.
        attn: attention implementation instead of the cell's.
        more: further keywords of `from_pretrained`, as source text.
    """
    context = known["context"]
    subject = context.subject
    if known["scene"].source == "factory":
        return rendered("_made.py.j2", {**known, "name": name, "attn": attn or context.cell.attn}).strip("\n")
    options = {compat.dtype_keyword(): f"torch.{context.recipe.parameters}"}
    if attn or context.cell.attn != "default":
        options["attn_implementation"] = f'"{attn or context.cell.attn}"'
    if subject.task != "causal-lm":
        options["num_labels"] = str(context.num_labels)
    if context.loaded.mismatched:
        options["ignore_mismatched_sizes"] = "True"
    words = ", ".join(
        ["CHECKPOINT", *(f"{key}={value}" for key, value in {**options, **known["trust"], **more}.items())]
    )
    call = f"{name} = transformers.{known['auto_class']}.from_pretrained("
    return f"{call}{words})" if len(call) + len(words) < WIDTH else f"{call}\n    {words}\n)"


def _trust(scene: ScriptContext) -> dict[str, str]:
    """The checkpoint's own code runs where it ran in the suite: on the user's word."""
    trusted = scene.source == "checkpoint" and scene.context.subject.trust_remote_code
    return {"trust_remote_code": "True"} if trusted and "auto_map" in scene.context.subject.config else {}


def _ready(device: str, name: str = "model") -> str:
    """The line that brings a model to the cell's device, in eval mode."""
    return f"{name}.eval()" if device == "cpu" else f'{name}.to("{device}").eval()'


def _holds_what_nobody_wrote(context: CellContext) -> bool:
    """Whether filling memory makes a difference: the cell's model was made so, and has NaN that no file explains."""
    return bool(context.unwritten) or any(nan_count(buffer) for buffer in context.model.buffers())


def _pad_id(scene: ScriptContext) -> int | None:
    """A classifier's pad token, which a checkpoint of a language model may lack."""
    context = scene.context
    pooled = context.subject.task == "sequence-classification" and context.family.pooling == "pad-id"
    if not pooled or scene.measurement == "no-pad-token":
        return None
    config: Any = context.model.config
    return context.space.pad_id if config.pad_token_id is None else None


# --- the batch -----------------------------------------------------------------------------------------------------


def batch_lines(scene: ScriptContext) -> list[str]:
    """The batch, written out."""
    ids = scene.tensors.get("input_ids")
    lines = ["batch = {"]
    copied = False
    for name, value in scene.tensors.items():
        if name == "labels" and ids is not None and torch.equal(value, ids):
            copied = True
        else:
            text = _mask_text(value) if name == "attention_mask" else None
            lines += f"    {name!r}: {text or f'torch.tensor({written(value.tolist())})'},".splitlines()
    lines.append("}")
    if copied:
        lines.append("batch['labels'] = batch['input_ids'].clone()")
    device = scene.context.condition.main_device
    if device != "cpu":
        lines.append(f'batch = {{name: value.to("{device}") for name, value in batch.items()}}')
    return lines


def _mask_text(mask: Tensor) -> str | None:
    """A mask of ones, or of rows that are padded on one side, in short; None for any other."""
    if mask.dtype is not torch.int64 or mask.dim() != 2:
        return None
    rows, width = mask.shape
    columns, counts = torch.arange(width), mask.sum(dim=1, keepdim=True)
    if bool((mask == 1).all()):
        return f"torch.ones({rows}, {width}, dtype=torch.int64)"
    for sign, edges in (("<", counts), (">=", width - counts)):
        if torch.equal(mask.bool(), columns < edges if sign == "<" else columns >= edges):
            return f"(torch.arange({width}) {sign} torch.tensor({edges.tolist()})).long()"
    return None


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _under(scene: ScriptContext, *, gradients: bool = False, within: str = "") -> str:
    """Contexts of a forward pass in the cell's precision: autocast, or in fp64 what lifts float32 sections.

    Args:
        scene: its precision.
        gradients: they are kept.
        within: one more context.
    """
    recipe = scene.context.recipe
    autocast = "" if recipe.autocast is None else f'torch.autocast("{scene.device_kind}", torch.{recipe.autocast})'
    arithmetic = "Float64()" if recipe.parameters == "float64" else autocast
    return ", ".join(filter(None, ("" if gradients else "torch.no_grad()", arithmetic, within)))


def _uncached(context: CellContext) -> str:
    """`, use_cache=False` where the model takes the word."""
    taken = inspect.signature(type(context.model).forward).parameters.values()
    words = any(value.name == "use_cache" or value.kind is value.VAR_KEYWORD for value in taken)
    return ", use_cache=False" if words else ""
