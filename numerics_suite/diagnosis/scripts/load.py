"""Scripts of the `load.*` checks."""

from __future__ import annotations

from numerics_suite.diagnosis.scripts.parts import FILLED, indented, loading, raw_config, ready, trust, under, written
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.subjects import compat
from numerics_suite.subjects.tasks import TASKS, head_tensors

NAMELESS = frozenset({"dtype", "torch_dtype"})
"""Keys that a load names itself, so that no value in the file could show."""

STORED = (
    "stored = {}",
    'for file in pathlib.Path(CHECKPOINT).glob("*.safetensors"):',
    '    with safe_open(file, "pt") as held:',
    "        stored |= {name: held.get_tensor(name) for name in held.keys()}",
)


# --- load.config ---------------------------------------------------------------------------------------------------


def _ignored(scene: ScriptContext) -> list[str] | None:
    """Another value of the key gives the same bits: nothing reads it."""
    keys = [key for key in scene.finding.parameters if key not in NAMELESS]
    if not keys:
        return None
    trusted = "".join(f", {key}={value}" for key, value in trust(scene).items())
    return [
        f"raw = {raw_config(scene)}",
        f"kind = type(transformers.AutoConfig.from_pretrained(CHECKPOINT{trusted}))",
        "",
        "",
        "",
        "def answer(values):",
        "    torch.manual_seed(0)",
        *indented(loading(scene, config="kind.from_dict(values)")),
        *indented(under(scene, f"return {ready(scene)}(**batch).logits")),
        "",
        "",
        "def unread(key):",
        '    """Whether another value of the key gives the same bits; one that is read may be refused, too."""',
        "    value = raw[key]",
        "    other = not value if isinstance(value, bool) else 2 * value + 1 if isinstance(value, (int, float)) else None",
        "    try:",
        "        return torch.equal(answer(raw), answer({**raw, key: other}))",
        "    except Exception:",
        "        return False",
        "",
        "",
        f"ignored = [key for key in {keys!r} if raw.get(key) is not None and unread(key)]",
        f'assert not ignored, f"{SYMPTOM}: nothing reads {{ignored}} of config.json: any value gives the same bits"',
        'print("not reproduced: config.json has no such key, or it is read")',
    ]


def _differing(scene: ScriptContext) -> list[str] | None:
    keys = list(scene.finding.parameters)
    return [
        f"raw = {raw_config(scene)}",
        'rope = getattr(model.config, "rope_parameters", None) or {}',
        "differing = {}",
        f"for key in {keys!r}:",
        "    has = rope.get(key, getattr(model.config, key, None))",
        "    has = list(has) if isinstance(has, tuple) else has",
        "    if key in raw and raw[key] != has:",
        '        differing[key] = f"the file says {raw[key]!r}, the model has {has!r}"',
        f'assert not differing, f"{SYMPTOM}: {{differing}}"',
        'print("not reproduced: the model has what config.json says")',
    ]


# --- load.complete -------------------------------------------------------------------------------------------------


def _missing(scene: ScriptContext) -> list[str] | None:
    return [
        *_informed(scene),
        f"head = {set(scene.context.loaded.new_head) or '()'}",
        'missing = sorted(name for name in info["missing_keys"] if name not in head)',
        'unused = sorted(info["unexpected_keys"])',
        f'assert not missing, f"{SYMPTOM}: {{len(missing)}} weights were drawn at random, first {{missing[:2]}}; unused {{unused[:2]}}"',
        'print("not reproduced: every weight but a new head is stored")',
    ]


def _unexpected(scene: ScriptContext) -> list[str] | None:
    subject = scene.context.subject
    dropped = {
        name
        for task in TASKS
        if task != subject.task
        for name in head_tensors(scene.context.loaded.unexpected, scene.context.family, task)
    } - set(scene.finding.parameters)
    return [
        *_informed(scene),
        f"dropped = {dropped or '()'}",
        'unused = sorted(name for name in info["unexpected_keys"] if name not in dropped)',
        f'assert not unused, f"{SYMPTOM}: {{len(unused)}} stored tensors find no place in the model, first {{unused[:3]}}"',
        'print("not reproduced: every stored tensor has its place")',
    ]


def _mismatched(scene: ScriptContext) -> list[str] | None:
    return [
        *_informed(scene, ignore_mismatched_sizes="True"),
        'found = sorted(str(item) for item in info["mismatched_keys"])',
        f'assert not found, f"{SYMPTOM}: {{len(found)}} stored tensors have another shape than the model\'s, first {{found[0]}}"',
        'print("not reproduced: every stored tensor has the shape of its weight")',
    ]


def _informed(scene: ScriptContext, **more: str) -> list[str]:
    """Loading with the story of its names; what is drawn at random is drawn alike each time."""
    return ["torch.manual_seed(0)", *loading(scene, "model, info", **more, output_loading_info="True")]


