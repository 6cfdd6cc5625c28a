"""Each measurement that has a script has a defect whose script fails alone, and ends well without the defect."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants.article_checkpoints import WEIGHT, Tensors, changed
from mutants.catalogue import MUTANTS, ORACLE, Mutant
from mutants.driver import release
from unit.script_of import UnseenError, shown
from unit.script_process import ScriptProcess

from numerics_suite.diagnosis.reproducer import fails
from numerics_suite.diagnosis.scripts import BODIES, WITHOUT
from numerics_suite.judgement.budgets import all_budgets
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.suite import driver

SMALL = {"seq_len": 12, "batch_size": 2}
BY_ID = {mutant.id: mutant for mutant in MUTANTS}

CLASS = "class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):\n"
DOUBLED = "        self.transformer.output_layer.weight.data.mul_(2)\n"
WHEN_LOADED = f"    def eval(self):\n{DOUBLED}        return super().eval()\n\n"
CAST = """    @classmethod
    def from_pretrained(cls, *args, **words):
        made = super().from_pretrained(*args, **words)
        model = made[0] if isinstance(made, tuple) else made
        {cast}
        return made

"""
WHEN_SAVED = """    def save_pretrained(self, *args, **words):
        held = {name: value.clone() for name, value in self.state_dict().items()}
        held["transformer.output_layer.weight"] *= 2
        super().save_pretrained(*args, **{**words, "state_dict": held})

