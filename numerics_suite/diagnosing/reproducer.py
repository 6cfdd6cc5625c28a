"""A script that shows a finding with torch and transformers alone: written, run, and kept only if it fails as the finding did.

First with a tiny model made from the checkpoint's config, cut down; where that does not show it, with the checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import pprint
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.records import Batch, Finding
from numerics_suite.running.evidence import Evidence
from numerics_suite.running.training import OPTIMIZERS
from numerics_suite.subjects import compat
from numerics_suite.subjects.families.family import Family
from numerics_suite.subjects.poison import poisoned, seeded
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.validate import needs_remote_code

SYMPTOM = "REPRODUCED"
"""How the assertion of every script begins."""

LONGEST = 80
"""Lines of a script, fewer than."""

CUT = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
"""What a config is cut down to, where it has the key and more."""

DROPPED = (
    "architectures",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "layer_types",
    "id2label",
    "label2id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """What a script is made of: where the model comes from, and the batch."""

    evidence: Evidence
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]


def reproducer(check: str, finding: Finding, evidence: Evidence, batch: Batch | None) -> str | None:
    """The text of a script that fails alone as the check did, None where none could be made.

    Args:
        check: id of the check that failed.
        finding: of that check.
        evidence: the cell.
        batch: the smallest failing one, None where the check took none.
    """
    body = _BODIES.get((check, str(finding.evidence.get("measurement", ""))))
    subject = evidence.subject
    if body is None or subject.path is None or subject.adapter_base or subject.quantized or not evidence.takes_ids:
        return None
    for scene in _scenes(check, evidence, batch):
        text = "\n".join([*_opening(check, finding, scene), *_model(scene), *_batch(scene), *body(scene)]) + "\n"
        if len(text.splitlines()) < LONGEST and fails(text):
            return text
    return None


def _scenes(check: str, evidence: Evidence, batch: Batch | None) -> Iterator[_Scene]:
    """Smallest first."""
    whole = dict((batch or evidence.training_batch).tensors)
    if check.startswith("forward."):
        whole.pop("labels", None)
    first = {name: value[:1, :8] if value.dim() > 1 else value[:1] for name, value in whole.items()}
    # The last columns of a row padded on the left are the real ones.
    mask = whole.get("attention_mask")
    if mask is not None and not bool(mask[0, 0]):
        first = {name: value[:1, -8:] if value.dim() > 1 else value[:1] for name, value in whole.items()}
    config = None if needs_remote_code(evidence.subject.config) else cut_down(evidence.subject.config)
    for tensors in (first, whole):
        if config is not None:
            yield _Scene(evidence=evidence, config=config, tensors=_within(tensors, int(config["vocab_size"])))
    for tensors in (first, whole):
        yield _Scene(evidence=evidence, config=None, tensors=tensors)


def cut_down(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tiny config of the same kind; None for one that does not say its sizes in the usual words.

    Args:
        config: raw `config.json`.
    """
    if "vocab_size" not in config or "hidden_size" not in config:
        return None
    small = {key: value for key, value in config.items() if key not in DROPPED}
    small |= {key: min(value, small[key]) for key, value in CUT.items() if isinstance(small.get(key), int)}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = small.get(key)
        if isinstance(value, int) and value >= small["vocab_size"]:
            small[key] = small["vocab_size"] - 1
        elif isinstance(value, list):
            small[key] = [min(token, small["vocab_size"] - 1) for token in value]
    return small


def _within(tensors: Mapping[str, Tensor], vocab: int) -> dict[str, Tensor]:
    """Ids (and labels that are ids) brought into a smaller vocabulary."""
    return {
        name: torch.where(value < 0, value, value % vocab) if name in {"input_ids", "labels"} else value
        for name, value in tensors.items()
    }


# --- the parts of a script -----------------------------------------------------------------------------------------


