"""Scripts of the `inputs.*` checks."""

from __future__ import annotations

from numerics_suite.checks.inputs._padding_side import COPIES, GIVEN
from numerics_suite.checks.inputs.pipeline import TEXTS, UNLIKELY_BITS
from numerics_suite.core.exact import AGREED
from numerics_suite.diagnosis.scripts.parts import indented, trust, under
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.engine.decoding import takes_positions
from numerics_suite.inputs.strategies import MASK_DTYPES
from numerics_suite.subjects.generation import names_keyword

# --- inputs.ids-dtype ----------------------------------------------------------------------------------------------


def _floating_ids(scene: ScriptContext) -> list[str] | None:
    return [
        "ids = batch['input_ids']",
        "used = []",
        "for dtype in (torch.bfloat16, torch.float16, torch.float32):",
        "    try:",
        *indented(indented(under(scene, "model(input_ids=ids.to(dtype))"))),
        "        used.append(dtype)",
        "    except (RuntimeError, TypeError, ValueError, IndexError) as error:",
        '        print(f"{dtype} ids are refused: {str(error).splitlines()[0]}")',
        f'assert not used, f"{SYMPTOM}: input_ids of {{used}} are used silently; bfloat16 keeps 8 bits of an id"',
        'print("not reproduced: floating ids are refused")',
    ]


def _narrow_ids(scene: ScriptContext) -> list[str] | None:
    limit = min(127, scene.context.vocab_size)
    return [
        f'ids = (torch.arange(1, 9) % {limit}).unsqueeze(0).to("{scene.context.condition.main_device}")',
        "",
        "",
        "def answer(ids):",
        *indented(under(scene, "return model(input_ids=ids, attention_mask=torch.ones_like(ids).long()).logits")),
        "",
        "",
        "other = []",
        "for dtype in (torch.int32, torch.int16, torch.uint8):",
        "    try:",
        "        other += [] if torch.equal(answer(ids.to(dtype)), answer(ids)) else [dtype]",
        "    except (RuntimeError, TypeError, ValueError, IndexError) as error:",
        '        print(f"{dtype} ids are refused: {str(error).splitlines()[0]}")',
        f'assert not other, f"{SYMPTOM}: the same ids as {{other}} give another answer than as int64"',
        'print("not reproduced: the same ids give the same bits in every integer dtype")',
    ]


def _merged_ids(scene: ScriptContext) -> list[str] | None:
    """Ids that a 16-bit float would merge, or the first and the last id with their neighbours."""
    last = scene.context.vocab_size - 1
    pairs = ["pairs = [(0, 1), (LAST, LAST - 1)]"]
    if scene.measurement == "merged-ids":
        pairs = [
            "pairs = []",
            "for dtype in (torch.bfloat16, torch.float16):",
            "    rounded = torch.arange(LAST + 1).to(dtype).long().tolist()",
            "    pairs += [(a, b) for a, b in enumerate(rounded) if a != b and b <= LAST][:4]",
        ]
    return [
        f"LAST = {last}  # id of the vocabulary",
        *pairs,
        "states = []",
        "entry = model.get_input_embeddings()",
        "entry.register_forward_hook(lambda module, args, output: states.append(output.detach().clone()))",
        "",
        "",
        "def embedded(token):",
        f'    ids = torch.full((1, 2), token, device="{scene.context.condition.main_device}")',
        *indented(under(scene, "model(input_ids=ids, attention_mask=torch.ones_like(ids))")),
        "    return states[-1]",
        "",
        "",
        "pairs = [(a, b) for a, b in pairs if not torch.equal(entry.weight[a], entry.weight[b])]",
        "merged = [(a, b) for a, b in pairs if torch.equal(embedded(a), embedded(b))]",
        f'assert not merged, f"{SYMPTOM}: ids whose rows differ get the same embedding: {{merged}}"',
        'print("not reproduced: each of these ids has its own state")',
    ]


# --- inputs.mask-dtype ---------------------------------------------------------------------------------------------


def _mask_dtype(scene: ScriptContext) -> list[str] | None:
    dtypes = ", ".join(str(dtype) for dtype in MASK_DTYPES[1:])
    return [
        "mask = batch['attention_mask']",
        "",
        "",
        "def answer(mask):",
        *indented(under(scene, "logits = model(input_ids=batch['input_ids'], attention_mask=mask).logits")),
        "    return logits[mask.bool()] if logits.dim() == 3 else logits",
        "",
        "",
        "other = []",
        f"for dtype in ({dtypes}):",
        "    try:",
        "        other += [] if torch.equal(answer(mask.to(dtype)), answer(mask)) else [dtype]",
        "    except (RuntimeError, TypeError, ValueError) as error:",
        '        print(f"a {dtype} mask is refused: {str(error).splitlines()[0]}")',
        f'assert not other, f"{SYMPTOM}: the same mask in {{other}} gives another answer at real tokens than in int64"',
        'print("not reproduced: the mask gives the same bits in every dtype")',
    ]


# --- inputs.pipeline -----------------------------------------------------------------------------------------------


def _given(scene: ScriptContext) -> list[str]:
    """What reaches the model: the factory's own batch, or what the tokenizer makes of a few texts."""
    if scene.source == "factory":
        return ["batch = own_batch"]
    trusted = "".join(f", {key}={value}" for key, value in trust(scene).items())
    return [
        f"tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT{trusted})",
        f"texts = {list(TEXTS)!r}",
        "pads = tokenizer.pad_token is not None",
        'batch = dict(tokenizer(texts if pads else texts[:1], padding=pads, return_tensors="pt"))',
    ]


