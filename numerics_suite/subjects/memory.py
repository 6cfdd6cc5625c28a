"""Estimates the memory of a cell from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
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
PROCESS_BYTES = 300_000_000
"""Of a process that has imported torch and transformers."""
SMALL_COPY = 1 << 30
"""A model whose float64 copy takes less is never streamed."""
HEAD_COPIES = 3
"""Float64 gradients of the output layer that a streamed backward pass holds beside those that are kept. 3.73 GB were measured, with
175 million parameters of which 61 million are the output layer's, where these counts give 3.9 GB."""
STEP_COPIES = 2
"""Copies of the largest parameter that AdamW makes in a step."""
KEPT_PER_BLOCK = 16
"""Hidden-sized tensors that one block keeps for its backward pass: norms, q, k, v, output, gate, up, product, residuals."""


HIDDEN_STATES, INTERMEDIATE_STATES, LOGITS, SERVED_LOGITS = 18, 5, 7, 5
"""Tensors in float64 that a backward pass of the true fp64 run keeps at its peak: hidden-sized and intermediate-sized ones of
each block, and logits-sized ones of the loss (fewer where only the definition's loss is there). Counted on a device that accounts for every byte, over seven shapes of GLM-4
(2 to 12 blocks, hidden size 64 to 512, 500 to 20,000 words, 4 to 16 heads) in two precisions and two attentions: the sum below
is within 6 % of the peak on all of them."""
KEPT_BATCHES = 2.85
"""Batches as large as the training batch whose logits stay in memory for each drawn one, up to :data:`KEPT_BYTES`."""
KEPT_BYTES = 2**28
"""Bytes of answers that a cell keeps of each kind, forward results and those of references: checks of a group share
batches."""
KEPT_GRADIENT_BYTES = 2**31
"""Bytes of one set of float64 gradients that the cells of a subject keep for each other; a larger one is dropped with its cell."""
GRADIENT_COPIES = 3
"""Float64 copies of all parameters at once where two backward passes are compared: one's gradients, the other's leaves and gradients."""