"""
NARROWED_AFTER_A_SAVE = """    def save_pretrained(self, folder, *args, **words):
        super().save_pretrained(folder, *args, **words)
        with open(f"{folder}/saved", "w"):
            pass

    @classmethod
    def from_pretrained(cls, folder, *args, **words):
        made = super().from_pretrained(folder, *args, **words)
        if __import__("os").path.exists(f"{folder}/saved"):
            (made[0] if isinstance(made, tuple) else made).transformer.output_layer.half()
        return made

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A defect that one measurement shows.

    Attributes:
        check: its id.
        measurement: of that check.
        mutant: id in the catalogue.
        model: function in `script_models`.
        copy: makes a damaged checkpoint in a folder; the fixture that it is a copy of.
        cell: precision, attention, other settings.
        slow: a check that runs many batches, whose script has the parts of a quicker one's.
    """

    check: str
    measurement: str
    mutant: str = ""
    model: str = ""
    copy: tuple[Callable[[Path], object], str] | None = None
    cell: dict[str, Any] = field(default_factory=dict)
    slow: bool = False

    @property
    def name(self) -> str:
        """Of the test."""
        return f"{self.check}-{self.measurement}"

    def source(self, folder: Path) -> str:
        """SUBJECT."""
        if self.mutant:
            return f"factory:mutants.factories:{self.mutant.replace('-', '_')}"
        if self.model:
            return f"factory:unit.script_models:{self.model}"
        assert self.copy is not None
        made = folder / f"{folder.name}-copy"
        self.copy[0](made)
        return str(made)

    def settings(self) -> dict[str, Any]:
        """Of the cell."""
        mutant = BY_ID.get(self.mutant)
        own = {} if mutant is None else {"precision": mutant.precision, "attn": mutant.attn}
        return {**SMALL, **own, **self.cell}

    def without(self, script: str, source: str) -> str:
        """The script on what is not damaged."""
        if self.copy is not None:
            assert repr(source) in script
            return script.replace(repr(source), repr(str(fixture_path(self.copy[1]))))
        function = source.rpartition(":")[2]
        assert f".{function}()" in script
        clean = "sound" if self.model else f"clean_{BY_ID[self.mutant].fixture.replace('-', '_')}"
        return script.replace(f".{function}()", f".{clean}()")


def of_weight(change: Callable[[Tensors], object]) -> tuple[Callable[[Path], object], str]:
    return (lambda folder: changed(folder, "glm-tiny", tensors=change)), "glm-tiny"


def of_code(method: str) -> tuple[Callable[[Path], object], str]:
    return (lambda folder: changed(folder, "chatglm-tiny", code=(CLASS, CLASS + method))), "chatglm-tiny"


def narrower(held: Tensors) -> None:
    held[WEIGHT] = held[WEIGHT][:, 1:].contiguous()


def missing(held: Tensors) -> None:
    held.pop(WEIGHT)


def homeless(held: Tensors) -> None:
    held["model.layers.1.mlp.down.weight"] = held[WEIGHT].clone()


def renamed(held: Tensors) -> None:
    held["model.blocks.1.mlp.down_proj.weight"] = held.pop(WEIGHT)


def infinite(held: Tensors) -> None:
    held[WEIGHT][0, 0] = float("inf")


def whole_numbers(held: Tensors) -> None:
    """Quantised to eight bits by a tool whose scales were lost."""
    held[WEIGHT] = (held[WEIGHT].float() / held[WEIGHT].float().abs().max() * 127).round().to(torch.int8)


def with_tied_config(folder: Path) -> None:
    changed(folder, "glm-tiny", config={"tie_word_embeddings": True})


def with_a_computed_buffer(folder: Path) -> None:
    """The constructor computes it, it is not saved, and `_init_weights` knows nothing of it."""
    code = 'self.register_buffer("inv_freq", rotary_frequencies(config), persistent=True)'
    own = f'{code}\n        self.register_buffer("window", torch.arange(8.0), persistent=False)'
    changed(folder, "chatglm-tiny", code=(code, own))


def with_another_eps(folder: Path) -> None:
    """The config class drops what the file says."""
    changed(folder, "chatglm-tiny")
    file = folder / "configuration_chatglm.py"
    text = file.read_text(encoding="utf-8")
    assert text.count("self.layernorm_epsilon = layernorm_epsilon") == 1
    file.write_text(text.replace("= layernorm_epsilon", "= 1e-3"), encoding="utf-8")


def with_an_unknown_tokenizer(folder: Path) -> None:
    changed(folder, "glm-tiny")
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**written, "tokenizer_class": "NoSuchTokenizer"}), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def without_a_pad_token(folder: Path) -> None:
    changed(folder, "glm-tiny-classifier")
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**written, "pad_token_id": None}), encoding="utf-8")


def padded_by_another(folder: Path) -> None:
    """The tokenizer pads on the right by a token that the config does not call the pad token."""
    changed(folder, "glm-tiny-classifier")
    for name, changes in (("config.json", {"pad_token_id": 1}), ("tokenizer_config.json", {"padding_side": "right"})):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def without_pooling(folder: Path) -> None:
    pooled = "body.last_hidden_state[:, -1]"
    changed(folder, "chatglm-tiny-classifier", code=(pooled, pooled.removesuffix("[:, -1]")))


def of_load() -> Iterator[Row]:
    yield Row(check="load.config", measurement="differing", copy=(with_another_eps, "chatglm-tiny"))
    yield Row(check="load.complete", measurement="renamed", copy=of_weight(renamed))
    yield Row(check="load.complete", measurement="missing", copy=of_weight(missing))
    yield Row(check="load.complete", measurement="unexpected", copy=of_weight(homeless))
    yield Row(check="load.complete", measurement="mismatched", copy=of_weight(narrower))
    yield Row(check="load.complete", measurement="changed", copy=of_code(WHEN_LOADED))
    yield Row(check="load.finite", measurement="non-finite", copy=of_weight(infinite))
    yield Row(check="load.complete", measurement="without-scales", copy=of_weight(whole_numbers))
    if release() >= (5,):
        yield Row(
            check="load.finite", measurement="uninitialised-buffers", copy=(with_a_computed_buffer, "chatglm-tiny")
        )
    yield Row(check="load.tied", measurement="stored-apart", copy=(with_tied_config, "glm-tiny"))
    narrowed = CAST.format(cast="[setattr(p, 'data', p.data.half()) for p in model.parameters()]")
    yield Row(check="load.dtype", measurement="ignored-dtype", copy=of_code(narrowed), cell={"precision": "bf16"})
    rounded = CAST.format(cast="[setattr(b, 'data', b.data.half()) for b in model.buffers()]")
    yield Row(check="load.dtype", measurement="rounded-buffers", copy=of_code(rounded))
    yield Row(check="load.roundtrip", measurement="differing", copy=of_code(WHEN_SAVED))
    yield Row(check="load.roundtrip", measurement="other-dtype", copy=of_code(NARROWED_AFTER_A_SAVE))
    yield Row(check="load.tied", measurement="wrongly-tied", model="untied")


def of_inputs() -> Iterator[Row]:
    check = "inputs.ids-dtype"
    yield Row(check=check, measurement="floating-accepted", mutant="embedding-takes-floats")
    yield Row(check=check, measurement="integer-disagreement", model="narrow_ids_shifted")
    yield Row(check=check, measurement="merged-ids", model="ids_rounded_inside")
    yield Row(check=check, measurement="merged-edges", mutant="embedding-last-row-lost")
    yield Row(check="inputs.mask-dtype", measurement="disagreement", mutant="mask-dtype-dependent")
    yield Row(check="inputs.pipeline", measurement="tokenizer-raises", copy=(with_an_unknown_tokenizer, "glm-tiny"))
    yield Row(check="inputs.pipeline", measurement="no-pad-token", copy=(without_a_pad_token, "glm-tiny-classifier"))
    yield Row(check="inputs.pipeline", measurement="padding-moves", copy=(padded_by_another, "glm-tiny-classifier"))


def of_forward() -> Iterator[Row]:
    bf16 = {"precision": "bf16"}
    yield Row(check="forward.finite", measurement="non-finite", mutant="mask-causal-one-early-chatglm")
    yield Row(check="forward.deterministic", measurement="differing", mutant="classifier-dropout-left-on")
    yield Row(check="forward.pooling", measurement="wrong-shape", copy=(without_pooling, "chatglm-tiny-classifier"))
    yield Row(check="forward.pooling", measurement="wrong-rows", mutant="pooled-first-token")
    yield Row(check="forward.padding", measurement="true", mutant="mask-padding-ignored")
    yield Row(check="forward.padding", measurement="true-pooled", mutant="pooled-first-token")
    yield Row(check="forward.padding", measurement="rounded", model="odd_widths_coarse", cell=bf16, slow=True)
    yield Row(check="forward.batch", measurement="true", mutant="embedding-permuted-by-batch")
    yield Row(check="forward.batch", measurement="rounded", model="rows_alone_coarse", cell=bf16)
    yield Row(check="forward.packing", measurement="true", mutant="packing-positions-ignored-by-the-mask")
    yield Row(check="forward.packing", measurement="rounded", model="packed_rows_coarse", cell=bf16)
    yield Row(check="forward.causal", measurement="true", mutant="attention-heads-not-brought-back")
    many = {**bf16, "max_examples": 40}
    yield Row(check="forward.causal", measurement="rounded", model="futures_coarse", cell=many, slow=True)
    yield Row(check="forward.cache", measurement="true", mutant="cache-padding-forgotten", slow=True)
    yield Row(check="forward.cache", measurement="rounded", mutant="cache-keys-in-bf16", slow=True)
    yield Row(check="forward.attention", measurement="true", mutant="attention-groups-in-other-order")
    yield Row(check="forward.attention", measurement="rounded", model="attention_kernel_coarse", cell=bf16)


def of_training() -> Iterator[Row]:
    labels = "train.labels"
    yield Row(check=labels, measurement="loss-error", mutant="loss-of-probabilities")
    yield Row(check=labels, measurement="loss-without-labels", mutant="loss-without-labels")
    yield Row(check=labels, measurement="loss-missing", model="loss_forgotten")
    yield Row(check=labels, measurement="logits-changed", mutant="loss-labels-leak-into-logits")
    yield Row(check="train.finite", measurement="non-finite", mutant="gradient-nan-in-backward")
    yield Row(check="train.descends", measurement="rise", mutant="gradient-against-the-loss")
    yield Row(check="train.grad-flow", measurement="dead", mutant="gradient-of-classifier-body-detached")
    yield Row(check="train.updates", measurement="untrained", mutant="gradient-undone-by-a-copy")
    yield Row(check="train.accumulation", measurement="true-gradient", mutant="loss-mean-of-row-means")
    yield Row(check="train.accumulation", measurement="true-loss", model="loss_with_a_constant")
    checkpointing = "train.checkpointing"
    yield Row(check=checkpointing, measurement="true-gradient", mutant="checkpointing-drops-residual-gradient")
    yield Row(check=checkpointing, measurement="true-training-mode", mutant="training-scales-states")
    yield Row(check=checkpointing, measurement="lost", mutant="checkpointing-detaches")
    yield Row(check="train.trainer", measurement="accumulation", mutant="loss-swallows-the-count")
    cell = {"precision": "amp-bf16", "optimizer": "sgd"}
    yield Row(check="train.amp", measurement="dtype-drift", model="weight_narrowed_by_a_step", cell=cell)


def of_references() -> Iterator[Row]:
    local, gradient, oracle = "reference.local", "reference.gradient", "reference.oracle"
    bf16 = {"precision": "bf16"}
    yield Row(check="reference.end-to-end", measurement="excess", mutant="mlp-kernel-at-ten-bits")
    yield Row(check=local, measurement="coarser", mutant="attention-softmax-in-fp16")
    yield Row(check=local, measurement="norm", mutant="norm-without-fp32-bf16")
    yield Row(check=local, measurement="rotary", mutant="rope-angles-in-bf16", cell={"seq_len": 64})
    yield Row(check=local, measurement="linear", mutant="mlp-kernel-at-ten-bits")
    yield Row(check=local, measurement="embedding", model="embedding_coarse", cell=bf16)
    yield Row(check=local, measurement="composed", model="attention_kernel_coarse", cell=bf16)
    yield Row(check=gradient, measurement="coarser", mutant="gradient-through-fp16")
    yield Row(check=gradient, measurement="excess", model="product_kernel_coarse", cell=bf16)
    yield Row(check=gradient, measurement="median-excess", model="product_kernel_coarse", cell=bf16)
    yield Row(check=gradient, measurement="lost", model="gradient_lost_in_16_bits", cell=bf16)
    yield Row(check=oracle, measurement="rotary-excess", mutant="rope-whole-head")
    yield Row(check=oracle, measurement="rotary-scale", mutant="rope-attention-factor")
    yield Row(check=oracle, measurement="true-loss", mutant="loss-label-smoothing")
    yield Row(check=oracle, measurement="true-gradient", mutant="gradient-of-classifier-body-detached")
    yield Row(check=oracle, measurement="true-logits", mutant="norm-eps-last")


ROWS = [*of_load(), *of_inputs(), *of_forward(), *of_training(), *of_references()]

ELSEWHERE = {
    *(("load.config", "ignored"), ("load.dtype", "other-dtype")),
    *([("load.finite", "uninitialised-buffers")] if release() < (5,) else []),  # up to 4.57 a constructor's values stay
    *(("load.head-init", "uninitialised"), ("load.head-init", "gain")),
    *(("inputs.pipeline", name) for name in ("floating", "out-of-range", "looks-rounded")),
    ("train.labels", "no-counted-labels"),
    ("train.updates", "lost"),
    *(("forward.headroom", "non-finite"), ("train.amp", "skipped-forever"), ("train.clip", "saved-by-clipping")),
}
"""Shown by the article's defects, or where the user's own data are tested."""

PATCHED = {
    *(("train.clip", "excess"), ("train.clip", "non-finite")),
    *(("train.trainer", f"{kind}-checkpointing") for kind in ("reentrant", "non-reentrant")),
    *(("train.trainer", name) for name in ("label-count", "label-smoothing", "padding-free", "clipping")),
    *(("train.trainer", name) for name in ("adapter", "accelerate-loop")),
}
"""Only torch's own clipping, or the installed Trainer, could be at fault."""

