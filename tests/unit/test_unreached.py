"""Parameters that the loss cannot reach by design are no finding; one that it should reach and does not is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unit.test_clean_models import BODY, save, statuses

CHECK = ("train.grad-flow",)
BIG_BIRD = {**BODY, "intermediate_size": 64, "is_decoder": True, "attention_type": "original_full"}
MISTRAL = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}


def test_a_pooler_that_nothing_reads(tmp_path):
    assert statuses(save(tmp_path, "BigBirdForCausalLM", "BigBirdConfig", **BIG_BIRD), CHECK) == {
        "train.grad-flow": "passed"
    }


def test_an_indexer_that_only_picks(tmp_path):
    pytest.importorskip("transformers.models.glm_moe_dsa")
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    index = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    config = {**BODY, "num_key_value_heads": 2, "intermediate_size": 64, "topk_group": 1, **latent, **index, **experts}
    folder = save(tmp_path, "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", **config)
    assert statuses(folder, CHECK, "fp32") == {"train.grad-flow": "passed"}


@pytest.mark.parametrize("part", ["MistralRMSNorm", "MistralMLP"])
def test_a_part_that_is_left_out(tmp_path, monkeypatch, part):
    from transformers.models.mistral import modeling_mistral

    monkeypatch.setattr(getattr(modeling_mistral, part), "forward", lambda _, x: x)
    found = statuses(save(tmp_path, "MistralForCausalLM", "MistralConfig", **MISTRAL), CHECK, "fp32")
    assert found["train.grad-flow"].startswith("failed: ")


def first_position() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A batch in which the loss reads the answer of the first position alone."""
    import transformers

    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 6))
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**MISTRAL))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def queries_times_zero() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """In the same batch, one layer's queries are lost in any batch."""
    model, batch = first_position()
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _module, _args, output: 0 * output)
    return model, batch


def test_a_loss_that_reads_the_first_position_alone():
    """One key has a softmax of 1 whatever the scores are, so queries and keys have no gradient by mathematics."""
    assert statuses(f"factory:{__name__}:first_position", CHECK, "fp32") == {"train.grad-flow": "passed"}
    found = statuses(f"factory:{__name__}:queries_times_zero", CHECK, "fp32")
    # The keys that only these queries read are dead with them.
    assert "model.layers.1.self_attn.q_proj.weight" in found["train.grad-flow"]
    assert "layers.0" not in found["train.grad-flow"]


def test_a_pooler_whose_answer_is_cut_off(tmp_path, monkeypatch):
    """It is read, so the loss depends on it, and no gradient comes back."""
    import transformers
    from transformers.models.bert.modeling_bert import BertPooler

    own = BertPooler.forward
    monkeypatch.setattr(BertPooler, "forward", lambda self, states: own(self, states).detach())
    assert transformers.BertForSequenceClassification
    config = {**BODY, "intermediate_size": 64, "num_labels": 3}
    found = statuses(save(tmp_path, "BertForSequenceClassification", "BertConfig", **config), CHECK, "fp32")
    assert "bert.pooler.dense.weight" in found["train.grad-flow"] or "parameters receive" in found["train.grad-flow"]


def test_the_head_is_applied_to_what_it_reads(tmp_path, monkeypatch):
    """A model whose last hidden state comes before its final norm, as BioGPT's up to 5.0."""
    from transformers.models.mistral import modeling_mistral

    own = modeling_mistral.MistralForSequenceClassification.forward

    def early(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        if output.hidden_states is not None:
            output.hidden_states = (*output.hidden_states[:-1], output.hidden_states[-1].roll(1, 1) * 3)
        return output

    monkeypatch.setattr(modeling_mistral.MistralForSequenceClassification, "forward", early)
    folder = save(tmp_path, "MistralForSequenceClassification", "MistralConfig", **{**MISTRAL, "num_labels": 3})
    assert statuses(folder, ("forward.pooling",), "fp32") == {"forward.pooling": "passed"}
