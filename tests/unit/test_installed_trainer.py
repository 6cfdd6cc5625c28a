"""The installed training stack as a subject: each fault is found in its own place, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mutants.driver import MutantSession, release
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from numerics_suite.checks.train import _stack_batch as stack_batch
from numerics_suite.checks.train import trainer as check_file
from numerics_suite.checks.train._stack_batch import stack_of
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Finding, Measurement
from numerics_suite.core.registry import get_check
from numerics_suite.diagnosis.findings import finding as finding_of
from numerics_suite.diagnosis.reproducer import reproducer
from numerics_suite.engine.installed_trainer import Way, trainer_step
from numerics_suite.judgement.known_faults import KNOWN_FAULTS, reason_to_accept
from numerics_suite.judgement.verdicts import judge
from numerics_suite.settings.tree import Settings

pytest.importorskip("accelerate")
pytest.importorskip("peft")
newest = pytest.mark.skipif(release() < (5, 15), reason="older releases have faults of their own here")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def context_of(folder: Path, **settings):
    """Of the one cell of a checkpoint."""
    session = MutantSession(
        Settings(
            subjects=(str(folder),),
            precision=("fp32",),
            attn=("eager",),
            checks=("train.trainer",),
            device="cpu",
            origins={"precision": "command line"},
            **settings,
        )
    )
    (question,) = session.plan.questions
    return session.context(question.cell)


def saved(folder: Path, make=AutoModelForCausalLM, kind="glm", **changes) -> Path:
    torch.manual_seed(0)
    make.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return context_of(saved(tmp_path_factory.mktemp("causal") / "lm"))


@pytest.fixture(scope="module")
def stack(language_model):
    return stack_of(language_model)


def faults_of(context):
    """Measurement → fault of what is over the budget."""
    found = {each.name: each for each in get_check("train.trainer").function(context)}
    return {name: each.facts[f"fault of {name}"] for name, each in found.items() if not each.value <= 1e-10}


def off(trial):
    """Whose fault it is that a trial is off; None where it is not, or where the model's own code is."""
    told = check_file._measured(trial)
    return None if told is None or told[1] is None else str(told[1])


@newest
def test_a_causal_model_of_the_newest_release_gets_its_gradient_in_each_way(language_model):
    found = [each.name for each in get_check("train.trainer").function(language_model)]
    assert found == [
        *("label-count", "accumulation", "adapter", "accelerate-loop", "label-smoothing", "padding-free"),
        *("reentrant-checkpointing", "non-reentrant-checkpointing", "clipping"),
    ]
    assert not faults_of(language_model)


@newest
def test_a_classifier_that_swallows_the_count_is_named(tmp_path):
    context = context_of(saved(tmp_path / "classifier", AutoModelForSequenceClassification, num_labels=3))
    found = {each.name: each for each in get_check("train.trainer").function(context)}["accumulation"]
    assert found.facts[check_file.TIMES] == pytest.approx(4)
    assert found.facts["fault"] == (
        "GenericForSequenceClassification.forward accepts num_items_in_batch and never hands it to the loss"
    )
    file, _, line = found.source.partition(":")
    import transformers.modeling_layers as layers

    assert file == "modeling_layers.py"
    assert "self.loss_function(" in Path(layers.__file__).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert faults_of(context) == {
        "accumulation": "ignored-count at transformers.modeling_layers.GenericForSequenceClassification.forward"
    }


@newest
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_is_judged_on_its_first_words(tmp_path, monkeypatch, tied):
    context = context_of(saved(tmp_path / "words", vocab_size=2048, tie_word_embeddings=tied))
    stack = stack_of(context)
    assert stack.plain.get_input_embeddings().weight.shape[0] == stack_batch.MOST_WORDS
    assert int(stack.tensors["input_ids"].max()) < stack_batch.MOST_WORDS
    assert context.model.get_input_embeddings().weight.shape[0] == 2048
    assert context.model.config.vocab_size == 2048
    whole = check_file._whole(stack)
    assert off(check_file._clipping(stack, whole)) is None
    monkeypatch.setattr(Trainer, "get_batch_samples", counting_every_label(Trainer.get_batch_samples))
    assert off(check_file._counting(stack)).startswith("miscount of GlmForCausalLM at ")


