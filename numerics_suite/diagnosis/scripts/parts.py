"""The parts that scripts share: the heading, the model, the batch, and the modes that compute in float64."""

from __future__ import annotations

import inspect
import pprint
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.text import harmless
from numerics_suite.diagnosis.scripts.scene import ScriptContext
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

FILLED = (
    "# Memory that is never written is NaN on any machine, not what the allocator happens to hand out.",
    "torch.use_deterministic_algorithms(True, warn_only=True)",
    "torch.utils.deterministic.fill_uninitialized_memory = True",
)


def script(scene: ScriptContext, *, model: bool, batch: bool, fills: bool, body: Iterable[str]) -> str:
    """The whole text.

    Args:
        scene: what it is made of.
        model: it loads `model`.
        batch: it writes `batch` out.
        fills: uninitialised memory is NaN while the model is made, where that matters.
        body: what shows the symptom.
    """
    rest = [*(source_lines(scene) if model or scene.source != "factory" else [])]
    if model:
        rest += _model(scene, fills=fills)
    if batch:
        rest += ["", *batch_lines(scene)]
    rest = [*rest, "", *body]
    text = "\n".join(rest)
    for word, definition in (("rms", RMS), ("Rounded", ROUNDED), ("Float64", FLOAT64), ("wide", WIDE)):
        if re.search(rf"\b{word}\b", text):
            text = f"{definition}\n\n{text}"
    text = "\n".join([*_opening(scene), *_imports(text), "", text])
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"
    return text if text.count("\n") < LONGEST else text.replace("\n\n\n", "\n\n")


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


def source_lines(scene: ScriptContext) -> list[str]:
    """Where the model comes from: a tiny config, the checkpoint's folder, or the user's own function."""
    context = scene.context
    if scene.source == "factory":
        module = context.subject.source.removeprefix(PREFIX).partition(":")[0]
        return [f"sys.path.append({_root_of(module)!r})  # where {module} lies"]
    if scene.config is None:
        return [f"CHECKPOINT = {str(context.subject.path)!r}"]
    stored = "AutoModelForCausalLM" if context.subject.new_head else auto_class_name(scene)
    return [
        "# The checkpoint's config, cut down; weights at random.",
        f"CONFIG = {written(scene.config)}",
        f"torch.manual_seed({context.request.seed})",
        "FOLDER = tempfile.TemporaryDirectory()",
        "CHECKPOINT = FOLDER.name",
        f"stored = transformers.{stored}.from_config(transformers.AutoConfig.for_model(**CONFIG))",
        f"stored.to(torch.{context.recipe.parameters}).save_pretrained(CHECKPOINT)",
    ]


def raw_config(scene: ScriptContext) -> str:
    """What gives the config as it is written."""
    if scene.config is not None:
        return "CONFIG"
    return 'json.loads((pathlib.Path(CHECKPOINT) / "config.json").read_text(encoding="utf-8"))'


def _root_of(module: str) -> str:
    """The folder from which that module is imported."""
    path = Path(str(sys.modules[module].__file__)).resolve()
    depth = len(module.split(".")) + (path.name == "__init__.py")
    return str(path.parents[depth - 1])


def loading(scene: ScriptContext, name: str = "model", **more: str) -> list[str]:
    """Lines that load a model under that name.

    Args:
        scene: where it comes from.
        name: of the variable, or of several.
        more: further keywords of `from_pretrained`, as source text; `attn_implementation` replaces the cell's.
    """
    if scene.source == "factory":
        return _made(scene, name, str(more.get("attn_implementation", repr(scene.context.cell.attn))).strip("\"'"))
    options = ["CHECKPOINT", *(f"{key}={value}" for key, value in {**_options(scene), **more}.items())]
    call = f"{name} = transformers.{auto_class_name(scene)}.from_pretrained("
    whole = f"{call}{', '.join(options)})"
    return [whole] if len(whole) <= WIDTH else [call, f"    {', '.join(options)}", ")"]


def auto_class_name(scene: ScriptContext) -> str:
    """The Auto class that loads the subject."""
    subject = scene.context.subject
    return compat.auto_class_name(subject.task, subject.config.get("model_type"))


def _options(scene: ScriptContext) -> dict[str, str]:
    context = scene.context
    subject = context.subject
    options = {compat.dtype_keyword(): f"torch.{context.recipe.parameters}"}
    if context.cell.attn != "default":
        options["attn_implementation"] = f'"{context.cell.attn}"'
    if subject.task != "causal-lm":
        options["num_labels"] = str(context.num_labels)
    if context.loaded.mismatched:
        options["ignore_mismatched_sizes"] = "True"
    return options | trust(scene)


