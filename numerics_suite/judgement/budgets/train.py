"""Budgets of the `train.*` checks."""

from __future__ import annotations

from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Budget

BUDGETS = (
    Budget(
        check="train.finite",
        measurement="non-finite",
        limit=0,
        cause="divergence",
        title="training is not finite from step {step} on",
        reason="Loss, logits, gradients, parameters and optimizer state are looked at after each step; from this step "
        "on the model is lost.",
        remedies=("clip-grad-norm", "lower-learning-rate", "use-amp-bf16"),
    ),
    Budget(
        check="train.descends",
        measurement="rise",
        limit=0,
        cause="divergence",
        title="the loss rises on the batch it is trained on",
        reason="After N small steps on one batch its loss must be lower: first-order theory predicts a fall that the "
        "precision can resolve. A rise means steps too large for this model, or a gradient that is not the loss's.",
        remedies=("lower-learning-rate", "clip-grad-norm", "init-head"),
    ),
    Budget(
        check="train.grad-flow",
        measurement="dead",
        limit=0,
        cause="dead-gradient",
        title="{value} trained parameters receive no gradient: {parameters}",
        reason="A gradient that is absent or exactly zero means a detached branch, a zero in front of it, or a value "
        "below the range of float16; the parameter never learns.",
        remedies=("tune-loss-scale", "newer-version"),
    ),
    Budget(
        check="train.updates",
        measurement="untrained",
        limit=0,
        cause="untrained-parameters",
        title="{value} trained parameters do not move: {parameters}",
        reason="A parameter that is meant to train gets a gradient and is held by an optimizer, and a float64 step of its whole spacing moves it in "
        "any precision. One that stays bit for bit is left out, or something writes its old value back.",
        remedies=("non-reentrant-checkpointing", "rebuild-optimizer"),
    ),
    Budget(
        check="train.updates",
        measurement="lost",
        limit=1,
        cause="rounded-update",
        title="updates round away: the {facts[dtype]} parameters hold {facts[share of the steps that is held]:.2%} of the steps at lr {facts[learning rate]:.2g}",
        reason="The unit roundoff of the parameters' dtype over the share of the float64 steps that they keep (plus three "
        "standard errors of the sample): above 1, the dtype cannot distinguish the run from one that did not train.",
        remedies=("raise-learning-rate", "stochastic-rounding", "fp32-master-weights", "use-amp-bf16"),
    ),
    Budget(
        check="train.labels",
        measurement="loss-without-labels",
        limit=0,
        cause="wrong-loss",
        title="a loss is returned although no labels were given",
        reason="Without labels there is no loss to compute; such a loss comes from something else.",
        remedies=("newer-version",),
    ),
    Budget(
        check="train.labels",
        measurement="loss-missing",
        limit=0,
        cause="wrong-loss",
        title="labels were given and no loss was returned",
        reason="Called with labels, the model must return the loss it is trained with.",
        remedies=("newer-version",),
    ),
    Budget(
        check="train.labels",
        measurement="logits-changed",
        limit=0,
        cause="wrong-loss",
        title="giving labels changes the logits ({value} elements)",
        reason="Labels are what the logits are compared with; they must not reach them.",
        remedies=("newer-version",),
    ),
    Budget(
        check="train.labels",
        measurement="no-counted-labels",
        limit=0,
        cause="no-counted-labels",
        title="no label counts in {facts[without a label that counts]}",
        reason="A loss is the mean over the labels that count; over none it is 0/0, or a step that learns nothing. A prompt "
        "that fills the length leaves no room for the answer to learn. A few such rows do no harm among others; a "
        "whole batch of them does, so what counts is whether an epoch is expected to have one.",
        remedies=("count-labels",),
    ),
    Budget(
        check="train.labels",
        measurement="loss-error",
        limit=16,
        cause="wrong-loss",
        title="the loss is not the cross entropy over the counted labels (off by {value:.3g} roundoffs)",
        reason="Subtraction of the maximum, exponential, sum, logarithm, difference and mean round six times, each by at "
        "most one unit roundoff of the largest logit plus the loss when the sums are made in float32 or wider; torch's "
        "exp and log are good to 1 to 4 roundoffs, which makes 16. A label shifted by one, or a mean over ignored "
        "labels, is off by thousands.",
        remedies=("newer-version",),
    ),
    Budget(
        check="train.amp",
        measurement="dtype-drift",
        limit=0,
        cause="low-precision-section",
        title="{value} parameters or gradients changed their dtype under autocast: {parameters}",
        reason="Autocast rounds activations only; parameters and their gradients stay in float32, or small updates are "
        "lost.",
        remedies=("disable-amp",),
    ),
    Budget(
        check="train.amp",
        measurement="skipped-forever",
        limit=0,
        cause="loss-scaling",
        title="the loss scaler skips every step and its scale never recovers",
        reason="The scale was halved below 1 and the gradients are still not finite, so no scale helps: the run looks "
        "calm, and no parameter ever changes.",
        remedies=("init-head", "tune-loss-scale", "disable-amp", "use-amp-bf16"),
    ),
    Budget(
        check="train.clip",
        measurement="excess",
        limit=2**-6,
        cause="divergence",
        title="clipping leaves the gradient norm above its limit",
        reason="clip_grad_norm_ multiplies every gradient once, rounding it by at most one bfloat16 roundoff (2**-8); the "
        "norm of the rounded gradients, taken in their dtype, carries two more.",
        remedies=("disable-amp",),
    ),
    Budget(
        check="train.clip",
        measurement="non-finite",
        limit=0,
        cause="divergence",
        title="training with clipping is not finite from step {step} on",
        reason="The run without clipping is finite and the one with it is not, so the clipping itself produced the value.",
        remedies=("lower-learning-rate",),
    ),
    Budget(
        check="train.clip",
        measurement="saved-by-clipping",
        limit=0,
        cause="divergence",
        title="gradients explode without clipping; clipped to norm 1.0 the same steps stay finite",
        reason="The same model, batch and steps stay finite once the total gradient norm is clipped.",
        remedies=("clip-grad-norm", "lower-learning-rate"),
    ),
    *(
        Budget(
            check="train.accumulation",
            measurement=f"true-{what}",
            limit=1e-10,
            cause="wrong-loss" if what == "loss" else "wrong-gradient",
            title=f"micro-batches do not add up to the full batch's {what} ({{value:.2g}} in true fp64)",
            reason="A mean over the labels that count is additive when each micro-batch is weighted by what it counts; in "
            "true fp64 the sum equals the full batch's to 1e-10, or the loss is no such mean.",
            remedies=("newer-version",),
        )
        for what in ("loss", "gradient")
    ),
    Budget(
        check="train.checkpointing",
        measurement="true-gradient",
        limit=1e-10,
        cause="wrong-gradient",
        title="activation checkpointing changes the gradient of {parameters} ({value:.2g} in true fp64)",
        reason="Checkpointing computes the same forward pass twice; in true fp64 its gradients equal the plain ones to "
        "1e-10, or the recomputation is another computation.",
        remedies=("newer-version",),
    ),
    Budget(
        check="train.checkpointing",
        measurement="true-training-mode",
        limit=1e-10,
        cause="semantic-error",
        title="training mode without dropout gives another gradient of {parameters} than eval mode ({value:.2g} in true fp64)",
        reason="But for dropout, training and eval mode are one function; in true fp64 their gradients agree to 1e-10. What "
        "is trained is then not what is served.",
        remedies=("newer-version",),
    ),
    Budget(
        check="train.checkpointing",
        measurement="lost",
        limit=0,
        cause="dead-gradient",
        title="activation checkpointing loses the gradient of {value} parameters: {parameters}",
        reason="These parameters have a gradient without checkpointing and none with it.",
        remedies=("newer-version",),
    ),
    *(
        Budget(
            check="train.trainer",
            measurement=way,
            limit=AGREED,
            cause="wrong-gradient",
            title="with {facts[with]}, the installed Trainer gives the optimizer {facts[times the whole batch's gradient]:.3g} times the whole "
            "batch's gradient (off by {value:.2g}): {facts[fault]}",
            reason="However a batch is cut, packed, recomputed or clipped, its loss is the mean over all of its labels that "
            "count, and the gradient that the optimizer gets is that loss's. In true fp64 both agree to 1e-10, or the "
            "installed packages train on another loss. The checkpoint is not the cause.",
        )
        for way in (
            *("label-count", "accumulation", "adapter", "accelerate-loop", "label-smoothing", "padding-free"),
            *("reentrant-checkpointing", "non-reentrant-checkpointing", "clipping"),
        )
    ),
)
