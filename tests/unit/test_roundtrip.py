"""What a save and a load change is seen, on the first trip or the second: weights, config, answers; code comes along."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import nn
from unit.test_clean_models import BODY, save, statuses

from numerics_suite.subjects.fixtures import fixture_path

CHECK = ("load.roundtrip",)
GROUPED = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "sliding_window": 32}


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path, "MistralForCausalLM", "MistralConfig", **GROUPED)


def test_nothing_is_lost(folder):
    assert statuses(folder, CHECK) == {"load.roundtrip": "passed"}


@pytest.mark.parametrize("trip", [1, 2])
def test_a_window_that_halves_as_it_is_saved(folder, monkeypatch, trip):
    import transformers

    own = transformers.MistralForCausalLM.save_pretrained
    saves = []

    def halving(self, path, *args, **kwargs):
        saves.append(path)
        self.config.sliding_window //= 2 if len(saves) == trip else 1
        own(self, path, *args, **kwargs)
        self.config.sliding_window *= 2 if len(saves) == trip else 1

    monkeypatch.setattr(transformers.MistralForCausalLM, "save_pretrained", halving)
    found = statuses(folder, CHECK)
    assert found == {"load.roundtrip": "failed: saving and loading again changes: config.sliding_window"}
    # The trips are saved to a `Path`; remedies that are tried save elsewhere.
    assert sum(isinstance(path, Path) for path in saves) == trip


def test_a_table_that_is_built_anew(folder, monkeypatch):
    """Neither stored nor in the config: only the answers tell."""
    import transformers

    own = transformers.MistralForCausalLM.__init__
    built = []

    def drifting(self, *args, **kwargs):
        own(self, *args, **kwargs)
        built.append(self)
        if len(built) > 1:
            self.register_forward_pre_hook(_stretch)

    def _stretch(model: nn.Module, _: object) -> None:
        model.model.rotary_emb.attention_scaling = 1.5

    monkeypatch.setattr(transformers.MistralForCausalLM, "__init__", drifting)
    assert statuses(folder, CHECK) == {"load.roundtrip": "failed: saving and loading again changes: answers"}


def test_a_head_that_comes_back_in_another_dtype(folder, monkeypatch):
    """As ChatGLM's does up to 4.57: a new head is made in the dtype asked for, a stored one in the class's own."""
    import transformers

    own = transformers.MistralForCausalLM.from_pretrained.__func__
    loads = []

    def halving(cls, *args, **kwargs):
        loaded = own(cls, *args, **kwargs)
        loads.append(loaded)
        if len(loads) > 1:
            loaded[0].lm_head.half()
        return loaded

    monkeypatch.setattr(transformers.MistralForCausalLM, "from_pretrained", classmethod(halving))
    found = statuses(folder, CHECK, diagnose=False)
    assert found == {"load.roundtrip": "failed: in another dtype after saving and loading: lm_head.weight"}


def test_code_comes_along(monkeypatch):
    """Whatever the release leaves behind of the checkpoint's own code."""
    import transformers

    own = transformers.PreTrainedModel.save_pretrained

    def bare(self, path, *args, **kwargs):
        own(self, path, *args, **kwargs)
        for file in path.glob("*.py"):
            file.unlink()

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", bare)
    assert statuses("fixture:chatglm-tiny", CHECK) == {"load.roundtrip": "passed"}


def test_code_of_another_folder_of_the_same_name_takes_no_part(tmp_path):
    """transformers registers a class for a config's class and prefers it from then on."""
    asked = ("forward.finite", "load.roundtrip")
    sound, broken = (shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / name / "model") for name in ("a", "b"))
    code = broken / "modeling_chatglm.py"
    logits = "self.transformer.output_layer(body.last_hidden_state[:, -logits_to_keep:])"
    text = code.read_text(encoding="utf-8")
    assert text.count(logits) == 1
    code.write_text(text.replace(logits, f'{logits} * float("nan")'), encoding="utf-8")
    for _ in range(2):
        found = statuses(str(sound), asked, trust_remote_code=True, diagnose=False)
        assert found == dict.fromkeys(asked, "passed")
        found = statuses(str(broken), asked, trust_remote_code=True, diagnose=False)
        assert found["forward.finite"].startswith("failed")
        assert found["load.roundtrip"] == "passed"
