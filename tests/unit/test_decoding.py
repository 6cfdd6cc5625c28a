"""Decoding with the cache is asked as `generate` does it, whatever the model calls its cache."""

from __future__ import annotations

import pytest
import torch
from unit.test_clean_models import BODY, SMALL, save, statuses

from numerics_suite.engine.decoding import with_cache
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.generation import cache_name, empty_cache, prepared_step
from numerics_suite.suite.session import SuiteSession

CHECK = ("forward.cache",)
GROUPED = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
STATE = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MAMBA2 = {**STATE, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
GEMMA = {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 8}
GPT = {**SMALL, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}


def answered(subject: str) -> tuple[str, str]:
    """Status and reason, or status and cause, of forward.cache."""
    settings = Settings(
        subjects=(subject,),
        precision=("fp32",),
        attn=("eager",),
        checks=CHECK,
        device="cpu",
        max_examples=3,
        seq_len=12,
        origins={"precision": "command line"},
    )
    session = SuiteSession(settings)
    session.findings.tries_remedies = False
    result = session.answer(session.plan.questions[0])[0]
    return result.status, result.finding.cause if result.finding else result.reason or ""


@pytest.mark.parametrize(
    ("model", "config", "keywords"),
    [
        ("MambaForCausalLM", "MambaConfig", STATE),
        ("Mamba2ForCausalLM", "Mamba2Config", MAMBA2),
        ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
        ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 40}),
        ("GPT2LMHeadModel", "GPT2Config", GPT),
    ],
)
def test_a_cache_of_its_own_kind(tmp_path, model, config, keywords):
    assert statuses(save(tmp_path, model, config, **keywords), CHECK, "fp32") == {"forward.cache": "passed"}


def test_an_encoder_has_no_next_token(tmp_path):
    folder = save(tmp_path, "Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA, use_bidirectional_attention=True)
    assert answered(folder) == ("skipped", "an encoder: its tokens see both sides")


def test_no_cache_is_no_error(tmp_path):
    folder = save(tmp_path, "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **GPT)
    assert answered(folder) == ("skipped", "the model keeps no cache")


def bamba(folder):
    pytest.importorskip("transformers.models.bamba")
    shape = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
    config = {**BODY, "num_key_value_heads": 1, "intermediate_size": 64, "attn_layer_indices": [1]}
    return save(folder, "BambaForCausalLM", "BambaConfig", **config, **shape)


def test_positions_that_start_anew_are_named(tmp_path):
    """Bamba's own forward pass counts positions from 0 at every step; `generate` hands it the right ones."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(bamba(tmp_path)).eval()
    ids = torch.arange(3, 15)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        right = with_cache([10, 11])(model, batch)["answer"]
        alone = with_cache([10, 11], positions="none")(model, batch)["answer"]
        whole = model(**batch).logits
    assert torch.allclose(right, whole, atol=1e-5)
    if not torch.allclose(alone, whole, atol=1e-5):
        assert answered(str(tmp_path)) == ("failed", "wrong-positions")


def windowed(folder, window):
    return save(folder, "MistralForCausalLM", "MistralConfig", **{**GROUPED, "sliding_window": window})


def test_a_window_that_no_batch_reaches(tmp_path, monkeypatch):
    """Ten more tokens than the longest batch: a row reaches past the window all the same."""
    from numerics_suite.checks.forward import cache as module

    lengths = []
    own = module.true_pass

    def noted(context, tensors, call, name):
        lengths.append(int(tensors["input_ids"].shape[1]))
        return own(context, tensors, call, name)

    monkeypatch.setattr(module, "true_pass", noted)
    assert statuses(windowed(tmp_path, 22), CHECK, "fp32") == {"forward.cache": "passed"}
    assert max(lengths) == 25


def test_a_prompt_that_was_padded_on_the_right(tmp_path, monkeypatch):
    """A step that attends to padding is seen though no batch of this family is padded on the left."""
    import transformers

    own = transformers.GPT2Model.forward

    def forgetful(self, input_ids=None, *args, **kwargs):
        if input_ids is not None and input_ids.shape[1] == 1:
            kwargs["attention_mask"] = None
        return own(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(transformers.GPT2Model, "forward", forgetful)
    found = answered(save(tmp_path, "GPT2LMHeadModel", "GPT2Config", **GPT))
    assert found == ("failed", "cache-mismatch")


def test_what_generate_would_hand_over(tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(windowed(tmp_path, 8))
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = empty_cache(model, rows=2, width=6)
    name = cache_name(model)
    assert cache is not None
    step = prepared_step(model, ids, mask, start=4, use_cache=True, **{name: cache})
    assert step is not None
    assert step["input_ids"].tolist() == ids[:, 4:].tolist()
    assert step["position_ids"].tolist() == [[2, 3], [4, 5]]
