"""A mixture of experts whose loss holds its router's: what is asked of the cross entropy is asked of it alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unit.test_clean_models import BODY, assert_clean, save, statuses

from numerics_suite.engine.router_loss import adds_router_loss, without_router_loss

SHAPE = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
MODELS = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def mixture(folder: object, name: str = "mixtral", **changes: object) -> str:
    model_class, config_class, shape = MODELS[name]
    return save(folder, model_class, config_class, **{**SHAPE, **ROUTED, **shape, **changes})


@pytest.fixture
def doubled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cross entropy that counts twice; the router's loss is right."""
    import transformers

    own = transformers.MixtralForCausalLM.loss_function

    def twice(self: nn.Module) -> object:
        loss = own.fget(self)
        return lambda *args, **kwargs: 2 * loss(*args, **kwargs)

    monkeypatch.setattr(transformers.MixtralForCausalLM, "loss_function", property(twice))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_routers_loss_is_no_finding(tmp_path, name, precision):
    checks = ("train.labels", "train.accumulation", "train.grad-flow", "train.checkpointing", "forward.cache")
    found = statuses(mixture(tmp_path, name), checks, precision)
    assert found == dict.fromkeys(sorted(checks), "passed")


@pytest.mark.usefixtures("doubled_loss")
def test_a_wrong_cross_entropy_beside_it_is_one(tmp_path):
    found = statuses(mixture(tmp_path), ("train.labels",), "fp32")
    assert found["train.labels"].startswith("failed: the loss is not the cross entropy over the counted labels")


def test_what_is_trained_keeps_the_routers_loss(tmp_path):
    found = statuses(mixture(tmp_path), ("train.finite", "train.descends", "reference.gradient"), "fp32")
    assert_clean(found)


def test_the_switch_is_put_back(tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(mixture(tmp_path)).eval()
    ids = torch.arange(1, 9)[None]
    assert adds_router_loss(model)
    with without_router_loss(model):
        assert not adds_router_loss(model)
        assert getattr(model(ids, labels=ids), "aux_loss", None) is None
    with pytest.raises(ValueError, match="input_ids"), without_router_loss(model):
        model()
    assert model(ids, labels=ids).aux_loss is not None
    assert not adds_router_loss(nn.Linear(2, 2))


def test_a_call_that_is_refused_halfway_leaves_the_model_alone(tmp_path, monkeypatch):
    """As transformers up to 5.0 leaves the routers whose logits it records: bound to this model in every copy of it."""
    import transformers

    own = transformers.MixtralForCausalLM.forward

    def recorded(self, *args, **kwargs):
        bound = self.lm_head.forward

        def noted(states):
            return bound(states)

        self.lm_head.forward = noted
        output = own(self, *args, **kwargs)
        self.lm_head.forward = bound
        return output

    monkeypatch.setattr(transformers.MixtralForCausalLM, "forward", recorded)
    checks = ("inputs.ids-dtype", "train.checkpointing", "train.grad-flow")
    assert statuses(mixture(tmp_path), checks, "fp32") == dict.fromkeys(sorted(checks), "passed")
