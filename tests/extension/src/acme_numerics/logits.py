"""A check and a remedy: logits so large that their own dtype cannot tell near ones apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from numerics_suite.extending import (
    AddedCheck,
    AddedRemedy,
    Attempt,
    Batch,
    Budget,
    CellContext,
    Finding,
    Loaded,
    Measurement,
    NotApplicableError,
    check,
)


@check(check_id="acme.logit-spacing", batches=True, seeks="largest-logit", needs=("token-ids",))
def logit_spacing(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Is the next number after the largest logit near enough for a softmax to tell two answers apart?

    bfloat16 has 8 bits: after 128 comes 129, so two tokens of which one is 2.7 times as likely have one logit.
    """
    logits = context.forward(batch)["logits"]
    if logits.dim() > 2:
        logits = logits[batch.tensors["attention_mask"].bool()]  # values at padding are not used
    largest = logits.abs().max().item()
    if not math.isfinite(largest):
        reason = "logits are not finite, which forward.finite is about"
        raise NotApplicableError(reason)
    spacing = torch.finfo(logits.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
    facts = {"largest logit": largest, "dtype": str(logits.dtype).removeprefix("torch.")}
    yield Measurement(name="spacing", value=spacing, unit="nats", module=next(iter(heads(context)), None), facts=facts)
    yield Measurement(name="largest-logit", value=largest, unit="nats")  # without a budget: Hypothesis climbs it


def heads(context: CellContext) -> list[str]:
    """Names of the linear layers on top, as the family calls them."""
    names = {*context.family.lm_head_names, *context.family.head_names}
    modules = context.model.named_modules()
    return [name for name, module in modules if name.rpartition(".")[2] in names and isinstance(module, nn.Linear)]


LOGIT_SPACING = AddedCheck(
    spec=logit_spacing,
    budgets=(
        Budget(
            check="acme.logit-spacing",
            measurement="spacing",
            limit=0.5,
            cause="acme.coarse-logits",
            title="logits of {facts[dtype]} are {value:.3g} apart at the largest, {facts[largest logit]:.4g}",
            reason="What a softmax sees of two logits is their difference, and what is smaller than the spacing may be rounded "
            "away. A spacing of 0.5 hides a factor of 1.6 between two probabilities; the next one, of 1, hides 2.7.",
            remedies=("acme.float32-head", "keep-in-fp32"),
        ),
    ),
)


class _Float32Linear(nn.Linear):
    """A linear layer that computes in float32 and leaves its output there; its weights stay as they are."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`[…, in]` of any dtype to `[…, out]` float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def float32_head(context: CellContext, _: Finding) -> Iterator[Attempt]:
    """The head in float32, on a fresh copy; nothing where the model computes in float32 or has no such head."""
    names = heads(context)
    if not names or context.recipe.computes_in in {"float32", "float64"}:
        return

    def change(loaded: Loaded) -> Loaded:
        for name in names:
            loaded.model.get_submodule(name).__class__ = _Float32Linear
        return loaded

    yield Attempt(context=context.variant(change=change), how=f"{', '.join(names)} in float32")


FLOAT32_HEAD = AddedRemedy(
    name="acme.float32-head",
    description="compute the head in float32 and leave its logits there",
    cure=float32_head,
    causes=("overflow",),  # of logits that leave the range of float16; a module within the model it cannot help
)
