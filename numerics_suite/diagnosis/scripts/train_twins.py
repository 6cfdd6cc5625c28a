"""Scripts of the `train.*` checks that hold a loss or a gradient against its definition."""

from __future__ import annotations

from numerics_suite.diagnosis.scripts.parts import uncached, under
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.inputs.labels import predicts_next_token

ROUNDINGS = 16
"""Unit roundoffs that a cross entropy may be off: the budget of `train.labels`."""

# --- train.labels --------------------------------------------------------------------------------------------------


def _with_and_without(scene: ScriptContext) -> list[str]:
    return [
        "bare = {name: value for name, value in batch.items() if name != 'labels'}",
        *under(scene, f"without, labelled = model(**bare{uncached(scene)}), model(**batch{uncached(scene)})"),
    ]


def _loss_without(scene: ScriptContext) -> list[str] | None:
    return [
        *_with_and_without(scene),
        f'assert without.loss is None, f"{SYMPTOM}: a loss of {{float(without.loss):.4g}} without labels"',
        'print("not reproduced: without labels there is no loss")',
    ]


def _loss_missing(scene: ScriptContext) -> list[str] | None:
    return [
        *_with_and_without(scene),
        f'assert labelled.loss is not None, "{SYMPTOM}: labels were given and no loss came back"',
        'print("not reproduced: with labels there is a loss")',
    ]


def _logits_changed(scene: ScriptContext) -> list[str] | None:
    return [
        *_with_and_without(scene),
        "differing = int((labelled.logits != without.logits).sum())",
        f'assert not differing, f"{SYMPTOM}: labels change {{differing}} logits"',
        'print("not reproduced: labels leave the logits alone")',
    ]


def loss_error(scene: ScriptContext) -> list[str] | None:
    """The cross entropy of torch, in float64, over the logits that the model itself gives."""
    task, targets = scene.context.subject.task, scene.context.space.targets
    if task == "sequence-classification" and targets != "classes":
        loss = "mse_loss" if targets == "numbers" else "binary_cross_entropy_with_logits"
        wanted = [f"wanted = torch.nn.functional.{loss}(scores, targets.double().reshape(scores.shape))"]
    else:
        shift = ["scores, targets = scores[:, :-1], targets[:, 1:]"] if task == "causal-lm" else []
        wanted = [
            *shift,
            "wanted = torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))",
        ]
    return [
        *_with_and_without(scene),
        "scores, targets = without.logits.double(), batch['labels']",
        *wanted,
        "# Rounding moves a cross entropy by a few unit roundoffs of the largest logit and itself.",
        "size = wanted.abs() + without.logits.double().abs().max()",
        "roundoff = torch.finfo(labelled.loss.dtype).eps / 2",
        "off = float((labelled.loss.double() - wanted).abs() / (roundoff * size))",
        f'assert off <= {ROUNDINGS}, f"{SYMPTOM}: the loss is {{labelled.loss}}, the labels that count give {{wanted}}"',
        'print(f"not reproduced: the loss is the cross entropy to {off:.2g} roundoffs")',
    ]


def _none_counts(scene: ScriptContext) -> list[str] | None:
    shift = "[:, 1:]" if scene.context.subject.task == "causal-lm" or predicts_next_token(scene.context.model) else ""
    bare = [
        "# A batch of those rows in which no label counts:",
        f"bare = (batch['labels']{shift} != -100).flatten(1).sum(dim=1) == 0",
        "batch = {name: value[bare] for name, value in batch.items()} if bare.any() else batch",
    ]
    return [
        *(["batch = own_batch"] if scene.source == "factory" else bare),
        *under(scene, f"loss = model(**batch{uncached(scene)}).loss"),
        f"counted = int((batch['labels']{shift} != -100).sum())",
        f'assert counted, f"{SYMPTOM}: no label counts, every one is -100; the loss is {{loss.item()}}"',
        'print(f"not reproduced: {counted} labels count; the loss is {loss.item():.4g}")',
    ]


# --- gradients in float64 ------------------------------------------------------------------------------------------


