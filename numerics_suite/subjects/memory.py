"""Estimates the memory of a cell from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numerics_suite.core.errors import CheckError
from numerics_suite.core.machine import swap_bytes
from numerics_suite.core.records import Subject
from numerics_suite.devices.kinds import CPU, kind_of, parts_of
from numerics_suite.devices.memory import free_bytes
from numerics_suite.subjects.layers import COUNTS

_WIDTHS: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PRECISION_OF: Mapping[str, str] = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "float16": "fp16"}
"""The precision whose parameters are held in a dtype, as `--precision` names it."""
USABLE = 0.8
"""Share of the free memory that may be planned with; the rest is for workspaces and other programs."""
TRAINING_COPIES = 4
"""Parameters, gradients and AdamW's two moments, all in the parameters' dtype."""
SMALL_COPY = 1 << 30
"""A model whose float64 copy takes less is never streamed."""
STEP_COPIES = 2
"""Copies of the largest parameter that AdamW makes in a step."""
KEPT_PER_BLOCK = 16
"""Hidden-sized tensors that one block keeps for its backward pass: norms, q, k, v, output, gate, up, product, residuals."""

KEPT_BYTES = 2**28
"""Bytes of answers that a cell keeps of each kind, forward results and those of references: checks of a group share
batches."""
KEPT_GRADIENT_BYTES = 2**31
"""Bytes of one set of float64 gradients that the cells of a subject keep for each other; a larger one is dropped with its cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a model by its config, 0 where that does not say.

    Attributes:
        hidden: of a state.
        inner: of the middle of a block's MLP.
        layers: blocks.
        heads: of attention.
        words: of the output at one token: the vocabulary, or a classifier's number of labels.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    words: int


