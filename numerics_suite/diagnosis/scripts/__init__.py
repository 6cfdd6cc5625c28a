"""What a reproducer is written from: a template for each check, at its id, and the facts that a template asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from numerics_suite.diagnosis.scripts import facts, oracle
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Asks, Body, ScriptContext, nothing_more

__all__ = ["BODIES", "SYMPTOM", "WITHOUT", "Body", "ScriptContext"]

_FILES = Body(model=False, batch=False)
_LOADED = Body(batch=False)
_TWINS = Body(twins=True)
_TRAINING = Body(facts=facts.training)
_TRAINER = Body(facts=facts.trainer_step, twins=True, rows=2)
_GRADIENT = Body(facts=facts.gradient_error, twins=True)
_COARSER = Body(template="reference/coarser.py.j2")
_TOKENIZER = "inputs/tokenizer.py.j2"


def _law(own: Asks = nothing_more, rows: int = 1) -> dict[str, Body]:
    """A law's two measurements."""
    return {
        "true": Body(facts=own, twins=True, rows=rows),
        "rounded": Body(facts=facts.at_once(facts.has_rounding, own), twins=True, rows=rows),
    }


_TABLE: Mapping[str, Mapping[str, Body]] = {
    "load.config": {"ignored": Body(facts=facts.unread_keys, model=False), "differing": _LOADED},
    "load.complete": {
        "without-scales renamed missing mismatched": _FILES,
        "unexpected": replace(_FILES, facts=facts.dropped_heads),
        "changed": _LOADED,
    },
    "load.finite": {"non-finite": replace(_LOADED, fills=True), "uninitialised-buffers": _FILES},
    "load.dtype": {"ignored-dtype other-dtype rounded-buffers": _LOADED},
    "load.head-init": {"uninitialised": replace(_LOADED, fills=True), "gain": replace(_LOADED, facts=facts.new_head)},
    "load.roundtrip": {"differing other-dtype": replace(_LOADED, facts=facts.saved_by_its_class)},
    "load.tied": {"stored-apart wrongly-tied": _LOADED},
    "inputs.ids-dtype": {"floating-accepted": Body(), "integer-disagreement merged-ids merged-edges": _LOADED},
    "inputs.mask-dtype": {"disagreement": Body()},
    "inputs.pipeline": {
        "floating": replace(_LOADED, facts=facts.integral_inputs),
        "out-of-range looks-rounded": _LOADED,
        "tokenizer-raises": replace(_FILES, template=_TOKENIZER, facts=facts.from_files),
        "no-pad-token": replace(_LOADED, template=_TOKENIZER, facts=facts.from_files),
        "padding-moves": Body(template=_TOKENIZER, facts=facts.tokenizer_inputs, batch=False, twins=True),
    },
    "forward.finite": {"non-finite": Body(fills=True)},
    "forward.headroom": {"non-finite": Body(fills=True)},
    "forward.deterministic": {"differing": Body()},
    "forward.pooling": {"wrong-shape": Body(), "wrong-rows": Body(facts=facts.pooled_head)},
    "forward.padding": {"true-pooled": Body(facts=facts.padding_sides, twins=True), **_law(facts.padding_sides)},
    "forward.batch": _law(rows=2),
    "forward.packing": _law(facts.packing_way),
    "forward.causal": _law(),
    "forward.cache": _law(facts.decoding_edges),
    "forward.attention": _law(),
    "train.finite": {"non-finite": Body(facts=facts.training, fills=True)},
    "train.clip": {
        "non-finite": Body(template="train/finite.py.j2", facts=facts.clipped_training),
        "saved-by-clipping": Body(template="train/explodes.py.j2", facts=facts.unclipped_training, fills=True),
        "excess": Body(facts=facts.clipped_training),
    },
    "train.descends": {"rise": _TRAINING},
    "train.grad-flow": {"dead": Body(facts=facts.needless_gradients)},
    "train.updates": {
        "untrained": replace(_TRAINING, template="train/untrained.py.j2"),
        "lost": replace(_TRAINING, template="train/lost_updates.py.j2"),
    },
    "train.amp": {"dtype-drift skipped-forever": Body(facts=facts.unclipped_steps)},
    "train.labels": {
        "loss-without-labels loss-missing logits-changed loss-error": Body(),
        "no-counted-labels": Body(facts=facts.counted_labels),
    },
    "train.accumulation": {"true-loss true-gradient": Body(twins=True, rows=2)},
    "train.checkpointing": {"true-gradient true-training-mode lost": _TWINS},
    "train.trainer": {
        "label-count accumulation adapter label-smoothing padding-free clipping accelerate-loop": _TRAINER,
        "reentrant-checkpointing non-reentrant-checkpointing": _TRAINER,
    },
    "reference.local": {
        "norm rotary linear embedding composed": Body(facts=facts.local_module, twins=True),
        "coarser": _COARSER,
    },
    "reference.gradient": {"coarser": _COARSER, "excess median-excess lost": _GRADIENT},
    "reference.end-to-end": {"excess": Body(facts=facts.whole_error, twins=True)},
    "reference.oracle": {
        "rotary-excess rotary-scale": Body(template="reference/rotary.py.j2", facts=oracle.rotary_table, batch=False),
        "true-logits": Body(facts=oracle.logits, twins=True),
        "true-loss": Body(template="train/labels.py.j2"),
        "true-gradient": Body(template="reference/oracle_gradient.py.j2", facts=facts.named_parameters, twins=True),
    },
}
"""By check and its measurements: what a script is written from, where that is not the template at the check's id alone."""


def _bodies() -> Iterator[tuple[tuple[str, str], Body]]:
    for check, bodies in _TABLE.items():
        own = f"{check.replace('.', '/').replace('-', '_')}.py.j2"
        for names, body in bodies.items():
            for name in names.split():
                yield (check, name), body if body.template else replace(body, template=own)


BODIES: Mapping[tuple[str, str], Body] = dict(_bodies())
"""By check and measurement: what runs the model and asserts."""

WITHOUT: Mapping[str, str] = {
    "baseline": "the other side of the comparison is a recorded baseline, which torch and transformers alone cannot read",
    "load.complete lost-head": "an adapter is loaded by peft, and the finding lists what is missing in its file",
}
"""Groups of checks, and measurements (`CHECK MEASUREMENT`), that get no script, and why."""