def cell_bytes(  # noqa: PLR0913 - what a cell's memory depends on
    subject: Subject,
    dtype: str,
    computes_in: str,
    *,
    training: bool,
    batch: int,
    seq: int,
    examples: int,
    device: str = CPU,
    scope: str = "full",
    tokens: int | None = None,
    gradients: bool = True,
) -> int | None:
    """Expected bytes on the device at the peak of one cell with all its checks, None where the number of parameters is unknown.

    The peak of a cell that trains is that of `train.checkpointing`: the model, its twin under the other attention and a copy, two
    backward passes in float64 of which one's gradients are kept, and the forward results that checks share. That of a cell for
    serving is `reference.oracle`'s: the states of all blocks in float64, which the definition is compared with.

    Args:
        subject: resolved.
        dtype: of the parameters, as torch names it.
        computes_in: dtype of the outputs that are kept: under autocast the narrower one.
        training: whether checks train.
        batch: rows of the training batch.
        seq: tokens of a row.
        examples: batches drawn for a check.
        device: where the cell runs.
        scope: what is trained.
        tokens: of the largest batch that checks of a forward pass share, None for the training batch.
        gradients: whether checks compare gradients in float64.
    """
    if subject.parameters is None:
        return None
    if 8 * subject.parameters > SMALL_COPY:
        sets = gradient_sets_that_fit(subject, dtype, device) if gradients else 0
        trains = training_bytes(subject, dtype, scope, batch=batch, seq=seq) if training else 0
        working = _forward_bytes(subject, computes_in, tokens or batch * seq, examples)
        # A gradient of the output layer is whole before it is compared: the sum, the part that is added, what it is compared with.
        compared = int(8 * (subject.parameters * sets + HEAD_COPIES * _head(subject))) if sets else 0
        return PROCESS_BYTES + held_bytes(subject, dtype, device) + max(trains, compared, working)
    width, config, tokens = _WIDTHS.get(dtype, 4), subject.config, batch * seq
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    inner = _number(config, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * hidden
    layers = _number(config, "num_hidden_layers", "num_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    words = _words(subject)
    models = (3 if training else 2) * width * subject.parameters
    twins = 8 * subject.parameters * (GRADIENT_COPIES if training else 1)
    block = tokens * (HIDDEN_STATES * hidden + INTERMEDIATE_STATES * inner) + batch * heads * seq**2
    states = 8 * (block * layers + tokens * words * (LOGITS if training else SERVED_LOGITS))
    kept = min(KEPT_BYTES, int(KEPT_BATCHES * examples * tokens * words * _WIDTHS.get(computes_in, 4)))
    return models + twins + states + kept


def gradient_sets_that_fit(subject: Subject, dtype: str, device: str) -> float:
    """How many times checks may hold the float64 gradients of all parameters at once: as many as the largest that fits holds, 0 where none does.

    Args:
        subject: resolved, with a known number of parameters.
        dtype: of its parameters.
        device: of the cell.
    """
    room = USABLE * (free_bytes(device) - held_bytes(subject, dtype, device))
    # `reference.gradient` holds the rounded run's and the cell's own beside the true ones.
    others = 2 * _WIDTHS.get(dtype, 4) / 8
    wanted = (1 + others, 1, others)
    return next((sets for sets in wanted if 8 * (subject.parameters or 0) * sets <= room), 0)


def _forward_bytes(subject: Subject, computes_in: str, tokens: int, examples: int) -> int:
    """Of forward passes whose weights are widened piece by piece: answers in float64, those that are kept, one weight of the definition."""
    hidden = _number(subject.config, "hidden_size", "n_embd", "d_model")
    inner = _number(subject.config, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * hidden
    words = _words(subject)
    kept = min(KEPT_BYTES, examples * tokens * words * _WIDTHS.get(computes_in, 4)) + 2 * min(
        KEPT_BYTES, 8 * examples * tokens * words
    )
    return 8 * (SERVED_LOGITS * tokens * words + inner * hidden) + kept


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
    width = _WIDTHS.get(dtype, 4)
    weights = subject.parameters * width * (TRAINING_COPIES if training else 1)
    return weights + _activations(subject, width, training=training, batch=batch, seq=seq)


def _activations(subject: Subject, width: int, *, training: bool, batch: int, seq: int) -> int:
    config = subject.config
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    layers = _number(config, "num_hidden_layers", "num_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    tokens = batch * seq
    block = tokens * hidden * KEPT_PER_BLOCK * width + batch * heads * seq * seq * 4  # eager's scores are float32
    logits = tokens * _words(subject) * (width + 4)  # and a float32 copy for the loss
    return block * (layers if training else 1) + logits * (2 if training else 1)


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
    return (subject.parameters or 0) * _WIDTHS.get(dtype, 4) // len(parts_of(device))


def bytes_read_anew(subject: Subject, dtype: str, device: str) -> int:
    """Bytes that each pass reads from disk: all weights where they are mapped and do not stay in memory, else none.

    Args:
        subject: resolved.
        dtype: of its parameters.
        device: of the cell.
    """
    size = (subject.parameters or 0) * _WIDTHS.get(dtype, 4)
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
    head = _head(subject)
    blocks = int(scope.partition(":")[2] or 0)
    return min(every, head + blocks * block_parameters(subject))


def _head(subject: Subject) -> int:
    """Weights of the output layer, the largest of all."""
    return _number(subject.config, "hidden_size", "n_embd", "d_model") * _words(subject)


def block_parameters(subject: Subject) -> int:
    """Parameters of one of the repeated blocks, on average."""
    return max((subject.parameters or 0) - _outside_blocks(subject), 0) // layer_count(subject)


def _outside_blocks(subject: Subject) -> int:
    hidden = _number(subject.config, "hidden_size", "n_embd", "d_model")
    embedding = hidden * _number(subject.config, "vocab_size", "padded_vocab_size")
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
    width = _WIDTHS.get(dtype, 4)
    # A graph reaches from the loss down to the lowest trained block.
    activations = _activations(subject, width, training=scope in {"full", "lora"}, batch=batch, seq=seq)
    return width * (trained_parameters(subject, scope) * TRAINING_COPIES + STEP_COPIES * _head(subject)) + activations


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
    width = _WIDTHS.get(dtype, 4)
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
    return _number(subject.config, "num_hidden_layers", "num_layers", "n_layer") or 1


def product_weights(subject: Subject) -> int:
    """Weights that a token is multiplied with: all but the embedding, unless that is the output layer too.

    Of a mixture of experts all experts are counted: over a batch each of them gets tokens, and the references widen all of them.
    """
    hidden = _number(subject.config, "hidden_size", "n_embd", "d_model")
    embedding = hidden * _number(subject.config, "vocab_size", "padded_vocab_size")
    tied = bool(subject.config.get("tie_word_embeddings")) and subject.task == "causal-lm"
    return max((subject.parameters or 0) - (0 if tied else embedding), 0)


def _words(subject: Subject) -> int:
    """Size of the output at one token: the vocabulary, or a classifier's number of labels."""
    if subject.task != "causal-lm":
        return subject.num_labels
    return _number(subject.config, "vocab_size", "padded_vocab_size")


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that holds a number, 0 where none does."""
    found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
    return int(found)