MODULES = (
    *("norm-gain-missing", "mlp-gate-and-up-swapped", "attention-scale-missing", "attention-scale-missing-chatglm"),
    *("post-norm-of-mlp-missing", "rope-half-split", "mask-padding-shifted", "rope-backwards"),
)
"""Mutants whose finding names a norm, a gated unit, attention, a block, the rotary embedding."""


@pytest.fixture(autouse=True)
def _few_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SHRINKS", 5)


def both_ways(row: Row, folder: Path, alone: ScriptProcess) -> None:
    source = row.source(folder)
    found = shown(source, row.check, measurement=row.measurement, **row.settings())
    assert found.script is not None
    ran = alone.run(found.script)
    assert ran.reproduced, f"{ran.said}\n{found.script}"
    ran = alone.run(row.without(found.script, source))
    assert ran.not_reproduced, f"{ran.said}\n{found.script}"


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS]
)
def test_a_script_of_each_measurement(row: Row, tmp_path: Path, alone: ScriptProcess) -> None:
    both_ways(row, tmp_path, alone)


def test_a_script_of_updates_that_round_away(alone: ScriptProcess) -> None:
    """The rate is the defect: at a usual one the same script ends well."""
    source, small = "factory:unit.script_models:sound", {"precision": "bf16", "attn": "eager", **SMALL}
    found = shown(source, "train.updates", measurement="lost", lr=6e-7, **small)
    assert found.script is not None
    ran = alone.run(found.script)
    assert ran.reproduced, f"{ran.said}\n{found.script}"
    ran = alone.run(found.script.replace("lr=6e-07", "lr=1e-4"))
    assert ran.not_reproduced, f"{ran.said}\n{found.script}"