def _changed(_: ScriptContext) -> list[str] | None:
    return [
        *STORED,
        "changed = []",
        "for name, parameter in model.named_parameters():",
        "    if name in stored and stored[name].shape == parameter.shape:",
        "        there, here = stored[name].to(parameter.dtype), parameter.detach().cpu()",
        "        if not ((there == here) | (there.isnan() & here.isnan())).all():",
        "            changed.append(name)",
        f'assert not changed, f"{SYMPTOM}: {{len(changed)}} weights are not the stored ones after loading, first {{changed[:3]}}"',
        'print("not reproduced: every weight is the stored one")',
    ]


def _without_scales(scene: ScriptContext) -> list[str] | None:
    return [
        *STORED,
        "lacking = []",
        f"for name in {written(list(scene.finding.parameters))}:",
        '    beside = [other for other in stored if other != name and other.startswith(name.rpartition(".")[0] + ".")]',
        '    if not stored[name].dtype.is_floating_point and not any("scale" in other.lower() for other in beside):',
        '        lacking.append(f"{name}: {stored[name].dtype}, beside {beside}")',
        f'assert not lacking, f"{SYMPTOM}: codes without a scale: {{lacking[:3]}}"',
        'print("not reproduced: no stored weight is a code without a scale")',
    ]


# --- what the weights are ------------------------------------------------------------------------------------------


def _finite(scene: ScriptContext) -> list[str] | None:
    loaded = scene.context.loaded
    fresh = {*loaded.new_head, *loaded.missing, *scene.context.unwritten}
    return [
        f"fresh = {fresh or '()'}",
        "bad = {name: p[~p.isfinite()].tolist() for name, p in model.named_parameters() if name not in fresh}",
        "bad |= {name: buffer[buffer.isnan()].tolist() for name, buffer in model.named_buffers()}",
        "bad = {name: values[:3] for name, values in bad.items() if values}",
        f'assert not bad, f"{SYMPTOM}: weights that are not finite: {{bad}}"',
        'print("not reproduced: every weight is finite")',
    ]


def _uninitialised_buffers(scene: ScriptContext) -> list[str] | None:
    return [
        *FILLED,
        *loading(scene),
        "torch.use_deterministic_algorithms(False)",
        "",
        "",
        "def poisoned(value):",
        "    if value.is_floating_point():",
        "        return bool(value.isnan().any())",
        "    return value.dtype != torch.bool and bool((value == torch.iinfo(value.dtype).max).any())",
        "",
        "",
        f"names = {written(list(scene.finding.parameters))}",
        "bad = [name for name, buffer in model.named_buffers() if name in names and poisoned(buffer)]",
        f'assert not bad, f"{SYMPTOM}: buffers that nothing has written to since memory was filled: {{bad}}"',
        'print("not reproduced: every buffer is initialised")',
    ]


def _dtype(scene: ScriptContext) -> list[str] | None:
    return [
        'kept = [*(getattr(model, "_keep_in_fp32_modules", None) or [])]',
        'kept += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or [])]',
        "other = {}",
        "for name, parameter in model.named_parameters():",
        "    declared = parameter.dtype == torch.float32 and any(part in name for part in kept)",
        f"    if parameter.dtype.is_floating_point and parameter.dtype != torch.{scene.context.recipe.parameters} and not declared:",
        "        other[name] = parameter.dtype",
        f'assert not other, f"{SYMPTOM}: not in the requested dtype: {{other}}"',
        'print("not reproduced: every parameter has the dtype asked for")',
    ]


def _rounded(scene: ScriptContext) -> list[str] | None:
    """Against the value in full: the file's, or what the class builds; where only a narrow one is left, values that it cannot tell apart."""
    return [
        *(["stored = {}"] if scene.source == "factory" else STORED),
        "torch.set_default_dtype(torch.bfloat16)  # a dtype that the class names itself stays",
        "made = dict(type(model)(copy.deepcopy(model.config)).named_buffers())",
        "torch.set_default_dtype(torch.float32)",
        "held, saved, lost = dict(model.named_buffers()), model.state_dict(), {}",
        f"for name in {written(list(scene.finding.parameters))}:",
        "    full = stored.get(name, held[name] if name in saved else made[name])",
        "    if full.dtype in (torch.bfloat16, torch.float16):",
        "        values = full[full != 0].flatten().tolist()",
        "        if made[name].dtype == torch.float32 and 1 < len(set(values)) < len(values):",
        '            lost[name] = f"{full.dtype} holds {len(set(values))} distinct values of {len(values)}"',
        "    elif not torch.equal(held[name].double().cpu(), full.double().cpu()):",
        '        lost[name] = f"{held[name].flatten()[:3].tolist()}, and {full.flatten()[:3].tolist()} in full"',
        f'assert not lost, f"{SYMPTOM}: buffers that the class keeps in float32 were rounded: {{lost}}"',
        'print("not reproduced: no buffer is rounded")',
    ]


