"""Remedies are tried: what cures is verified, what does not is said to be no help, what only hides is said to hide."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from mutants.driver import MutantSession, settings_of
from torch import nn

from numerics_suite.core.errors import UnsupportedError
from numerics_suite.core.records import Finding, Remedy
from numerics_suite.diagnosis.learning_rates import learning_rates
from numerics_suite.diagnosis.remedies import CURES, in_float32, initialised_head
from numerics_suite.diagnosis.remedy_trials import NOT_HERE, try_remedies
from numerics_suite.diagnosis.remedy_words import COST, DESCRIPTIONS
from numerics_suite.engine.training_loop import Trainer, TrainingPlan
from numerics_suite.suite.planning import Question


def told(patch, check, *, fixture="glm4-tiny", precision="bf16", attn="sdpa", **changes):
    """The finding of a check of the patched checkpoint, with its remedies by name."""
    session = MutantSession(settings_of(fixture, precision, attn, max_examples=3, **changes), patch)
    session.findings.tries_remedies = True
    (question,) = [question for question in session.plan.questions if question.check == check]
    result, trace = session.answer(question)
    assert result.finding is not None, f"{result.status} {result.reason} {trace}"
    return result.finding, {remedy.name: remedy for remedy in result.finding.remedies}, session, question


def tried(session, question: Question, finding: Finding, *names: str) -> dict[str, Remedy]:
    """The same finding's remedies, had the budget named these."""
    asked = replace(finding, remedies=tuple(Remedy(name=name, description=DESCRIPTIONS[name]) for name in names))
    context = session.context(question.cell)
    found = try_remedies(question.check, asked, context, session.findings.ask_again)
    return {remedy.name: remedy for remedy in found}


def uninitialised(model):
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))


def loud_head(model):
    with torch.no_grad():
        model.score.weight.normal_(std=200.0, generator=torch.Generator().manual_seed(1))


CLASSIFY = {"task": "sequence-classification"}


def test_every_remedy_has_a_cost_and_a_way_to_be_tried_or_a_reason_why_not():
    assert set(COST) == set(DESCRIPTIONS)
    assert set(CURES) | set(NOT_HERE) | {"lower-learning-rate"} <= set(DESCRIPTIONS)
    assert not set(CURES) & set(NOT_HERE)


@pytest.mark.parametrize("check", ["load.head-init", "train.finite"])
def test_an_uninitialised_head_is_cured_by_initialising_it_and_by_nothing_else(check):
    finding, remedies, session, question = told(uninitialised, check, **CLASSIFY)
    assert finding.cause == "uninitialised-parameters"
    assert remedies["init-head"].verified is True
    assert "finite; loss" in remedies["init-head"].effect
    assert finding.remedies[0].name == "init-head"
    others = tried(
        session, question, finding, "clip-grad-norm", "lower-learning-rate", "use-amp-bf16", "eager-attention"
    )
    assert [remedy.verified for remedy in others.values()] == [False] * 4, others


def test_clipping_hides_a_head_that_is_too_loud():
    finding, _, session, question = told(loud_head, "load.head-init", **CLASSIFY)
    assert finding.cause == "bad-initialisation"
    remedies = tried(session, question, finding, "clip-grad-norm", "init-head")
    assert remedies["init-head"].verified is True
    assert remedies["clip-grad-norm"].verified is False
    # Asked of training alone it would look like a cure.
    training = replace(question, check="train.finite")
    hidden = tried(session, training, finding, "clip-grad-norm")["clip-grad-norm"]
    assert hidden.verified is False
    assert "hides the symptom and leaves the cause" in hidden.effect


def test_an_eps_that_float16_cannot_hold():
    _, remedies, _, _ = told(None, "train.finite", precision="pure-fp16")
    assert remedies["larger-optimizer-eps"].verified is True
    assert "eps 0.0001: finite; loss" in remedies["larger-optimizer-eps"].effect
    assert remedies["use-amp-bf16"].verified is True
    assert list(remedies).index("larger-optimizer-eps") < list(remedies).index("use-amp-bf16")


def test_two_remedies_that_only_help_together():
    finding, _, session, question = told(uninitialised, "train.finite", precision="pure-fp16", **CLASSIFY)
    remedies = tried(session, question, finding, "init-head", "larger-optimizer-eps", "eager-attention")
    assert remedies["init-head"].verified is True
    assert remedies["init-head"].effect.startswith("with larger-optimizer-eps, not alone: ")
    assert remedies["larger-optimizer-eps"].verified is True
    assert remedies["eager-attention"].verified is False


