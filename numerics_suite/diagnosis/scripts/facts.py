"""What the template of one measurement says of a scene; None where the scene cannot show it."""

from __future__ import annotations

from numerics_suite.checks.forward.packing import MOST_ROWS, MOST_TOKENS
from numerics_suite.checks.forward.padding import EXTRA
from numerics_suite.checks.inputs._padding_side import COPIES, GIVEN
from numerics_suite.checks.inputs.pipeline import TEXTS, UNLIKELY_BITS
from numerics_suite.checks.train.amp import INITIAL_SCALE
from numerics_suite.checks.train.clip import LIMIT
from numerics_suite.core.exact import AGREED
from numerics_suite.diagnosis.scripts.scene import Asks, Facts, ScriptContext
from numerics_suite.engine.decoding import takes_positions
from numerics_suite.engine.packed_rows import WORDS
from numerics_suite.engine.references import is_reference_itself, longest_reduction, rounding_allowance
from numerics_suite.engine.training_loop import OPTIMIZERS
from numerics_suite.inputs.labels import IGNORED, predicts_next_token
from numerics_suite.inputs.strategies import MASK_DTYPES
from numerics_suite.judgement.budgets.forward import ROUNDED_LAW
from numerics_suite.subjects import compat
from numerics_suite.subjects.generation import names_keyword
from numerics_suite.subjects.tasks import TASKS, head_tensors

NAMELESS = frozenset({"dtype", "torch_dtype"})
"""Keys that a load names itself, so that no value in the file could show."""

MOST_NAMES = 30
"""Trained parameters that a script names one by one, where the scope leaves others untrained."""

TRAINER_ARGUMENTS = {
    "label-smoothing": "label_smoothing_factor=0.1",
    "reentrant-checkpointing": 'gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}',
    "non-reentrant-checkpointing": 'gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}',
}
EACH_ROW = ("accumulation", "adapter", "label-smoothing")
"""Ways in which the Trainer gets each row as a micro-batch of its own."""

CONSTANTS: Facts = {
    "AGREED": AGREED,
    "COPIES": COPIES,
    "EXTRA": EXTRA,
    "IGNORED": IGNORED,
    "INITIAL_SCALE": INITIAL_SCALE,
    "LIMIT": LIMIT,
    "MASK_DTYPES": MASK_DTYPES,
    "MOST_NAMES": MOST_NAMES,
    "MOST_ROWS": MOST_ROWS,
    "MOST_TOKENS": MOST_TOKENS,
    "ROUNDED_LAW": ROUNDED_LAW,
    # Unit roundoffs that a cross entropy may be off: the budget of `train.labels`.
    "ROUNDINGS": 16,
    # Of the gradient: above what the float32 sections of a model in float64 round, and below every fault of counting.
    "SHARE": 1e-3,
    "TEXTS": list(TEXTS),
    "UNLIKELY_BITS": UNLIKELY_BITS,
}
"""Numbers of the checks, by the names that the templates use."""


def unread_keys(scene: ScriptContext) -> Facts | None:
    """Keys of `load.config` that may show that nothing reads them."""
    keys = [key for key in scene.finding.parameters if key not in NAMELESS]
    return {"keys": keys} if keys else None


def dropped_heads(scene: ScriptContext) -> Facts:
    """Stored tensors of another task's head, which this task leaves out rightly."""
    context = scene.context
    others = [task for task in TASKS if task != context.subject.task]
    heads = {name for task in others for name in head_tensors(context.loaded.unexpected, context.family, task)}
    return {"dropped": heads - set(scene.finding.parameters)}


def new_head(scene: ScriptContext) -> Facts:
    """Weight matrices of the new head."""
    context = scene.context
    return {"head": [name for name in context.loaded.new_head if context.model.get_parameter(name).dim() > 1]}


def saved_by_its_class(scene: ScriptContext) -> Facts | None:
    """A class of one's own cannot be made from files alone."""
    made_from_files = scene.source != "factory" and compat.is_language_model(scene.context.model)
    return {} if made_from_files else None


def integral_inputs(scene: ScriptContext) -> Facts:
    """Inputs that must be integral."""
    names = ["input_ids", "attention_mask", "position_ids", "token_type_ids"]
    return {"names": [*names, "labels"] if scene.context.space.targets == "classes" else names}


def from_files(scene: ScriptContext) -> Facts | None:
    """Only a checkpoint has a tokenizer."""
    return {} if scene.source == "checkpoint" else None


def tokenizer_inputs(scene: ScriptContext) -> Facts | None:
    """What of a tokenizer's output goes to the model, and whether positions go with it."""
    if scene.source != "checkpoint":
        return None
    model = scene.context.model
    return {
        "names": [*GIVEN[:2], *(name for name in GIVEN[2:] if names_keyword(model, name))],
        "positions": scene.context.subject.task == "causal-lm" and takes_positions(model),
    }


def pooled_head(scene: ScriptContext) -> Facts | None:
    """The module that reads one token of each row."""
    ends = scene.context.family.head_names
    heads = [name for name, _ in scene.context.model.named_modules() if name.split(".")[-1] in ends]
    return {"head": heads[0]} if heads else None


