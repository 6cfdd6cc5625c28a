"""What users run beside a plain call is measured, a defect that only one use meets is seen there, and nothing else fires."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from unit.sample_baseline import baseline
from unit.test_measuring import EXACT, context_of

from numerics_suite.baselines.batches import draw_batches, draw_uses
from numerics_suite.baselines.compare import difference
from numerics_suite.baselines.measure import _modules  # the states as they are stored
from numerics_suite.baselines.trace import answer_record
from numerics_suite.baselines.uses import run_uses
from numerics_suite.judgement.classify import judge_difference

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 70
"""More than the 65 tokens of the training batch: nothing but the long row reaches past it."""


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    from transformers import MistralConfig, MistralForCausalLM

    return saved(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=WINDOW), tmp_path_factory)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    from transformers import MixtralConfig, MixtralForCausalLM

    return saved(MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=4), tmp_path_factory)


def saved(model_class, config, factory):
    folder = factory.mktemp("models") / config.model_type
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def used(source, change=None):
    """The sample cell with the uses of this model."""
    context = context_of(str(source), precision="fp32", attn="eager", change=change)
    uses = draw_uses(context)
    found = run_uses(context, uses, draw_batches(context))
    return replace(
        baseline(),
        uses=uses,
        use_answers=tuple(answer_record(name, answer) for name, answer in found.answers.items()),
        use_modules=_modules(context.model, found.modules, {}, "fp32"),
        bits={**baseline().bits, "uses": found.bits},
        left_out=found.left_out,
    )


@pytest.fixture(scope="module")
def clean(mistral):
    return used(mistral)


@pytest.fixture(scope="module")
def routed(mixtral):
    return used(mixtral)


def values(made, name):
    return next(answer.values for answer in made.use_answers if answer.name == name)


def judged(old, new):
    return judge_difference(difference(old, new))


def apart(old, new):
    """Names of the answers that differ."""
    return [item.name for item in difference(old, new).answers if not item.value <= 1e-10]


def test_every_use_of_a_language_model_is_there_and_is_the_plain_call(clean):
    assert not clean.left_out
    assert [batch.name for batch in clean.uses] == ["alone-left", "alone-right", "long"]
    names = ["alone-left", "alone-right", "generated", "generated-long", "reloaded"]
    assert [answer.name for answer in clean.use_answers] == [f"{name}.logits" for name in names]
    left, right = (values(clean, f"alone-{side}.logits") for side in ("left", "right"))
    assert np.abs(left - right).max() < EXACT
    assert np.abs(values(clean, "generated.logits") - left[-3:]).max() < EXACT
    assert np.abs(values(clean, "generated-long.logits") - values(clean, "reloaded.logits")).max() < EXACT


def test_the_same_twice_is_identical(mistral, clean):
    assert judged(clean, used(mistral)).kind == "identical"


def test_a_mask_that_is_dropped_for_one_row_is_seen(mistral, clean):
    def change(loaded):
        def alone(_module, args, kwargs):
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 4 and mask.shape[0] == 1:
                causal = torch.full(mask.shape[-2:], torch.finfo(mask.dtype).min, dtype=mask.dtype).triu(1)
                kwargs["attention_mask"] = causal.expand(mask.shape)
            return args, kwargs

        loaded.model.model.layers[1].self_attn.register_forward_pre_hook(alone, with_kwargs=True)

    found = used(mistral, change)
    assert {"alone-left.logits", "generated.logits"} <= set(apart(clean, found))
    assert (judged(clean, found).kind, judged(clean, found).module) == ("changed", "model.layers.1.self_attn")


def test_a_window_that_is_another_past_the_training_batch_is_seen(mistral, clean):
    def change(loaded):
        loaded.model.config.sliding_window = WINDOW - 4

    found = used(mistral, change)
    assert apart(clean, found) == ["generated-long.logits", "reloaded.logits"]
    assert judged(clean, found).module == "model.layers.0.self_attn"


def test_a_value_that_each_load_converts_once_more_is_seen_in_what_was_reloaded(mistral, clean):
    """The window of gemma3 halves on each save and load (transformers 5.15)."""

    def change(loaded):
        for module in loaded.model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = loaded.model.config.rms_norm_eps
        loaded.model.config.rms_norm_eps *= 2

    found = used(mistral, change)
    assert apart(clean, found) == ["reloaded.logits"]
    assert judged(clean, found).module == "model.layers.0.input_layernorm"


def test_the_router_s_loss_is_asked_though_the_config_leaves_it_off(mixtral, routed):
    assert not json.loads((mixtral / "config.json").read_text()).get("output_router_logits")
    assert values(routed, "router.aux_loss").shape == (1, 1)
    assert judged(routed, used(mixtral)).kind == "identical"

    def change(loaded):
        loaded.model.num_experts_per_tok = 1

    found = used(mixtral, change)
    assert apart(routed, found) == ["router.aux_loss"]
    assert judged(routed, found).kind == "changed"


def test_a_use_that_is_no_longer_possible_is_missing(mistral, clean):
    def change(loaded):
        def refuse(*_, **__):
            message = "no cache in this release"
            raise ValueError(message)

        loaded.model.prepare_inputs_for_generation = refuse

    found = judged(clean, used(mistral, change))
    assert found.kind == "missing"
    assert "use generated (ValueError: no cache in this release)" in found.details["missing"]
    assert "answer generated.logits" in found.details["missing"]


def test_the_side_of_the_tokenizer_and_of_generate_are_used_though_the_family_declares_neither(tmp_path):
    from transformers import BioGptConfig, BioGptForCausalLM

    config = BioGptConfig(**{key: value for key, value in SMALL.items() if key != "num_key_value_heads"})
    BioGptForCausalLM(config).save_pretrained(tmp_path / "biogpt")
    context = context_of(str(tmp_path / "biogpt"), precision="fp32", attn="eager")
    assert context.space.sides == ("right",)
    assert [batch.name for batch in draw_uses(context)] == ["alone-left", "padded-left", "alone-right"]


def test_a_baseline_of_before_is_compared_in_what_it_has(clean):
    before = replace(clean, uses=(), use_answers=(), use_modules=(), bits=baseline().bits)
    for old, new, lacks in ((before, clean, "old"), (clean, before, "new")):
        found = judged(old, new)
        assert found.kind == "identical"
        (line,) = found.details["not_compared"]
        assert f"the {lacks} baseline holds none" in line
    assert "not_compared" not in judged(clean, clean).details
