"""GLM-4.1V, GLM-4.7-Flash and GLM-5 load by path, each by its own class, and clean ones raise nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mutants.driver import release
from unit.test_clean_models import SMALL, assert_clean, save, statuses

from numerics_suite.core.errors import UnsupportedError
from numerics_suite.subjects import compat
from numerics_suite.subjects.resolve import resolve

TEXT = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "patch_size": 14,
    "image_size": 28,
}
LATENT = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
}
SPARSE = {**LATENT, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 16, "first_k_dense_replace": 1}
"""Of two index heads both scores are often 0 after their ReLU, and which of equal keys is chosen depends on the padding."""
MODELS = {
    "glm4v": ("Glm4vForConditionalGeneration", "Glm4vConfig", {"text_config": TEXT, "vision_config": VISION}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", LATENT),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", SPARSE),
}
QUICK = ("load.*", "forward.padding", "forward.causal", "train.grad-flow")


def made(folder, name):
    if not compat.knows_model_type(name):
        pytest.skip(f"transformers {compat.version()} has no {name}")
    model, config, values = MODELS[name]
    return save(folder, model, config, **values)


@pytest.mark.parametrize("name", MODELS)
def test_a_clean_one_is_quiet(tmp_path, name):
    found = statuses(made(tmp_path, name), QUICK)
    assert_clean(found)
    assert found["load.complete"] == found["load.dtype"] == found["forward.padding"] == "passed"


def nested(folder, **changes):
    """The folder with more in the section of its text part."""
    path = Path(folder, "config.json")
    raw = json.loads(path.read_text("utf-8"))
    raw["text_config"] |= changes
    path.write_text(json.dumps(raw), "utf-8")
    return folder


def test_what_the_file_says_of_the_text_part(tmp_path):
    """A key of `text_config` that no class reads is told with its section, and one that says the same in another word is not."""
    folder = made(tmp_path, "glm4v")
    assert statuses(nested(folder, ffn_hidden_size=64), ("load.config",))["load.config"] == (
        "failed: config.json has keys that this transformers ignores: text_config.ffn_hidden_size"
    )


def test_another_value_than_the_file_has_for_the_text_part(tmp_path, monkeypatch):
    folder = made(tmp_path, "glm4v")
    import transformers

    own = transformers.Glm4vForConditionalGeneration.__init__

    def other(self, config, *args, **kwargs):
        config.text_config.rms_norm_eps = 0.5
        own(self, config, *args, **kwargs)

    monkeypatch.setattr(transformers.Glm4vForConditionalGeneration, "__init__", other)
    assert statuses(nested(folder, rms_norm_eps=1e-5), ("load.config",))["load.config"] == (
        "failed: the model was built with other values than config.json says: text_config.rms_norm_eps"
    )


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_check_of_a_clean_one_is_quiet(tmp_path, name, attn):
    assert_clean(statuses(made(tmp_path, name), attn=(attn,)))


def test_a_model_that_sees_images_is_judged_on_text_and_refused_as_a_classifier(tmp_path):
    folder = made(tmp_path, "glm4v")
    subject = resolve(folder)
    assert (subject.task, subject.model_class) == ("causal-lm", "Glm4vForConditionalGeneration")
    with pytest.raises(
        UnsupportedError, match="has no text-only class of model type glm4v for sequence-classification"
    ):
        resolve(folder, task="sequence-classification")


def test_the_auto_classes_of_other_models_stay():
    assert compat.auto_class_name("causal-lm", "glm4") == "AutoModelForCausalLM"
    assert compat.auto_class_name("causal-lm", "qwen2_vl") == "AutoModelForCausalLM"
    assert compat.auto_class_name("causal-lm", "glm4v") == "AutoModelForImageTextToText"
    assert release() < (4, 53) or compat.model_class_name("glm4v", "causal-lm") == "Glm4vForConditionalGeneration"
