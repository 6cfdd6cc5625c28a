"""Scripts of the `reference.*` checks: a module, an answer or a gradient against float64."""

from __future__ import annotations

from numerics_suite.diagnosis.scripts.parts import uncached, under
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.engine.references import is_reference_itself, longest_reduction, rounding_allowance

# --- one module ----------------------------------------------------------------------------------------------------


def _module_run(scene: ScriptContext) -> list[str]:
    """The module's own call within a run, and the same in float64."""
    return [
        f"module, calls = model.get_submodule({scene.finding.module!r}), []",
        "keep = module.register_forward_hook(lambda _, args, words, out: calls.append((args, words, out)), with_kwargs=True)",
        *under(scene, f"model(**batch{uncached(scene)})"),
        "keep.remove()",
        "args, words, output = calls[0]",
        "",
        "",
        "def first(value):",
        "    return value[0] if isinstance(value, (tuple, list)) else value",
        "",
        "",
        "exact = copy.deepcopy(module).double()",
        "with torch.no_grad(), Float64():",
        "    wanted = first(exact(*tree_map(wide, args), **tree_map(wide, words)))",
        "error = first(output).double() - wanted",
    ]


def _local(scene: ScriptContext) -> list[str] | None:
    """What the module got, given to it again in float64: its error in unit roundoffs."""
    dtype = str(scene.finding.evidence.get("computes in", ""))
    if dtype not in {"float32", "bfloat16", "float16"} or not _is_of_its_role(scene):
        return None
    allowance = longest_reduction(scene.context.model) ** 0.5 if dtype == "float32" else 1.0
    composed = [
        *under(scene, "inherent = first(module(*args, **words)).double() - wanted", within="Rounded()"),
        "floor = 12**-0.5 * roundoff  # a rounding's own root mean square",
        "by_rms = rms(error) / max(rms(inherent), floor * rms(wanted))",
        "middle = max(float(inherent.abs().median()), floor * float(wanted.abs().median()), 5e-324)",
        "found = min(by_rms, float(error.abs().median()) / middle)",
    ]
    single = ["found = rms(error) / (roundoff * rms(wanted))"]
    large = [
        f"large = wanted.abs() > torch.finfo(torch.{dtype}).tiny / torch.finfo(torch.{dtype}).eps",
        "if large.any():",
        "    found = min(found, rms(error[large] / wanted[large]) / roundoff)",
    ]
    return [
        *_module_run(scene),
        f"roundoff = torch.finfo(torch.{dtype}).eps / 2",
        *(composed if scene.measurement == "composed" else [*single, *large]),
        f"allowed = {scene.allowed * allowance!r}",
        f'assert found <= allowed, f"{SYMPTOM}: the error of {scene.module} is {{found:.3g}} units of its own rounding; at most {{allowed:.3g}} is allowed"',
        'print(f"not reproduced: the error is {found:.3g} units of its own rounding")',
    ]


def _is_of_its_role(scene: ScriptContext) -> bool:
    """Whether the module is one that the measurement judges; a NaN's finding names the module where the NaN begins."""
    if not scene.finding.module:
        return False
    module = scene.context.model.get_submodule(scene.finding.module)
    kind = type(module).__name__
    role = scene.context.family.kind_of(kind) or {"Linear": "linear", "Embedding": "embedding"}.get(kind, "other")
    composed = role in {"attention", "block", "mlp"} or any(True for _ in module.children())
    return composed if scene.measurement == "composed" else role == scene.measurement


def _coarser(scene: ScriptContext) -> list[str] | None:
    asked = scene.context.recipe.computes_in
    trains = scene.check == "reference.gradient"
    run = f"model(**batch{uncached(scene)}){'.loss.backward()' if trains else ''}"
    return [
        "coarser = set()",
        "",
        "",
        "class Watch(TorchDispatchMode):",
        "    def __torch_dispatch__(self, func, types, args=(), kwargs=None):",
        "        result = func(*args, **(kwargs or {}))",
        "        for value in result if isinstance(result, (tuple, list)) else [result]:",
        "            floating = isinstance(value, torch.Tensor) and value.is_floating_point()",
        f"            if floating and torch.finfo(value.dtype).eps > torch.finfo(torch.{asked}).eps:",
        '                coarser.add(f"{func} in {value.dtype}")',
        "        return result",
        "",
        "",
        *under(scene, run, gradients=trains, within="Watch()"),
        f'assert not coarser, f"{SYMPTOM}: ops in a coarser float than {asked}: {{sorted(coarser)}}"',
        f'print("not reproduced: every op computes in {asked} or wider")',
    ]


