"""What each remedy means for a user: those of the contract, and those that other packages add."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.records import Remedy
from numerics_suite.diagnosing.added import added_remedies

DESCRIPTIONS = {
    "newer-version": "install a transformers release without the defect",
    "default-input-dtypes": "leave input_ids, attention_mask and labels in int64; cast floating tensors only",
    "init-head": "initialise the head by hand: xavier_uniform_ for its weight, zeros for its bias",
    "clip-grad-norm": "clip the total gradient norm to 1.0 (torch.nn.utils.clip_grad_norm_, --max-grad-norm 1.0)",
    "tune-loss-scale": "start the GradScaler at a scale that this model's gradients fit (init_scale, growth_interval)",
    "disable-amp": "train without autocast, in fp32",
    "use-amp-bf16": "use bfloat16, whose range is float32's (amp-bf16)",
    "keep-in-fp32": "keep this module in float32 and cast its result",
    "eager-attention": 'load with attn_implementation="eager"',
    "sdpa-attention": 'load with attn_implementation="sdpa"',
    "lower-learning-rate": "lower the learning rate until the loss on one small batch falls",
    "larger-optimizer-eps": "give the optimizer an eps that its dtype can hold (AdamW(eps=1e-4) in float16), "
    "or keep float32 parameters",
    "reload-weights": "fetch the checkpoint again and compare its SHA-256",
    "fix-padding": "pad on the side that the model is made for, with the mask that goes with it",
    "set-pad-token": "set pad_token_id in config.json to the tokenizer's pad id",
    "fix-config": "write the key in the layout that the installed release reads",
    "pin-version": "pin transformers to the last release without the defect until it is repaired",
}


def is_remedy(name: str) -> bool:
    """Whether a budget may name it: a remedy of the contract, or one that another package adds."""
    return name in DESCRIPTIONS or name in added_remedies()


def description_of(name: str) -> str:
    """What the user does, in a line.

    Args:
        name: of a remedy that :func:`is_remedy` knows.
    """
    return DESCRIPTIONS[name] if name in DESCRIPTIONS else added_remedies()[name].description


def useful_first(remedies: Iterable[Remedy]) -> tuple[Remedy, ...]:
    """Those that were seen to work, then those that could not be tried, then those that do not help; else as they stood.

    Args:
        remedies: of one finding.
    """
    rank = {True: 0, None: 1, False: 2}
    return tuple(sorted(remedies, key=lambda remedy: rank[remedy.verified]))


def untried(names: tuple[str, ...]) -> tuple[Remedy, ...]:
    """The remedies of these names, not tried yet (`verified` is None)."""
    return tuple(Remedy(name=name, description=description_of(name)) for name in names)
