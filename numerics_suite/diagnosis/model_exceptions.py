"""`model-raises`: the model's own code raises where it is called as it documents.

An exception counts only where a plain call, with nothing of this tool between, ends in the same one at the same line. So a call that
only a check makes (narrow or floating ids, a mask of another dtype, a float64 twin, several tokens in one decoding step) and that the model refuses is
no finding, nor is an op that torch has no kernel for, or memory that ran out.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Batch, Finding
from numerics_suite.devices import memory
from numerics_suite.diagnosis.consequences import RAISES
from numerics_suite.diagnosis.findings import batch_as_json
from numerics_suite.diagnosis.remedy_register import cures, remedies_of, untried
from numerics_suite.diagnosis.versions_advice import is_users_code
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.documented_calls import documented_calls, is_documented
from numerics_suite.observations.module_trace import OWN, TORCH

NO_KERNEL = ("not implemented for", "not currently implemented for")
"""What torch says of an op that has no kernel for a dtype or a device."""

TRIED = ("eager-attention", "sdpa-attention", "cast-after-loading")
"""Changes of how the model is loaded, under which its code may take another way."""

EXPLANATION = (
    "A call that the model documents, with nothing of this tool between, ends in this exception. Training and serving end there too. The "
    "code was written for another release of a library, for another dtype or for another shape of its input."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception of the model's own code.

    Attributes:
        line: `modeling_x.py:123`, the innermost of the model's own code.
        module: dotted name of the module whose code that is, None where it is not a module's.
    """

    kind: str
    text: str
    line: str
    module: str | None = None


def model_raises(error: Exception, context: CellContext) -> Finding | None:
    """The finding of an exception that a check met; None where it is no matter of the model's own code."""
    if isinstance(error, NumericsSuiteError):
        return _while_loading(error, context)
    if not _may_be_the_models(error):
        return None
    seen = raised_in(error, context.model)
    if seen is None:
        return None
    replay = _replay(error, seen, context)
    if replay is None:
        return None
    call, tensors = replay
    return _finding(seen, context, call, tensors)


def _may_be_the_models(error: BaseException) -> bool:
    if memory.is_out_of_memory(error) or memory.is_device_lost(error) or isinstance(error, NotImplementedError):
        return False
    return not any(words in str(error) for words in NO_KERNEL)


def raised_in(error: BaseException, model: nn.Module) -> Raised | None:
    """Where in the model's own code the exception was raised, by itself or by what it called; None elsewhere.

    Args:
        error: with its traceback.
        model: its classes' files are its own code, and so is transformers.
    """
    own = _files_of(model)
    frames = [frame for frame in _frames(error) if _is_own(frame, own)]
    return _raised(error, frames[-1], model) if frames else None


def _raised(error: BaseException, frame: traceback.FrameSummary | Any, model: nn.Module | None) -> Raised:
    holder, line = frame
    module = None
    if model is not None:
        running = holder.f_locals.get("self")
        module = next((name for name, each in model.named_modules() if each is running), None)
    text = " ".join(str(error).split())
    return Raised(
        kind=type(error).__name__, text=text, line=f"{Path(holder.f_code.co_filename).name}:{line}", module=module
    )


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


def _files_of(model: nn.Module) -> frozenset[str]:
    modules = {type(module).__module__ for module in model.modules()}
    files = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    return frozenset(file for file in files if file and not file.startswith((TORCH, OWN)))


def _is_own(frame: tuple[FrameType, int], own: frozenset[str]) -> bool:
    file = frame[0].f_code.co_filename
    return file in own or "transformers" in Path(file).parts or _is_remote(file)


def _is_remote(file: str) -> bool:
    return "transformers_modules" in Path(file).parts


def _replay(error: Exception, seen: Raised, context: CellContext) -> tuple[str, Mapping[str, Any]] | None:
    """The documented call that ends in the same exception, and its tensors."""
    double = context.recipe.parameters == "float64"
    plain = context.variant(precision_name="fp32" if double else None)
    given, keywords = _called_with(error)
    if given is None or not is_documented(plain, given, keywords):
        given, keywords = plain.training_batch.tensors, {}
    with_labels = given if "labels" in given else plain.training_batch.tensors
    for tensors in (given, with_labels) if with_labels is not given else (given,):
        for call, make in documented_calls(plain, tensors, keywords):
            try:
                make()
            except NumericsSuiteError:
                continue
            except Exception as again:  # noqa: BLE001 - it is compared with the one that is known
                memory.reraise_if_fatal(again)
                other = raised_in(again, plain.model)
                if other is not None and (other.kind, other.line) == (seen.kind, seen.line):
                    return call, tensors
    return None


def _called_with(error: Exception) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Tensors and keywords of the innermost call of the model."""
    calls = [frame for frame, _ in _frames(error) if frame.f_code is call_model.__code__]
    if not calls:
        return None, {}
    held = calls[-1].f_locals
    return held["tensors"], {name: value for name, value in held["keywords"].items() if name != "use_cache" or value}


def _while_loading(error: NumericsSuiteError, context: CellContext) -> Finding | None:
    """A model whose own code raises while `from_pretrained` makes it; a value of its config that it refuses is bad input."""
    reason = error.__cause__
    if reason is None or isinstance(reason, ValueError) or not _may_be_the_models(reason):
        return None
    frames = [frame for frame in _frames(reason) if not frame[0].f_code.co_filename.startswith((TORCH, "<"))]
    file = frames[-1][0].f_code.co_filename if frames else ""
    if not _is_remote(file) and Path("transformers", "models").as_posix() not in Path(file).as_posix():
        return None
    seen = _raised(reason, frames[-1], None)
    return _finding(seen, context, f"from_pretrained, attention {context.cell.attn}", {})


def _finding(seen: Raised, context: CellContext, call: str, tensors: Mapping[str, Any]) -> Finding:
    text = f"{seen.kind}: {seen.text}"
    versions = () if is_users_code(context) else ("newer-version", "pin-version")
    names = (*(name for name in TRIED if name in cures()), *versions, *remedies_of(RAISES))
    return Finding(
        cause=RAISES,
        title=f"the model's own code raises {text}"[:200],
        explanation=EXPLANATION,
        module=seen.module,
        source=seen.line,
        evidence={
            "exception": text,
            "line": seen.line,
            "input": _described(tensors) or f"dtype {context.recipe.parameters}",
            "call": call,
        },
        batch=batch_as_json(Batch(tensors=tensors)) if tensors else None,
        remedies=untried(tuple(dict.fromkeys(names))),
    )


def _described(tensors: Mapping[str, Any]) -> str:
    """`input_ids int64 [2, 7], attention_mask int64 [2, 7]`."""
    parts = []
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            parts.append(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}")
        else:
            parts.append(f"{name} {type(value).__name__}")
    return ", ".join(parts)