def test_a_learning_rate_that_is_too_large_is_lowered_to_the_largest_that_holds():
    finding, _, session, question = told(None, "train.descends", precision="fp32", lr=1.0)
    seen = tried(session, question, finding, "lower-learning-rate")["lower-learning-rate"]
    assert seen.verified is True
    found = float(seen.effect.split()[1])
    assert 1e-4 < found < 1.0


def test_the_search_for_a_learning_rate_ends_within_a_factor_of_the_boundary():
    boundary = 3.3e-3
    found = learning_rates(TrainingPlan(lr=1.0), lambda plan: plan.lr <= boundary)
    assert found is not None
    assert boundary / 1.4 <= found <= boundary
    assert learning_rates(TrainingPlan(lr=1.0), lambda _: False) is None


def broken_sdpa(model):
    """Attention that is wrong where the model computes it with sdpa: it returns what it should, halved."""
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(
                lambda m, _a, out: (out[0] * 0.5, *out[1:]) if m.config._attn_implementation == "sdpa" else out
            )


def test_the_other_attention_cures_a_broken_one():
    finding, _, session, question = told(broken_sdpa, "reference.oracle")
    remedies = tried(session, question, finding, "eager-attention", "clip-grad-norm")
    assert remedies["eager-attention"].verified is True
    assert remedies["clip-grad-norm"].verified is False


def overflowing_mlp(model):
    """Gate and up scaled up, down scaled down as much: the product leaves float16 within the module, its result does not."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_up_proj.weight.mul_(600.0)
            layer.mlp.down_proj.weight.div_(600.0**2)


def test_a_module_that_overflows_is_kept_in_float32():
    finding, remedies, _, _ = told(overflowing_mlp, "forward.finite", precision="fp16")
    assert finding.cause == "overflow"
    assert remedies["keep-in-fp32"].verified is True
    assert "in float32" in remedies["keep-in-fp32"].effect


def test_a_module_in_float32_trains_its_copy_and_not_the_original():
    class Loaded:
        model = nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3).half())

    in_float32("1")(Loaded)
    import copy

    twin = copy.deepcopy(Loaded.model)
    given = torch.ones(2, 3, dtype=torch.float16)
    out = twin(given)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert twin[1].weight.grad is not None
    assert Loaded.model[1].weight.grad is None


def test_what_cannot_be_tried_is_said_plainly():
    def spoiled(model):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")

    _, remedies, _, _ = told(spoiled, "load.finite")
    assert remedies["reload-weights"].verified is None
    assert remedies["reload-weights"].effect.startswith("cannot be tried: there is no other copy of the files here")


def test_an_experiment_and_the_remedy_of_its_name_train_once(monkeypatch):
    ran = []
    own = Trainer.run

    def counted(trainer):
        ran.append((trainer.condition.precision.name, trainer.plan))
        return own(trainer)

    monkeypatch.setattr(Trainer, "run", counted)
    finding, remedies, _, _ = told(None, "train.finite", precision="pure-fp16")
    assert finding.evidence["with eps 0.0001"] == "passes"
    assert remedies["larger-optimizer-eps"].verified is True
    assert len(ran) == len(set(ran)), "the same copy was trained twice"
    assert len({plan.eps for _, plan in ran}) > 1


def test_without_diagnosis_nothing_is_tried():
    session = MutantSession(settings_of("glm4-tiny", "bf16", "sdpa", diagnose=False, **CLASSIFY), uninitialised)
    session.findings.tries_remedies = True
    (question,) = [question for question in session.plan.questions if question.check == "load.head-init"]
    result, _ = session.answer(question)
    assert [remedy.verified for remedy in result.finding.remedies] == [None, None]


# --- the cause's decisive experiment ---------------------------------------------------------------------------------


def quiet_mask(model):
    """Eager attention's mask is too small to mask."""
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(
                lambda _m, args, kwargs: (
                    args,
                    {**kwargs, "attention_mask": kwargs["attention_mask"].clamp_min(-3.0)}
                    if kwargs.get("attention_mask") is not None and kwargs["attention_mask"].is_floating_point()
                    else kwargs,
                ),
                with_kwargs=True,
            )


