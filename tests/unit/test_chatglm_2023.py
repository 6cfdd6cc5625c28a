"""ChatGLM in the layout of 2023: states `[sequence, batch, …]`, a rotary buffer that nobody reads, a head with a dtype of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from unit.test_clean_models import statuses

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.fixtures import fixture_names, fixture_path
from numerics_suite.subjects.validate import check_model_type

CAUSAL, CLASSIFIER = "chatglm-2023-tiny", "chatglm-2023-tiny-classifier"
TRUSTED = {"trust_remote_code": True, "diagnose": False}
LAWS = ("forward.*", "reference.end-to-end", "reference.gradient")


def changed(folder: Path, name: str, code: tuple[str, str] = ("", ""), **config: object) -> str:
    """A changed copy of the fixture: keys of its config, and a text of its code that stands there once."""
    # transformers keeps remote code in memory by the folder's name.
    folder /= folder.name
    shutil.copytree(fixture_path(name), folder)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, **config}), "utf-8")
    path = folder / "modeling_chatglm.py"
    source = path.read_text("utf-8")
    assert not code[0] or source.count(code[0]) == 1
    path.write_text(source.replace(*code) if code[0] else source, "utf-8")
    return str(folder)


def failed(found: dict[str, str]) -> dict[str, str]:
    return {check: said for check, said in found.items() if said not in {"passed", "skipped"}}


def test_it_is_checked_where_it_is_named():
    assert CAUSAL not in fixture_names()
    assert {CAUSAL, CLASSIFIER} < set(fixture_names(default=False))


@pytest.mark.parametrize("name", [CAUSAL, CLASSIFIER])
def test_laws_read_its_states(name):
    found = statuses(f"fixture:{name}", LAWS)
    assert failed(found) == {}
    assert found["forward.pooling" if name == CLASSIFIER else "forward.cache"] == "passed"


@pytest.mark.parametrize("name", [CAUSAL, CLASSIFIER])
def test_the_definition_and_the_files(name):
    """In float32, where the float16 buffer is far from the table that is meant."""
    found = statuses(f"fixture:{name}", ("load.*", "reference.oracle"))
    assert failed(found) == {}
    assert found["reference.oracle"] == "passed"


def test_another_base_is_seen_in_the_table_of_the_call(tmp_path):
    folder = changed(tmp_path, CAUSAL, ("10000.0 * config.rope_ratio", "20000.0 * config.rope_ratio"))
    said = statuses(folder, ("reference.oracle",), **TRUSTED)["reference.oracle"]
    assert "rotary" in said


def test_a_wrong_part_is_named_in_that_layout(tmp_path):
    folder = changed(tmp_path, CAUSAL, ("F.silu(gate)", "F.gelu(gate)"))
    said = statuses(folder, ("reference.oracle",), **TRUSTED)["reference.oracle"]
    assert "first in transformer.encoder.layers.0.mlp" in said


def test_neighbours_that_leak_along_the_batch(tmp_path):
    """Along the second dimension of a state, which is the batch here."""
    leak = ("states = states + change\n", "states = states + change + 0.1 * states.mean(1, keepdim=True)\n")
    folder = changed(tmp_path, CLASSIFIER, leak)
    said = statuses(folder, ("forward.batch",), **TRUSTED)["forward.batch"]
    assert said.startswith("failed: ")


def test_a_row_that_is_not_the_last(tmp_path):
    folder = changed(tmp_path, CLASSIFIER, ("body.last_hidden_state[-1]", "body.last_hidden_state[0]"))
    said = statuses(folder, ("forward.pooling",), **TRUSTED)["forward.pooling"]
    assert said.startswith("failed: the classifier reads another position than the last real token")


@pytest.mark.slow
def test_decoding_that_is_wrong_with_positions_too(tmp_path):
    lost = (
        "torch.cat((past[0], key)), torch.cat((past[1], value))",
        "torch.cat((past[0], key)), torch.cat((value, past[1]))",
    )
    folder = changed(tmp_path, CAUSAL, lost)
    said = statuses(folder, ("forward.cache",), **TRUSTED)["forward.cache"]
    assert said.startswith("failed: decoding with the cache differs")


def test_vocab_size_is_read_where_no_other_word_counts(tmp_path):
    """The fixture's own `vocab_size` is a note that passes above; rows that nobody asked for are a finding."""
    folder = changed(tmp_path, CAUSAL, ("config.padded_vocab_size, config.hidden_size)", "1000, config.hidden_size)"))
    said = statuses(folder, ("load.config",), **TRUSTED)["load.config"]
    assert "vocab_size" in said


@pytest.mark.parametrize("key", ["position_encoding_2d", "inner_hidden_size", "gmask_token_id"])
def test_chatglm_6b_is_refused_with_its_reason(key, tmp_path):
    with pytest.raises(BadInputError, match=r"ChatGLM-6B of 2023.*prefix mask"):
        check_model_type(tmp_path, {"model_type": "chatglm", key: 1}, trust_remote_code=True)


def test_where_states_are_turned_is_seen_from_one_row():
    from transformers import AutoModelForSequenceClassification

    from numerics_suite.engine.layout import STATES, sequence_first
    from numerics_suite.engine.rotary import reads_table
    from numerics_suite.subjects.remote_code import private_modules

    found, read = {}, {}
    with private_modules():
        for name in (CLASSIFIER, "chatglm-tiny-classifier"):
            model = AutoModelForSequenceClassification.from_pretrained(fixture_path(name), trust_remote_code=True)
            found[name], read[name] = sequence_first(model, output_hidden_states=True), reads_table(model)
    turned = found[CLASSIFIER]
    assert {STATES, "transformer", "transformer.embedding", "transformer.encoder.layers.0:input"} <= turned
    assert "transformer.embedding.word_embeddings" not in turned
    assert found["chatglm-tiny-classifier"] == frozenset()
    assert read == {CLASSIFIER: False, "chatglm-tiny-classifier": True}
    assert torch.get_default_dtype() is torch.float32


def test_code_whose_prepared_step_says_nothing_of_a_cache(tmp_path):
    """As ChatGLM2's: what it hands on has no `use_cache`, which its config then decides. The cache is asked all the same."""
    folder = changed(tmp_path, CAUSAL, ('            "use_cache": use_cache,\n', ""))
    assert statuses(folder, ("forward.cache",), **TRUSTED)["forward.cache"] == "passed"