@pytest.mark.parametrize("mutant", MODULES)
def test_a_module_against_its_definition(mutant: str, tmp_path: Path, alone: ScriptProcess) -> None:
    row = Row(check="reference.oracle", measurement="true-logits", mutant=mutant)
    both_ways(row, tmp_path, alone)


MISPLACED = {
    *("post-norm-before-attention", "last-norm-missing", "last-norm-twice"),
    *("blocks-in-other-order", "block-skipped", "pooled-mean"),
}
"""Mutants of which only `reference.oracle` knows, in which each module is right and is in the wrong place."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if not mutant.equivalent], ids=lambda mutant: mutant.id
)
def test_a_script_of_each_mutant(mutant: Mutant, tmp_path: Path, alone: ScriptProcess) -> None:
    seen = 0
    for check in mutant.expected_checks:
        row = Row(check=check, measurement="", mutant=mutant.id, cell={"seq_len": 64, "batch_size": 4})
        source = row.source(tmp_path)
        try:
            found = shown(source, check, **row.settings())
        except UnseenError:
            continue
        seen += 1
        if found.script is None:
            assert check == ORACLE
            assert mutant.id in MISPLACED
            continue
        assert alone.run(found.script).reproduced
        ran = alone.run(row.without(found.script, source))
        assert ran.not_reproduced, f"{ran.said}\n{found.script}"
    if not seen:
        pytest.skip(
            "made by a function, which has no files to differ from, it is no defect; or this release has no such line"
        )


def no_clipping(parameters: Any, limit: float) -> None:
    """Torch's clipping, left out."""


