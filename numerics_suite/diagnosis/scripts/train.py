"""Scripts of the `train.*` checks that train in the cell's own precision."""

from __future__ import annotations

from numerics_suite.checks.train.amp import INITIAL_SCALE
from numerics_suite.checks.train.clip import LIMIT
from numerics_suite.diagnosis.scripts.parts import backward, indented, uncached, under, written
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.engine.training_loop import OPTIMIZERS

MOST_NAMES = 30
"""Trained parameters that a script names one by one, where the scope leaves others untrained."""


def _begun(scene: ScriptContext, *, optimizer: bool = True) -> list[str] | None:
    """What is trained and by what; None for a scope that cannot be said in a few lines."""
    plan = scene.context.request.plan
    if plan.scope == "full":
        return _optimizer(scene) if optimizer else []
    trained = scene.context.trajectory.trained
    if plan.scope == "lora" or len(trained) > MOST_NAMES:
        return None
    return [
        f"trained = {written(list(trained))}",
        "for name, parameter in model.named_parameters():",
        "    parameter.requires_grad_(name in trained)",
        *(_optimizer(scene) if optimizer else []),
    ]


def _optimizer(scene: ScriptContext) -> list[str]:
    plan, recipe = scene.context.request.plan, scene.context.recipe
    eps = f", eps={plan.eps}" if plan.eps is not None else ""
    scale = f", init_scale={plan.init_scale}" if plan.init_scale is not None else ""
    parameters = "model.parameters()" if plan.scope == "full" else "[p for p in model.parameters() if p.requires_grad]"
    return [
        f"optimizer = torch.optim.{OPTIMIZERS[plan.optimizer].__name__}({parameters}, lr={plan.lr}{eps})",
        *([f'scaler = torch.amp.GradScaler("{scene.device_kind}"{scale})'] if recipe.loss_scaling else []),
    ]


def _loss(scene: ScriptContext, *, gradients: bool = False) -> list[str]:
    return under(scene, f"loss = model(**batch{uncached(scene)}).loss", gradients=gradients)


