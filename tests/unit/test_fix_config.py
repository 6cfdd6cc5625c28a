"""fix-config is tried on a copy of the files: what the release then builds is told in numbers, and the answers decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mutants.driver import MutantSession, release
from safetensors.torch import load_file, save_file

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.diagnosis.config_rewrites import in_words_that_are_read, of_stored_sizes, tied_as_stored
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.fixtures import fixture_path

LAYOUT5 = {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5}
OLD = ("rope_theta", "partial_rotary_factor", "torch_dtype")
TABLE = "transformer.rotary_pos_emb.inv_freq"


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a changed copy of a shipped checkpoint."""

    def make(name, *, config=None, drop=(), tensors=None):
        folder = tmp_path / tmp_path.name  # transformers keeps remote code by the folder's name
        shutil.copytree(fixture_path(name), folder)
        written = json.loads((folder / "config.json").read_text(encoding="utf-8")) | (config or {})
        kept = {key: value for key, value in written.items() if key not in drop}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def fix_config(folder: Path, check: str):
    """The finding of the check, and what trying fix-config showed; the folder is as it was."""
    before = {path.name: path.read_bytes() for path in folder.rglob("*.json")}
    settings = Settings(
        subjects=(str(folder),),
        precision=("fp32",),
        attn=("eager",),
        checks=(check,),
        trust_remote_code=True,
        max_examples=2,
        device="cpu",
        origins={"precision": "command line"},
    )
    session = MutantSession(settings)
    session.findings.tries_remedies = True
    (question,) = session.plan.questions
    result, trace = session.answer(question)
    assert result.finding is not None, f"{result.status} {result.reason} {trace}"
    assert before == {path.name: path.read_bytes() for path in folder.rglob("*.json")}
    (remedy,) = [remedy for remedy in result.finding.remedies if remedy.name == "fix-config"]
    return result.finding, remedy


def without_table(held):
    """The class computes it from the config, then."""
    del held[TABLE]


@pytest.mark.parametrize("check", ["load.config", "reference.oracle"])
@pytest.mark.skipif(release() >= (5,), reason="5.x reads its own layout")
def test_a_5x_layout_is_said_in_the_words_of_4x(checkpoint, check):
    folder = checkpoint("glm-tiny", config={"rope_parameters": LAYOUT5, "dtype": "bfloat16"}, drop=OLD)
    _, remedy = fix_config(folder, check)
    assert remedy.verified is True
    assert "with rope_theta 500000.0, partial_rotary_factor 0.5 in place of rope_parameters" in remedy.effect
    assert "builds rotary base 500000 (was 10000)" in remedy.effect


def test_a_5x_layout_is_said_in_the_word_of_code_that_knows_no_such_layout(checkpoint):
    folder = checkpoint(
        "chatglm-tiny", config={"rope_parameters": LAYOUT5}, drop=("rope_ratio",), tensors=without_table
    )
    finding, remedy = fix_config(folder, "load.config")
    assert finding.cause == "ignored-config"
    assert remedy.verified is True
    assert remedy.effect.startswith("with rope_ratio 50.0 in place of rope_parameters, transformers ")
    assert "builds rotary base 500000 (was 10000)" in remedy.effect
    assert "config keys that are ignored: 1 before, now 0" in remedy.effect


def test_a_file_that_is_read_then_and_computes_otherwise_all_the_same_is_not_verified(checkpoint):
    """The check of the file passes on the copy; the stored table of base 10,000 is what the model computes with."""
    folder = checkpoint("chatglm-tiny", config={"rope_parameters": LAYOUT5}, drop=("rope_ratio",))
    _, remedy = fix_config(folder, "load.config")
    assert remedy.verified is False
    assert "builds the same model: reference.oracle fails" in remedy.effect


def test_a_definition_that_the_wrong_words_hid_shows_the_cure_in_the_answers(checkpoint):
    def trained_so(held):
        count = len(held[TABLE])
        exact = torch.tensor([500_000.0 ** (-index / count) for index in range(count)], dtype=torch.float64)
        held[TABLE] = exact.to(held[TABLE].dtype)

    folder = checkpoint("chatglm-tiny", config={"rope_parameters": LAYOUT5}, drop=("rope_ratio",), tensors=trained_so)
    finding, remedy = fix_config(folder, "reference.oracle")
    assert finding.evidence["measured"] > 0.1
    assert remedy.verified is True
    assert "difference of the logits in float64: " in remedy.effect


@pytest.mark.parametrize(
    ("config", "drop", "check", "told"),
    [
        ({"kv_channels": 16}, ("head_dim",), "load.config", "head_dim 16 (was 128)"),
        ({"kv_channels": 16}, ("head_dim",), "load.complete", "stored tensors of another shape: 21 before, now 0"),
        ({}, ("head_dim",), "load.complete", "with head_dim 16, "),
        ({"layernorm_epsilon": 1e-3}, ("rms_norm_eps",), "load.config", "rms_norm_eps 0.001 (was 1.5625e-07)"),
        ({"kv_channels": 16}, (), "load.config", "without kv_channels, "),
        ({"tie_word_embeddings": True}, (), "load.tied", "tie_word_embeddings False (was True)"),
    ],
)
def test_words_and_sizes_that_the_release_reads(checkpoint, config, drop, check, told):
    if check == "load.tied" and release() < (5,):
        pytest.skip("4.x ties what the file ties, whatever is stored")
    _, remedy = fix_config(checkpoint("glm-tiny", config=config, drop=drop), check)
    assert remedy.verified is True, remedy.effect
    assert told in remedy.effect


