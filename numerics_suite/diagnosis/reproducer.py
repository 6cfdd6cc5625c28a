"""A script that shows a finding with torch and transformers alone: written, run, and kept only if it fails as the finding did.

First with a tiny model made from the checkpoint's config, cut down; where that does not show it, with the checkpoint. A
model that the user's own function makes is made by that function in the script too.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.records import Batch, Finding
from numerics_suite.devices import arithmetic
from numerics_suite.devices.memory import free_bytes
from numerics_suite.devices.random_state import seeded
from numerics_suite.diagnosis.scripts import BODIES, SYMPTOM, Body, ScriptContext
from numerics_suite.diagnosis.scripts.parts import LONGEST, script
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.inputs.labels import IGNORED
from numerics_suite.subjects.memory import USABLE, estimate_bytes
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.remote_code import private_modules
from numerics_suite.subjects.validate import needs_remote_code

SMALLER = ((8,), (8, 5), (24, 16), (64,))
"""Tokens of each row that are tried before the whole batch; a shorter row keeps padding in it."""

ENOUGH_LABELS = 2

PATIENCE = 120.0
"""Seconds after which no larger batch is tried: a model of billions of parameters is loaded for each."""

CUT = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
"""What a config is cut down to, where it has the key and more."""

DROPPED = (
    "architectures",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "layer_types",
    "id2label",
    "label2id",
)


def reproducer(check: str, finding: Finding, context: CellContext, batch: Batch | None) -> str | None:
    """The text of a script that fails alone as the check did, None where none could be made.

    Args:
        check: id of the check that failed.
        finding: of that check.
        context: the cell.
        batch: the smallest failing one, None where the check took none.
    """
    ways = list(_ways(check, finding))
    if not ways or not _can_be_written(context):
        return None
    for body, shown in ways:
        with contextlib.suppress(Exception):  # a finding without a script is a finding still
            text = _first_that_fails(_scenes(check, shown, context, batch, body), body)
            if text is not None:
                return text
    return None


def _first_that_fails(scenes: Iterator[ScriptContext], body: Body) -> str | None:
    begun = time.monotonic()
    for scene in scenes:
        if time.monotonic() - begun > PATIENCE:
            break
        text = script(scene, body) if _fits(scene, body) else None
        if text is not None and len(text.splitlines()) < LONGEST and fails(text):
            return text
    return None


def _ways(check: str, finding: Finding) -> Iterator[tuple[Body, Finding]]:
    """What may show the finding: its own measurement, or where nothing short can, another of the check that is over its budget too.

    A comparison with float64 that came out as NaN is shown by the activations that are NaN, too.
    """
    facts = finding.evidence
    own, measured = str(facts.get("measurement", "")), facts.get("measured")
    if (check, own) in BODIES:
        yield BODIES[check, own], finding
    if check.startswith("reference.") and isinstance(measured, float) and math.isnan(measured):
        yield BODIES["forward.headroom", "non-finite"], finding
    beside = [name.removeprefix("also ") for name in facts if name.startswith("also ")]
    for name in beside:
        if (check, name) in BODIES:
            told = {"measurement": name, "allowed": facts[f"also {name} allowed"]}
            yield BODIES[check, name], replace(finding, evidence={**facts, **told})


def _can_be_written(context: CellContext) -> bool:
    """Whether a few lines of torch and transformers load the subject, and run no code that the user did not trust."""
    subject = context.subject
    if subject.adapter_base or subject.quantized or not context.takes_ids:
        return False
    own_code = subject.kind != "factory" and needs_remote_code(subject.config)
    return subject.trust_remote_code or not own_code


def _fits(scene: ScriptContext, body: Body) -> bool:
    """Whether another copy of the model, and its float64 twins, have room beside the one that is loaded."""
    context = scene.context
    if scene.source == "config":
        return True
    needed = estimate_bytes(
        context.subject,
        "float64" if body.twins else context.recipe.parameters,
        training=scene.check.startswith("train.") or scene.check == "reference.gradient",
        batch=context.request.rows,
        seq=context.request.length,
    )
    return needed is None or needed * (1.5 if body.twins else 1) <= USABLE * free_bytes(context.cell.device)


# --- scenes --------------------------------------------------------------------------------------------------------


def _scenes(
    check: str, finding: Finding, context: CellContext, batch: Batch | None, body: Body
) -> Iterator[ScriptContext]:
    """Smallest first."""
    batches = list(_batches(check, context, batch, body)) if body.batch else [{}]
    subject = context.subject
    small = None if subject.kind == "factory" or needs_remote_code(subject.config) else cut_down(subject.config)
    for config in (small, None) if small is not None else (None,):
        for tensors in batches:
            held = tensors if config is None else _within(tensors, int(config["vocab_size"]))
            yield ScriptContext(check=check, finding=finding, context=context, tensors=held, config=config)


def _batches(check: str, context: CellContext, batch: Batch | None, body: Body) -> Iterator[dict[str, Tensor]]:
    """Cuts of the failing batch, then all of it; labels where they are asked for."""
    given = (batch or context.training_batch).tensors
    whole = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    labelled = check.startswith("train.") or check in {"reference.gradient", "reference.oracle"}
    if not labelled:
        whole.pop("labels", None)
    for lengths in SMALLER:
        cut = _cut(whole, lengths, context) if len(lengths) >= body.rows else None
        # The mean over no label is NaN by definition, and shows nothing.
        if cut is not None and ("labels" not in cut or bool((cut["labels"] != IGNORED).any())):
            yield cut
    yield whole


def _cut(whole: Mapping[str, Tensor], lengths: tuple[int, ...], context: CellContext) -> dict[str, Tensor] | None:
    """The first real tokens of the first rows, padded on the side where they were; None where that is no cut.

    Args:
        whole: a batch.
        lengths: most tokens of each row.
        context: the cell.
    """
    mask = whole.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.is_floating_point() or len(mask) < len(lengths):
        return None
    left = not bool(mask[:, 0].all())
    real = [mask[row].nonzero().flatten()[:length] for row, length in enumerate(lengths)]
    width = max(len(places) for places in real)
    if not width or (len(lengths) == len(mask) and width == mask.shape[1]):
        return None
    cut: dict[str, Tensor] = {}
    for name, value in whole.items():
        if value.shape[:2] != mask.shape:
            cut[name] = value[: len(lengths)] if value.dim() and len(value) == len(mask) else value
            continue
        filler = {"input_ids": context.space.pad_id, "labels": IGNORED}.get(name, 0)
        cut[name] = value.new_full((len(lengths), width), filler)
        for row, places in enumerate(real):
            at = slice(width - len(places), None) if left else slice(0, len(places))
            cut[name][row, at] = value[row, places]
    return _with_labels(cut) if context.subject.task == "causal-lm" and "labels" in cut else cut


def _with_labels(cut: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a row with a single label queries and keys learn nothing by definition: there all real tokens count."""
    labels, mask = cut["labels"], cut["attention_mask"].bool()
    few = ((labels[:, 1:] != IGNORED).sum(dim=1) < ENOUGH_LABELS).unsqueeze(1)
    first = mask & (mask.cumsum(dim=1) == 1)  # predicted from padding, or from nothing
    labels = torch.where(few & mask & ~first, cut["input_ids"], labels)
    return {**cut, "labels": labels}


