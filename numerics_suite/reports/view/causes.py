"""Why a finding happens, in plain words: one template for each cause, filled from the finding's own facts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.view.formats import sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numerics_suite.core.records import Finding

NAMED = 2
"""Parameters that a sentence names; the line with the place names more."""

WHY: dict[str, str] = {
    "uninitialised-parameters": "no code writes to the memory of {parameters|a parameter}, so it holds whatever was there before: NaN in one process, zeros in another",
    "bad-initialisation": "the first logits and gradients are far too large, and training starts from noise",
    "missing-weights": "no trained values exist for {parameters|weights that the checkpoint lacks}",
    "lost-weights": "the trained values of {parameters|some weights} never reach the model, or are lost on saving",
    "corrupt-weights": "there are NaN or infinite values in {parameters|a stored weight} before anything is computed",
    "untied-weights": "model and config disagree, so one of the two is not what was trained",
    "ignored-config": "the model is built with other values than the checkpoint was trained with",
    "wrong-input-dtype": "ids and masks are integers, and a cast to a narrow float turns them into other tokens or another mask",
    "out-of-range-input": "an id lies outside the vocabulary, or is read as its neighbour",
    "overflow": "{op|an operation} of finite inputs exceeds the largest number of {dtype|its dtype}",
    "underflow": "a value that float32 still holds is 0 in {dtype|its dtype}",
    "invalid-operation": "{op|an operation} gives NaN from finite inputs, as 0/0 or the root of a negative number does",
    "fully-masked-row": "a softmax over a row in which every position is masked has nothing to average",
    "low-precision-section": "a part of the model holds or computes numbers in another dtype than the rest, and everything after it carries the error",
    "kernel-accuracy": "the model is right, but a kernel rounds more than its precision makes unavoidable",
    "padding-leak": "padded positions influence the outputs at real tokens, so a row's output depends on its batch",
    "batch-leak": "the rows of a batch influence each other",
    "future-leak": "a position sees later tokens, which do not exist yet when text is generated",
    "cache-mismatch": "generation with the cache computes another function than the full forward pass",
    "wrong-positions": "positions are computed wrongly, so tokens are rotated as if they stood elsewhere",
    "wrong-pooling": "the class is read from another position than the last real token",
    "wrong-loss": "training minimises another number than the mean loss over the counted labels",
    "wrong-gradient": "the optimizer gets a gradient that is not the loss's",
    "dead-gradient": "no gradient reaches {parameters|a trained parameter}, which therefore never learns",
    "optimizer-underflow": "the optimizer's eps (1e-8 by default) is 0 in {dtype|the dtype of its state}, so its step divides by 0",
    "loss-scaling": "no loss scale keeps the gradients finite, so every step is skipped and nothing trains",
    "divergence": "the steps are too large for this model and its weights diverge",
    "nondeterminism": "the same call gives another output each time, so no comparison can be trusted",
    "attention-mismatch": "two implementations of attention compute different functions",
    "semantic-error": "the model computes another function than its family's definition gives for these weights",
    "semantic-change": "this is another function than the recorded one; rounding does not explain it",
    "rounding-change": "the function is the same, and its rounding error grew by more than chance",
    "contract-change": "code that relies on what was recorded may fail, or silently behave differently",
    "unknown": "no experiment identified the cause",
    "ignored-dtype": "the model's own code or its config chose the dtype, and not the caller",
    "rounded-buffer": "a cast of the whole model, such as model.to(dtype), rounded buffers that belong in a wider dtype",
    "uninitialised-buffer": "no code writes to the memory of {parameters|a buffer}, so its value differs between processes",
    "model-raises": "the model's own code stops with an exception, and training and serving stop there too",
    "tokenizer-incompatible": "the tokenizer's code does not fit the installed transformers",
    "no-pad-token": "rows of different lengths need a token to pad them with, and there is none",
    "no-counted-labels": "the loss is then a mean over no token, which is NaN (0/0), or 0 where the code guards against it",
    "lost-head": "the trained head is lost, and each load draws a new one at random, so answers are random until it is trained again",
    "wrong-output-shape": "a loss over such logits raises an error, or is that of another task",
    "rounded-update": "almost every step is smaller than the spacing of {dtype|the dtype's} numbers at the weights' size, and is lost",
    "untrained-parameters": "the optimizer steps do not change these parameters as the loss requires",
    "packing-leak": "attention or positions continue across the border between two packed rows",
}
"""By cause; `{fact|text used without it}`."""

WITH: dict[str, tuple[str, str]] = {
    "out-of-range-input": (
        "input that is not finite",
        "the input {input that is not finite} is NaN or infinite already",
    ),
    "low-precision-section": (
        "computes in",
        "it computes in {computes in}, and everything after it carries that rounding error",
    ),
    "divergence": (
        "largest norm after clipping",
        "the norm after clipping is {largest norm after clipping}; the limit is {limit|lower}",
    ),
    "uninitialised-parameters": (
        "the checkpoint",
        "the checkpoint {the checkpoint}, and no code writes to the memory of {parameters|a parameter}: it holds whatever was there before, "
        "NaN in one process and zeros in another",
    ),
    "wrong-gradient": (
        "times the true gradient",
        "its component along the true gradient is {times the true gradient} times the right size, and the optimizer uses it",
    ),
    "padding-leak": (
        "flipped at the padding",
        "with the attention mask set to 1 at the padding the outputs are {flipped at the padding}, and padded positions reach real tokens",
    ),
    "model-raises": ("exception", "training and serving stop there too"),
}
"""Causes with another template where a finding has a certain fact: the name of the fact, and that template."""

_SLOT = re.compile(r"\{([^}|]+)(?:\|([^}]*))?\}")
_FIGURE = re.compile(r" \([^()]*(?:\d|nan|inf)[^()]*\)(?=$|[,:])")
"""What a title says in numbers: where there is a limit the line with the measured value says it, with limit and unit."""

PLAINER = (("of the true fp64 run", "in float64"), ("in true fp64", "in float64"))
"""Terms of the theory, as a title has them, in plain words."""

BY_REMEDY: dict[tuple[str, str], str] = {
    (
        "untrained-parameters",
        "non-reentrant-checkpointing",
    ): "reentrant gradient checkpointing cuts the backward pass off where the input of a block needs no gradient",
    ("untrained-parameters", "rebuild-optimizer"): "the optimizer was created before the model had these parameters",
}
"""By cause and remedy: why the finding happens, where that remedy was tried and works."""

UNSURE = "low"
"""How the confidence begins where an experiment spoke against the cause."""


def why(cause: str, facts: Mapping[str, str]) -> str:
    """Why a finding with this cause happens, empty for a cause of another package.

    Args:
        cause: its id.
        facts: texts for the places of a template; a missing one is replaced by a general text.
    """
    fact, other = WITH.get(cause, ("", ""))
    template = other if fact in facts else WHY.get(cause, "")
    return _SLOT.sub(lambda slot: facts.get(slot[1], slot[2] or ""), template)


def sentence_of(finding: Finding, *, diagnosed: bool = True) -> str:
    """What happens and why, with the cause's id in brackets.

    Args:
        finding: any.
        diagnosed: False without a diagnosis (`--no-diagnose`): the sentence then names no cause.
    """
    facts = {str(name): shown(value) for name, value in finding.evidence.items()}
    named = listed(finding.parameters, NAMED)
    facts |= {"parameters": named} if named else {}
    facts |= {"op": finding.op} if finding.op else {}
    title = title_of(finding)
    if not diagnosed:
        return f"{sentence(title)}."
    worked = (BY_REMEDY.get((finding.cause, remedy.name)) for remedy in finding.remedies if remedy.verified)
    reason = next(filter(None, worked), "") or why(finding.cause, facts)
    if ": " in title and reason:
        title, reason = f"{title}. ", reason[:1].upper() + reason[1:] if reason.split(" ")[0].isalpha() else reason
    elif reason:
        title = f"{title}: "
    unsure = "perhaps " if str(finding.evidence.get("confidence", "")).startswith(UNSURE) else ""
    return f"{sentence(title)}{reason} ({unsure}{finding.cause})."


def title_of(finding: Finding) -> str:
    """The title without the figure, the parameters and the cause, which stand in places of their own."""
    title = finding.title.rstrip(" .").removesuffix(f": {finding.cause}")
    title = _FIGURE.sub("", title) if finding.evidence.get("allowed") else title
    for term, words in PLAINER:
        title = title.replace(term, words)
    head, colon, tail = title.rpartition(": ")
    return head if colon and finding.parameters and tail.startswith(finding.parameters[0]) else title
