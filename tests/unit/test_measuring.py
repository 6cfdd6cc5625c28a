"""What a baseline records: the formulas, every part of a cell, and that each part sees the change that it is there for."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from numerics_suite.baselines import curve as curves
from numerics_suite.baselines.batches import draw_batches, tensors_of
from numerics_suite.baselines.contract import accepted_names
from numerics_suite.baselines.deterministic_head import formula_values
from numerics_suite.baselines.measure import measure_cell
from numerics_suite.baselines.sketch import PROJECTIONS, Sketcher, condensed, sketch, uniform
from numerics_suite.baselines.trace import trace
from numerics_suite.core.errors import BadInputError, NotApplicableError
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.request import Request
from numerics_suite.engine.training_loop import TrainingPlan
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.load import load
from numerics_suite.suite.planning import applicable_checks, make_plan

EXACT = 1e-12
KNOWN = [0.09307927204566346, 0.5488679307762337, 0.4379613334099577]


def context_of(source, *, task="auto", precision="bf16", attn="sdpa", change=None, **request):
    asked = {} if attn is None else {"attn": (attn,)}
    try:
        plan = make_plan(Settings(subjects=(source,), task=task, precision=(precision,), **asked))
    except BadInputError as error:
        if "needs transformers" in str(error):
            pytest.skip(str(error))
        raise
    cell = plan.cells[0]

    def loader(*args, **keywords):
        loaded = load(*args, **keywords)
        with torch.no_grad():
            change(loaded)
        return loaded

    return CellContext(plan.subjects[cell.subject], cell, Request(**request), loader=loader if change else None)


def measured(source, **conditions):
    return measure_cell(context_of(source, **conditions))


@pytest.fixture(scope="module")
def glm4():
    return measured("fixture:glm4-tiny")


@pytest.fixture(scope="module")
def classifier():
    return measured("fixture:glm-tiny-classifier")


def apart(one, other):
    """Of two sketches, over the root mean square."""
    return float(np.abs(one.projections - other.projections).max()) / other.rms


def same(one, other):
    """Whether two records agree in every bit, NaN with NaN."""
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other or (one != one and other != other)


# --- formulas ------------------------------------------------------------------------------------------------------


def test_the_stream_of_a_name_is_what_it_was_when_baselines_were_first_written():
    assert uniform("row 0", 3).tolist() == pytest.approx(KNOWN, abs=0)
    assert uniform("row 0", 2, start=1).tolist() == uniform("row 0", 3).tolist()[1:]
    many = uniform("column 1", 100_000)
    assert 0 <= many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    assert abs(many.mean() - 0.5) < 0.004


@pytest.mark.parametrize("shape", [(7,), (5, 3), (768, 64), (2, 3, 4), (9000, 2)])
def test_one_element_that_changes_is_seen(shape):
    values = torch.from_numpy(uniform("values", math.prod(shape))).reshape(shape)
    before = sketch(values)
    assert before.shape == shape
    assert before.count == math.prod(shape)
    assert before.rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-12)
    for place in (0, math.prod(shape) // 2, math.prod(shape) - 1):
        changed = values.clone()
        changed.reshape(-1)[place] += 1e-6
        moved = np.abs(sketch(changed).projections - before.projections)
        least, most = (0.2e-6 / math.sqrt(before.count), 2.1e-6 / math.sqrt(before.count))
        assert (moved > least).all()
        assert (moved < most).all()


def test_rows_and_columns_that_change_places_are_seen():
    values = torch.from_numpy(uniform("values", 512)).reshape(16, 32)
    for order in ([1, 0, *range(2, 16)], list(reversed(range(16)))):
        assert apart(sketch(values[order]), sketch(values)) > 1e-3
    assert apart(sketch(values[:, [1, 0, *range(2, 32)]]), sketch(values)) > 1e-3


def test_rows_that_come_in_pieces_give_the_sketch_of_the_whole():
    values = torch.from_numpy(uniform("values", 6000 * 5)).reshape(6000, 5)
    sketcher = Sketcher()
    for start, stop in ((0, 1), (1, 4097), (4097, 6000)):
        sketcher.add(values[start:stop])
    assert apart(sketcher.sketch(), sketch(values)) < EXACT
    assert sketcher.sketch().shape == (6000, 5)
    assert sketcher.sketch().projections.shape == (PROJECTIONS,)


def test_a_sketch_of_nan_is_nan():
    assert np.isnan(sketch(torch.tensor([[1.0, math.nan]])).projections).all()
    assert math.isnan(sketch(torch.tensor([[1.0, math.nan]])).rms)
    assert sketch(torch.tensor([math.inf, 1.0])).rms == math.inf


def test_a_wide_answer_is_kept_as_projections_and_its_largest_values():
    answer = torch.from_numpy(uniform("answer", 3 * 500)).reshape(3, 500)
    values, whole, top, ids = condensed(answer)
    assert (values.shape, whole, top.shape, ids.shape) == ((3, 64), False, (3, 8), (3, 8))
    assert np.array_equal(top[:, 0], answer.amax(1).numpy())
    assert np.array_equal(answer.gather(1, torch.from_numpy(ids)).numpy(), top)
    narrow = condensed(answer[:, :80])
    assert narrow[1]
    assert np.array_equal(narrow[0], answer[:, :80].numpy())


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("fixture:glm4-tiny", ["right", "left", "training"]),
        ("fixture:glm-tiny-classifier", ["right", "left", "training"]),
        ("fixture:chatglm-tiny", ["left", "training"]),
    ],
)
def test_batches_are_padded_on_declared_sides_and_hold_no_pad_id_among_real_tokens(source, names):
    context = context_of(source)
    batches = draw_batches(context)
    assert [batch.name for batch in batches] == names
    pad, vocabulary = context.space.pad_id, context.vocab_size
    ids = np.concatenate([batch.tensors["input_ids"][batch.tensors["attention_mask"] == 1] for batch in batches])
    assert pad not in ids
    assert {0, vocabulary - 1, 1, vocabulary - 2} <= set(ids.tolist())
    assert (ids >= 0).all()
    assert (ids < vocabulary).all()
    answered = sum(int(batch.tensors["attention_mask"].sum()) for batch in batches[:-1])
    assert answered <= 40
    for name, first in (("left", 0), ("right", 1)):
        for batch in batches:
            if batch.name == name:
                assert int(batch.tensors["attention_mask"][1, 0]) == first
    labels = batches[-1].tensors["labels"]
    if context.subject.task == "causal-lm":
        assert (labels[:, 1:] != -100).any(axis=1).all()
        assert (labels[batches[-1].tensors["attention_mask"] == 0] == -100).all()
    assert same(batches, draw_batches(context_of(source)))
    assert not same(batches, draw_batches(context_of(source, seed=1)))


def test_given_batches_are_used_as_they_are(glm4):
    again = measure_cell(context_of("fixture:glm4-tiny", seed=5), glm4.batches)
    assert all(map(same, again.batches, glm4.batches))
    assert same(again.answers, glm4.answers)


# --- a whole cell --------------------------------------------------------------------------------------------------


def test_everything_of_a_language_model_is_there(glm4):
    assert not glm4.left_out
    assert [answer.name for answer in glm4.answers] == ["right.logits", "left.logits", "decoded.logits"]
    assert glm4.answers[0].values.shape == (16, 64)
    # The same tokens on either side: the law of padding, seen in what is stored.
    assert np.abs(glm4.answers[0].values - glm4.answers[1].values).max() < EXACT
    assert set(glm4.bits) == {"logits", "loss", "gradients", "decoding", "curve", "uses", "cell"}
    assert 0.8 < glm4.error / glm4.inherent < 1.2
    assert glm4.error_count == (32 + 8 + sum(int(b.tensors["attention_mask"].sum()) for b in glm4.batches[-1:])) * 64
    assert glm4.true_loss == pytest.approx(glm4.curve.true_losses[0], rel=1e-12)
    assert glm4.curve.losses[0] == pytest.approx(glm4.true_loss, rel=1e-3)
    assert len(glm4.curve.losses) == len(glm4.curve.true_losses) == 6
    assert len(glm4.curve.norms) == len(glm4.curve.true_norms) == 5
    assert math.isfinite(glm4.headroom_bits)
    assert len(glm4.gradients) == 33
    squares = sum(item.gradient.rms**2 * item.gradient.count for item in glm4.gradients)
    assert math.sqrt(squares) == pytest.approx(glm4.curve.true_norms[0], rel=1e-9)
    names = [module.name for module in glm4.modules]
    assert names[0] == "model.embed_tokens"
    assert names[-1] == ""
    assert names.index("model.layers.0.mlp") < names.index("model.layers.0") < names.index("model.layers.1.mlp")
    block = next(module for module in glm4.modules if module.name == "model.layers.1")
    before = next(module for module in glm4.modules if module.name == "model.layers.0")
    assert same(block.given, before.gave)
    assert block.kind == "Glm4DecoderLayer"
    assert 0.5 < block.local_error < 3
    assert block.local_count


def test_a_classifier_has_its_hidden_states_beside_its_pooled_logits(classifier):
    assert [(answer.name, answer.values.shape, answer.whole) for answer in classifier.answers] == [
        ("right.logits", (2, 3), True),
        ("right.hidden", (16, 64), True),
        ("left.logits", (2, 3), True),
        ("left.hidden", (16, 64), True),
    ]
    assert "decoding" not in classifier.bits
    root = classifier.modules[-1]
    assert (root.name, root.gave.shape) == ("", (8, 3))


@pytest.mark.parametrize("precision", ["fp64", "fp32", "amp-bf16", "fp16"])
def test_chatglm_is_measured_in_every_kind_of_precision(precision):
    found = measured("fixture:chatglm-tiny-classifier", precision=precision)
    assert [answer.name for answer in found.answers] == ["left.logits", "left.hidden"]
    assert len(found.gradients) == 25
    if precision == "fp64":
        assert found.error < EXACT
        assert set(found.left_out) == {"inherent", "local_error"}
        assert found.curve.losses == pytest.approx(found.curve.true_losses, rel=1e-12)
    if precision == "fp16":
        assert "serving" in found.curve.reason
        assert "serving" in found.left_out["bits.gradients"]
        assert not found.curve.true_losses


def test_measured_twice_it_is_the_same_and_the_model_is_as_it_was(glm4):
    context = context_of("fixture:glm4-tiny")
    model = context.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert same(measure_cell(context), glm4)
    assert same(measure_cell(context), glm4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not model.training


def test_streamed_by_block_it_is_the_same():
    context = context_of("fixture:glm4-tiny")
    batches = draw_batches(context)
    whole, streamed = (trace(context, batches, stream=stream) for stream in (False, True))
    assert list(whole.modules) == list(streamed.modules)
    for name, states in whole.modules.items():
        assert apart(states.gave.sketch(), streamed.modules[name].gave.sketch()) < EXACT
        assert states.gave.rows == streamed.modules[name].gave.rows
    assert [item.name for item in whole.gradients] == [item.name for item in streamed.gradients]
    for one, other in zip(whole.gradients, streamed.gradients, strict=True):
        assert apart(one.gradient, other.gradient) < 1e-10
    assert whole.loss == pytest.approx(streamed.loss, rel=1e-13)


# --- what changes is seen ------------------------------------------------------------------------------------------


def test_a_weight_that_moves_is_seen_in_its_module_first_and_in_all_that_follows(glm4):
    def change(loaded):
        loaded.model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] += 0.25

    moved = measured("fixture:glm4-tiny", change=change)
    parted = [
        new.name
        for new, old in zip(moved.modules, glm4.modules, strict=True)
        if new.given is not None and new.gave is not None
        if apart(new.given, old.given) < EXACT and apart(new.gave, old.gave) > 1e-8
    ]
    assert parted[0] == "model.layers.1.mlp.down_proj"
    assert np.abs(moved.answers[0].values - glm4.answers[0].values).max() > 1e-8
    assert {name for name in glm4.bits if moved.bits[name] != glm4.bits[name]} == set(glm4.bits)
    assert moved.true_loss != glm4.true_loss
    assert moved.curve.true_losses[-1] != glm4.curve.true_losses[-1]


def test_an_order_of_sums_that_bfloat16_hides_is_seen_in_the_bits(glm4):
    """The norm of one block computed in another order: nothing in 8 bits, everything in the last bits of float64."""

    def change(loaded):
        norm = loaded.model.get_submodule("model.layers.2.post_attention_layernorm")

        def forward(states):
            wide = states.float()
            mean = wide.square().flip(-1).cumsum(-1)[..., -1:] / wide.shape[-1]
            return norm.weight * (wide * torch.rsqrt(mean + norm.variance_epsilon)).to(states.dtype)

        norm.forward = forward

    moved = measured("fixture:glm4-tiny", change=change)
    assert np.abs(moved.answers[0].values - glm4.answers[0].values).max() < EXACT
    assert moved.bits["logits"] != glm4.bits["logits"]
    assert moved.bits["decoding"] != glm4.bits["decoding"]


# --- heads ---------------------------------------------------------------------------------------------------------


def test_a_new_head_is_measured_with_values_by_formula_and_described_as_it_was_drawn():
    one, other = (
        measured("fixture:glm-tiny", task="sequence-classification", precision="fp32", seed=seed) for seed in (0, 7)
    )
    drawn, again = (item.contract["head"]["score.weight"] for item in (one, other))
    assert drawn["initialised"]
    assert drawn["count"] == 128
    assert drawn["std"] != again["std"]
    assert drawn["std"] == pytest.approx(0.02, rel=0.3)
    context = context_of("fixture:glm-tiny", task="sequence-classification", precision="fp32", seed=7)
    assert same(measure_cell(context, one.batches).answers, one.answers)


def test_the_formula_of_a_head_has_the_scale_of_xavier_uniform():
    weight = formula_values("score.weight", torch.empty(40, 1000))
    bound = math.sqrt(6 / 1040)
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not formula_values("score.bias", torch.empty(4)).any()
    assert formula_values("norm.weight", torch.empty(4, dtype=torch.bfloat16)).tolist() == [1] * 4


def test_a_head_that_nobody_initialised_is_recorded_as_nan():
    def change(loaded):
        loaded.model.score.weight.fill_(math.nan)

    found = measured("fixture:glm-tiny", task="sequence-classification", change=change)
    assert found.contract["head"]["score.weight"]["initialised"] is False
    by_name = {answer.name: answer for answer in found.answers}
    assert np.isnan(by_name["right.logits"].values).all()
    assert np.isfinite(by_name["right.hidden"].values).all()
    score = next(module for module in found.modules if module.name == "score")
    assert math.isfinite(score.given.rms)
    assert math.isnan(score.gave.rms)
    assert math.isnan(found.true_loss)
    assert math.isnan(found.error)
    assert math.isnan(found.headroom_bits)
    assert found.headroom_module == "score"
    assert len(found.curve.losses) == 6
    assert all(map(math.isnan, found.curve.losses + found.curve.true_losses))


# --- curve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_true_curve_is_that_of_a_training_in_float64(optimizer):
    plan = TrainingPlan(steps=3, optimizer=optimizer, lr=1e-2, max_grad_norm=1.0)
    found = measured("fixture:glm4-tiny", precision="fp32", plan=plan).curve
    exact = measured("fixture:glm4-tiny", precision="fp64", plan=plan).curve
    assert found.true_losses == pytest.approx(exact.losses, rel=1e-11)
    assert found.true_norms == pytest.approx(exact.norms, rel=1e-11)
    assert found.losses == pytest.approx(exact.losses, rel=1e-4)
    assert found.losses != exact.losses


def test_above_a_billion_parameters_head_and_last_block_are_trained_and_it_says_so(monkeypatch, glm4):
    monkeypatch.setattr(curves, "LARGE", 10**5)
    found = measured("fixture:glm4-tiny")
    assert (found.curve.scope, found.recipe["scope"], glm4.curve.scope) == ("last:1", "last:1", "full")
    assert found.curve.true_losses[0] == pytest.approx(glm4.curve.true_losses[0], rel=1e-12)
    assert glm4.curve.true_losses[-1] < found.curve.true_losses[-1] < found.curve.true_losses[0]
    assert same([record.gradient for record in found.gradients], [record.gradient for record in glm4.gradients])


# --- contract ------------------------------------------------------------------------------------------------------


def test_the_contract_of_a_language_model(glm4):
    contract = glm4.contract
    assert {"input_ids", "attention_mask", "labels", "use_cache", "past_key_values", "logits_to_keep"} <= set(
        contract["forward"]
    )
    assert {"return_dict", "output_hidden_states", "output_attentions"} <= set(contract["forward"])
    assert not {"kwargs", "self"} & set(contract["forward"])
    assert contract["outputs"]["logits"] == "bfloat16"
    assert contract["outputs"]["past_key_values"] == "cache"
    assert contract["inputs"]["input_ids"] == {"int32": "same", "float32": "refused"}
    assert contract["default_dtype"] in {"bfloat16", "float32"}
    assert contract["head"] == {}


def test_a_renamed_argument_is_accepted_and_a_swallowed_one_is_not():
    def renamed(function, old_name, new_name):
        def wrapper(*args, **kwargs):
            if old_name in kwargs:
                kwargs[new_name] = kwargs.pop(old_name)
            return function(*args, **kwargs)

        wrapper.__wrapped__ = function
        return wrapper

    def forward(self, input_ids, *, keep=0, **kwargs):
        return input_ids, keep, kwargs

    assert accepted_names(forward) == {"input_ids", "keep"}
    assert accepted_names(renamed(forward, "kept", "keep")) == {"input_ids", "keep", "kept"}
    assert accepted_names(renamed(forward, "kept", "gone")) == {"input_ids", "keep"}


def test_float_ids_and_masks_that_a_model_would_use_wrongly_are_told():
    def change(loaded):
        inner = loaded.model.forward

        def forward(input_ids=None, attention_mask=None, **keywords):
            if attention_mask is not None and attention_mask.dtype is torch.float32:
                attention_mask = attention_mask * 0 + 1
            return inner(input_ids=input_ids.long(), attention_mask=attention_mask, **keywords)

        loaded.model.forward = forward

    found = measured("fixture:glm4-tiny", change=change).contract["inputs"]
    assert found["input_ids"]["float32"] == "same"
    # Padded on the right, real tokens see none of it; so the first batch alone would be blind.
    assert found["attention_mask"]["float32"] == "other"


# --- plain modules -------------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 9), nn.Linear(9, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))

def net():
    return Net(), {"x": torch.linspace(-2, 2, 30).reshape(5, 6)}

def bare():
    return Net()
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "made_for_measuring.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "factory:made_for_measuring"
    sys.modules.pop("made_for_measuring", None)


def test_a_factory_is_measured_on_its_own_batch(factories):
    found = measured(f"{factories}:net", attn=None)
    assert [batch.name for batch in found.batches] == ["own"]
    assert [(answer.name, answer.values.shape) for answer in found.answers] == [("own.output", (5, 2))]
    assert [module.name for module in found.modules] == ["inner", "outer", ""]
    assert len(found.gradients) == 4
    assert len(found.curve.losses) == 6
    assert found.curve.true_losses[-1] < found.curve.true_losses[0]
    assert found.contract["forward"] == ["x"]
    assert "default_dtype" not in found.contract
    again = measure_cell(context_of(f"{factories}:net", attn=None), found.batches)
    assert same(again, found)


def test_a_factory_without_a_batch_has_nothing_to_measure(factories):
    with pytest.raises(NotApplicableError, match="plain module"):
        measured(f"{factories}:bare", attn=None)


def test_what_cannot_be_lifted_is_left_out_and_the_rest_is_there(factories):
    class Foreign(nn.Module):
        def forward(self, states):
            return states.to(torch.float32).view(torch.int32).view(torch.float32).to(states.dtype)

    def change(loaded):
        loaded.model.outer = nn.Sequential(loaded.model.outer, Foreign())

    found = measured(f"{factories}:net", attn=None, precision="fp32", change=change)
    assert not found.curve.true_losses
    assert not found.answers
    assert not found.modules
    assert math.isnan(found.error)
    assert {"answers", "modules", "gradients", "true_loss"} <= set(found.left_out)
    assert "cannot be computed in float64" in found.left_out["answers"]
    assert found.bits["logits"]
    assert found.curve.reason == "the loss has no gradient"


# --- the plan ------------------------------------------------------------------------------------------------------


def test_the_checks_that_apply_are_those_of_the_full_plan():
    context = context_of("fixture:glm4-tiny", precision="fp16")
    checks = applicable_checks(context.subject, "fp16")
    assert {"forward.cache", "load.config", "forward.finite"} <= set(checks)
    assert not [check for check in checks if check.startswith("train.")]
    assert "forward.pooling" not in checks


def test_tensors_of_a_stored_batch_are_those_that_were_stored():
    context = context_of("fixture:glm4-tiny")
    for batch in draw_batches(context):
        for name, tensor in tensors_of(batch, context).items():
            assert np.array_equal(tensor.numpy(), batch.tensors[name])