def _uninitialised(_: ScriptContext) -> list[str] | None:
    return [
        "bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]",
        f'assert not bad, f"{SYMPTOM}: never initialised: {{bad}}"',
        'print("not reproduced: every parameter is initialised")',
    ]


def _gain(scene: ScriptContext) -> list[str] | None:
    head = [name for name in scene.context.loaded.new_head if scene.context.model.get_parameter(name).dim() > 1]
    return [
        "# Root mean square times the square root of the fan-in: 0.58 to 1.41 for the standard initialisers.",
        "gains = {}",
        f"for name in {written(head)}:",
        "    weight = model.get_parameter(name).detach().double()",
        "    gains[name] = float(weight.square().mean().sqrt()) * math.sqrt(weight[0].numel())",
        f"bad = {{name: gain for name, gain in gains.items() if not gain <= {scene.allowed!r}}}",
        f'assert not bad, f"{SYMPTOM}: new weights at {{bad}} times the scale that keeps variance"',
        'print("not reproduced: new weights have a sane scale")',
    ]


def _roundtrip(scene: ScriptContext) -> list[str] | None:
    saved, again = ["    model.save_pretrained(folder)"], loading(scene, "again")
    if scene.source == "factory" or not compat.is_language_model(scene.context.model):
        return None  # its class cannot be made from files alone
    return [
        "before = {name: value.clone() for name, value in model.state_dict().items()}",
        "with tempfile.TemporaryDirectory() as folder:",
        *saved,
        *indented(line.replace("CHECKPOINT", "folder") for line in again),
        "after = again.state_dict()",
        "",
        "",
        "def same(left, right):",
        "    bits = [value.cpu().contiguous().view(-1).view(torch.uint8) for value in (left, right)]",
        "    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)",
        "",
        "",
        "lost = [name for name in before if name not in after or not same(before[name], after[name])]",
        "lost += [name for name in after if name not in before]",
        f'assert not lost, f"{SYMPTOM}: {{len(lost)}} tensors differ after saving and loading again, first {{lost[:3]}}"',
        'print("not reproduced: saved and loaded again, every tensor has the same bits")',
    ]


def _tied(_: ScriptContext) -> list[str] | None:
    return [
        "entry, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight",
        'declared = bool(getattr(model.config, "tie_word_embeddings", False))',
        "shared = entry.data_ptr() == output.data_ptr() and entry.shape == output.shape",
        f'assert shared == declared, f"{SYMPTOM}: the config ties the embeddings: {{declared}}; they are one tensor: {{shared}}"',
        'print("not reproduced: the embeddings are one tensor where the config ties them")',
    ]


def _stored_apart(_: ScriptContext) -> list[str] | None:
    return [
        *STORED,
        "names = {module: name for name, module in model.named_modules()}",
        "pair = [names[module] + '.weight' for module in (model.get_input_embeddings(), model.get_output_embeddings())]",
        "one, other = (stored.get(name) for name in pair)",
        'declared = bool(getattr(model.config, "tie_word_embeddings", False)) and one is not None and other is not None',
        "same = not declared or (one.shape == other.shape and torch.equal(one, other))",
        f'assert same, f"{SYMPTOM}: the config ties {{pair}}, and the files hold two different tensors"',
        'print("not reproduced: the output embedding is stored once, or untied, or twice the same")',
    ]


LOAD = {
    ("load.config", "ignored"): Body(lines=_ignored, model=False),
    ("load.config", "differing"): Body(lines=_differing, batch=False),
    ("load.complete", "without-scales"): Body(lines=_without_scales, model=False, batch=False),
    ("load.complete", "renamed"): Body(lines=_missing, model=False, batch=False),
    ("load.complete", "missing"): Body(lines=_missing, model=False, batch=False),
    ("load.complete", "unexpected"): Body(lines=_unexpected, model=False, batch=False),
    ("load.complete", "mismatched"): Body(lines=_mismatched, model=False, batch=False),
    ("load.complete", "changed"): Body(lines=_changed, batch=False),
    ("load.finite", "non-finite"): Body(lines=_finite, batch=False, fills=True),
    ("load.finite", "uninitialised-buffers"): Body(lines=_uninitialised_buffers, model=False, batch=False),
    ("load.dtype", "ignored-dtype"): Body(lines=_dtype, batch=False),
    ("load.dtype", "other-dtype"): Body(lines=_dtype, batch=False),
    ("load.dtype", "rounded-buffers"): Body(lines=_rounded, batch=False),
    ("load.head-init", "uninitialised"): Body(lines=_uninitialised, batch=False, fills=True),
    ("load.head-init", "gain"): Body(lines=_gain, batch=False),
    ("load.roundtrip", "differing"): Body(lines=_roundtrip, batch=False),
    ("load.tied", "stored-apart"): Body(lines=_stored_apart, batch=False),
    ("load.roundtrip", "other-dtype"): Body(lines=_roundtrip, batch=False),
    ("load.tied", "wrongly-tied"): Body(lines=_tied, batch=False),
}