def padding_sides(scene: ScriptContext) -> Facts:
    """Sides on which the rows take more padding: a row is padded on one side only."""
    mask = scene.tensors["attention_mask"]
    free = {"left": bool(mask[:, -1].all()), "right": bool(mask[:, 0].all())}
    return {"sides": [side for side in scene.context.family.padding_sides if free[side]]}


def decoding_edges(scene: ScriptContext) -> Facts:
    """Where decoding is cut into pieces: before each of the last two tokens, and in the middle."""
    width = int(scene.tensors["input_ids"].shape[1])
    cuts = [sorted({max(width - 2, 1), width - 1}), [width // 2]]
    return {"edges": [[0, *(cut for cut in piece if 0 < cut < width), width] for piece in cuts]}


def packing_way(scene: ScriptContext) -> Facts | None:
    """By what the rows are kept apart, where they are in one row."""
    way = next((way for way, words in WORDS.items() if words == scene.finding.evidence.get("packed by")), "rows")
    return None if way == "rows" else {"way": way}


def has_rounding(scene: ScriptContext) -> Facts | None:
    """Float64 has no rounding to be judged."""
    return None if scene.context.recipe.parameters == "float64" else {}


def at_once(*several: Asks) -> Asks:
    """The facts of several; None where one has none."""

    def facts(scene: ScriptContext) -> Facts | None:
        found = [one(scene) for one in several]
        return None if None in found else {key: value for each in found for key, value in (each or {}).items()}

    return facts


def local_module(scene: ScriptContext) -> Facts | None:
    """The dtype in which the module computes; None for a module that the measurement does not judge.

    A NaN's finding names the module where the NaN begins.
    """
    dtype = str(scene.finding.evidence.get("computes in", ""))
    if dtype not in {"float32", "bfloat16", "float16"} or not scene.finding.module:
        return None
    module = scene.context.model.get_submodule(scene.finding.module)
    kind = type(module).__name__
    role = scene.context.family.kind_of(kind) or {"Linear": "linear", "Embedding": "embedding"}.get(kind, "other")
    composed = role in {"attention", "block", "mlp"} or any(True for _ in module.children())
    if not (composed if scene.measurement == "composed" else role == scene.measurement):
        return None
    return {"dtype": dtype, "allowance": longest_reduction(scene.context.model) ** 0.5 if dtype == "float32" else 1.0}


def whole_error(scene: ScriptContext) -> Facts:
    """How far rounding alone may go."""
    return {"allowance": rounding_allowance(scene.context)}


def gradient_error(scene: ScriptContext) -> Facts | None:
    """As `whole_error`; a classifier is differentiated by its states, which takes more than a few lines."""
    context = scene.context
    if is_reference_itself(context) or context.subject.task == "sequence-classification":
        return None
    return {"allowance": rounding_allowance(context, tokens=int(scene.tensors["input_ids"].numel()))}


def training(scene: ScriptContext) -> Facts | None:
    """What every training script says; None for a scope that cannot be said in a few lines."""
    plan = scene.context.request.plan
    if plan.scope != "full" and (plan.scope == "lora" or len(scene.context.trajectory.trained) > MOST_NAMES):
        return None
    return {
        "optimizer": OPTIMIZERS[plan.optimizer].__name__,
        "limit": plan.max_grad_norm,
        "looks": False,
        "between": "",
    }


def unclipped_steps(scene: ScriptContext) -> Facts | None:
    """As `training`, where clipping has no part."""
    facts = training(scene)
    return facts and {**facts, "limit": None}


def clipped_training(scene: ScriptContext) -> Facts | None:
    """As `training`, with the limit that `train.clip` sets where the plan has none."""
    facts = training(scene)
    return facts and {**facts, "limit": facts["limit"] or LIMIT}


def unclipped_training(scene: ScriptContext) -> Facts | None:
    """As `training`, for a script that clips by itself and trains a copy."""
    plan = scene.context.request.plan
    return training(scene) if plan.scope == "full" and plan.max_grad_norm is None else None


def needless_gradients(scene: ScriptContext) -> Facts | None:
    """As `training` without an optimizer, and the parts of a name that the loss need not reach."""
    beside = scene.context.family.lm_head_names if scene.context.subject.task != "causal-lm" else ()
    facts = training(scene)
    return facts and {**facts, "optimizer": "", "unused": {"experts", "lora_A", *beside}}


def counted_labels(scene: ScriptContext) -> Facts:
    """Whether a label is that of the token before it."""
    return {"shifted": scene.context.subject.task == "causal-lm" or predicts_next_token(scene.context.model)}


def named_parameters(scene: ScriptContext) -> Facts | None:
    """Only a finding that names a parameter says whose gradient is off."""
    return {} if scene.finding.parameters else None


def trainer_step(scene: ScriptContext) -> Facts:
    """How the Trainer is asked for the one step."""
    way = scene.measurement
    return {"each_row": way in EACH_ROW, "arguments": TRAINER_ARGUMENTS.get(way, "")}
