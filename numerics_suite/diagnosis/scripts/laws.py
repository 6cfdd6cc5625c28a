"""Scripts of the metamorphic laws: the answer of the batch beside that of the batch transformed.

A law that is broken for any rounding is shown in float64, where both sides agree to 1e-10 or the model computes something
else. One that is broken in the precision only is shown by the transformed run's distance from float64, in units of the
plain run's.
"""

from __future__ import annotations

from collections.abc import Callable

from numerics_suite.checks.forward.packing import MOST_ROWS, MOST_TOKENS
from numerics_suite.checks.forward.padding import EXTRA
from numerics_suite.core.exact import AGREED
from numerics_suite.diagnosis.scripts.parts import indented, loading, ready, uncached, under
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.engine.packed_rows import WORDS
from numerics_suite.judgement.budgets.forward import ROUNDED_LAW

Law = Callable[[ScriptContext], list[str]]
"""Gives the lines that compute `usual` and `other`, `[tokens, …]`, from `run`, `model`, `ids`, `mask` and `real`."""


# --- what is transformed -------------------------------------------------------------------------------------------


def _padding(scene: ScriptContext) -> list[str]:
    mask = scene.tensors["attention_mask"]
    left_free, right_free = bool(mask[:, -1].all()), bool(mask[:, 0].all())
    free = {"left": left_free, "right": right_free}  # a row is padded on one side only
    sides = [side for side in scene.context.family.padding_sides if free[side]]
    pooled = scene.measurement == "true-pooled"
    kept = "" if pooled else "[real]"
    more = "" if pooled else "[more.bool()]"
    lines = [
        f"pad, none = torch.full_like(ids[:, :1], {scene.context.space.pad_id}), torch.zeros_like(mask[:, :1])",
        "usual, other = [], []",
    ]
    for side in sides:
        ids, zeros = ([f"[pad] * {EXTRA}", "[ids]"], [f"[none] * {EXTRA}", "[mask]"])
        if side == "right":
            ids, zeros = ids[::-1], zeros[::-1]
        lines += [
            f"more = torch.cat({' + '.join(zeros)}, dim=1)",
            f"usual.append(run(model, ids, mask){kept})",
            f"other.append(run(model, torch.cat({' + '.join(ids)}, dim=1), more){more})",
        ]
    return [*lines, "usual, other = torch.cat(usual), torch.cat(other)"]


def _batch(_: ScriptContext) -> list[str]:
    return [
        "usual, other = [], []",
        "for row in (0, len(ids) - 1):",
        "    one = slice(row, row + 1)",
        "    usual.append(run(model, ids, mask)[row][real[row]])",
        "    other.append(run(model, ids[one], mask[one])[0][real[row]])",
        "usual, other = torch.cat(usual), torch.cat(other)",
    ]


def _causal(scene: ScriptContext) -> list[str]:
    vocab, pad = scene.context.vocab_size, scene.context.space.pad_id
    return [
        "cut = ids.shape[1] // 2",
        f"changed = (ids + 1) % {vocab}",
        f"changed[changed == {pad}] = {(pad + 1) % vocab}",
        "changed = torch.where(real, changed, ids)",
        "changed[:, :cut] = ids[:, :cut]",
        "past = real[:, :cut]",
        "usual, other = run(model, ids, mask)[:, :cut][past], run(model, changed, mask)[:, :cut][past]",
    ]