def _opening(check: str, finding: Finding, scene: _Scene) -> list[str]:
    cell = scene.evidence.cell
    told = textwrap.wrap(f"{finding.title}.", 116)
    return [
        '"""' + told[0].replace('"""', "'''").replace("\\", "/"),
        *(line.replace("\\", "/") for line in told[1:]),
        "",
        f"Found by numerics-suite: {check} in {cell.precision} with {cell.attn} attention on {cell.device}, cause {finding.cause},",
        f"torch {torch.__version__}, transformers {compat.version()}. Needs these two alone, and fails where the defect is.",
        '"""',
        "",
        *(["import tempfile", ""] if scene.config is not None else []),
        "import torch",
        "import transformers",
        "",
    ]


def _model(scene: _Scene) -> list[str]:
    evidence = scene.evidence
    subject, family = evidence.subject, evidence.family
    auto = f"transformers.{compat.auto_class_name(subject.task)}"
    options = [f"{compat.dtype_keyword()}=torch.{evidence.recipe.parameters}"]
    if evidence.cell.attn != "default":
        options.append(f'attn_implementation="{evidence.cell.attn}"')
    if subject.task != "causal-lm":
        options.append(f"num_labels={evidence.num_labels}")
    if needs_remote_code(subject.config):
        options.append("trust_remote_code=True")
    lines = []
    if scene.config is not None:
        stored = "AutoModelForCausalLM" if subject.new_head else compat.auto_class_name(subject.task)
        lines += [
            "# The checkpoint's config, cut down; weights at random.",
            f"CONFIG = {pprint.pformat(dict(scene.config), width=110, compact=True)}",
            "torch.manual_seed(0)",
            "CHECKPOINT = tempfile.mkdtemp()",
            f"stored = transformers.{stored}.from_config(transformers.AutoConfig.for_model(**CONFIG))",
            f"stored.to(torch.{evidence.recipe.parameters}).save_pretrained(CHECKPOINT)",
        ]
    else:
        lines += [f"CHECKPOINT = {str(subject.path)!r}"]
    return [
        *lines,
        "# Memory that nobody writes to is NaN on any machine, not what the allocator happens to hand out.",
        "torch.use_deterministic_algorithms(True, warn_only=True)",
        "torch.utils.deterministic.fill_uninitialized_memory = True",
        f"model = {auto}.from_pretrained(",
        f"    CHECKPOINT, {', '.join(options)}",
        ")",
        "torch.use_deterministic_algorithms(False)",
        f'model = model.to("{evidence.cell.device}").eval()',
        *_head(family, evidence),
        "",
    ]


def _head(family: Family, evidence: Evidence) -> list[str]:
    """A classifier's pad token, which a checkpoint of a language model may lack."""
    if evidence.subject.task != "sequence-classification" or family.pooling != "pad-id":
        return []
    config: Any = evidence.model.config
    return [f"model.config.pad_token_id = {evidence.space.pad_id}"] if config.pad_token_id is None else []


def _batch(scene: _Scene) -> list[str]:
    lines = ["batch = {"]
    for name, value in scene.tensors.items():
        if isinstance(value, Tensor):
            text = pprint.pformat(value.tolist(), width=108, compact=True)
            lines += f"    {name!r}: torch.tensor({text}),".splitlines()
    return [
        *lines,
        "}",
        f'batch = {{name: value.to("{scene.evidence.cell.device}") for name, value in batch.items()}}',
        "",
    ]


def _autocast(scene: _Scene) -> str:
    recipe, kind = scene.evidence.recipe, scene.evidence.cell.device.partition(":")[0]
    if recipe.autocast is None:
        return f'torch.autocast("{kind}", enabled=False)'
    return f'torch.autocast("{kind}", torch.{recipe.autocast})'


def _uninitialised(_: _Scene) -> list[str]:
    return [
        "bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]",
        f'assert not bad, f"{SYMPTOM}: never initialised: {{bad}}"',
        'print("not reproduced: every parameter is initialised")',
    ]


