"""The defects that the suite was written for: each fails, with the cause named, and exit status 1."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preloaded import python

from mutants.article_checkpoints import (
    FIVE,
    NOBODY_INITIALISES,
    WEIGHT,
    changed,
    spoiled,
    with_homeless_tensor,
    with_renamed_trunk,
    without_weight,
)
from mutants.driver import MutantSession, answers, describe, failures, release
from numerics_suite.core.records import CheckResult, Finding
from numerics_suite.settings.tree import Settings

CLASSIFIER = "sequence-classification"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a changed copy of a shipped checkpoint."""

    # A name of its own: transformers keeps remote code in memory by the folder's name.
    return lambda name, **changes: changed(tmp_path / tmp_path.name, name, **changes)


def results_of(
    source: object, check: str, *, precision: str = "fp32", attn: str = "eager", **changes: Any
) -> list[CheckResult]:
    """What that check says of one cell of the subject, asked as the command asks it."""
    settings = Settings(
        subjects=(str(source),),
        precision=(precision,),
        attn=(attn,),
        checks=(check,),
        trust_remote_code=True,
        device="cpu",
        origins={"precision": "command line"},
        **changes,
    )
    return list(answers(MutantSession(settings)))


def finding_of(source: object, check: str, cause: str, **changes: Any) -> Finding:
    """The finding of that check, which must have that cause."""
    results = results_of(source, check, **changes)
    failed = failures(results)
    assert failed, describe(results)
    found = failed[0].finding
    assert found is not None
    assert found.cause == cause, describe(results)
    return found


def factory(name: str) -> str:
    """A model of `article_models`."""
    return f"factory:mutants.article_models:{name}"


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(checkpoint: Callable[..., Path], value: float) -> None:
    found = finding_of(checkpoint("glm-tiny", tensors=spoiled(value)), "load.finite", "corrupt-weights")
    assert found.module == "model.layers.1.mlp.down_proj"
    assert found.parameters == (WEIGHT,)
    assert "reload-weights" in [remedy.name for remedy in found.remedies]