def _step(scene: ScriptContext, *between: str, looks: bool = False) -> list[str]:
    """One step, with `loss` at hand.

    Args:
        scene: its precision.
        between: lines between the backward pass and the update.
        looks: the loss is shown, and must be finite.
    """
    looking = [
        'print(f"step {step}: loss {loss.item():.4g}")',
        f'assert loss.isfinite(), f"{SYMPTOM}: the loss is {{loss.item()}} at step {{step}}"',
    ]
    scaled = scene.context.recipe.loss_scaling
    return [
        "optimizer.zero_grad()",
        *_loss(scene, gradients=True),
        *(looking if looks else []),
        *backward(scene, "scaler.scale(loss).backward()" if scaled else "loss.backward()"),
        *(["scaler.unscale_(optimizer)"] if scaled else []),
        *between,
        *(["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]),
    ]


def _clipping(limit: float | None) -> list[str]:
    return [f"torch.nn.utils.clip_grad_norm_(model.parameters(), {limit})"] if limit else []


def _steps(scene: ScriptContext) -> str:
    return f"for step in range(1, {scene.context.request.plan.steps + 1}):"


# --- what happens over the steps -----------------------------------------------------------------------------------


def _finite(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene)
    if begun is None:
        return None
    limit = scene.context.request.plan.max_grad_norm or (LIMIT if scene.check == "train.clip" else None)
    return [
        *begun,
        _steps(scene),
        *indented(_step(scene, *_clipping(limit), looks=True)),
        "    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]",
        f'    assert not bad, f"{SYMPTOM}: {{len(bad)}} parameters are not finite after step {{step}}, first {{bad[:1]}}"',
        *_loss(scene),
        f'assert loss.isfinite(), f"{SYMPTOM}: the loss is {{loss.item()}} after the last step"',
        'print("not reproduced: training stays finite")',
    ]


def _explodes(scene: ScriptContext) -> list[str] | None:
    """The same steps without and with clipping: not finite, or a loss that grows tenfold, without it alone."""
    begun, plan = _begun(scene), scene.context.request.plan
    if begun is None or plan.scope != "full" or plan.max_grad_norm is not None:
        return None
    clip = ["if limit:", "    torch.nn.utils.clip_grad_norm_(model.parameters(), limit)"]
    return [
        "",
        "def losses(model, limit):",
        *indented([*begun, "found = []", _steps(scene)]),
        *indented(indented([*_step(scene, *clip), "found.append(loss.item())"])),
        *indented(_loss(scene)),
        "    return [*found, loss.item()]",
        "",
        "",
        "def explodes(curve):",
        "    return not all(math.isfinite(loss) and loss <= 10 * max(abs(curve[0]), 1) for loss in curve)",
        "",
        "",
        f"free, clipped = losses(copy.deepcopy(model), None), losses(model, {LIMIT})",
        'print("without clipping:", free)',
        f'print("clipped to {LIMIT}:", clipped)',
        f'assert explodes(clipped) or not explodes(free), f"{SYMPTOM}: without clipping the loss goes from {{free[0]:.4g}} to {{max(free):.4g}}"',
        'print("not reproduced: clipping makes no such difference")',
    ]


def _excess(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene)
    if begun is None:
        return None
    limit = scene.context.request.plan.max_grad_norm or LIMIT
    measured = (
        "gradients = [p.grad for p in model.parameters() if p.grad is not None]",
        "norms.append(float(torch.nn.utils.get_total_norm(gradients)))",
    )
    return [
        *begun,
        "norms = []",
        _steps(scene),
        *indented(_step(scene, *_clipping(limit), *measured)),
        f'assert max(norms) <= {limit * (1 + scene.allowed)!r}, f"{SYMPTOM}: norms after clipping to {limit}: {{norms}}"',
        'print("not reproduced: clipping holds the norm at its limit")',
    ]


def _descends(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene)
    if begun is None:
        return None
    return [
        *begun,
        "losses = []",
        _steps(scene),
        *indented([*_step(scene, *_clipping(scene.context.request.plan.max_grad_norm)), "losses.append(loss.item())"]),
        *_loss(scene),
        "losses.append(loss.item())",
        f'assert losses[-1] <= losses[0], f"{SYMPTOM}: the loss rises on the batch it is trained on: {{losses}}"',
        'print(f"not reproduced: the loss falls: {losses}")',
    ]


def _unmoved(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene)
    if begun is None:
        return None
    return [
        *begun,
        "first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}",
        _steps(scene),
        *indented(_step(scene, *_clipping(scene.context.request.plan.max_grad_norm))),
        *_loss(scene),
        f"names = {written(list(scene.finding.parameters[:MOST_NAMES]))}",
        "still = [name for name in names if torch.equal(model.get_parameter(name), first[name])]",
        f'assert not still, f"{SYMPTOM}: {{len(still)}} parameters are what they were before the first step: {{still[:4]}}"',
        'print("not reproduced: every parameter moves")',
    ]


def _lost(scene: ScriptContext) -> list[str] | None:
    begun, plan = _begun(scene), scene.context.request.plan
    if begun is None:
        return None
    return [
        *begun,
        "held, meant = 0.0, 0.0",
        _steps(scene),
        *indented(
            [
                *_step(
                    scene,
                    *_clipping(plan.max_grad_norm),
                    "moving = [p for p in model.parameters() if p.grad is not None]",
                    "before = [p.detach().double() for p in moving]",
                    "twins = [p.clone() for p in before]",
                    "for twin, p in zip(twins, moving):",
                    "    twin.grad = p.grad.double()",
                    "options = {key: value for key, value in optimizer.param_groups[0].items() if key != 'params'}",
                    "shadow = type(optimizer)([{**options, 'params': twins}])",
                    "for twin, p in zip(twins, moving):",
                    "    if optimizer.state[p]:",
                    "        wide = {k: v.double() if v.shape == p.shape else v.clone() for k, v in optimizer.state[p].items()}",
                    "        shadow.state[twin] = wide",
                    "shadow.step()",
                ),
                "for p, old, new in zip(moving, before, twins):",
                "    held += float(((p.detach().double() - old) * (new - old)).sum())",
                "    meant += float((new - old).square().sum())",
            ]
        ),
        "limit = torch.finfo(moving[0].dtype).eps / 2",
        f'assert held / meant >= limit, f"{SYMPTOM}: the parameters hold {{held / meant:.2g}} of the steps, below the unit roundoff {{limit:.2g}}"',
        'print(f"not reproduced: the parameters hold {held / meant:.2g} of the steps")',
    ]


# --- what one backward pass leaves ---------------------------------------------------------------------------------


def _dead(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene, optimizer=False)
    if begun is None:
        return None
    scale = scene.context.request.plan.init_scale or INITIAL_SCALE
    loss = f"(loss * {scale})" if scene.context.recipe.loss_scaling else "loss"
    beside = scene.context.family.lm_head_names if scene.context.subject.task != "causal-lm" else ()
    unused = {"experts", "lora_A", *beside}
    return [
        *begun,
        *_loss(scene, gradients=True),
        *backward(scene, f"{loss}.backward()"),
        f"unused = {unused!r}  # by definition the loss need not reach these",
        "dead = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]",
        "dead = [name for name in dead if not unused & set(name.split('.'))]",
        f'assert not dead, f"{SYMPTOM}: {{len(dead)}} parameters get no gradient, or zeros: {{dead[:4]}}"',
        'print("not reproduced: every parameter gets a gradient")',
    ]


def _drift(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene)
    if begun is None:
        return None
    return [
        *begun,
        "before = {name: parameter.dtype for name, parameter in model.named_parameters()}",
        *_step(scene),
        "held = {name: p.dtype if p.grad is None else p.grad.dtype for name, p in model.named_parameters()}",
        "held |= {name: p.dtype for name, p in model.named_parameters() if p.dtype != before[name]}",
        "drifted = {name: dtype for name, dtype in held.items() if dtype != before[name]}",
        f'assert not drifted, f"{SYMPTOM}: other dtypes after a step under autocast: {{drifted}}"',
        'print("not reproduced: parameters and gradients keep their dtype")',
    ]


def _skipped(scene: ScriptContext) -> list[str] | None:
    begun = _begun(scene)
    if begun is None:
        return None
    counted = "taken += all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())"
    return [
        *begun,
        "# A scaler that skips a few steps at first is at work; below a scale of 1 no scale helps.",
        "steps, taken = 0, 0",
        "while scaler.get_scale() >= 1 and not taken:",
        "    steps += 1",
        *indented(_step(scene, counted)),
        '    print(f"step {steps}: loss {loss.item():.4g}, loss scale {scaler.get_scale()}")',
        f'assert taken, f"{SYMPTOM}: the scaler skipped each of {{steps}} steps, down to a loss scale of {{scaler.get_scale()}}"',
        'print("not reproduced: the loss scale settles")',
    ]


TRAIN = {
    ("train.finite", "non-finite"): Body(lines=_finite, fills=True),
    ("train.clip", "non-finite"): Body(lines=_finite),
    ("train.clip", "saved-by-clipping"): Body(lines=_explodes, fills=True),
    ("train.clip", "excess"): Body(lines=_excess),
    ("train.descends", "rise"): Body(lines=_descends),
    ("train.grad-flow", "dead"): Body(lines=_dead),
    ("train.updates", "untrained"): Body(lines=_unmoved),
    ("train.updates", "lost"): Body(lines=_lost),
    ("train.amp", "dtype-drift"): Body(lines=_drift),
    ("train.amp", "skipped-forever"): Body(lines=_skipped),
}
