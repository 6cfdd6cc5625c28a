"""Estimates the memory of a cell from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numerics_suite.core.errors import CheckError
from numerics_suite.core.machine import swap_bytes
from numerics_suite.core.records import Subject
from numerics_suite.devices.kinds import CPU, kind_of, parts_of
from numerics_suite.devices.memory import free_bytes

_WIDTHS: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
TRAINING_COPIES = 4
"""Parameters, gradients and AdamW's two moments, all in the parameters' dtype."""
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
GRADIENT_COPIES = 3
"""Float64 copies of all parameters at once where two backward passes are compared: one's gradients, the other's leaves and gradients."""


def cell_bytes(  # noqa: PLR0913 - what a cell's memory depends on
    subject: Subject, dtype: str, computes_in: str, *, training: bool, batch: int, seq: int, examples: int
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
    """
    if subject.parameters is None:
        return None
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


def refuse_too_large(subject: Subject, dtype: str, device: str) -> None:
    """Check that the weights fit, before the system kills the process.

    Args:
        subject: about to be loaded.
        dtype: of its parameters.
        device: of the cell.

    Raises:
        CheckError: they do not, with the bytes requested and free.
    """
    parts = parts_of(device)
    if subject.parameters is None or subject.quantized:
        return
    on_cpu = kind_of(parts[0]) == CPU
    if on_cpu and dtype == subject.stored_dtype:
        return  # mapped: the system takes pages back and reads them again
    asked = subject.parameters * _WIDTHS.get(dtype, 4) // len(parts)
    free = free_bytes(device) + (swap_bytes() if on_cpu else 0)
    if asked > free:
        message = f"out of memory on {parts[0]}: {asked} bytes asked for the weights in {dtype}, {free} bytes free"
        raise CheckError(message)


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