def in_float64(scene: ScriptContext, *, compares: bool = True) -> list[str]:
    """Lines that give `gradients` of a batch and how far `apart` two of them are, for a model that is float64 from there on.

    Args:
        scene: what the script is made of.
        compares: with `apart`.
    """
    apart = [
        "def apart(got, wanted):",
        '    """Difference over the largest number of each gradient, or of all where it cancels to nothing."""',
        "    sizes = {name: float(value.abs().max()) for name, value in wanted.items()}",
        "    least = 1e-12 * max(sizes.values())",
        "    scales = {name: size if size > least else least * 1e12 for name, size in sizes.items()}",
        "    return {name: float((got[name] - wanted[name]).abs().max()) / scales[name] for name in wanted if name in got}",
        "",
        "",
    ]
    return [
        "def gradients(batch):",
        "    with Float64():",
        f"        loss = model(**batch{uncached(scene)}).loss",
        "        names, trained = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))",
        "        found = torch.autograd.grad(loss, trained, allow_unused=True)",
        "    return loss.item(), {name: gradient for name, gradient in zip(names, found) if gradient is not None}",
        "",
        "",
        *(apart if compares else []),
        "model.double()",
        "torch.set_default_dtype(torch.float64)",
    ]


def _accumulation(scene: ScriptContext) -> list[str] | None:
    if scene.context.subject.task == "sequence-classification":
        counted = "len({}['labels'])"
    else:
        columns = "[:, 1:]" if scene.context.subject.task == "causal-lm" else ""
        counted = f"int(({{}}['labels']{columns} != -100).sum())"
    return [
        *in_float64(scene),
        "loss, wanted = gradients(batch)",
        "total, sums = 0.0, {name: torch.zeros_like(value) for name, value in wanted.items()}",
        "for part in (slice(0, 1), slice(1, None)):",
        "    piece = {name: value[part] for name, value in batch.items()}",
        f"    share = {counted.format('piece')} / {counted.format('batch')}",
        "    own, found = gradients(piece)",
        "    total += share * own",
        "    sums = {name: value + share * found[name] for name, value in sums.items()}",
        'errors = {"the loss": abs(total / loss - 1), **apart(sums, wanted)}',
        "worst = max(errors, key=errors.get)",
        f'assert errors[worst] <= {scene.allowed!r}, f"{SYMPTOM}: micro-batches do not add up: {{worst}} is off by {{errors[worst]:.2g}}"',
        'print("not reproduced: micro-batches, weighted by their labels, give the full batch")',
    ]


def _checkpointing(scene: ScriptContext) -> list[str] | None:
    switch = ["model.train()", "_, wanted = gradients(batch)"]
    if scene.measurement == "true-training-mode":
        switch.reverse()
    else:
        words = '{"use_reentrant": False}'
        switch.append(f"model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={words})")
    return [
        *in_float64(scene),
        "for module in model.modules():  # dropout off",
        "    held = [name for name, value in vars(module).items() if isinstance(value, float)]",
        '    vars(module).update({name: 0.0 for name in held if name == "p" or "dropout" in name})',
        *switch,
        "_, found = gradients(batch)",
        "lost = sorted(wanted.keys() - found.keys())",
        f'assert not lost, f"{SYMPTOM}: {{len(lost)}} parameters have no gradient any more: {{lost[:3]}}"',
        "errors = apart(found, wanted)",
        "worst = max(errors, key=errors.get)",
        f'assert errors[worst] <= 1e-10, f"{SYMPTOM}: the gradient of {{worst}} differs by {{errors[worst]:.2g}} in float64"',
        'print("not reproduced: the gradients are the same")',
    ]


TRAIN_TWINS = {
    ("train.labels", "loss-without-labels"): Body(lines=_loss_without),
    ("train.labels", "loss-missing"): Body(lines=_loss_missing),
    ("train.labels", "logits-changed"): Body(lines=_logits_changed),
    ("train.labels", "no-counted-labels"): Body(lines=_none_counts),
    ("train.labels", "loss-error"): Body(lines=loss_error),
    ("train.accumulation", "true-loss"): Body(lines=_accumulation, twins=True, rows=2),
    ("train.accumulation", "true-gradient"): Body(lines=_accumulation, twins=True, rows=2),
    ("train.checkpointing", "true-gradient"): Body(lines=_checkpointing, twins=True),
    ("train.checkpointing", "true-training-mode"): Body(lines=_checkpointing, twins=True),
    ("train.checkpointing", "lost"): Body(lines=_checkpointing, twins=True),
}