def _floating(scene: ScriptContext) -> list[str] | None:
    names = ["input_ids", "attention_mask", "position_ids", "token_type_ids"]
    names += ["labels"] if scene.context.space.targets == "classes" else []
    return [
        *_given(scene),
        f"names = [name for name in {names!r} if name in batch]",
        "bad = {name: batch[name].dtype for name in names if batch[name].is_floating_point()}",
        f'assert not bad, f"{SYMPTOM}: not integral when it reaches the model: {{bad}}"',
        'print("not reproduced: what reaches the model is integral")',
    ]


def _outside(scene: ScriptContext) -> list[str] | None:
    return [
        *_given(scene),
        "ids, rows = batch['input_ids'], model.get_input_embeddings().weight.shape[0]",
        "bad = ids[(ids < 0) | (ids >= rows)].tolist()",
        f'assert not bad, f"{SYMPTOM}: ids {{bad}} are outside the {{rows}} rows of the embedding"',
        'print("not reproduced: every id is in the vocabulary")',
    ]


def _looks_rounded(scene: ScriptContext) -> list[str] | None:
    return [
        *_given(scene),
        "# bfloat16 holds 128 of the 2**k integers from 2**k on: an id there is one of them with probability 2**-(k - 7).",
        "large = torch.unique(batch['input_ids'][batch['input_ids'] > 256])",
        "bits = sum(int(token).bit_length() - 8 for token in large)",
        "rounded = torch.equal(large.to(torch.bfloat16).to(large.dtype), large)",
        f'assert not (rounded and bits >= {UNLIKELY_BITS}), f"{SYMPTOM}: all {{len(large)}} ids above 256 are what bfloat16 holds, by chance 2**-{{bits}}"',
        'print("not reproduced: these ids did not pass through bfloat16")',
    ]


def _tokenizer(scene: ScriptContext) -> list[str]:
    trusted = ", trust_remote_code=True" if scene.context.subject.trust_remote_code else ""
    return [f"tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT{trusted})"]


def _raises(scene: ScriptContext) -> list[str] | None:
    if scene.source != "checkpoint":
        return None
    return [
        f"texts = {list(TEXTS)!r}",
        "try:",
        *indented(_tokenizer(scene)),
        "    tokenizer(texts[0])",
        "    tokenizer(texts, padding=tokenizer.pad_token is not None)",
        "except Exception as error:",
        f'    raise AssertionError(f"{SYMPTOM}: the tokenizer raises {{type(error).__name__}}: {{error}}") from error',
        'print("not reproduced: the tokenizer opens, reads and pads")',
    ]


def _no_pad_token(scene: ScriptContext) -> list[str] | None:
    if scene.source != "checkpoint":
        return None
    return [
        *_tokenizer(scene),
        "try:",
        f"    batch = tokenizer({list(TEXTS)!r}, padding=True, return_tensors='pt')",
        "    model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'])",
        "except ValueError as error:",
        f'    raise AssertionError(f"{SYMPTOM}: rows cannot be batched: {{error}}") from error',
        'print("not reproduced: rows of several lengths make a batch")',
    ]


def _padding_moves(scene: ScriptContext) -> list[str] | None:
    if scene.source != "checkpoint":
        return None
    task = scene.context.subject.task
    given = [*GIVEN[:2], *(name for name in GIVEN[2:] if names_keyword(scene.context.model, name))]
    counts = task == "causal-lm" and takes_positions(scene.context.model)
    return [
        *_tokenizer(scene),
        f"batch = tokenizer({list(TEXTS)!r}, padding=True, return_tensors='pt')",
        "mask = batch['attention_mask']",
        "row = int(mask.sum(dim=1).masked_fill(mask.all(dim=1), 0).argmax())",
        "real = mask[row].bool()",
        f"names = [name for name in {given!r} if name in batch]",
        f"padded = {{name: batch[name][row:row + 1].repeat({COPIES}, 1) for name in names}}",
        *(["padded['position_ids'] = (padded['attention_mask'].cumsum(-1) - 1).clamp(min=0)"] if counts else []),
        "alone = {name: value[:, real] for name, value in padded.items()}",
        "model.double()",
        "torch.set_default_dtype(torch.float64)",
        "with torch.no_grad(), Float64():",
        f"    usual, other = model(**alone).logits, model(**padded).logits{'' if task == 'sequence-classification' else '[:, real]'}",
        "apart = float((other - usual).abs().max() / usual.square().mean().sqrt())",
        f'assert apart <= {AGREED!r}, f"{SYMPTOM}: padding on the {{tokenizer.padding_side}} moves the logits: {{apart:.2g}} of the answer in float64"',
        'print(f"not reproduced: the answers agree to {apart:.2g} in float64")',
    ]


INPUTS = {
    ("inputs.ids-dtype", "floating-accepted"): Body(lines=_floating_ids),
    ("inputs.ids-dtype", "integer-disagreement"): Body(lines=_narrow_ids, batch=False),
    ("inputs.ids-dtype", "merged-ids"): Body(lines=_merged_ids, batch=False),
    ("inputs.ids-dtype", "merged-edges"): Body(lines=_merged_ids, batch=False),
    ("inputs.mask-dtype", "disagreement"): Body(lines=_mask_dtype),
    ("inputs.pipeline", "floating"): Body(lines=_floating, batch=False),
    ("inputs.pipeline", "out-of-range"): Body(lines=_outside, batch=False),
    ("inputs.pipeline", "looks-rounded"): Body(lines=_looks_rounded, batch=False),
    ("inputs.pipeline", "tokenizer-raises"): Body(lines=_raises, model=False, batch=False),
    ("inputs.pipeline", "no-pad-token"): Body(lines=_no_pad_token, batch=False),
    ("inputs.pipeline", "padding-moves"): Body(lines=_padding_moves, batch=False, twins=True),
}
