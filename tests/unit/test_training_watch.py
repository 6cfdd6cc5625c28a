"""The watch in plain loops: what it says of each defect and when, and that it says nothing of clean runs."""

# ruff: noqa: PT012, PT031 - a whole loop is what raises or warns

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn
from unit.watched_models import Decoder, ids, train

import numerics_suite
from numerics_suite import NumericsError, NumericsWarning, watch
from numerics_suite.training_watch import async_metrics, gauges
from numerics_suite.training_watch.patches import TAPS

LATE = 3
"""Looks at the mailbox before a figure has arrived from a pretended device: those of one step."""


class LateEvent:
    looks = 0
    waits = 0

    def __init__(self):
        self.posted = LateEvent.looks

    def query(self):
        LateEvent.looks += 1
        return LateEvent.looks - self.posted > LATE

    def synchronize(self):
        LateEvent.waits += 1


@pytest.fixture
def late(monkeypatch):
    """Figures arrive as a busy device's do: not before the next step."""
    monkeypatch.setattr(async_metrics, "copy_to_host", lambda packed: (packed.clone(), LateEvent()))


def pair(seed=0, lr=1e-3, **kwargs):
    model = Decoder(seed, **kwargs)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def untouched(model, optimizer):
    """Nothing of the watch is left anywhere."""
    own = not model._forward_hooks and not model._forward_pre_hooks
    steps = not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    return (
        own
        and steps
        and all(
            not tap.methods and getattr(tap.owner, tap.name).__module__ != "numerics_suite.training_watch.patches"
            for tap in TAPS.values()
        )
    )


SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])


@SEEDS
@pytest.mark.parametrize("clip", [1.0, None])
def test_hundreds_of_clean_steps_are_quiet(seed, clip):
    """Warnings are errors here; the figures are there all the same."""
    model, optimizer = pair(seed)
    with watch(model, optimizer) as w:
        train(model, optimizer, 300, clip=clip)
    assert (w.step, w.finding, w.warnings) == (300, None, [])
    assert set(w.values) == {
        f"numerics/{name}" for name in ("largest_logit", "loss", "gradient_norm", "parameter_norm", "update_ratio")
    }
    assert untouched(model, optimizer)