def ruinous_clipping(parameters: Any, limit: float) -> None:
    """Torch's clipping, with a norm that is NaN."""
    for parameter in parameters:
        parameter.grad.mul_(float("nan"))


@pytest.mark.parametrize(("measurement", "clipping"), [("excess", no_clipping), ("non-finite", ruinous_clipping)])
def test_clipping_that_does_not_clip(
    measurement: str, clipping: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    found = shown("fixture:glm-tiny", "train.clip", measurement=measurement, **SMALL)
    assert found.script is not None
    assert fails(found.script)
    monkeypatch.undo()
    assert not fails(found.script)


def test_every_measurement_with_a_budget_has_a_script_or_a_reason_why_not() -> None:
    excused = {key for key in all_budgets() if key[0].partition(".")[0] in WITHOUT or " ".join(key) in WITHOUT}
    lacking = [key for key in all_budgets() if key not in BODIES and key not in excused]
    assert not lacking


def test_every_script_is_shown_by_a_defect() -> None:
    rows = {(row.check, row.measurement) for row in ROWS}
    assert rows | ELSEWHERE | PATCHED == set(BODIES)
    assert not rows & ELSEWHERE
    assert all(len(list(group)) == 1 for _, group in itertools.groupby(sorted(row.name for row in ROWS)))