# --- the whole model -----------------------------------------------------------------------------------------------


def _end_to_end(scene: ScriptContext) -> list[str] | None:
    by_token = scene.context.subject.task == "sequence-classification"
    states, answer = (", output_hidden_states=True", "hidden_states[-1]") if by_token else ("", "logits")
    return [
        "real = batch['attention_mask'].bool()",
        "",
        "",
        "def answer(model):",
        f"    return model(**batch{uncached(scene)}{states}).{answer}[real].double()",
        "",
        "",
        *under(scene, "own = answer(model)", "with Rounded():", "    rounded = answer(model)"),
        "torch.set_default_dtype(torch.float64)",
        "twin = copy.deepcopy(model).double()",
        "with torch.no_grad(), Float64():",
        "    exact = answer(twin)",
        f"excess = rms(own - exact) / (rms(rounded - exact) * {rounding_allowance(scene.context)!r})",
        f'assert excess <= {scene.allowed!r}, f"{SYMPTOM}: the error is {{excess:.3g}} times what the precision makes unavoidable"',
        'print(f"not reproduced: the error is {excess:.3g} times the unavoidable one")',
    ]


def _gradient(scene: ScriptContext) -> list[str] | None:
    if is_reference_itself(scene.context) or scene.context.subject.task == "sequence-classification":
        return None  # a classifier is differentiated by its states, which takes more than these lines
    allowance = rounding_allowance(scene.context, tokens=int(scene.tensors["input_ids"].numel()))
    worst = "max(ratios.values())" if scene.measurement == "excess" else "statistics.median(ratios.values())"
    judged = [
        f"roundoff = torch.finfo(torch.{scene.context.recipe.computes_in}).eps / 2",
        "ratios = {}",
        "for name in exact.keys() & own.keys() & rounded.keys():",
        "    scale = max(rms(rounded[name] - exact[name]), roundoff * rms(exact[name]))",
        f"    ratios[name] = rms(own[name] - exact[name]) / (scale * {allowance!r}) if scale else 0.0",
        f"found = {worst}",
        f'assert found <= {scene.allowed!r}, f"{SYMPTOM}: gradients err {{found:.3g}} times what the precision makes unavoidable"',
        'print(f"not reproduced: gradients err {found:.3g} times the unavoidable")',
    ]
    lost = [
        "lost = sorted(exact.keys() - own.keys())",
        f'assert not lost, f"{SYMPTOM}: no gradient in this precision, and one in float64: {{lost[:4]}}"',
        'print("not reproduced: every gradient of float64 is there")',
    ]
    return [
        "def gradients(model):",
        f"    loss = model(**batch{uncached(scene)}).loss",
        "    names, trained = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))",
        "    found = torch.autograd.grad(loss, trained, allow_unused=True)",
        "    return {name: gradient.double() for name, gradient in zip(names, found) if gradient is not None}",
        "",
        "",
        *under(scene, "own = gradients(model)", "with Rounded():", "    rounded = gradients(model)", gradients=True),
        "torch.set_default_dtype(torch.float64)",
        "twin = copy.deepcopy(model).double()",
        "with Float64():",
        "    exact = gradients(twin)",
        *(lost if scene.measurement == "lost" else judged),
    ]


REFERENCE = {
    **{
        ("reference.local", role): Body(lines=_local, twins=True)
        for role in ("norm", "rotary", "linear", "embedding", "composed")
    },
    ("reference.local", "coarser"): Body(lines=_coarser),
    ("reference.gradient", "coarser"): Body(lines=_coarser),
    ("reference.gradient", "excess"): Body(lines=_gradient, twins=True),
    ("reference.gradient", "median-excess"): Body(lines=_gradient, twins=True),
    ("reference.gradient", "lost"): Body(lines=_gradient, twins=True),
    ("reference.end-to-end", "excess"): Body(lines=_end_to_end, twins=True),
}