def _forward(scene: _Scene) -> list[str]:
    return [
        f"with torch.no_grad(), {_autocast(scene)}:",
        "    logits = model(**batch).logits",
        "bad = int((~logits.isfinite()).sum())",
        f'assert bad == 0, f"{SYMPTOM}: {{bad}} of {{logits.numel()}} logits are NaN or infinite"',
        'print("not reproduced: the logits are finite")',
    ]


def _training(scene: _Scene) -> list[str]:
    plan, recipe = scene.evidence.request.plan, scene.evidence.recipe
    eps = f", eps={plan.eps}" if plan.eps is not None else ""
    kind = scene.evidence.cell.device.partition(":")[0]
    clip = (
        [f"    torch.nn.utils.clip_grad_norm_(model.parameters(), {plan.max_grad_norm})"] if plan.max_grad_norm else []
    )
    return [
        f"optimizer = torch.optim.{OPTIMIZERS[plan.optimizer].__name__}(model.parameters(), lr={plan.lr}{eps})",
        f'scaler = torch.amp.GradScaler("{kind}", enabled={recipe.loss_scaling})',
        f"for step in range(1, {plan.steps} + 1):",
        "    optimizer.zero_grad()",
        f"    with {_autocast(scene)}:",
        "        loss = model(**batch).loss",
        '    print(f"step {step}: loss {loss.item():.4g}")',
        f'    assert loss.isfinite(), f"{SYMPTOM}: the loss is {{loss.item()}} at step {{step}}"',
        "    scaler.scale(loss).backward()",
        "    scaler.unscale_(optimizer)",
        *clip,
        "    scaler.step(optimizer)",
        "    scaler.update()",
        "    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]",
        f'    assert not bad, f"{SYMPTOM}: {{len(bad)}} parameters are not finite after step {{step}}, first {{bad[:1]}}"',
        f"with torch.no_grad(), {_autocast(scene)}:",
        "    loss = model(**batch).loss",
        f'assert loss.isfinite(), f"{SYMPTOM}: the loss is {{loss.item()}} after the last step"',
        'print("not reproduced: training stays finite")',
    ]


def _floating_ids(_: _Scene) -> list[str]:
    return [
        "ids = batch['input_ids']",
        "used = []",
        "for dtype in (torch.bfloat16, torch.float16, torch.float32):",
        "    try:",
        "        with torch.no_grad():",
        "            model(input_ids=ids.to(dtype))",
        "        used.append(dtype)",
        "    except (RuntimeError, TypeError, ValueError, IndexError) as error:",
        '        print(f"{dtype} ids are refused: {str(error).splitlines()[0]}")',
        f'assert not used, f"{SYMPTOM}: input_ids of {{used}} are used silently; bfloat16 keeps 8 bits of an id"',
        'print("not reproduced: floating ids are refused")',
    ]


_BODIES = {
    ("load.head-init", "uninitialised"): _uninitialised,
    ("forward.finite", "non-finite"): _forward,
    ("forward.headroom", "non-finite"): _forward,
    ("train.finite", "non-finite"): _training,
    ("train.clip", "saved-by-clipping"): _training,
    ("inputs.ids-dtype", "floating-accepted"): _floating_ids,
}
"""By check and measurement: the lines that run the model and assert."""


# --- seeing that it fails ------------------------------------------------------------------------------------------


def fails(text: str) -> bool:
    """Whether the script, run in this process, ends with its own assertion; what it changes of torch is restored.

    Args:
        text: of a script.
    """
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(quiet_transformers())
        stack.enter_context(seeded(0))
        stack.enter_context(poisoned())  # for its restoring: the script sets the switches itself
        try:
            exec(compile(text, "<reproducer>", "exec"), {"__name__": "__main__"})  # noqa: S102 - the text was written above
        except AssertionError as error:
            return str(error).startswith(SYMPTOM)
        except Exception:  # noqa: BLE001 - another failure is not the finding's
            return False
    return False