def test_a_weight_beyond_float16(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("glm-tiny", tensors=spoiled(1e5))
    assert not failures(results_of(folder, "load.finite", precision="bf16"))
    assert finding_of(folder, "load.finite", "overflow", precision="fp16").parameters == (WEIGHT,)


def test_a_tensor_that_is_missing(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("glm-tiny", tensors=without_weight)
    found = finding_of(folder, "load.complete", "missing-weights")
    assert found.parameters == (WEIGHT,)


def test_a_tensor_without_a_place(checkpoint: Callable[..., Path]) -> None:
    found = finding_of(checkpoint("glm-tiny", tensors=with_homeless_tensor), "load.complete", "lost-weights")
    assert found.parameters == ("model.layers.1.mlp.down.weight",)


def test_a_revision_whose_trunk_was_renamed(checkpoint: Callable[..., Path]) -> None:
    found = finding_of(checkpoint("glm-tiny", tensors=with_renamed_trunk), "load.complete", "missing-weights")
    assert (
        "stored under other names (language_model.model.embed_tokens.weight for model.embed_tokens.weight)"
        in found.title
    )
    assert len(found.parameters) == found.evidence["measured"] > 20


def test_tied_weights_untied() -> None:
    finding_of(factory("untied"), "load.tied", "untied-weights")


# --- config ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(release() >= (5,), reason="5.x reads its own layout")
def test_a_5x_layout_opened_by_4x(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("glm-tiny", **FIVE)
    assert "rope_parameters" in finding_of(folder, "load.config", "ignored-config").parameters
    if release() >= (4, 47):
        finding_of(folder, "reference.oracle", "semantic-error")


@pytest.mark.skipif(release() < (5,), reason="4.x ignores this layout, as the test above shows")
def test_a_5x_layout_opened_by_5x(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("glm-tiny", **FIVE)
    assert not failures(results_of(folder, "load.config"))
    assert not failures(results_of(folder, "reference.oracle"))


def test_a_key_that_this_release_ignores(checkpoint: Callable[..., Path]) -> None:
    found = finding_of(checkpoint("glm-tiny", config={"use_qk_norm": True}), "load.config", "ignored-config")
    assert found.parameters == ("use_qk_norm",)
    assert "use_qk_norm" in found.title


@pytest.mark.skipif(release() >= (4, 47), reason="later releases honour partial_rotary_factor")
def test_a_rotary_factor_that_4_46_ignores(checkpoint: Callable[..., Path]) -> None:
    finding_of(checkpoint("glm-tiny", config={"partial_rotary_factor": 0.25}), "reference.oracle", "semantic-error")


# --- the new head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_head_that_stays_uninitialised(checkpoint: Callable[..., Path], precision: str) -> None:
    folder = checkpoint("chatglm-tiny", config={"legacy_skip_head_init": True})
    found = finding_of(folder, "load.head-init", "uninitialised-parameters", precision=precision, task=CLASSIFIER)
    assert found.module == "classifier_head"
    assert "init-head" in [remedy.name for remedy in found.remedies]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_init_weights_that_does_nothing(checkpoint: Callable[..., Path], precision: str) -> None:
    folder = checkpoint("chatglm-tiny", code=NOBODY_INITIALISES)
    found = finding_of(folder, "load.head-init", "uninitialised-parameters", precision=precision, task=CLASSIFIER)
    assert found.module == "classifier_head"


def test_a_head_a_thousand_times_too_large(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("chatglm-tiny", config={"initializer_range": 20.0})
    found = finding_of(folder, "load.head-init", "bad-initialisation", task=CLASSIFIER)
    assert found.module == "classifier_head"


def test_a_new_head_that_is_well(checkpoint: Callable[..., Path]) -> None:
    assert not failures(results_of(checkpoint("chatglm-tiny"), "load.head-init", task=CLASSIFIER))


def test_a_head_in_float16_under_a_bfloat16_body(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("chatglm-tiny-classifier", config={"legacy_head_dtype": "float16"})
    found = finding_of(folder, "load.dtype", "low-precision-section", precision="bf16")
    assert found.module == "classifier_head"
    assert not failures(results_of(folder, "load.dtype", precision="fp16"))


# --- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("ids_through_bf16", "wrong-input-dtype"),
        ("ids_as_floats", "wrong-input-dtype"),
        ("mask_as_floats", "wrong-input-dtype"),
        ("ids_out_of_range", "out-of-range-input"),
    ],
)
def test_a_batch_that_was_cast(name: str, cause: str) -> None:
    finding_of(factory(name), "inputs.pipeline", cause, precision="bf16")


# --- values ------------------------------------------------------------------------------------------------------


def test_a_norm_that_overflows_in_fp16() -> None:
    """Its squares are infinite, so its output is zero: finite, and wrong."""
    found = finding_of(factory("norm_without_fp32"), "reference.local", "low-precision-section", precision="fp16")
    assert found.module == "model.layers.0.input_layernorm"
    assert not failures(results_of(factory("norm_without_fp32"), "reference.local", precision="fp32"))


def test_a_product_beyond_fp16() -> None:
    found = finding_of(factory("products_beyond_fp16"), "forward.finite", "overflow", precision="fp16")
    assert found.module == "model.layers.1.mlp"
    assert not failures(results_of(factory("products_beyond_fp16"), "forward.finite", precision="bf16"))
    finding_of(factory("products_beyond_fp16"), "forward.headroom", "overflow", precision="fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_softmax_over_a_fully_masked_row(precision: str) -> None:
    found = finding_of(factory("fully_masked_row"), "forward.finite", "fully-masked-row", precision=precision)
    assert found.module == "model.layers.1.self_attn"
    assert found.op is not None
    assert "softmax" in found.op


def test_zero_by_zero_at_a_masked_token() -> None:
    found = finding_of(factory("zero_by_zero_at_padding"), "forward.finite", "invalid-operation")
    assert found.module == "model.embed_tokens"


def test_the_reciprocal_of_zero_at_a_masked_token() -> None:
    found = finding_of(factory("reciprocal_at_padding"), "forward.finite", "invalid-operation")
    assert found.module == "model.layers.0.input_layernorm"


def test_a_pooled_token_that_is_padding() -> None:
    finding_of(factory("pooled_padding"), "forward.pooling", "wrong-pooling")


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm-tiny", "glm-tiny-classifier", "chatglm-tiny-classifier"])
def test_adamw_in_pure_fp16(name: str) -> None:
    found = finding_of(f"fixture:{name}", "train.finite", "optimizer-underflow", precision="pure-fp16")
    assert found.step is not None
    assert found.step <= 2
    assert "larger-optimizer-eps" in [remedy.name for remedy in found.remedies]


def test_gradients_that_explode_without_clipping() -> None:
    changes = {"optimizer": "sgd", "lr": 10.0, "steps": 10}
    found = finding_of("fixture:glm-tiny", "train.clip", "divergence", **changes)
    assert "clip-grad-norm" in [remedy.name for remedy in found.remedies]


def test_a_detached_branch() -> None:
    found = finding_of(factory("detached_branch"), "train.grad-flow", "dead-gradient")
    assert any("layers.1.mlp" in name for name in found.parameters)


@pytest.mark.parametrize(
    ("name", "cause"), [("gradient_never_finite", "invalid-operation"), ("gradient_beyond_any_scale", "overflow")]
)
def test_a_loss_scale_that_never_recovers(name: str, cause: str) -> None:
    """The scaler skips in silence; what it skips, and by what it breaks, is named."""
    found = finding_of(factory(name), "train.amp", "loss-scaling", precision="amp-fp16")
    assert found.evidence["the gradient breaks by"] == cause
    assert float(found.evidence["loss scale"]) < 1
    assert "scale never recovers" in found.title
    assert found.module is not None
    assert found.module.startswith("model.layers.1.mlp")


# --- through the command -----------------------------------------------------------------------------------------


def _command(*arguments: str, cwd: Path) -> tuple[int, dict[str, Any]]:
    out = cwd / "out.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [python(), "-m", "numerics_suite", "check", *arguments, "--attn", "eager", "--json", str(out), "--quiet"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_command_on_a_nan_weight(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("glm-tiny", tensors=spoiled(float("nan")))
    status, results = _command(str(folder), "--precision", "bf16", "--checks", "load.*", cwd=tmp_path)
    assert (status, results["verdict"]) == (1, "fail")
    (row,) = [row for row in results["checks"] if row["status"] == "failed" and row["check"] == "load.finite"]
    assert row["finding"]["cause"] == "corrupt-weights"


def test_the_command_on_an_uninitialised_head(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("chatglm-tiny", config={"legacy_skip_head_init": True})
    status, results = _command(
        str(folder),
        "--task",
        CLASSIFIER,
        "--trust-remote-code",
        "--precision",
        "bf16",
        "--checks",
        "load.head-init",
        cwd=tmp_path,
    )
    assert (status, results["verdict"]) == (1, "fail")
    assert [row["finding"]["cause"] for row in results["checks"]] == ["uninitialised-parameters"]


@pytest.mark.slow
def test_the_command_on_a_clean_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    status, results = _command(str(checkpoint("glm-tiny")), "--precision", "bf16", "--checks", "load.*", cwd=tmp_path)
    assert (status, results["verdict"]) == (0, "pass")
