"""A config or weights of which no model comes: the one line names the file, the key at fault and the exception."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from numerics_suite.core.errors import BadInputError, CheckError, UnusableError
from numerics_suite.subjects import load as loading
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.subjects.load import load
from numerics_suite.subjects.resolve import resolve


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "mine"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def why(folder: Path) -> str:
    with pytest.raises(UnusableError) as caught:
        load(resolve(str(folder)), dtype="float32", attn="eager")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_key_without_which_a_model_can_be_built_is_named(checkpoint: Path) -> None:
    edit(checkpoint, hidden_act="no-such-function")
    told = why(checkpoint)
    assert told.startswith(f"{checkpoint / 'config.json'}: hidden_act is 'no-such-function', with which transformers ")
    assert "cannot build a Glm4ForCausalLM (KeyError: 'no-such-function'); correct it or leave it out" in told


def test_two_keys_at_fault_name_the_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.glm4 import modeling_glm4

    own = modeling_glm4.Glm4Attention.__init__

    def refusing(self: object, config: object, *args: object, **kwargs: object) -> None:
        if "told" in (getattr(config, "first", None), getattr(config, "second", None)):
            message = "told cannot be"
            raise ValueError(message)
        own(self, config, *args, **kwargs)

    monkeypatch.setattr(modeling_glm4.Glm4Attention, "__init__", refusing)
    edit(checkpoint, first="told", second="told")
    told = why(checkpoint)
    assert told.startswith(f"{checkpoint / 'config.json'}: transformers ")
    assert "cannot build a Glm4ForCausalLM from it (ValueError: told cannot be); compare it with" in told


def test_weights_that_cannot_be_loaded_are_told_from_a_config(checkpoint: Path) -> None:
    subject = resolve(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        UnusableError,
        match=r"can build a Glm4ForCausalLM from its config.json but cannot load these weights: .*; fetch",
    ):
        load(subject, dtype="float32", attn="eager")


def test_a_fixture_that_cannot_be_loaded_is_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        message = "the release cannot"
        raise KeyError(message)

    subject = resolve("fixture:glm4-tiny")
    monkeypatch.setattr(loading, "_from_folder", broken)
    with pytest.raises(CheckError, match="could not be loaded by transformers") as caught:
        load(subject, dtype="float32", attn="eager")
    assert not isinstance(caught.value, UnusableError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, and the weights hold 33 tensors"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, which makes a model of 3,277,000,000,000 numbers"),
        (
            {"intermediate_size": 2**70},
            "intermediate_size is 1180591620717411303424, and no model can be built from it",
        ),
        ({"hidden_size": -64}, "hidden_size is -64, and no model can be built from it"),
    ],
)
def test_sizes_that_no_memory_holds(checkpoint: Path, changes: dict[str, object], words: str) -> None:
    edit(checkpoint, **changes)
    with pytest.raises(BadInputError) as caught:
        resolve(str(checkpoint))
    assert words in str(caught.value)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 40}, {"intermediate_size": 4096}, {"head_dim": 32}, {}])
def test_sizes_that_are_a_finding_are_loaded(checkpoint: Path, changes: dict[str, object]) -> None:
    edit(checkpoint, **changes)
    loaded = load(resolve(str(checkpoint)), dtype="float32", attn="eager")
    assert bool(loaded.missing or loaded.mismatched) == bool(changes)
