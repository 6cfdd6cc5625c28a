"""`--layers`: a shallower model of the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from numerics_suite.cli.main import main
from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.layers import chosen, shallower_config, shallower_name
from numerics_suite.subjects.load import load
from numerics_suite.subjects.resolve import resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fixtures"


@pytest.mark.parametrize(
    ("wanted", "count", "kept"),
    [("first:2", 5, (0, 1)), ("first:5", 5, (0, 1, 2, 3, 4)), ("every:2", 5, (0, 2, 4)), ("every:5", 5, (0,))],
)
def test_which_layers_are_kept(wanted: str, count: int, kept: tuple[int, ...]) -> None:
    assert chosen(wanted, count) == kept
    with pytest.raises(BadInputError, match=f"--layers {wanted.partition(':')[0]}:9: the model has {count} layers"):
        chosen(f"{wanted.partition(':')[0]}:9", count)


def test_names_and_config_follow_the_layers() -> None:
    assert shallower_name("model.layers.4.mlp.experts.3.up_proj.weight", (0, 2, 4)) == (
        "model.layers.2.mlp.experts.3.up_proj.weight"
    )
    assert shallower_name("transformer.encoder.layers.1.mlp.dense_h_to_4h.weight", (0, 2)) is None
    assert shallower_name("model.embed_tokens.weight", (0,)) == "model.embed_tokens.weight"
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "first_k_dense_replace": 2,
        "eos_token_id": [1, 2, 3, 4],
    }
    changed = shallower_config(config, "num_hidden_layers", (0, 3))
    assert changed == {
        "num_hidden_layers": 2, "layer_types": ["a", "d"], "first_k_dense_replace": 1, "eos_token_id": [1, 2, 3, 4]
    }  # fmt: skip


def blocks_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the blocks, and their name in it."""
    return next(
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
    )


@pytest.mark.parametrize(("fixture", "wanted"), [("glm4-tiny", "first:1"), ("chatglm-tiny", "every:2")])
def test_it_computes_what_the_whole_model_does_without_the_others(fixture: str, wanted: str) -> None:
    whole = load(resolve(f"fixture:{fixture}"), dtype="float32", attn="eager").model
    owner, name = blocks_of(whole)
    blocks = getattr(owner, name)
    kept = chosen(wanted, len(blocks))
    assert 0 < len(kept) < len(blocks)
    setattr(owner, name, nn.ModuleList(blocks[index] for index in kept))
    for key in ("num_layers", "num_hidden_layers"):
        for each in (owner, whole.config):
            if hasattr(each, key):
                setattr(each, key, len(kept))
    subject = resolve(f"fixture:{fixture}", layers=wanted)
    assert (subject.id, subject.kind) == (fixture, "fixture")
    assert f"--layers {wanted}: {len(kept)} of {len(blocks)} layers, made of the same weights" in subject.notes
    loaded = load(subject, dtype="float32", attn="eager")
    assert (loaded.missing, loaded.unexpected) == ((), ())
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected, found = (m(input_ids=ids, use_cache=False).logits for m in (whole, loaded.model))
    assert torch.equal(expected, found)


def test_code_in_the_cache_is_never_trusted_for_its_place(cache: Path) -> None:
    first = resolve("fixture:chatglm-tiny", layers="first:1")
    assert first.trust_remote_code
    assert first.path is not None
    assert first.path.parent == cache
    code = next(first.path.glob("modeling*.py"))
    code.write_text("raise SystemExit\n")
    again = resolve("fixture:chatglm-tiny", layers="first:1")
    assert again.digest == first.digest
    assert code.read_text() != "raise SystemExit\n"


def test_a_run_says_so(tmp_path: Path) -> None:
    arguments = ("--precision", "fp32", "--attn", "sdpa", "--checks", "load.complete,load.config,reference.oracle")
    out = tmp_path / "out.json"
    assert (
        main(
            ["check", "fixture:glm4-tiny", "--layers", "first:1", *arguments, "-n", "0", "--json", str(out), "--quiet"]
        )
        == 0
    )
    document = json.loads(out.read_text(encoding="utf-8"))
    assert {entry["status"] for entry in document["checks"]} == {"passed"}
    assert any("glm4-tiny: --layers first:1: 1 of" in note for note in document["notes"])
    assert document["settings"]["layers"] == "first:1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fixture:glm4-tiny", "--layers", "first:0"), "--layers: must be first:N or every:N with N of at least 1, not 'first:0'"),
        (("fixture:glm4-tiny", "--layers", "last:2"), "--layers: must be first:N or every:N"),
        (("fixture:glm4-tiny", "--layers", "first:50"), "--layers first:50: the model has"),
        (("factory:torch.nn:Identity", "--layers", "first:1"), "has no checkpoint files to make a shallower model of"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_shallower_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(["check", *arguments]) == 4
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
