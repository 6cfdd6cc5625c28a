"""Budgets of the `inputs.*` checks: bits are compared, so every limit but that of a law in true fp64 is 0."""

from __future__ import annotations

from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Budget

CURE = ("default-input-dtypes",)

BUDGETS = (
    Budget(
        check="inputs.ids-dtype",
        measurement="integer-disagreement",
        limit=0,
        cause="wrong-input-dtype",
        title="integer ids of different widths give different outputs ({value} elements)",
        reason="The same ids as int64 and as a narrower integer must look up the same rows of the embedding.",
        remedies=CURE,
    ),
    Budget(
        check="inputs.ids-dtype",
        measurement="floating-accepted",
        limit=0,
        cause="wrong-input-dtype",
        title="floating input_ids are silently used instead of refused",
        reason="bfloat16 keeps 8 bits of an integer: under it 99 % of the ids of a 151,552-word vocabulary change. A model "
        "that accepts floating ids computes the output of another text, without an error.",
        remedies=CURE,
    ),
    Budget(
        check="inputs.ids-dtype",
        measurement="merged-ids",
        limit=0,
        cause="wrong-input-dtype",
        title="{value} pairs of different ids get the same embedding, as after a cast to a 16-bit float",
        reason="Ids that a 16-bit float rounds to the same number reach the embedding as one id although their rows "
        "differ: somewhere on the way input_ids are cast to a floating dtype and back.",
        remedies=CURE,
    ),
    Budget(
        check="inputs.ids-dtype",
        measurement="merged-edges",
        limit=0,
        cause="out-of-range-input",
        title="the first or last id of the vocabulary gets its neighbour's embedding ({value} pairs)",
        reason="Both ids are in range and their rows of the embedding differ, so a range check on the way to it is off by "
        "one: it clamps an id that exists.",
        remedies=("fix-config",),
    ),
    Budget(
        check="inputs.mask-dtype",
        measurement="disagreement",
        limit=0,
        cause="wrong-input-dtype",
        title="the same attention mask in another dtype gives another output ({value} elements)",
        reason="Loaders produce masks as int64, int32, bool or floating ones and zeros; all mean the same, so the outputs at "
        "real tokens must be the same bits, or the dtype be refused.",
        remedies=CURE,
    ),
    Budget(
        check="inputs.pipeline",
        measurement="floating",
        limit=0,
        cause="wrong-input-dtype",
        title="{value} tensors that must be integral reach the model in a floating dtype",
        reason="input_ids, attention_mask and class labels are integers. Cast to bfloat16 with the rest of a batch, ids "
        "above 256 change and a mask may be added instead of applied.",
        remedies=CURE,
    ),
    Budget(
        check="inputs.pipeline",
        measurement="out-of-range",
        limit=0,
        cause="out-of-range-input",
        title="{value} batches hold ids outside the vocabulary",
        reason="An id outside the embedding is an index error on CPU and a device assertion, or another row's values, "
        "on an accelerator.",
        remedies=("fix-config", "default-input-dtypes"),
    ),
    Budget(
        check="inputs.pipeline",
        measurement="looks-rounded",
        limit=0,
        cause="wrong-input-dtype",
        title="all input_ids are numbers that bfloat16 holds exactly, as after a cast to bfloat16 and back",
        reason="Every id above 256 is a number that bfloat16 can hold, which for an id from 2**k on has the probability "
        "2**-(k - 7); for all ids of this batch together it is below one in a million by chance.",
        remedies=CURE,
    ),
    Budget(
        check="inputs.pipeline",
        measurement="tokenizer-raises",
        limit=0,
        cause="tokenizer-incompatible",
        title="the checkpoint's tokenizer raises when {facts[input]}: {facts[exception]}",
        reason="A tokenizer opens, reads texts and pads them without an exception, or no text reaches the model. Its class may be "
        "unknown to the installed release, or its own code written for another one: since 4.45 transformers hands a padding_side "
        "to _pad, which older code does not take.",
        remedies=("fix-tokenizer", "newer-version"),
    ),
    Budget(
        check="inputs.pipeline",
        measurement="no-pad-token",
        limit=0,
        cause="no-pad-token",
        title="{facts[who]}: rows cannot be batched",
        reason="Rows of different lengths are padded to make a batch, and a classifier finds the last real token of each by the pad "
        "id: without one every batch of two rows is refused. Llama's tokenizers and configs come without.",
        remedies=("set-pad-token",),
    ),
    Budget(
        check="inputs.pipeline",
        measurement="padding-moves",
        limit=AGREED,
        cause="padding-leak",
        title="the tokenizer pads on the {facts[side]}, and this padding changes the logits (by {facts[logits move by]:.2g})",
        reason="A text has one output, alone or padded in a batch. In true fp64 both are the same program on the same "
        "tokens, so they agree to 1e-10; a classifier that pools another column, or positions that count the padding, "
        "give another class.",
        remedies=("fix-padding", "set-pad-token", "newer-version"),
    ),
)
