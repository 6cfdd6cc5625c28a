"""Tensors that are parts of another are found by value, and only by value; modules that were inlined are not missing."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from unit.sample_baseline import baseline, moved_sketch, sketch, with_bits

from numerics_suite.baselines.compare import difference
from numerics_suite.baselines.fused_experts import fusions, part_of
from numerics_suite.baselines.records import GradientRecord, ModuleRecord, TensorRecord
from numerics_suite.baselines.sketch import sketch as sketched
from numerics_suite.judgement.classify import judge_difference

EXPERTS, WIDE, INNER = 4, 12, 6
BLOCK = "model.layers.1.mlp"


def parts(tensors):
    return [part_of(name, sketched(tensor)) for name, tensor in tensors.items()]


def split_experts(prefix=f"{BLOCK}.experts", names=("gate_proj", "up_proj", "down_proj")):
    made = torch.Generator().manual_seed(3)
    shapes = ((INNER, WIDE), (INNER, WIDE), (WIDE, INNER))
    return {
        f"{prefix}.{index}.{name}.weight": torch.randn(shape, generator=made, dtype=torch.float64)
        for index in range(EXPERTS)
        for name, shape in zip(names, shapes, strict=True)
    }


def fused_experts(split, layout):
    gate, up, down = (torch.stack(list(split.values())[kind::3]) for kind in range(3))
    both = torch.stack([gate, up], 2).flatten(1, 2) if layout == "interleaved" else torch.cat([gate, up], 1)
    if layout == "transposed":
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    return {f"{BLOCK}.experts.gate_up_proj": both.contiguous(), f"{BLOCK}.experts.down_proj": down.contiguous()}


@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "transposed"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_are_found_in_whatever_layout_they_were_fused(layout, names):
    split = split_experts("model.layers.1.block_sparse_moe.experts", names)
    fused = fused_experts(split, layout)
    found = fusions(parts(split), parts(fused))
    assert {fusion.new: len(fusion.old) for fusion in found} == {
        (f"{BLOCK}.experts.gate_up_proj",): 2 * EXPERTS,
        (f"{BLOCK}.experts.down_proj",): EXPERTS,
    }
    back = fusions(parts(fused), parts(split))
    assert {fusion.old: len(fusion.new) for fusion in back} == {fusion.new: len(fusion.old) for fusion in found}


def test_query_key_and_value_that_became_one_are_found():
    made = torch.Generator().manual_seed(5)
    rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
    split = {f"a.{n}.weight": torch.randn(size, 8, generator=made, dtype=torch.float64) for n, size in rows.items()}
    joined = torch.cat([split[f"a.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")])
    (found,) = fusions(parts(split), parts({"a.qkv_proj.weight": joined}))
    assert set(found.old) == {"a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"}


def test_one_element_of_one_expert_that_differs_is_no_fusion():
    split = split_experts()
    fused = fused_experts(split, "concatenated")
    fused[f"{BLOCK}.experts.down_proj"][1, 2, 3] += 1e-6
    assert [fusion.new for fusion in fusions(parts(split), parts(fused))] == [(f"{BLOCK}.experts.gate_up_proj",)]
    del split[f"{BLOCK}.experts.2.up_proj.weight"]
    found = fusions(parts(split), parts(fused_experts(split_experts(), "concatenated")))
    assert [fusion.new for fusion in found] == [(f"{BLOCK}.experts.down_proj",)]


def mixture(tensors, modules, *, weights=True, gradients=1.0):
    """The sample cell with these parameters in one of its blocks, and these modules within that."""
    made = with_bits(baseline(), gradients="other") if len(tensors) == 2 else baseline()
    place = [module.name for module in made.modules].index(BLOCK)
    inner = [
        ModuleRecord(
            name=f"{BLOCK}.{name}",
            kind=name.rpartition(".")[2],
            given=sketch(1, 8, 8),
            gave=sketch(zlib.crc32(name.encode()), 8, 8),
        )
        for name in modules
    ]
    records = [GradientRecord(name=name, gradient=sketched(gradients * value)) for name, value in tensors.items()]
    held = [TensorRecord(name=name, dtype="bfloat16", values=sketched(value)) for name, value in tensors.items()]
    return replace(
        made,
        modules=(*made.modules[:place], *inner, *made.modules[place:]),
        gradients=(*made.gradients, *records),
        tensors=(*made.tensors, *held) if weights else (),
    )


SPLIT = split_experts()
CALLED = [f"experts.{index}.{name}" for index in range(EXPERTS) for name in ("gate_proj", "act_fn", "down_proj")]


@pytest.mark.parametrize("weights", [True, False])
def test_a_release_that_fuses_its_experts_only_rounds_otherwise(weights):
    old = mixture(SPLIT, CALLED, weights=weights)
    new = mixture(fused_experts(SPLIT, "transposed"), ["experts"], weights=weights)
    found = judge_difference(difference(old, new))
    assert found.kind == "rounding"
    assert "missing" not in found.details
    assert len(found.details["fused"]) == 2
    assert set(found.details["inlined_modules"]) == {f"{BLOCK}.{name}" for name in CALLED}


def test_an_expert_that_is_lost_on_the_way_is_missing():
    fused = {name: value[:-1] for name, value in fused_experts(SPLIT, "concatenated").items()}
    found = judge_difference(difference(mixture(SPLIT, CALLED), mixture(fused, ["experts"])))
    assert found.kind == "missing"
    assert f"gradient of {BLOCK}.experts.0.gate_proj.weight" in found.details["missing"]


def test_fused_experts_with_another_gradient_are_changed():
    new = mixture(fused_experts(SPLIT, "concatenated"), ["experts"], gradients=1 + 1e-9)
    found = judge_difference(difference(mixture(SPLIT, CALLED), new))
    assert (found.kind, found.module) == ("changed", f"{BLOCK}.experts")


def test_an_inlined_module_is_missing_where_the_block_around_it_gives_something_else():
    weights = {f"{BLOCK}.conv1d.weight": torch.arange(12.0).reshape(3, 4)}
    old, new = mixture(weights, ["conv1d", "act"]), mixture(weights, [])
    assert judge_difference(difference(old, new)).kind == "identical"
    moved = [replace(item, gave=moved_sketch(item.gave, 1e-3)) if item.name == BLOCK else item for item in new.modules]
    found = judge_difference(difference(old, replace(new, modules=tuple(moved))))
    assert found.details["missing"] == [f"module {BLOCK}.conv1d", f"module {BLOCK}.act"]


def test_a_change_in_a_module_that_was_renamed_and_retyped_is_placed_there():
    """A router that is another class under another name: the block around it says which it is."""
    old, new = (mixture({}, ["gate"]) for _ in range(2))
    modules = [
        replace(
            item,
            name=item.name.replace(".mlp", ".moe"),
            kind="Router" if item.name == f"{BLOCK}.gate" else item.kind,
            gave=moved_sketch(item.gave, 0.1) if item.name == f"{BLOCK}.gate" else item.gave,
        )
        for item in new.modules
    ]
    found = judge_difference(difference(old, replace(new, modules=tuple(modules), true_loss=old.true_loss * 1.1)))
    assert (found.kind, found.module) == ("changed", f"{BLOCK.replace('mlp', 'moe')}.gate")


def test_the_tensors_that_differ_are_named():
    old = replace(baseline(), tensors=mixture(SPLIT, []).tensors)
    changed, retyped = (f"{BLOCK}.experts.{index}.up_proj.weight" for index in (1, 2))
    tensors = [
        replace(item, values=moved_sketch(item.values, 1e-3))
        if item.name == changed
        else replace(item, dtype="float16" if item.name == retyped else item.dtype)
        for item in old.tensors
    ]
    found = judge_difference(difference(old, replace(old, tensors=tuple(tensors))))
    assert [(item["name"], item["now"]) for item in found.details["tensors"]] == [
        (changed, f"bfloat16 [{INNER}, {WIDE}]"),
        (retyped, f"float16 [{INNER}, {WIDE}]"),
    ]
    assert found.details["tensors"][0]["difference"] == pytest.approx(1e-3)
    assert "tensors" not in judge_difference(difference(old, old)).details


def test_errors_of_a_router_that_returns_something_else_are_not_compared():
    """GLM-4.5's router gave the chosen weights up to 4.57, and gives all logits since: another error of another number."""

    def routed(gave, error):
        made = with_bits(mixture({}, ["gate"]), logits=str(error))
        modules = [
            replace(item, gave=gave, local_error=error, local_count=4096) if item.name == f"{BLOCK}.gate" else item
            for item in made.modules
        ]
        return replace(made, modules=tuple(modules))

    weights, logits = sketch(70, 64, 2), sketch(71, 64, 8)
    assert judge_difference(difference(routed(weights, 0.9), routed(logits, 1.9))).kind == "rounding"
    found = judge_difference(difference(routed(logits, 0.9), routed(logits, 1.9)))
    assert (found.kind, found.module) == ("worse", f"{BLOCK}.gate")
