"""Scripts of the `forward.*` checks that ask one run, or the same run twice."""

from __future__ import annotations

from numerics_suite.diagnosis.scripts.parts import indented, uncached, under
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext


def _finite(scene: ScriptContext) -> list[str] | None:
    return [
        *under(scene, f"logits = model(**batch{uncached(scene)}).logits"),
        "bad = int((~logits.isfinite()).sum())",
        f'assert bad == 0, f"{SYMPTOM}: {{bad}} of {{logits.numel()}} logits are NaN or infinite"',
        'print("not reproduced: the logits are finite")',
    ]


def _headroom(scene: ScriptContext) -> list[str] | None:
    """An activation beyond the dtype's range, though what comes after may be finite again."""
    return [
        "bad = []",
        "",
        "",
        "def look(name):",
        "    def hook(module, args, output):",
        "        values = output if isinstance(output, (tuple, list)) else [output]",
        "        values = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]",
        '        bad.extend(name or "the model" for value in values if not value.isfinite().all())',
        "",
        "    return hook",
        "",
        "",
        "for name, module in model.named_modules():",
        "    module.register_forward_hook(look(name))",
        *under(scene, f"model(**batch{uncached(scene)})"),
        f'assert not bad, f"{SYMPTOM}: activations of {{len(bad)}} modules are NaN or infinite, first of {{bad[0]}}"',
        'print("not reproduced: every activation is finite")',
    ]


def _deterministic(scene: ScriptContext) -> list[str] | None:
    return [
        "def answer():",
        *indented(under(scene, f"return model(**batch{uncached(scene)}).logits")),
        "",
        "",
        "usual, again = answer(), answer()",
        "bits = [value.contiguous().view(-1).view(torch.uint8) for value in (usual, again)]",
        f'assert torch.equal(*bits), f"{SYMPTOM}: {{int((usual != again).sum())}} of {{usual.numel()}} logits differ in a second run"',
        'print("not reproduced: the same input gives the same bits")',
    ]


def _shape(scene: ScriptContext) -> list[str] | None:
    return [
        *under(scene, f"logits = model(**batch{uncached(scene)}).logits"),
        "rows, shape = len(batch['input_ids']), list(logits.shape)",
        f'assert shape[:1] == [rows] and len(shape) <= 2, f"{SYMPTOM}: logits of shape {{shape}} for {{rows}} rows of a batch"',
        'print(f"not reproduced: logits of shape {shape}")',
    ]


def _pooling(scene: ScriptContext) -> list[str] | None:
    heads = [
        name
        for name, _ in scene.context.model.named_modules()
        if name.split(".")[-1] in scene.context.family.head_names
    ]
    if not heads:
        return None
    return [
        f"head = model.get_submodule({heads[0]!r})",
        *under(
            scene,
            f"output = model(**batch, output_hidden_states=True{uncached(scene)})",
            "states = output.hidden_states[-1]",
            "if states.shape[0] != len(batch['input_ids']):",
            "    states = states.transpose(0, 1)",
            "every = head(states.to(next(head.parameters()).dtype)).double()",
        ),
        "logits, mask = output.logits.double(), batch['attention_mask']",
        "last = (mask * (torch.arange(mask.shape[1], device=mask.device) + 1)).argmax(dim=1).tolist()",
        "wrong = []",
        "for row, real in enumerate(last):",
        "    apart = (every[row] - logits[row]).abs().amax(dim=-1)",
        "    # Two roundings of the logits: the same product in another shape may round its sum otherwise.",
        "    noise = 2 * torch.finfo(output.logits.dtype).eps * logits[row].abs().max()",
        "    if not apart[real] <= apart.min() + noise:",
        '        wrong.append(f"row {row} reads position {int(apart.argmin())}, its last real token is {real}")',
        f'assert not wrong, f"{SYMPTOM}: {{wrong}}"',
        'print("not reproduced: every row reads its last real token")',
    ]


FORWARD = {
    ("forward.finite", "non-finite"): Body(lines=_finite, fills=True),
    ("forward.headroom", "non-finite"): Body(lines=_headroom, fills=True),
    ("forward.deterministic", "differing"): Body(lines=_deterministic),
    ("forward.pooling", "wrong-shape"): Body(lines=_shape),
    ("forward.pooling", "wrong-rows"): Body(lines=_pooling),
}