@SEEDS
def test_hundreds_of_clean_steps_under_a_scaler_and_float16_are_quiet(seed):
    model, optimizer = pair(seed)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=40)
    with watch(model, optimizer) as w:
        for step in range(200):
            batch = ids(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(input_ids=batch, labels=batch)["loss"]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert (w.step, w.finding, w.warnings) == (200, None, [])
    assert w.values["numerics/loss_scale"] > 1


def test_the_watch_changes_no_bit_of_the_run():
    results = []
    for watched in (False, True):
        model, optimizer = pair()
        torch.manual_seed(5)
        if watched:
            with watch(model, optimizer, snapshot_every=3):
                train(model, optimizer, 25)
        else:
            train(model, optimizer, 25)
        results.append([p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_head_that_nobody_wrote_is_named_at_step_1():
    model, optimizer = pair()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError) as caught, watch(model, optimizer):
        train(model, optimizer, 3)
    finding = caught.value.finding
    assert (finding.step, finding.cause, finding.module) == (1, "uninitialised-parameters", "lm_head")
    assert finding.parameters == ("lm_head.weight",)
    assert [remedy.name for remedy in finding.remedies] == ["init-head"]
    assert str(caught.value).startswith("step 1: the logits are not finite; lm_head.weight is not finite itself")
    assert "\n" not in str(caught.value)
    assert untouched(model, optimizer)


def test_an_overflow_in_float16_is_located():
    model, optimizer = pair(dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with torch.no_grad():
        model.layers[1].up.weight.fill_(100.0)
        model.layers[1].norm.weight.fill_(6000.0)
        model.layers[1].norm.bias.fill_(30000.0)
    with pytest.raises(NumericsError) as caught, watch(model, optimizer):
        train(model, optimizer, 2)
    finding = caught.value.finding
    assert (finding.step, finding.cause) == (1, "overflow")
    assert finding.module.startswith("layers.1")
    assert finding.source.startswith("watched_models.py:")
    assert finding.evidence["largest number of the dtype"] == 65504


@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_parameter_spoiled_at_step_k_is_reported_at_step_k(k):
    model, optimizer = pair()

    def spoil(step):
        if step == k:
            with torch.no_grad():
                model.layers[0].down.weight[3, 3] = float("nan")

    with pytest.raises(NumericsError) as caught, watch(model, optimizer) as w:
        train(model, optimizer, 12, before=spoil)
    finding = caught.value.finding
    assert (finding.step, w.step, finding.module) == (k, k, "layers.0.down")
    assert finding.parameters == ("layers.0.down.weight",)


def breaks_at(model, k):
    def set_broken(step):
        model.layers[1].broken = step == k

    return set_broken


def test_a_gradient_broken_at_step_k_is_located_in_the_backward_pass():
    model, optimizer = pair()
    with pytest.raises(NumericsError) as caught, watch(model, optimizer):
        train(model, optimizer, 8, before=breaks_at(model, 5))
    finding = caught.value.finding
    assert (finding.step, finding.cause, finding.module) == (5, "invalid-operation", "layers.1")
    assert finding.evidence["pass"] == "backward"
    assert all(torch.isfinite(p).all() for p in model.parameters()), "the step was not taken"


def test_late_figures_are_read_one_step_later(late, monkeypatch):
    monkeypatch.setattr("numerics_suite.training_watch.snapshots.Snapshots.is_small", False)
    model, optimizer = pair()
    with pytest.raises(NumericsError) as caught, watch(model, optimizer) as w:
        train(model, optimizer, 9, before=breaks_at(model, 5))
    assert (caught.value.finding.step, w.step) == (5, 6)
    assert caught.value.finding.module is None
    assert LateEvent.waits == 0
    assert "no snapshot was kept" in caught.value.finding.evidence["replay"]


def test_a_device_that_lags_two_steps_is_waited_for(late, monkeypatch):
    monkeypatch.setattr(LateEvent, "query", lambda _: False)
    model, optimizer = pair()
    with pytest.raises(NumericsError) as caught, watch(model, optimizer) as w:
        train(model, optimizer, 9, before=breaks_at(model, 4))
    assert (caught.value.finding.step, w.step) == (4, 6)


def test_late_figures_with_a_snapshot_are_located(late, tmp_path):
    model, optimizer = pair()

    def always(step):
        model.layers[1].broken = step >= 5

    with pytest.raises(NumericsError) as caught, watch(model, optimizer, snapshot_every=2, bundle=tmp_path / "b") as w:
        train(model, optimizer, 9, before=always)
    finding = caught.value.finding
    assert (finding.step, finding.cause, finding.module) == (5, "invalid-operation", "layers.1")
    assert w.step <= 7
    assert finding.evidence["replay"] == "with the snapshot from before step 5"
    assert (tmp_path / "b" / "parameters.safetensors").is_file()


def test_the_end_of_the_block_reads_what_is_under_way(late):
    model, optimizer = pair()
    with pytest.raises(NumericsError, match=r"^step 2: "), watch(model, optimizer):
        train(model, optimizer, 2, before=breaks_at(model, 2))


def test_an_eps_of_0_is_seen_after_the_first_step():
    model = Decoder(dtype=torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-8)
    with pytest.raises(NumericsError) as caught, watch(model, optimizer):
        train(model, optimizer, 3, clip=None)
    assert (caught.value.finding.cause, caught.value.finding.step) == ("optimizer-underflow", 1)


def test_floating_ids_are_refused_before_the_model_sees_them():
    model, optimizer = pair()
    with (
        pytest.raises(NumericsError, match=r"input_ids came as bfloat16; token ids must be integers") as caught,
        watch(model, optimizer),
    ):
        model(input_ids=ids(0).bfloat16())
    assert caught.value.finding.cause == "wrong-input-dtype"
    assert [remedy.name for remedy in caught.value.finding.remedies] == ["default-input-dtypes"]


def language_model(kind, **config):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    model = getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**sizes, **heads, **config))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


@pytest.mark.parametrize(
    ("kind", "of_ids", "of_labels", "text"),
    [
        ("CausalLM", 64, 3, r"input_ids hold 64, and the embedding has 64 rows \(0 to 63\)"),
        ("CausalLM", 3, 70, r"labels hold 70, and the model has 64 classes \(0 to 63\)"),
        ("SequenceClassification", 3, 3, r"labels hold 3, and the model has 3 classes \(0 to 2\)"),
    ],
)
def test_what_the_model_has_no_row_for_is_named_before_it_raises(kind, of_ids, of_labels, text):
    """On a CPU the model raises `Target 3 is out of bounds`, on other devices an op ends the process."""
    model, optimizer = language_model(kind, num_labels=3)
    batch = torch.tensor([[5, of_ids, 7], [3, 4, 5]])
    labels = torch.tensor([[-100, of_labels, 7], [3, 4, 5]]) if kind == "CausalLM" else torch.tensor([1, of_labels])
    with pytest.raises(NumericsError, match=text) as caught, watch(model, optimizer):
        model(input_ids=batch, labels=labels)
    assert caught.value.finding.cause == "out-of-range-input"


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 2]), torch.tensor([0.5, 7.0]), torch.tensor([[0, 1, 1], [1, 0, 0]]).float()]
)
def test_labels_that_are_numbers_name_no_class(labels):
    count = {torch.Size([2, 3]): 3}.get(labels.shape, 1 if labels.is_floating_point() else 3)
    model, optimizer = language_model("SequenceClassification", num_labels=count)
    with watch(model, optimizer) as w:
        model(input_ids=torch.tensor([[5, 6, 63], [3, 4, 5]]), labels=labels).loss.backward()
        optimizer.step()
    assert w.finding is None