def sizes_of(subject: Subject) -> Sizes:
    """The sizes that decide what passes over a model take.

    Args:
        subject: resolved.
    """
    config = subject.config
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    return Sizes(
        hidden=hidden,
        inner=_number(config, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * hidden,
        layers=_number(config, "num_hidden_layers", "num_layers", "n_layer"),
        heads=_number(config, "num_attention_heads", "n_head"),
        words=_vocabulary(config) if subject.task == "causal-lm" else subject.num_labels,
    )


def gradient_sets_that_fit(subject: Subject, dtype: str, device: str) -> float:
    """How many float64 gradients of all parameters fit in memory beside the model; a fraction where not even one does.

    Args:
        subject: resolved, with a known number of parameters.
        dtype: of its parameters.
        device: of the cell.
    """
    room = USABLE * (free_bytes(device) - held_bytes(subject, dtype, device))
    return room / max(8 * (subject.parameters or 0), 1)


def compared_sets(dtype: str) -> float:
    """The sets that the cell's own gradients and those of the rounded run take, which `reference.gradient` holds.

    Args:
        dtype: of the parameters.
    """
    return 2 * width_of(dtype) / 8


def estimate_bytes(subject: Subject, dtype: str, *, training: bool, batch: int, seq: int) -> int | None:
    """Estimated bytes of one model at work, None where the number of parameters is unknown.

    Args:
        subject: resolved.
        dtype: of the parameters, as torch names it.
        training: with gradients, optimizer state and what the backward pass keeps.
        batch: rows.
        seq: tokens of a row.
    """
    if subject.parameters is None:
        return None
    width = width_of(dtype)
    weights = subject.parameters * width * (TRAINING_COPIES if training else 1)
    return weights + _activations(subject, width, training=training, batch=batch, seq=seq)


def _activations(subject: Subject, width: int, *, training: bool, batch: int, seq: int) -> int:
    sizes, tokens = sizes_of(subject), batch * seq
    block = tokens * sizes.hidden * KEPT_PER_BLOCK * width
    block += batch * sizes.heads * seq * seq * 4  # eager's scores are float32
    logits = tokens * sizes.words * (width + 4)  # and a float32 copy for the loss
    return block * (sizes.layers if training else 1) + logits * (2 if training else 1)


def width_of(dtype: str) -> int:
    """Bytes of an element.

    Args:
        dtype: as torch names it.
    """
    return _WIDTHS.get(dtype, 4)


def is_mapped(subject: Subject, dtype: str, device: str) -> bool:
    """Whether the weights stay in the files, of which the system holds what is in use: on the CPU, in the dtype they are stored in.

    Args:
        subject: resolved.
        dtype: of its parameters.
        device: of the cell.
    """
    return kind_of(parts_of(device)[0]) == CPU and subject.path is not None and dtype == subject.stored_dtype


def held_bytes(subject: Subject, dtype: str, device: str) -> int:
    """Bytes of memory that the weights of a loaded model take on a device, 0 where they are mapped.

    Args:
        subject: resolved, with a known number of parameters.
        dtype: of its parameters.
        device: of the cell.
    """
    if is_mapped(subject, dtype, device):
        return 0
    return (subject.parameters or 0) * width_of(dtype) // len(parts_of(device))


def bytes_read_anew(subject: Subject, dtype: str, device: str) -> int:
    """Bytes that each pass reads from disk: all weights where they are mapped and do not stay in memory, else none.

    Args:
        subject: resolved.
        dtype: of its parameters.
        device: of the cell.
    """
    size = (subject.parameters or 0) * width_of(dtype)
    large = size > SMALL_COPY and is_mapped(subject, dtype, device)
    return size if large and size > USABLE * free_bytes(device) else 0


def trained_parameters(subject: Subject, scope: str) -> int:
    """How many parameters a scope trains: all, the head, or the head and the last blocks.

    Args:
        subject: resolved, with a known number of parameters.
        scope: `full`, `head` or `last:K`; of `lora`, whose adapters are small, the most that they can be is not known, and 0 is given.
    """
    every = subject.parameters or 0
    if scope in {"full", "lora"}:
        return every if scope == "full" else 0
    head = head_parameters(subject)
    blocks = int(scope.partition(":")[2] or 0)
    return min(every, head + blocks * block_parameters(subject))


def head_parameters(subject: Subject) -> int:
    """Weights of the output layer, the largest of all."""
    return (sizes := sizes_of(subject)).hidden * sizes.words


def block_parameters(subject: Subject) -> int:
    """Parameters of one of the repeated blocks, on average."""
    return max((subject.parameters or 0) - _outside_blocks(subject), 0) // layer_count(subject)


def _outside_blocks(subject: Subject) -> int:
    embedding = sizes_of(subject).hidden * _vocabulary(subject.config)
    tied = bool(subject.config.get("tie_word_embeddings")) or subject.task != "causal-lm"
    return embedding if tied else 2 * embedding


def training_bytes(subject: Subject, dtype: str, scope: str, *, batch: int, seq: int) -> int:
    """Bytes that a training run takes beside the model: a copy of what is trained, its gradients, AdamW's moments, activations.

    Args:
        subject: resolved, with a known number of parameters.
        dtype: of the parameters.
        scope: what is trained.
        batch: rows.
        seq: tokens of a row.
    """
    width = width_of(dtype)
    # A graph reaches from the loss down to the lowest trained block.
    activations = _activations(subject, width, training=scope in {"full", "lora"}, batch=batch, seq=seq)
    return (
        width * (trained_parameters(subject, scope) * TRAINING_COPIES + STEP_COPIES * head_parameters(subject))
        + activations
    )


def layers_that_fit(subject: Subject, bytes_per_parameter: float, room: float) -> int | None:
    """The most blocks of the model that leave it within so many bytes, None where one does not.

    Args:
        subject: resolved.
        bytes_per_parameter: that are needed.
        room: bytes.
    """
    each = block_parameters(subject)
    if not each or not any(isinstance(subject.config.get(key), int) for key in COUNTS):
        return None
    fitting = int((room / bytes_per_parameter - _outside_blocks(subject)) // each)
    return fitting if 0 < fitting < layer_count(subject) else None


def shallower_hint(subject: Subject, bytes_per_parameter: float, room: float) -> str:
    """`; --layers first:N checks its first N of M layers`, empty where no number fits, or it is no checkpoint.

    Args:
        subject: resolved.
        bytes_per_parameter: that are needed.
        room: bytes.
    """
    fitting = None if subject.path is None else layers_that_fit(subject, bytes_per_parameter, room)
    if fitting is None:
        return ""
    return f"; --layers first:{fitting} checks the first {fitting} of its {layer_count(subject)} layers"


def refuse_too_large(subject: Subject, dtype: str, device: str) -> None:
    """Check that the weights fit, before the system kills the process.

    Args:
        subject: about to be loaded.
        dtype: of its parameters.
        device: of the cell.

    Raises:
        CheckError: they do not, with the bytes asked and free.
    """
    parts = parts_of(device)
    if subject.parameters is None or subject.quantized:
        return
    on_cpu = kind_of(parts[0]) == CPU
    width = width_of(dtype)
    if is_mapped(subject, dtype, device):
        return  # the system takes pages back and reads them again
    asked = subject.parameters * width // len(parts)
    free = free_bytes(device) + (swap_bytes() if on_cpu else 0)
    if asked > free:
        message = f"out of memory on {parts[0]}: {asked} bytes asked for the weights in {dtype}, {free} bytes free"
        stored = subject.stored_dtype or ""
        if on_cpu and stored in PRECISION_OF:
            message += f"; as they are stored, in {stored}, they are read from disk: --precision {PRECISION_OF[stored]}"
        raise CheckError(message + shallower_hint(subject, width, USABLE * free * len(parts)))


def layer_count(subject: Subject) -> int:
    """Number of blocks, 1 if the config does not say."""
    return sizes_of(subject).layers or 1


def product_weights(subject: Subject) -> int:
    """Weights that a token is multiplied with: all but the embedding, unless that is the output layer too.

    Of a mixture of experts all experts are counted: over a batch each of them gets tokens, and the references widen all of them.
    """
    embedding = sizes_of(subject).hidden * _vocabulary(subject.config)
    tied = bool(subject.config.get("tie_word_embeddings")) and subject.task == "causal-lm"
    return max((subject.parameters or 0) - (0 if tied else embedding), 0)


def _vocabulary(config: Mapping[str, Any]) -> int:
    return _number(config, "vocab_size", "padded_vocab_size")


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that holds a number, 0 where none does."""
    found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
    return int(found)