def _cache(scene: ScriptContext) -> list[str]:
    width = int(scene.tensors["input_ids"].shape[1])
    cuts = [sorted({max(width - 2, 1), width - 1}), [width // 2]]
    edges = [[0, *(cut for cut in piece if 0 < cut < width), width] for piece in cuts]
    return [
        "usual, other = [], []",
        f"for edges in {edges!r}:",
        "    cache, pieces = None, []",
        "    for start, stop in zip(edges, edges[1:]):",
        "        piece = {'input_ids': ids[:, start:stop], 'attention_mask': mask[:, :stop]}",
        "        output = model(**piece, use_cache=True, past_key_values=cache)",
        "        cache = output.past_key_values",
        "        pieces.append(output.logits)",
        "    usual.append(run(model, ids, mask)[real])",
        "    other.append(torch.cat(pieces, dim=1)[real])",
        "usual, other = torch.cat(usual), torch.cat(other)",
    ]


def _packing(scene: ScriptContext) -> list[str]:
    vocab, pad = scene.context.vocab_size, scene.context.space.pad_id
    way = next((way for way, words in WORDS.items() if words == scene.finding.evidence.get("packed by")), "")
    mask = {
        "position_ids": ["mask, more = None, {}"],
        "cu_seqlens": [
            "edges = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)",
            "mask, longest = None, max(lengths)",
            "more = {'cu_seq_lens_q': edges, 'cu_seq_lens_k': edges, 'max_length_q': longest, 'max_length_k': longest}",
        ],
        "block-mask": [
            "row_of = torch.arange(len(rows), device=ids.device).repeat_interleave(torch.tensor(lengths, device=ids.device))",
            "dtype, more = next(model.parameters()).dtype, {}",
            "mask = torch.zeros(len(row_of), len(row_of), dtype=dtype, device=ids.device)",
            "mask = mask.masked_fill(~(row_of[:, None] == row_of).tril(), torch.finfo(dtype).min)[None, None]",
        ],
    }
    return [
        f"rows = [row[seen] for row, seen in zip(ids[:{MOST_ROWS}], real)]",
        "if len(rows) == 1:",
        f"    other = (rows[0] + 1) % {vocab}",
        f"    rows = [torch.where(other == {pad}, (other + 1) % {vocab}, other), *rows]",
        f"rows = [row[:{MOST_TOKENS}] for row in rows]",
        "lengths = [len(row) for row in rows]",
        "places = [torch.arange(n, device=ids.device)[None] for n in lengths]",
        "usual = [run(model, row[None], torch.ones_like(row[None]), position_ids=at)[0] for row, at in zip(rows, places)]",
        "usual = torch.cat(usual)",
        *mask[way],
        "other = run(model, torch.cat(rows)[None], mask, position_ids=torch.cat(places, dim=1), **more)[0]",
    ]


def _attention(_: ScriptContext) -> list[str]:
    return ["usual, other = run(second, ids, mask)[real], run(model, ids, mask)[real]"]


def _second(scene: ScriptContext) -> list[str]:
    """The same weights under the other attention implementation."""
    if scene.check != "forward.attention":
        return []
    name = "sdpa" if scene.context.loaded.attn == "eager" else "eager"
    lines = loading(scene, "second", attn_implementation=f'"{name}"')
    return [*lines, ready(scene, "second")]


# --- how it is compared --------------------------------------------------------------------------------------------


def _run(scene: ScriptContext) -> list[str]:
    """`run`: the answer by token, or the pooled logits."""
    by_token = scene.measurement != "true-pooled" and scene.context.subject.task == "sequence-classification"
    states, answer = (", output_hidden_states=True", "hidden_states[-1]") if by_token else ("", "logits")
    more = ", **more" if scene.check == "forward.packing" else ""
    return [
        *_second(scene),
        "ids, mask = batch['input_ids'], batch['attention_mask']",
        "real = mask.bool()",
        "",
        "",
        f"def run(model, ids, mask{more}):",
        f"    return model(input_ids=ids, attention_mask=mask{uncached(scene)}{states}{more}).{answer}",
        "",
        "",
    ]


def _true(scene: ScriptContext, law: Law, told: str) -> list[str] | None:
    second = ["second.double()"] if scene.check == "forward.attention" else []
    return [
        *_run(scene),
        "model.double()",
        *second,
        "torch.set_default_dtype(torch.float64)",
        "with torch.no_grad(), Float64():",
        *indented(law(scene)),
        "apart = float((other - usual).abs().max() / usual.square().mean().sqrt())",
        f'assert apart <= {AGREED!r}, f"{SYMPTOM}: {told}: {{apart:.2g}} of the answer in float64"',
        'print(f"not reproduced: the answers agree to {apart:.2g} in float64")',
    ]


def _rounded(scene: ScriptContext, law: Law, told: str) -> list[str] | None:
    if scene.context.recipe.parameters == "float64":
        return None
    # The plain run of an attention implementation is that of the other one.
    second = ["second.double()"] if scene.check == "forward.attention" else []
    return [
        *_run(scene),
        "def both(model):",
        *indented(law(scene)),
        "    return usual.double(), other.double()",
        "",
        "",
        *under(scene, "usual, other = both(model)"),
        "torch.set_default_dtype(torch.float64)",
        "twin = copy.deepcopy(model).double()",
        *second,
        "with torch.no_grad(), Float64():",
        "    exact, _ = both(twin)",
        f"roundoff = torch.finfo(torch.{scene.context.recipe.computes_in}).eps / 2",
        "inherent = max(rms(usual - exact), roundoff * rms(exact))",
        f'assert rms(other - exact) <= {ROUNDED_LAW!r} * inherent, f"{SYMPTOM}: {told}: off by {{rms(other - exact) / inherent:.3g}} roundings"',
        'print("not reproduced: the error of the transformed run is no larger than that of the plain one")',
    ]


def _law(law: Law, told: str, *, rows: int = 1) -> dict[str, Body]:
    true = Body(lines=lambda scene: _true(scene, law, told), twins=True, rows=rows)
    return {"true": true, "rounded": Body(lines=lambda scene: _rounded(scene, law, told), twins=True, rows=rows)}


_BY_LAW = {
    "padding": _law(_padding, "padding changes the answers"),
    "batch": _law(_batch, "a row's answer depends on the other rows", rows=2),
    "packing": _law(_packing, "rows packed into one row see each other"),
    "causal": _law(_causal, "a later token changes the answers before it"),
    "cache": _law(_cache, "decoding with the cache is not the full forward pass"),
    "attention": _law(_attention, "attention implementations disagree"),
}

LAWS = {(f"forward.{law}", name): body for law, bodies in _BY_LAW.items() for name, body in bodies.items()}
LAWS["forward.padding", "true-pooled"] = _BY_LAW["padding"]["true"]