def cut_down(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tiny config of the same kind; None for one that does not say its sizes in the usual words."""
    if "vocab_size" not in config or "hidden_size" not in config:
        return None
    small = {key: value for key, value in config.items() if key not in DROPPED}
    small |= {key: min(value, small[key]) for key, value in CUT.items() if isinstance(small.get(key), int)}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = small.get(key)
        if isinstance(value, int) and value >= small["vocab_size"]:
            small[key] = small["vocab_size"] - 1
        elif isinstance(value, list):
            small[key] = [min(token, small["vocab_size"] - 1) for token in value]
    return small


def _within(tensors: Mapping[str, Tensor], vocab: int) -> dict[str, Tensor]:
    """Ids (and labels that are ids) brought into a smaller vocabulary."""
    return {
        name: torch.where(value < 0, value, value % vocab) if name in {"input_ids", "labels"} else value
        for name, value in tensors.items()
    }


# --- seeing that it fails ------------------------------------------------------------------------------------------


def fails(text: str) -> bool:
    """Whether the script, run in this process, ends with its own assertion; what it changes of torch is restored."""
    said = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(quiet_transformers())
        stack.enter_context(private_modules())
        stack.enter_context(seeded(0))
        stack.enter_context(arithmetic.kept())
        stack.enter_context(_import_path_kept())
        try:
            exec(compile(text, "<reproducer>", "exec"), names)  # noqa: S102 - the text was written above
        except AssertionError as error:
            return str(error).startswith(SYMPTOM)
        except Exception:  # noqa: BLE001 - another failure is not the finding's
            return False
        finally:
            for value in names.values():
                if isinstance(value, tempfile.TemporaryDirectory):
                    value.cleanup()
    return False


@contextlib.contextmanager
def _import_path_kept() -> Iterator[None]:
    """Restore the path of imports."""
    path = sys.path[:]
    try:
        yield
    finally:
        sys.path[:] = path
