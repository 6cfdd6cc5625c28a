"""A key of config.json is ignored if this release does not read it and the model lacks its effect; else it is no finding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unit.test_clean_models import BODY, save, statuses

CHECK = ("load.config",)
GROUPED = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
GEMMA = {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 16}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def written(folder: str, **changes: object) -> str:
    """The checkpoint with more in its config.json."""
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    return folder


def said(folder: str, **changes: object) -> str:
    return statuses(folder, CHECK, **changes)["load.config"]


def gemma2(folder: Path) -> str:
    return save(folder, "Gemma2ForCausalLM", "Gemma2Config", **GEMMA)


def test_a_doubled_key_of_equal_value(tmp_path):
    assert said(written(gemma2(tmp_path), hidden_act="gelu_pytorch_tanh")) == "passed"


def test_a_doubled_key_of_another_value(tmp_path):
    found = said(written(gemma2(tmp_path), hidden_act="silu"))
    assert found == "failed: config.json has keys that this transformers ignores: hidden_act"


def test_a_value_that_is_converted_on_load(tmp_path):
    folder = save(tmp_path, "Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA)
    assert said(written(folder, use_bidirectional_attention=True, sliding_window=16)) == "passed"


def test_a_value_that_does_not_arrive(tmp_path, monkeypatch):
    import transformers

    own = transformers.MistralForCausalLM.__init__

    def other(self, config, *args, **kwargs):
        config.sliding_window = 5
        own(self, config, *args, **kwargs)

    folder = save(tmp_path, "MistralForCausalLM", "MistralConfig", **{**GROUPED, "sliding_window": 16})
    monkeypatch.setattr(transformers.MistralForCausalLM, "__init__", other)
    assert said(folder) == "failed: the model was built with other values than config.json says: sliding_window"


def test_another_name_for_the_number_of_experts(tmp_path):
    folder = save(tmp_path, "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GROUPED, **EXPERTS)
    assert said(written(folder, num_local_experts=4)) == "passed"
    found = said(written(folder, num_local_experts=8))
    assert found == "passed" or "num_local_experts" in found


@pytest.mark.parametrize("known", [True, False])
def test_a_vocabulary_that_the_code_calls_otherwise(known, tmp_path):
    """ChatGLM's code reads `padded_vocab_size`; `vocab_size` beside it says the same, or is wrong."""
    import shutil

    from numerics_suite.subjects.fixtures import fixture_path

    shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "own")
    rows = json.loads(Path(tmp_path, "own", "config.json").read_text("utf-8"))["padded_vocab_size"]
    folder = written(str(tmp_path / "own"), vocab_size=rows if known else rows + 8)
    assert said(folder, trust_remote_code=True).startswith("passed" if known else "failed")


TAKES_ANY = """    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_hidden_layers = self.num_layers
        self.legacy_half_head = self.legacy_skip_head_init = False
"""


def takes_any_key(folder: Path) -> str:
    """ChatGLM whose config class declares no key, with those keys in its file that the model looks at."""
    import shutil

    from numerics_suite.subjects.fixtures import fixture_path

    shutil.copytree(fixture_path("chatglm-2023-tiny"), folder)
    code = folder / "configuration_chatglm.py"
    text = code.read_text("utf-8")
    code.write_text(text[: text.index("    def __init__(")] + TAKES_ANY, "utf-8")
    model = (folder / "modeling_chatglm.py").read_text("utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {"architectures", "auto_map", "model_type", "torch_dtype", "tie_word_embeddings", "pad_token_id"}
    config = {key: value for key, value in config.items() if key in kept or f"config.{key}" in model}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


def test_keys_that_a_class_takes_through_kwargs(tmp_path):
    folder = takes_any_key(tmp_path / "takes_any")
    assert said(folder, trust_remote_code=True) == "passed"
    found = said(written(folder, mlp_bias=True, intermediate_size=128), trust_remote_code=True)
    assert found == "failed: config.json has keys that this transformers ignores: intermediate_size, mlp_bias"
