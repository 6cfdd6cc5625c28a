"""Each kind of change is told from a near miss that must not fire, and the module where it starts is named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from unit.sample_baseline import baseline, moved_sketch, renamed, sketch, with_bits, with_module

from numerics_suite.baselines.batch_match import deviation, modules_matched
from numerics_suite.baselines.compare import difference
from numerics_suite.baselines.records import CellBaseline
from numerics_suite.baselines.sampling_error import accumulation, two_draws
from numerics_suite.baselines.store import Baselines
from numerics_suite.core.errors import BadInputError
from numerics_suite.judgement.classify import Judged, compare_baselines, judge_difference

OLD = baseline()
NORM, ATTENTION, Q = "model.layers.1.input_layernorm", "model.layers.1.self_attn", "model.layers.1.self_attn.q_proj"


def judged(new: CellBaseline, old: CellBaseline = OLD) -> Judged:
    return judge_difference(difference(old, new))


def of(made: CellBaseline, name: str):
    return next(module for module in made.modules if module.name == name)


def from_module_on(made: CellBaseline, name: str, by: float) -> CellBaseline:
    """The answer and everything that returns from this module on moved by so much, and what comes in after it too."""
    start = [module.name for module in made.modules].index(name)
    modules = [
        module
        if index < start
        else replace(
            module,
            gave=moved_sketch(module.gave, by),
            # A module around the first one took its input before.
            given=module.given
            if index == start or name.startswith(f"{module.name}.")
            else moved_sketch(module.given, by),
        )
        for index, module in enumerate(made.modules)
    ]
    answers = tuple(replace(answer, values=answer.values + by * answer.rms) for answer in made.answers)
    return with_bits(
        replace(made, modules=tuple(modules), answers=answers, true_loss=made.true_loss * (1 + by)), logits="other"
    )


def with_answer(by: float) -> CellBaseline:
    (answer,) = OLD.answers
    values = answer.values.copy()
    values[3, 5] += by
    return replace(OLD, answers=(replace(answer, values=values),))


# --- each kind, and its near miss --------------------------------------------------------------------------------------


def test_the_same_is_identical():
    found = judged(baseline())
    assert (found.kind, found.module, found.error_ratio, found.all_kinds) == ("identical", None, 1.0, ("identical",))


@pytest.mark.parametrize(
    ("new", "kind"),
    [
        (with_answer(2e-10), "changed"),
        (with_answer(5e-11), "identical"),
        (replace(OLD, true_loss=OLD.true_loss * (1 + 2e-10)), "changed"),
        (replace(OLD, true_loss=OLD.true_loss * (1 + 5e-11)), "identical"),
        (replace(OLD, true_loss=math.nan), "changed"),
        (replace(OLD, answers=(replace(OLD.answers[0], values=OLD.answers[0].values * math.nan),)), "changed"),
        (replace(OLD, answers=(replace(OLD.answers[0], values=OLD.answers[0].values[:-1]),)), "changed"),
        (replace(OLD, answers=(replace(OLD.answers[0], top_values=OLD.answers[0].top_values + 1e-9),)), "changed"),
        (replace(OLD, answers=(replace(OLD.answers[0], top_ids=OLD.answers[0].top_ids[:, ::-1]),)), "identical"),
    ],
)
def test_semantics(new, kind):
    assert judged(new).kind == kind


def test_nan_in_both_is_the_same():
    values = OLD.answers[0].values.copy()
    values[0, 0] = math.nan
    nan = replace(OLD, answers=(replace(OLD.answers[0], values=values),), true_loss=math.nan)
    assert judged(nan, nan).kind == "identical"


def test_zero_wants_zero():
    zero = replace(OLD, answers=(replace(OLD.answers[0], values=OLD.answers[0].values * 0, rms=0.0),))
    assert judged(zero, zero).kind == "identical"
    least = replace(zero, answers=(replace(zero.answers[0], values=zero.answers[0].values + 1e-300),))
    assert judged(least, zero).kind == "changed"


@pytest.mark.parametrize(("by", "kind"), [(2e-10, "changed"), (5e-11, "identical")])
def test_gradients(by, kind):
    gradients = list(OLD.gradients)
    gradients[7] = replace(gradients[7], gradient=moved_sketch(gradients[7].gradient, by))
    found = judged(replace(OLD, gradients=tuple(gradients)))
    assert found.kind == kind
    if kind == "changed":
        assert found.module == "layers.7"
        assert "of layers.7.weight" in found.details["why"][0]


def test_a_gradient_that_cancels_has_no_size_of_its_own():
    """The bias of a key has a gradient of zero but for the order of its sum."""
    left = [replace(OLD.gradients[0], gradient=sketch(5, 64, rms=1e-18)), *OLD.gradients[1:]]
    right = [replace(OLD.gradients[0], gradient=sketch(6, 64, rms=3e-18)), *OLD.gradients[1:]]
    assert judged(replace(OLD, gradients=tuple(right)), replace(OLD, gradients=tuple(left))).kind == "identical"
    lost = [replace(OLD.gradients[0], gradient=sketch(6, 64, rms=1e-6)), *OLD.gradients[1:]]
    assert judged(replace(OLD, gradients=tuple(lost)), replace(OLD, gradients=tuple(left))).kind == "changed"


@pytest.mark.parametrize(("error", "kind"), [(0.82, "worse"), (0.62, "rounding"), (0.40, "better")])
def test_a_module_s_own_error(error, kind):
    found = judged(with_bits(with_module(OLD, NORM, local_error=error), logits="other"))
    assert found.kind == kind
    assert found.module == (None if kind == "rounding" else NORM)


def test_with_the_same_bits_no_error_is_worse():
    assert judged(with_module(OLD, NORM, local_error=5.0)).kind == "identical"


@pytest.mark.parametrize(("error", "kind"), [(0.0145, "worse"), (0.0105, "rounding"), (0.006, "better")])
def test_the_whole_error(error, kind):
    found = judged(with_bits(replace(OLD, error=error), logits="other"))
    assert found.kind == kind
    assert found.error_ratio == pytest.approx(error / 0.01)


def test_few_numbers_tell_nothing():
    few = replace(OLD, error_count=8)
    assert judged(with_bits(replace(few, error=0.03), logits="other"), few).kind == "rounding"


def test_an_error_that_is_nan_is_worse():
    assert judged(with_bits(replace(OLD, error=math.nan), logits="other")).kind == "worse"


def test_another_order_of_float32_sums_is_allowed_on_another_machine_only():
    old = baseline(precision="fp32")
    name = "model.layers.1.mlp.down_proj"
    new = with_bits(with_module(old, name, local_error=4.0), logits="other")
    assert judged(new, old).kind == "worse"
    elsewhere = replace(new, environment={**new.environment, "machine": "aarch64"})
    assert judged(elsewhere, old).kind == "rounding"
    far = replace(with_module(elsewhere, name, local_error=40.0))
    assert judged(far, old).kind == "worse"


@pytest.mark.parametrize("part", ["logits", "loss", "gradients", "decoding"])
def test_bits_alone_are_rounding(part):
    found = judged(with_bits(OLD, **{part: "other"}), with_bits(OLD))
    assert (found.kind, found.module) == ("rounding", None)
    assert found.details["bits_differ"] == [part]


@pytest.mark.parametrize(
    ("contract", "kind", "told"),
    [
        ({"default_dtype": "float32"}, "contract", "default_dtype: bfloat16 → float32"),
        ({"signature": ["input_ids", "labels"]}, "contract", "signature.attention_mask removed"),
        ({"signature": ["labels", "input_ids", "attention_mask", "cache_position"]}, "identical", None),
        ({"head": {"initialised": False}}, "contract", "head.initialised: True → False"),
        ({"outputs": {"logits": "bfloat16"}}, "contract", "outputs.loss removed (float32)"),
        ({"new": 1.0}, "identical", None),
    ],
)
def test_contract(contract, kind, told):
    found = judged(replace(OLD, contract={**OLD.contract, **contract}))
    assert found.kind == kind
    assert found.details.get("contract", [None])[0] == told


@pytest.mark.parametrize(
    ("now", "kind"),
    [
        ({"mean": 0.0004, "std": 0.0203}, "identical"),
        ({"mean": 0.0004, "std": 0.0303}, "contract"),
        ({"mean": 0.01, "std": 0.02}, "contract"),
        ({"mean": math.nan, "std": math.nan}, "contract"),
        ({"mean": 0.0, "std": 0.0}, "contract"),
    ],
)
def test_a_head_s_draw_is_compared_as_a_draw(now, kind):
    def cell(**values: float) -> CellBaseline:
        return replace(OLD, contract={"head": {"score.weight": {"initialised": True, "count": 4096, **values}}})

    assert judged(cell(**now), cell(mean=0.0, std=0.02)).kind == kind


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checks": ("forward.finite",)}, ["check reference.local", "check train.finite"]),
        ({"answers": ()}, ["answer right.logits"]),
        ({"gradients": OLD.gradients[:-1]}, ["gradient of layers.39.weight"]),
        ({"left_out": {"bits.decoding": "it failed"}}, ["bits.decoding (it failed)"]),
        ({"curve": replace(OLD.curve, losses=(), norms=(), reason="no labels")}, ["training curve (no labels)"]),
    ],
)
def test_what_vanished_is_missing(changes, told):
    found = judged(replace(OLD, **changes))
    assert (found.kind, found.details["missing"]) == ("missing", told)


def test_a_module_that_vanished_is_missing():
    found = judged(replace(OLD, modules=tuple(module for module in OLD.modules if module.name != NORM)))
    assert (found.kind, found.module) == ("missing", NORM)


def test_an_error_that_is_no_longer_measured_is_missing():
    found = judged(with_module(OLD, NORM, local_error=None))
    assert (found.kind, found.details["missing"]) == ("missing", [f"local error of {NORM}"])


def test_more_of_everything_is_no_change():
    more = replace(
        OLD,
        checks=(*OLD.checks, "train.amp"),
        modules=(*OLD.modules, replace(OLD.modules[0], name="extra", gave=sketch(99, 3, 3))),
    )
    assert judged(more).kind == "identical"


@pytest.mark.parametrize(
    ("curve", "kind"),
    [
        ({"losses": (6.26, 6.11, math.nan, math.nan, math.nan, math.nan)}, "worse"),
        ({"norms": (1.0, math.inf, 1.0, 0.9, 0.9)}, "worse"),
        ({"losses": (6.24, 6.13, 5.96, 5.84, 5.71, 5.6)}, "rounding"),
        ({"losses": (6.26, 6.4, 6.5, 6.6, 6.7, 6.8)}, "worse"),
        ({"true_losses": (6.25, 6.1001, 5.97, 5.83, 5.70, 5.59)}, "changed"),
        ({"true_losses": (6.25, 6.10 + 1e-9, 5.97, 5.83, 5.70, 5.59)}, "rounding"),
    ],
)
def test_training(curve, kind):
    new = with_bits(replace(OLD, curve=replace(OLD.curve, **curve)), gradients="other")
    assert judged(new).kind == kind


# --- precedence and place ----------------------------------------------------------------------------------------------


def test_the_worst_kind_comes_first_and_all_are_told():
    new = from_module_on(OLD, NORM, 1e-3)
    new = replace(new, contract={}, checks=())
    found = judged(new)
    assert found.all_kinds == ("missing", "changed", "contract")
    assert judged(replace(new, checks=OLD.checks)).all_kinds == ("changed", "contract")
    worse = with_bits(with_module(replace(OLD, contract={}), NORM, local_error=2.0), logits="other")
    assert judged(worse).all_kinds == ("worse", "contract")
    better = with_bits(with_module(replace(OLD, contract={}), NORM, local_error=0.1), logits="other")
    assert judged(better).all_kinds == ("contract", "better")


def test_a_head_that_nobody_initialises():
    """Transformers 5.8: the new head is NaN and the contract says so; both kinds apply and the head is named."""
    old = with_module(replace(OLD, contract={"head": {"initialised": True}}), "lm_head", name="score", kind="Linear")
    nan = replace(sketch(1, 64, 64), rms=math.nan, projections=np.full(8, math.nan))
    new = with_bits(
        with_module(replace(old, contract={"head": {"initialised": False}}), "score", gave=nan), logits="nan"
    )
    new = replace(
        new,
        true_loss=math.nan,
        error=math.nan,
        answers=(replace(old.answers[0], values=old.answers[0].values * math.nan),),
    )
    found = judged(new, old)
    assert (found.kind, found.module, found.all_kinds) == ("changed", "score", ("changed", "contract"))


@pytest.mark.parametrize("name", [NORM, Q, ATTENTION, "model.embed_tokens", "lm_head"])
def test_the_first_module_is_named(name):
    assert judged(from_module_on(OLD, name, 1e-3)).module == name


def test_the_first_module_is_named_when_every_input_differs():
    new = replace(
        OLD, modules=tuple(replace(m, given=moved_sketch(m.given, 1.0) if m.given else None) for m in OLD.modules)
    )
    new = from_module_on(new, NORM, 1e-3)
    assert judged(new).module == NORM


def test_an_inner_change_that_reaches_no_answer_is_no_change():
    new = with_module(OLD, Q, gave=moved_sketch(of(OLD, Q).gave, 1.0))
    found = judged(new)
    assert found.kind == "identical"
    assert difference(OLD, new).internal == (Q,)


# --- renamed modules ---------------------------------------------------------------------------------------------------


def test_renamed_modules_are_matched_by_order_and_shape_and_it_is_said():
    new = renamed(OLD, {"model": "transformer", "lm_head": "output_layer"})
    found = judged(new)
    assert found.kind == "identical"
    assert found.details["matched"].startswith(
        "matched by order and shape: model.embed_tokens ↔ transformer.embed_tokens, "
    )
    changed = judged(renamed(from_module_on(OLD, NORM, 1e-3), {"model": "transformer"}))
    assert (changed.kind, changed.module) == ("changed", NORM.replace("model", "transformer"))


def test_one_renamed_module():
    new = renamed(OLD, {"model.norm": "model.final_layernorm"})
    assert modules_matched(OLD.modules, new.modules).renamed == (("model.norm", "model.final_layernorm"),)


def test_a_module_of_another_shape_is_no_partner():
    new = with_module(OLD, "model.norm", name="model.final", gave=sketch(7, 3, 3))
    matching = modules_matched(OLD.modules, new.modules)
    assert (matching.vanished, matching.appeared, matching.renamed) == (("model.norm",), ("model.final",), ())


def test_blocks_that_were_inserted_do_not_shift_the_others():
    block = "model.layers.1"
    inserted = [replace(m, name=f"x.{m.name}", gave=sketch(9, 2, 2)) for m in OLD.modules if m.name.startswith(block)]
    new = replace(renamed(OLD, {"model": "transformer"}), modules=())
    start = [m.name for m in OLD.modules].index("model.layers.1.input_layernorm")
    theirs = renamed(OLD, {"model": "transformer"}).modules
    new = replace(new, modules=(*theirs[:start], *inserted, *theirs[start:]))
    matching = modules_matched(OLD.modules, new.modules)
    assert [(OLD.modules[i].name, new.modules[j].name.replace("transformer", "model")) for i, j in matching.pairs] == [
        (m.name, m.name) for m in OLD.modules
    ]
    assert len(matching.appeared) == len(inserted)


def test_a_module_that_moved_is_not_missing():
    """What each block had to itself, one module of the trunk now gives to all."""
    rotary = replace(of(OLD, NORM), kind="RotaryEmbedding", local_error=None)
    own = tuple(replace(rotary, name=f"model.layers.{i}.rotary_emb") for i in range(4))
    old = replace(OLD, modules=(*own, *OLD.modules))
    new = replace(OLD, modules=(replace(rotary, name="model.rotary_emb"), *OLD.modules))
    found = judged(new, old)
    assert found.kind == "identical"
    assert len(found.details["moved_modules"]) == 3


def test_a_large_model_is_matched_quickly():
    old = baseline(blocks=80)
    new = renamed(old, {"model": "transformer"})
    assert len(modules_matched(old.modules, new.modules).pairs) == len(old.modules)


# --- what cannot be compared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": {**OLD.recipe, "seed": 1}}, "recorded with seed 0 and 1; record both with the same --seed"),
        ({"recipe": {**OLD.recipe, "lr": 0.1}}, "recorded with lr 0.0001 and 0.1"),
        ({"batches": OLD.batches[:1]}, "measured on other batches ('training' is only in the old one)"),
        (
            {
                "batches": (
                    replace(
                        OLD.batches[0], tensors={**OLD.batches[0].tensors, "input_ids": np.zeros((4, 16), np.int64)}
                    ),
                    OLD.batches[1],
                )
            },
            "measured on other batches (right.input_ids differs); record both with the same --seed",
        ),
    ],
)
def test_other_questions_are_not_compared(changes, words):
    with pytest.raises(BadInputError) as caught:
        difference(OLD, replace(OLD, **changes))
    assert str(caught.value).startswith("glm4-tiny/bf16/eager/cpu (causal-lm) cannot be compared: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def folder(tmp_path, name, *cells):
    return Baselines(tmp_path / name, cells)


def test_whole_folders(tmp_path):
    fp32, other = baseline(precision="fp32"), baseline(attn="sdpa")
    found = compare_baselines(folder(tmp_path, "a", OLD, fp32), folder(tmp_path, "b", OLD, other))
    assert [(item.cell.precision, item.cell.attn, item.kind) for item in found] == [
        ("bf16", "eager", "identical"), ("fp32", "eager", "missing"), ("bf16", "sdpa", "new"),
    ]  # fmt: skip


def test_subjects_of_different_names_are_paired(tmp_path):
    old, new = folder(tmp_path, "a", OLD), folder(tmp_path, "b", baseline(subject="glm4-new"))
    with pytest.raises(BadInputError, match=r"have no cell in common .*--as OLD=NEW pairs"):
        compare_baselines(old, new)
    (found,) = compare_baselines(old, new, [("glm4-tiny", "glm4-new")])
    assert (found.kind, found.cell.subject, found.against) == ("identical", "glm4-new", "glm4-tiny")
    with pytest.raises(
        BadInputError, match=r"--as glm4-tiny=glm4-neu: NEW .* has no subject 'glm4-neu'; did you mean 'glm4-new'"
    ):
        compare_baselines(old, new, [("glm4-tiny", "glm4-neu")])
    with pytest.raises(BadInputError, match="'glm4-tiny' is paired twice"):
        compare_baselines(old, new, [("glm4-tiny", "glm4-new"), ("glm4-tiny", "glm4-new")])


# --- the arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 400, 4000])
def test_two_draws_stay_below_the_bound(count):
    """Of a million ratios of normal draws none is over the bound for one in ten million, and the bound is no idle one."""
    draw = np.random.default_rng(0)
    free = count // 4
    ratio = np.sqrt(draw.chisquare(free, 1_000_000) / draw.chisquare(free, 1_000_000))
    assert ratio.max() < two_draws(count, 1000)
    assert two_draws(count, 1000) < 1.05 * math.exp(8.5 / math.sqrt(free))


def test_few_numbers_bound_nothing():
    assert two_draws(8, 1) == math.inf
    assert two_draws(0, 1) == math.inf
    assert two_draws(12, 1) > 200


def test_accumulation_is_float32_s():
    shapes = [(64, 4096), (4096, 64), (8,)]
    assert accumulation(shapes, "fp32") == 64
    assert accumulation(shapes, "bf16") == 64 * 2.0**-16


@pytest.mark.parametrize(
    ("old", "new", "scale", "want"),
    [
        ([1.0, 2.0], [1.0, 2.5], 2.0, 0.25),
        ([1.0], [1.0, 2.0], 1.0, math.inf),
        ([math.nan, math.inf], [math.nan, math.inf], 1.0, 0.0),
        ([1.0], [math.nan], 1.0, math.nan),
        ([0.0], [1e-300], 0.0, math.inf),
        ([0.0], [0.0], 0.0, 0.0),
        ([1.0], [math.inf], 1.0, math.inf),
    ],
)
def test_deviation(old, new, scale, want):
    found = deviation(np.array(old), np.array(new), scale)
    assert found == want or (math.isnan(found) and math.isnan(want))