def trust(scene: ScriptContext) -> dict[str, str]:
    """The checkpoint's own code runs where it ran in the suite: on the user's word."""
    trusted = scene.source == "checkpoint" and scene.context.subject.trust_remote_code
    return {"trust_remote_code": "True"} if trusted and "auto_map" in scene.context.subject.config else {}


def _made(scene: ScriptContext, name: str, attn: str) -> list[str]:
    context = scene.context
    module, _, function = context.subject.source.removeprefix(PREFIX).partition(":")
    several = name if context.loaded.batch is None else f"{name}, own_batch"
    integral = any(not parameter.is_floating_point() for parameter in context.model.parameters())
    lines = [
        f'{several} = importlib.import_module("{module}").{function}()',
        f"for parameter in {name}.parameters():",
        *(["    if not parameter.is_floating_point():", "        continue"] if integral else []),
        f"    parameter.data = parameter.data.to(torch.{context.recipe.parameters})",
    ]
    if attn != "default":
        built = hasattr(context.model, "set_attn_implementation")
        lines.append(
            f'{name}.set_attn_implementation("{attn}")' if built else f'{name}.config._attn_implementation = "{attn}"'
        )
    return lines


def _model(scene: ScriptContext, *, fills: bool) -> list[str]:
    context = scene.context
    lines = [f"torch.manual_seed({context.request.seed})"] if context.subject.new_head else []
    fills = fills and _holds_what_nobody_wrote(scene)
    if fills:
        lines += FILLED
    lines += loading(scene)
    if fills:
        lines.append("torch.use_deterministic_algorithms(False)")
    lines.append(ready(scene))
    if context.recipe.tf32:
        lines.append("torch.backends.cuda.matmul.allow_tf32 = True")
    return [*lines, *_pad_token(scene)]


def ready(scene: ScriptContext, name: str = "model") -> str:
    """The line that brings a model to the cell's device, in eval mode."""
    device = scene.context.condition.main_device
    return f"{name}.eval()" if device == "cpu" else f'{name}.to("{device}").eval()'


def _holds_what_nobody_wrote(scene: ScriptContext) -> bool:
    """Whether filling memory makes a difference: the cell's model was made so, and has NaN that no file explains."""
    context = scene.context
    return bool(context.unwritten) or any(nan_count(buffer) for buffer in context.model.buffers())


def _pad_token(scene: ScriptContext) -> list[str]:
    """A classifier's pad token, which a checkpoint of a language model may lack."""
    context = scene.context
    pooled = context.subject.task == "sequence-classification" and context.family.pooling == "pad-id"
    if not pooled or scene.measurement == "no-pad-token":
        return []
    config: Any = context.model.config
    return [f"model.config.pad_token_id = {context.space.pad_id}"] if config.pad_token_id is None else []


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


def written(value: object) -> str:
    """A value as source text, over as many lines as it takes."""
    return pprint.pformat(dict(value) if isinstance(value, Mapping) else value, width=108, compact=True)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def under(scene: ScriptContext, *lines: str, gradients: bool = False, within: str = "") -> list[str]:
    """Lines of a forward pass in the cell's precision: under autocast, or in fp64 under what lifts float32 sections.

    Args:
        scene: its precision.
        lines: of the pass.
        gradients: they are kept.
        within: one more context.
    """
    contexts = [*([] if gradients else ["torch.no_grad()"]), *_arithmetic(scene), *([within] if within else [])]
    return [f"with {', '.join(contexts)}:", *indented(lines)] if contexts else list(lines)


def _arithmetic(scene: ScriptContext) -> list[str]:
    recipe = scene.context.recipe
    if recipe.parameters == "float64":
        return ["Float64()"]
    return [] if recipe.autocast is None else [f'torch.autocast("{scene.device_kind}", torch.{recipe.autocast})']


def backward(scene: ScriptContext, statement: str) -> list[str]:
    """A backward pass in the cell's precision, which autocast has no part in."""
    return ["with Float64():", f"    {statement}"] if scene.context.recipe.parameters == "float64" else [statement]


def indented(lines: Iterable[str]) -> list[str]:
    """The lines, one level deeper."""
    return [f"    {line}" if line else line for line in lines]


def uncached(scene: ScriptContext) -> str:
    """`, use_cache=False` where the model takes the word."""
    taken = inspect.signature(type(scene.context.model).forward).parameters.values()
    words = any(value.name == "use_cache" or value.kind is value.VAR_KEYWORD for value in taken)
    return ", use_cache=False" if words else ""