def test_a_class_that_cannot_do_with_fewer_words_keeps_all(tmp_path, monkeypatch):
    context = context_of(saved(tmp_path / "words", vocab_size=2048, num_hidden_layers=3))
    refuse = lambda *_args, **_words: (_ for _ in ()).throw(NotImplementedError)  # noqa: E731
    monkeypatch.setattr(type(context.model), "resize_token_embeddings", refuse)
    stack = stack_of(context)
    assert stack.plain.get_input_embeddings().weight.shape[0] == 2048
    assert len(stack.plain.model.layers) == stack_batch.MOST_BLOCKS


def counting_every_label(own):
    def counts(self, *args):
        batches, _ = own(self, *args)
        return batches, sum((batch["labels"] != -100).sum() for batch in batches)

    return counts


@newest
def test_a_trainer_that_counts_another_number_of_labels(stack, monkeypatch):
    monkeypatch.setattr(Trainer, "get_batch_samples", counting_every_label(Trainer.get_batch_samples))
    trial = check_file._counting(stack)
    assert off(trial) == "miscount of GlmForCausalLM at transformers.trainer.Trainer.get_batch_samples"
    assert "counts 25 labels where 24 are predicted" in trial.fault(1.0).sentence


@newest
def test_a_smoother_that_takes_the_mean_of_each_micro_batch(stack, monkeypatch):
    from transformers.trainer_pt_utils import LabelSmoother

    own = LabelSmoother.__call__

    def without_the_count(self, output, labels, shift_labels=False, num_items_in_batch=None):
        return own(self, output, labels, shift_labels=shift_labels)

    monkeypatch.setattr(LabelSmoother, "__call__", without_the_count)
    trial = check_file._smoothing(stack, 4)
    assert off(trial) == "smoothed-means at transformers.trainer_pt_utils.LabelSmoother.__call__"
    assert trial.fault(4.0).source.startswith("trainer_pt_utils.py:")


@newest
def test_a_padding_free_collator_that_counts_positions_on(stack, monkeypatch):
    import transformers

    own = transformers.DataCollatorWithFlattening.__call__

    def on_and_on(self, rows, *args, **words):
        packed = own(self, rows, *args, **words)
        packed["position_ids"] = torch.arange(packed["input_ids"].shape[1])[None]
        return packed

    monkeypatch.setattr(transformers.DataCollatorWithFlattening, "__call__", on_and_on)
    (trial,) = check_file._packing(stack, check_file._whole(stack))
    assert off(trial).startswith("unknown at transformers.data.data_collator.DataCollatorWithFlattening")


@newest
def test_an_accelerate_that_divides_once_more(stack, monkeypatch):
    """As the Trainer of 5.2.0 asks it to."""
    import transformers.trainer as module

    plugin = module.GradientAccumulationPlugin
    monkeypatch.setattr(module, "GradientAccumulationPlugin", lambda **words: plugin(**{**words, "num_steps": 4}))
    step = trainer_step(stack.model, stack.rows(), Way(micro_batches=4))
    fault = check_file.faults.fault_of_count(stack, step, 0.25)
    assert str(fault) == "divided-twice at transformers.trainer.Trainer.create_accelerator_and_postprocess"
    assert fault.source.startswith("trainer.py:")


@newest
def test_an_adapter_that_loses_the_count(stack, monkeypatch):
    from peft import PeftModel

    own = PeftModel.forward

    def without(self, *args, num_items_in_batch=None, **words):
        return own(self, *args, **words)

    (sound,) = check_file._adapter(stack, 4)
    assert off(sound) is None
    monkeypatch.setattr(PeftModel, "forward", without)
    (trial,) = check_file._adapter(stack, 4)
    assert off(trial) == "lost-count at peft.peft_model.PeftModel.forward"


def test_an_accelerate_that_adds_up(stack, monkeypatch):
    from accelerate import Accelerator

    whole = check_file._whole(stack)
    assert off(check_file._loop(stack, whole)) is None
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **_: loss.backward())
    trial = check_file._loop(stack, whole)
    assert off(trial) == "accumulation at accelerate.accelerator.Accelerator.backward"
    assert check_file._measured(trial)[0].facts[check_file.TIMES] == pytest.approx(4)


