"""Scripts of `reference.oracle`: one module against its family's definition, written out in a few lines of float64.

The whole definition is too long for a script. The finding names the first module at which the model parts from it, and a
module, given what it really got, has a short one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numerics_suite.core.exact import AGREED
from numerics_suite.definitions import OracleUnavailable, oracle_for
from numerics_suite.definitions.definition import Oracle, rotary_of
from numerics_suite.diagnosis.scripts.parts import uncached
from numerics_suite.diagnosis.scripts.rotary import rotary_lines
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.diagnosis.scripts.train_twins import in_float64, loss_error

PARTS: Mapping[str, tuple[str, ...]] = {
    "glm": ("self_attn", "gate_up_proj", "down_proj"),
    "glm4": ("self_attn", "gate_up_proj", "down_proj"),
    "chatglm": ("self_attention", "dense_h_to_4h", "dense_4h_to_h"),
}
"""What a family calls its attention and the two matrices of its gated unit."""


def _config(scene: ScriptContext) -> Mapping[str, Any]:
    return scene.config or scene.context.subject.config


def _oracle(scene: ScriptContext) -> Oracle | None:
    kind = oracle_for(scene.context.family.name)
    try:
        return None if kind is None else kind.from_config(_config(scene))
    except OracleUnavailable:
        return None


# --- a module ------------------------------------------------------------------------------------------------------


def _module(scene: ScriptContext) -> list[str] | None:
    """The module that the finding names, given what it really got."""
    oracle, path = _oracle(scene), scene.finding.module
    if oracle is None or not path:
        return None
    kind = type(scene.context.model.get_submodule(path)).__name__
    role = scene.context.family.kind_of(kind) or kind
    writers = {
        "norm": _norm,
        "mlp": _gated_unit,
        "attention": _attention,
        "block": _block,
        "Linear": _linear,
        "Embedding": _embedding,
    }
    lines = writers[role](scene, oracle) if role in writers else None
    return None if lines is None else [*_observed(scene, path, whole=role == "block"), *lines]


def _observed(scene: ScriptContext, path: str, *, whole: bool) -> list[str]:
    """`x` and `output` of the module in a run wholly in float64; of a block also what its parts got and gave, as `seen`."""
    parts = [
        "for name, part in module.named_children():",
        "    part.register_forward_hook(lambda *call, name=name: seen.update({name: both(*call)}), with_kwargs=True)",
    ]
    return [
        "def both(module, args, words, out):",
        "    # The first tensor that it got, and the first that it gave.",
        "    return [next(v for v in tree_leaves(values) if isinstance(v, torch.Tensor)) for values in ([args, words], out)]",
        "",
        "",
        f"module, seen = model.double().get_submodule({path!r}), {{}}",
        "module.register_forward_hook(lambda *call: seen.update({'': both(*call)}), with_kwargs=True)",
        *(parts if whole else []),
        "torch.set_default_dtype(torch.float64)",
        "with torch.no_grad(), Float64():",
        f"    model(**batch{uncached(scene)})",
        "x, output = seen['']",
        *([] if whole else ["weights = {name: parameter.detach() for name, parameter in module.named_parameters()}"]),
    ]


def _judged(scene: ScriptContext, what: str, at: str = "") -> list[str]:
    return [
        f"apart = float((output - wanted){at}.abs().max() / wanted{at}.square().mean().sqrt())",
        f'assert apart <= {AGREED!r}, f"{SYMPTOM}: {scene.module} is {{apart:.2g}} away from {what}, in float64"',
        f'print(f"not reproduced: the module is {what} to {{apart:.2g}}")',
    ]


def _norm(scene: ScriptContext, oracle: Oracle) -> list[str] | None:
    return [
        f"wanted = x * (x.square().mean(dim=-1, keepdim=True) + {oracle.eps!r}).rsqrt() * weights['weight']",
        *_judged(scene, f"RMSNorm with the eps of config.json ({oracle.eps:g})"),
    ]


def _gated_unit(scene: ScriptContext, oracle: Oracle) -> list[str] | None:
    if getattr(oracle, "hidden_act", "silu") != "silu":
        return None
    _, into, out = PARTS[oracle.family]
    return [
        f"gate, up = (x @ weights['{into}.weight'].T).chunk(2, dim=-1)",
        f"wanted = (torch.nn.functional.silu(gate) * up) @ weights['{out}.weight'].T",
        *_judged(scene, "down(silu(gate) * up)"),
    ]


def _linear(scene: ScriptContext, _: Oracle) -> list[str] | None:
    return [
        "wanted = torch.nn.functional.linear(x, weights['weight'], weights.get('bias'))",
        *_judged(scene, "the product with its weight"),
    ]


def _embedding(scene: ScriptContext, _: Oracle) -> list[str] | None:
    return ["wanted = weights['weight'][x]", *_judged(scene, "its rows")]


def _attention(scene: ScriptContext, oracle: Oracle) -> list[str] | None:
    """Causal grouped attention at real tokens; rotary attention reads differences of positions only."""
    return [
        "table = next(buffer for name, buffer in model.named_buffers() if name.endswith('inv_freq'))",
        "angles = torch.outer(torch.arange(x.shape[1]).double(), table.double())",
        f"turn = torch.polar(torch.full_like(angles, {rotary_of(oracle).scale!r}), angles)",
        "",
        "",
        "def turned(value):",
        "    pairs = value[..., : 2 * len(table)].unflatten(-1, (-1, 2)).contiguous()",
        "    pairs = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)",
        "    return torch.cat((pairs, value[..., 2 * len(table) :]), dim=-1)",
        "",
        "",
        *_heads(oracle),
        "real = batch['attention_mask'].bool()",
        "visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & real[:, None, None, :].cpu()",
        "wanted = torch.nn.functional.scaled_dot_product_attention(",
        "    turned(query), turned(key), value, attn_mask=visible.to(x.device), enable_gqa=True",
        ").transpose(1, 2).flatten(2)",
        f"wanted = wanted @ weights['{'dense' if oracle.family == 'chatglm' else 'o_proj'}.weight'].T",
        *_judged(scene, "causal attention over rotated pairs", at="[real]"),
    ]


def _heads(oracle: Oracle) -> list[str]:
    """Lines that give query, key and value, `[batch, heads, sequence, width]`."""
    values: Any = oracle
    if oracle.family == "chatglm":
        split = [values.num_attention_heads, values.multi_query_group_num, values.multi_query_group_num]
        return [
            "rows = torch.nn.functional.linear(x, weights['query_key_value.weight'], weights.get('query_key_value.bias'))",
            f"rows = rows.unflatten(-1, (-1, {values.kv_channels})).transpose(1, 2)",
            f"query, key, value = rows.split({split}, dim=1)",
        ]
    return [
        "query, key, value = (",
        "    torch.nn.functional.linear(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'))",
        f"    .unflatten(-1, (-1, {values.head_width})).transpose(1, 2)",
        "    for name in ('q_proj', 'k_proj', 'v_proj')",
        ")",
    ]


def _block(scene: ScriptContext, oracle: Oracle) -> list[str] | None:
    """What the parts of a block are given and what is added to what."""
    attention = PARTS[oracle.family][0]
    sandwich = oracle.family == "glm4"
    attended, gated = ("post_self_attn_layernorm", "post_mlp_layernorm") if sandwich else (attention, "mlp")
    behind = [
        (f"{attended} behind {attention}", f"(seen['{attended}'][0], seen['{attention}'][1])"),
        (f"{gated} behind mlp", f"(seen['{gated}'][0], seen['mlp'][1])"),
    ]
    pairs = [
        ("input_layernorm of the state", "(seen['input_layernorm'][0], x)"),
        (f"{attention} of the normed state", f"(seen['{attention}'][0], seen['input_layernorm'][1])"),
        ("post_attention_layernorm of the sum", "(seen['post_attention_layernorm'][0], state)"),
        ("mlp of the normed sum", "(seen['mlp'][0], seen['post_attention_layernorm'][1])"),
        ("the block's sum", f"(output, state + seen['{gated}'][1])"),
        *(behind if sandwich else []),
    ]
    parts = ["input_layernorm", attention, "post_attention_layernorm", "mlp", *([attended, gated] if sandwich else [])]
    return [
        f"unused = [name for name in {parts!r} if name not in seen]",
        f'assert not unused, f"{SYMPTOM}: {scene.module} never calls {{unused}}"',
        f"state = x + seen['{attended}'][1]",
        "pairs = {",
        *(f"    {name!r}: {pair}," for name, pair in pairs),
        "}",
        "wrong = {name: float((a - b).abs().max() / b.square().mean().sqrt()) for name, (a, b) in pairs.items()}",
        f"wrong = {{name: apart for name, apart in wrong.items() if not apart <= {AGREED!r}}}",
        f'assert not wrong, f"{SYMPTOM}: {scene.module} does otherwise: {{wrong}}"',
        'print("not reproduced: the block adds what it should")',
    ]


# --- the rotary table, the loss, the gradient ----------------------------------------------------------------------


def _rotary(scene: ScriptContext) -> list[str] | None:
    """The table of frequencies, and the cosines and sines."""
    return rotary_lines(scene, _config(scene))


def _answer(scene: ScriptContext) -> list[str] | None:
    """Of a table that is wrong itself all else follows."""
    if scene.finding.module and type(scene.context.model.get_submodule(scene.finding.module)).__name__.endswith(
        scene.context.family.rotary_classes or ("RotaryEmbedding",)
    ):
        return _rotary(scene)
    return _module(scene)


def _loss(scene: ScriptContext) -> list[str] | None:
    """The loss against the cross entropy of the model's own logits: which of them is wrong is seen without the definition."""
    return loss_error(scene)