def test_ids_that_were_rounded_on_the_way_are_warned_of():
    model, optimizer = pair()
    batch = ids(0, 8, 16).bfloat16().long().clamp(max=996)
    with pytest.warns(NumericsWarning, match="its own rounding to bfloat16"), watch(model, optimizer) as w:
        model(input_ids=batch, labels=batch)["loss"].backward()
        optimizer.step()
    assert [alarm.kind for alarm in w.warnings] == ["rounded-ids"]


def test_a_batch_of_few_ids_is_no_rounding():
    """All pads, or a vocabulary of bytes: representable, and rightly so."""
    model, optimizer = pair()
    with watch(model, optimizer):
        for batch in (torch.full((4, 8), 512), ids(1) % 256):
            model(input_ids=batch, labels=batch)["loss"].backward()
            optimizer.step()


def test_a_bad_input_is_called_that():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NumericsError) as caught, watch(model, optimizer):
        model(torch.tensor([[1.0, float("nan"), 0, 0]])).sum().backward()
        optimizer.step()
    assert caught.value.finding.cause == "out-of-range-input"


def test_a_loss_outside_the_model_is_seen_where_backward_is_called():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer) as w:
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        optimizer.step()
    assert w.values["numerics/loss"] == pytest.approx(loss.item())


def test_warn_goes_on_and_tells_once():
    model, optimizer = pair()
    with pytest.warns(NumericsWarning, match=r"^step 3: ") as told, watch(model, optimizer, on_bad="warn") as w:
        train(model, optimizer, 6, before=breaks_at(model, 3))
    assert len(told) == 1
    assert (w.step, w.finding.step) == (6, 3)


def test_a_callable_gets_the_finding_and_may_choose():
    model, optimizer = pair()
    seen = []
    with watch(model, optimizer, on_bad=seen.append) as w:
        train(model, optimizer, 4, before=breaks_at(model, 3))
    assert seen == [w.finding]
    model, optimizer = pair()
    with pytest.raises(NumericsError), watch(model, optimizer, on_bad=lambda _: "stop"):
        train(model, optimizer, 4, before=breaks_at(model, 3))


def test_skip_leaves_out_exactly_the_bad_steps():
    model, optimizer = pair()
    with pytest.warns(NumericsWarning) as told, watch(model, optimizer, on_bad="skip") as w:
        train(model, optimizer, 2)
        before = [p.detach().clone() for p in model.parameters()]
        states = [state["exp_avg"].clone() for state in optimizer.state.values()]
        train(model, optimizer, 2, before=breaks_at(model, 4), start=3)
        assert any(not torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True)), (
            "step 3 is good"
        )
        before = [p.detach().clone() for p in model.parameters()]
        states = [state["exp_avg"].clone() for state in optimizer.state.values()]
        train(model, optimizer, 1, before=breaks_at(model, 5), start=5)
        assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(s["exp_avg"], kept) for s, kept in zip(optimizer.state.values(), states, strict=True))
        assert all(p.grad is not None for p in model.parameters()), "nothing is zeroed"
        model.layers[1].broken = False
        train(model, optimizer, 2, start=6)
    assert list(w.bad_steps) == [4, 5]
    assert len(told) == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_forward_passes_that_accumulate_are_one_step():
    model, optimizer = pair()
    with watch(model, optimizer) as w:
        for step in range(3):
            for part in range(4):
                batch = ids(10 * step + part)
                (model(input_ids=batch, labels=batch)["loss"] / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert w.step == 3
    assert sum(len(reading.values.get("loss", ())) for reading in w.readings) == 12
    assert sum(len(reading.values.get("gradient norm", ())) for reading in w.readings) == 3


def test_the_norm_of_clipping_is_taken_and_not_computed_again(monkeypatch):
    from torch.nn.utils import clip_grad_norm_

    model, optimizer = pair()
    monkeypatch.setattr(gauges, "total_norm", lambda _: pytest.fail("computed"))
    with watch(model, optimizer, every_parameters=1000) as w:
        w._gauges.of_update = lambda _: []
        batch = ids(0)
        model(input_ids=batch, labels=batch)["loss"].backward()
        norm = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert w.values["numerics/gradient_norm"] == pytest.approx(float(norm))


def test_clipping_a_part_is_no_norm_of_all():
    model, optimizer = pair()
    with watch(model, optimizer) as w:
        batch = ids(0)
        model(input_ids=batch, labels=batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.lm_head.parameters(), 1e9)
        whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
    assert w.values["numerics/gradient_norm"] == pytest.approx(float(whole))


def test_an_exception_of_the_loop_stays_and_every_patch_goes():
    model, optimizer = pair()

    def fail(step):
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch(model, optimizer):
        train(model, optimizer, 5, before=fail)
    assert untouched(model, optimizer)


def test_a_watch_that_nobody_holds_leaves():
    model, optimizer = pair()
    watch(model, optimizer).__enter__()
    gc.collect()
    assert untouched(model, optimizer)


def test_two_watches_at_once_do_not_disturb_each_other():
    one, other = pair(0), pair(1)
    with watch(*one) as first:
        with watch(*other) as second:
            train(*one, 2)
            train(*other, 3)
        train(*one, 1, start=3)
    assert (first.step, second.step) == (3, 3)
    assert untouched(*one)
    assert untouched(*other)


def test_evaluation_between_steps_is_not_looked_at():
    model, optimizer = pair()
    with watch(model, optimizer) as w:
        train(model, optimizer, 2)
        with torch.no_grad():
            model(input_ids=ids(9), scale=float("nan"))
        train(model, optimizer, 1, start=3)
    assert w.step == 3


def test_every_third_step():
    model, optimizer = pair()
    with watch(model, optimizer, every=3) as w:
        train(model, optimizer, 7)
    assert [r.step for r in w.readings if "loss" in r.values] == [1, 4, 7]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, not 0"),
        ({"ring": 0}, "ring must be a whole number of at least 1, not 0"),
        ({"on_bad": "explode"}, "on_bad must be 'stop', 'warn', 'skip' or a callable, not 'explode'"),
    ],
)
def test_what_means_nothing_is_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        watch(*pair(), **wrong)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="the optimizer is a dict"):
        watch(Decoder(), {"lr": 1})