@newest
@pytest.mark.parametrize("name", ["accelerate-loop", "adapter"])
def test_a_script_fails_with_the_defect_and_not_without(language_model, monkeypatch, name):
    from accelerate import Accelerator
    from peft import PeftModel

    facts = {check_file.TIMES: 4.0, "most in": "lm_head.weight", "with": "a loop", "fault": "adds up"}
    breach = judge("train.trainer", [Measurement(name=name, value=3.0, unit="ratio", facts=facts)])
    found = finding_of(breach, language_model, None)
    assert reproducer("train.trainer", found, language_model, None) is None
    own = PeftModel.forward
    if name == "adapter":

        def without(self, *given, num_items_in_batch=None, **words):
            return own(self, *given, **words)

        monkeypatch.setattr(PeftModel, "forward", without)
    else:
        monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **_: loss.backward())
    assert "REPRODUCED" in reproducer("train.trainer", found, language_model, None)


def test_a_clipping_that_does_nothing(stack, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, *_, **__: torch.tensor(1.0))
    trial = check_file._clipping(stack, check_file._whole(stack))
    assert off(trial) == "clipping at accelerate.accelerator.Accelerator.clip_grad_norm_"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_trainer_whose_checkpointing_changes_the_gradient(stack, monkeypatch, reentrant):
    whole, own = check_file._whole(stack), Trainer.compute_loss

    def doubled(self, *args, **words):
        return own(self, *args, **words) * (2 if self.args.gradient_checkpointing else 1)

    sound = check_file._checkpointing(stack, whole, reentrant=reentrant)
    assert off(sound) is None
    monkeypatch.setattr(Trainer, "compute_loss", doubled)
    trial = check_file._checkpointing(stack, whole, reentrant=reentrant)
    assert off(trial) == "checkpointing at transformers.trainer.Trainer.train"


@newest
def test_a_class_without_the_count_averages_means(stack, monkeypatch):
    model = stack.plain
    own = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids=None, attention_mask=None, labels=None, use_cache=None: own(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False
        ),
    )
    step = trainer_step(stack.model, stack.rows(), Way(micro_batches=4))
    assert step.handed == (None,) * 4
    fault = check_file.faults.fault_of_count(stack, step, 1.0)
    assert str(fault) == "no-count at transformers.models.glm.modeling_glm.GlmForCausalLM.forward"
    assert str(check_file.faults.fault_of_count(stack, step, 4.0)).startswith("undivided-sum at ")


def test_a_loss_of_its_own_definition_is_no_question_about_the_trainer(stack, monkeypatch):
    own = stack.plain.loss_function
    monkeypatch.setattr(type(stack.plain), "loss_function", lambda self, *args, **words: 2 * own(*args, **words))
    with pytest.raises(NotApplicableError, match=r"train\.labels"):
        check_file._whole(stack)


def test_dropout_is_off_where_checkpointing_recomputes_too(tmp_path):
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained(tmp_path)
    asked = stack_of(context_of(tmp_path))
    assert asked.model.config.resid_pdrop == 0
    whole = check_file._whole(asked)
    assert [off(check_file._checkpointing(asked, whole, reentrant=reentrant)) for reentrant in (True, False)] == [
        None,
        None,
    ]


def test_the_process_is_as_it_was(stack, monkeypatch):
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    environment, states = dict(os.environ), (dict(PartialState._shared_state), dict(AcceleratorState._shared_state))
    drawn, modes = torch.get_rng_state(), [module.training for module in stack.model.modules()]
    before = {name: value.clone() for name, value in stack.model.state_dict().items()}
    trainer_step(stack.model, stack.rows(), Way())
    assert dict(os.environ) == environment
    assert (dict(PartialState._shared_state), dict(AcceleratorState._shared_state)) == states
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in stack.model.modules()] == modes
    assert not [name for name, value in stack.model.state_dict().items() if not torch.equal(value, before[name])]
    assert not stack.model._forward_pre_hooks