@pytest.mark.parametrize(
    ("patch", "check", "cell", "experiment", "outcome"),
    [
        (uninitialised, "load.head-init", CLASSIFY, "loaded without poison", "NaN again"),
        (loud_head, "load.head-init", CLASSIFY, "with the head initialised", "passes"),
        (overflowing_mlp, "forward.finite", {"precision": "fp16"}, "in fp32", "passes"),
        (None, "train.finite", {"precision": "pure-fp16"}, "with eps 0.0001", "passes"),
        (quiet_mask, "forward.causal", {"attn": "eager"}, "in fp64", "fails"),
    ],
)
def test_the_decisive_experiment_is_told_with_its_outcome(patch, check, cell, experiment, outcome):
    finding, _, _, _ = told(patch, check, **cell)
    assert finding.evidence[experiment] == outcome
    if outcome != "NaN again":  # a hook that writes NaN does so without poison too: then nothing speaks for the cause
        assert finding.evidence["confidence"] == "high: the experiment agrees"
    else:
        assert finding.evidence["confidence"] == "low: the experiment disagrees"


def test_an_experiment_that_disagrees_lowers_the_confidence():
    """Infinite in every precision is no matter of float16's range."""

    def infinite(model):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")

    finding, _, _, _ = told(infinite, "load.finite", precision="fp16")
    assert finding.cause == "overflow"
    assert finding.evidence["in fp32"] == "fails"
    assert finding.evidence["confidence"] == "low: the experiment disagrees"


def test_a_definition_that_could_not_be_asked_does_not_count_against_the_cure():
    """The body differs from its definition, which NaN weights hid: an older reason than the head's."""

    def head_and_body(model):
        uninitialised(model)
        model.model.norm.variance_epsilon = 0.1

    finding, remedies, session, question = told(head_and_body, "load.head-init", **CLASSIFY)
    assert finding.cause == "uninitialised-parameters"
    cured = initialised_head(session.context(question.cell))
    assert session.findings.ask_again("reference.oracle", cured).breaches, "the defect of the body is there"
    assert remedies["init-head"].verified is True


def test_a_remedy_that_the_class_refuses_is_not_verified():
    def damaged(model):
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")

    finding, _, session, question = told(damaged, "forward.finite", attn="eager")
    usual = session._load

    def refusing(*args, **kwargs):
        if kwargs["attn"] == "sdpa":
            message = "Glm4ForCausalLM cannot use sdpa attention"
            raise UnsupportedError(message)
        return usual(*args, **kwargs)

    session.context(question.cell)._loader = refusing
    remedies = tried(session, question, finding, "sdpa-attention")
    assert remedies["sdpa-attention"].verified is None
    assert remedies["sdpa-attention"].effect == "Glm4ForCausalLM cannot use sdpa attention"


def factory_told(name, check):
    settings = settings_of("glm-tiny", "fp32", "eager", max_examples=2)
    session = MutantSession(replace(settings, subjects=(f"factory:mutants.{name}",)), None)
    session.findings.tries_remedies = True
    (question,) = [question for question in session.plan.questions if question.check == check]
    return session.answer(question)[0]


def test_untied_embeddings_of_code_are_tied_and_the_check_passes():
    found = factory_told("article_models:untied", "load.tied").finding
    assert found.cause == "untied-weights"
    (remedy,) = [remedy for remedy in found.remedies if remedy.name == "fix-config"]
    assert remedy.verified is True
    assert "with model.tie_weights()" in remedy.effect
    assert "1 before, now 0" in remedy.effect
    assert "tie_word_embeddings" in remedy.description
    assert factory_told("article_models:norm_without_fp32", "load.tied").status == "passed"


def test_a_wrong_gradient_has_its_factor_and_a_leak_says_whether_the_mask_is_read():
    doubled = factory_told("factories:gradient_doubled", "reference.oracle").finding
    assert doubled.evidence["times the true gradient"] == pytest.approx(2, abs=1e-6)
    ignored = factory_told("factories:mask_padding_ignored", "forward.padding").finding
    assert "does not read the mask" in ignored.evidence["flipped at the padding"]
    moved = factory_told("factories:mask_padding_shifted", "forward.padding").finding
    assert "the mask is read" in moved.evidence["flipped at the padding"]


def test_updates_that_round_away_show_the_share_that_is_held():
    """Not the loss, which five tiny steps move nowhere."""
    finding, remedies, _, _ = told(None, "train.updates", lr=1e-7)
    assert finding.cause == "rounded-update"
    before, after = re.findall(r"([\d.]+) %", remedies["stochastic-rounding"].effect)
    assert float(before) < 0.5
    assert float(after) > 50
    assert not any("loss" in remedy.effect for remedy in remedies.values())
    assert [remedy.name for remedy in finding.remedies][-1] == "raise-learning-rate"