@pytest.mark.parametrize(
    ("config", "verified", "told"),
    [
        ({"use_qk_norm": True}, None, "has no word for use_qk_norm"),
        ({"kv_channels": 32}, None, "config.json says head_dim 16 and kv_channels 32; which of them"),
        ({"use_qk_norm": True, "kv_channels": 16}, False, "has no word for use_qk_norm: still fails"),
    ],
)
def test_what_no_word_says_stays_with_its_reason(checkpoint, config, verified, told):
    _, remedy = fix_config(checkpoint("glm-tiny", config=config), "load.config")
    assert remedy.verified is verified
    assert told in remedy.effect


@pytest.mark.skipif(
    release() < (5,), reason="4.x ignores the second of them, and the file contradicts itself there too"
)
def test_two_layouts_that_contradict_each_other(checkpoint):
    finding, remedy = fix_config(checkpoint("glm-tiny", config={"rope_parameters": LAYOUT5}), "load.config")
    assert finding.evidence["measurement"] == "differing"
    assert remedy.verified is None
    assert "rope_theta 10000.0 (rope_theta) and 500000.0 (rope_parameters)" in remedy.effect


def test_without_a_definition_nothing_is_verified(checkpoint):
    _, remedy = fix_config(checkpoint("glm-tiny", config={"num_experts": 8, "kv_channels": 16}), "load.config")
    assert remedy.verified is None
    assert "no definition is at hand" in remedy.effect


# --- the words themselves ----------------------------------------------------------------------------------------------

OF_4X = {"rope_theta", "partial_rotary_factor", "rope_scaling", "torch_dtype"}
OF_5X = {*OF_4X, "rope_parameters", "dtype"}


def test_scaling_goes_where_4x_looks_for_it():
    raw = {"rope_parameters": {**LAYOUT5, "rope_type": "yarn", "factor": 4.0}, "dtype": "bfloat16"}
    found = in_words_that_are_read(raw, OF_4X, tuple(raw))
    assert found.config == {
        "rope_theta": 500_000.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "torch_dtype": "bfloat16",
    }
    assert found.meaning == {"rope_parameters": raw["rope_parameters"], "torch_dtype": "bfloat16"}, (
        "in the user's words"
    )


def test_the_older_words_become_a_section():
    raw = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    found = in_words_that_are_read(raw, {"rope_parameters"}, tuple(raw))
    assert found.config == {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}


@pytest.mark.parametrize(
    ("raw", "known", "reason"),
    [
        ({"rope_parameters": LAYOUT5}, {"rope_theta"}, "no word for partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": LAYOUT5}}, OF_4X, "a section for each type of layer"),
        ({"rope_parameters": {**LAYOUT5, "partial_rotary_factor": 0.25}}, {"rope_ratio"}, "partial_rotary_factor"),
        ({"rope_parameters": {**LAYOUT5, "rope_type": "yarn"}}, {"rope_ratio"}, "no word for rope_type"),
        ({"rope_parameters": LAYOUT5, "rope_ratio": 1}, {"rope_ratio"}, r"10000.0 \(rope_ratio\) and 500000.0"),
        ({"n_layers": 3}, OF_5X, "no word for n_layers"),
    ],
)
def test_a_rotary_section_without_a_word(raw, known, reason):
    with pytest.raises(NotApplicableError, match=reason):
        in_words_that_are_read(raw, known, tuple(raw))


def test_sizes_are_read_off_the_tensors_and_heads_that_the_file_names_are_its_own():
    stored = {
        "model.embed_tokens.weight": (700, 64),
        "model.layers.0.mlp.gate_up_proj.weight": (256, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
    }
    known = {"vocab_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads", "hidden_size"}
    raw = {"vocab_size": 768, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    found = of_stored_sizes(raw, known, object(), stored)
    assert found.written == {"vocab_size": 700, "head_dim": 16, "num_key_value_heads": 2}
    with pytest.raises(NotApplicableError, match="is at odds with the stored tensors"):
        of_stored_sizes({**raw, "vocab_size": 700, "head_dim": 8}, known, object(), stored)


def test_embeddings_are_tied_where_the_file_holds_one_matrix():
    head, both = "lm_head.weight", {"lm_head.weight": (3, 2)}
    assert tied_as_stored({}, {}, head=head, equal=False).written == {"tie_word_embeddings": True}
    assert tied_as_stored({}, both, head=head, equal=True).written == {"tie_word_embeddings": True}
    assert tied_as_stored({"tie_word_embeddings": True}, both, head=head, equal=False).written == {
        "tie_word_embeddings": False
    }
    with pytest.raises(NotApplicableError):
        tied_as_stored({}, both, head=head, equal=False)