@pytest.mark.parametrize("reason", ["accelerate", "PreTrainedModel", "GiB", "batch-size", "one device"])
def test_a_skip_says_why(reason, language_model, monkeypatch):
    if reason == "accelerate":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        subject = language_model
    else:
        model = torch.nn.Linear(2, 2) if reason == "PreTrainedModel" else language_model.model
        cell = SimpleNamespace(device="cuda:0,cuda:1" if reason == "one device" else "cpu")
        subject = SimpleNamespace(
            model=model, cell=cell, rows=1, request=SimpleNamespace(rows=1), space=language_model.space
        )
    if reason == "GiB":
        monkeypatch.setattr(stack_batch, "MOST_BYTES", 1000)
        subject = language_model
    with pytest.raises(NotApplicableError, match=reason):
        stack_of(subject)


# --- the depth -------------------------------------------------------------------------------------------------------


def float64_bytes(model):
    return 8 * sum(each.numel() for each in model.parameters())


def test_two_blocks_of_six_stand_for_all_and_the_model_keeps_its_own(tmp_path, monkeypatch):
    context = context_of(saved(tmp_path, num_hidden_layers=6))
    before = {name: value.clone() for name, value in context.model.state_dict().items()}
    # Too large as a whole, and judged all the same.
    monkeypatch.setattr(stack_batch, "MOST_BYTES", float64_bytes(context.model) - 1)
    asked = stack_of(context)
    assert len(asked.plain.model.layers) == asked.plain.config.num_hidden_layers == 2
    assert len(context.model.model.layers) == context.model.config.num_hidden_layers == 6
    after = context.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not faults_of(context)


def test_a_class_that_reaches_for_its_last_block_is_trained_whole(tmp_path, monkeypatch):
    context = context_of(saved(tmp_path, num_hidden_layers=4))
    kind = type(context.model.model)
    own = kind.forward

    def reaches(self, *args, **words):
        assert self.layers[3] is not None
        return own(self, *args, **words)

    monkeypatch.setattr(kind, "forward", reaches)
    assert len(stack_of(context).plain.model.layers) == 4
    monkeypatch.setattr(stack_batch, "MOST_BYTES", float64_bytes(context.model) - 1)
    with pytest.raises(NotApplicableError, match="GiB"):
        stack_of(context)


# --- what is accepted ------------------------------------------------------------------------------------------------


def finding_with(*faults: str) -> Finding:
    evidence = {f"fault of {number}": fault for number, fault in enumerate(faults)}
    return Finding(cause="wrong-gradient", title="", explanation="", evidence=evidence)


SWALLOWED = "ignored-count at transformers.modeling_layers.GenericForSequenceClassification.forward"


@pytest.mark.parametrize(
    ("faults", "version", "accepted"),
    [
        ((SWALLOWED,), "5.24.0", True),
        ((SWALLOWED,), "5.25.0", False),
        ((SWALLOWED,), "4.53.3", False),
        ((SWALLOWED, "clipping at accelerate.accelerator.Accelerator.clip_grad_norm_"), "5.24.0", False),
        (("ignored-count at transformers_modules.mine.ChatGLMForSequenceClassification.forward",), "5.24.0", False),
        (("divided-twice at transformers.trainer.Trainer.create_accelerator_and_postprocess",), "5.3.0", True),
        (("divided-twice at transformers.trainer.Trainer.create_accelerator_and_postprocess",), "5.24.0", False),
        (("smoothed-means at transformers.trainer_pt_utils.LabelSmoother.__call__",), "5.14.1", True),
        (("smoothed-means at transformers.trainer_pt_utils.LabelSmoother.__call__",), "5.15.0", False),
        (("miscount of GPT2LMHeadModel at transformers.trainer.Trainer.get_batch_samples",), "5.24.0", True),
        (("miscount of GlmForCausalLM at transformers.trainer.Trainer.get_batch_samples",), "5.24.0", False),
        ((), "5.24.0", False),
    ],
)
def test_only_known_faults_of_that_release_are_accepted(faults, version, accepted):
    assert (reason_to_accept("train.trainer", finding_with(*faults), version) is not None) is accepted
    assert reason_to_accept("train.accumulation", finding_with(*faults), version) is None


def test_every_known_fault_ends_with_a_measured_release():
    for known in KNOWN_FAULTS:
        assert "<" in known.transformers, known.fault
        assert known.reason.startswith("known "), known.fault