def test_curves_go_to_a_writer_or_a_function():
    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((name, step))

    model, optimizer = pair()
    writer, rows = Writer(), []
    with (
        watch(model, optimizer, log=writer),
        watch(model, optimizer, log=lambda values, step: rows.append((values, step))),
    ):
        train(model, optimizer, 2)
    assert ("numerics/loss", 2) in writer.rows
    assert [step for values, step in rows if "numerics/gradient_norm" in values] == [1, 2]


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model_is_watched_and_stays_compiled(way):
    model, optimizer = pair()
    frames = []

    def backend(graph, _inputs):
        frames.append(graph)
        return graph.forward

    if way == "wrapped":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        model.compile(backend=backend)
    with warnings.catch_warnings(), watch(compiled, optimizer) as w:
        warnings.simplefilter("ignore")
        train(compiled, optimizer, 3)
    assert len(frames) == 1, "no graph break, no recompilation"
    assert (w.step, len([r for r in w.readings if "loss" in r.values])) == (3, 3)
    with torch.no_grad():
        model.layers[0].up.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError) as caught, watch(compiled, optimizer):
        train(compiled, optimizer, 1, start=4)
    assert caught.value.finding.parameters == ("layers.0.up.weight",)


def test_public_names_are_lazy():
    assert numerics_suite.watch is watch
    assert {"watch", "NumericsCallback", "NumericsError", "NumericsWarning"} <= set(numerics_suite.__all__)


def labelled_loop(model, labels, *, items=False):
    """Two steps over the same ids, whose labels are given for each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    ids = torch.arange(3, 15).reshape(2, 6)
    with watch(model, optimizer):
        for each in labels:
            more = {"num_items_in_batch": (each[:, 1:] != -100).sum()} if items else {}
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=each, **more).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("items", [False, True], ids=["mean", "sum"])
def test_a_batch_of_which_no_label_counts(items):
    from unit.script_models import sound

    ids = torch.arange(3, 15).reshape(2, 6)
    some, none = ids.clone(), torch.full_like(ids, -100)
    some[0], none[:, 0] = -100, ids[:, 0]  # the first column is no target
    labelled_loop(sound(), [some, some], items=items)
    with pytest.raises(NumericsError, match="step 2: the loss is not finite; no label of the batch counts") as error:
        labelled_loop(sound(), [some, none], items=items)
    assert error.value.finding.cause == "no-counted-labels"
    assert [(each.name, each.verified) for each in error.value.finding.remedies] == [("count-labels", True)]


def test_a_loss_that_is_nan_for_another_reason_is_not_put_down_to_the_labels():
    from unit.script_models import sound

    ids, model = torch.arange(3, 15).reshape(2, 6), sound()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError) as error:
        labelled_loop(model, [torch.full_like(ids, -100)])
    assert error.value.finding.cause == "corrupt-weights"