def _gradient(scene: ScriptContext) -> list[str] | None:
    """The derivative of the loss along one direction, by two forward passes and by the backward pass."""
    if not scene.finding.parameters:
        return None
    return [
        *in_float64(scene, compares=False),
        f"name, step = {scene.finding.parameters[0]!r}, 1e-5",
        "loss, found = gradients(batch)",
        "parameter = model.get_parameter(name)",
        "torch.manual_seed(0)",
        "along = torch.randn(parameter.shape, device=parameter.device) * parameter.detach().square().mean().sqrt()",
        "if name in found and found[name].any():",
        "    along = along + found[name] * (along.norm() / found[name].norm())",
        "there = {}",
        "for size in (step, -step, step / 2, -step / 2):",
        "    parameter.data.add_(along, alpha=size)",
        "    there[size] = gradients(batch)[0]",
        "    parameter.data.sub_(along, alpha=size)",
        "wide, near = (there[step] - there[-step]) / (2 * step), (there[step / 2] - there[-step / 2]) / step",
        "wanted = (4 * near - wide) / 3  # Richardson: what is left is the rounding of the loss over the step",
        "got = float((found[name] * along).sum()) if name in found else 0.0",
        "noise = 1e-6 * abs(wanted) + 1e-14 * abs(loss) / step",
        f'assert abs(got - wanted) <= noise, f"{SYMPTOM}: along {{name}} the loss changes by {{wanted:.6g}}, its gradient says {{got:.6g}}"',
        'print(f"not reproduced: the gradient says {got:.6g}, the loss {wanted:.6g}")',
    ]


ORACLE = {
    ("reference.oracle", "rotary-excess"): Body(lines=_rotary, batch=False),
    ("reference.oracle", "rotary-scale"): Body(lines=_rotary, batch=False),
    ("reference.oracle", "true-logits"): Body(lines=_answer, twins=True),
    ("reference.oracle", "true-loss"): Body(lines=_loss),
    ("reference.oracle", "true-gradient"): Body(lines=_gradient, twins=True),
}
