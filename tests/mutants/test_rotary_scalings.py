"""Is a rotary scaling that a model does not follow caught at its rotary embedding, and one that it follows let alone?

The catalogue's mutants are made of the shipped checkpoints, none of which is scaled; these are made of copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mutants.article_checkpoints import changed
from mutants.catalogue import ORACLE
from mutants.driver import MutantSession, answers, describe
from mutants.editing import on
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import CheckResult
from numerics_suite.definitions import exact_inv_freq
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.compat import release

TABLE = "model.rotary_emb"
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.25, 2.0, 2.5],
    "long_factor": [1.5, 3.0, 6.0, 12.5],
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 48},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        "max_position_embeddings": 160,
    },
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}},
    "longrope": {"rope_scaling": LONGROPE, "max_position_embeddings": 128},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfollowed:
    """A way not to follow a scaling.

    Attributes:
        scaling: key of `CONFIGS`.
        apply: changes the rotary embedding of a freshly loaded model.
        why: the mistake in words.
    """

    scaling: str
    apply: Callable[[Any], None]
    why: str


def table_of(**section: Any) -> Callable[[Any], None]:
    """Puts in the table of a config with another section, and leaves the scale alone."""

    def change(module: Any) -> None:
        sizes = {"head_dim": 16, "max_position_embeddings": 160}
        exact = exact_inv_freq("glm4", sizes | ({"rope_scaling": section} if section else {}))
        module.inv_freq = exact.float().to(module.inv_freq.device)
        module.original_inv_freq = module.inv_freq.clone()

    return change


def with_attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


def sets_exchanged(module: Any) -> None:
    section = getattr(module.config, "rope_parameters", None) or module.config.rope_scaling
    section["short_factor"], section["long_factor"] = section["long_factor"], section["short_factor"]
    plain = exact_inv_freq("glm4", {"head_dim": 16}).float()
    module.inv_freq = plain / torch.tensor(section["short_factor"])
    module.original_inv_freq = module.inv_freq.clone()


YARN = CONFIGS["yarn"]["rope_scaling"]
UNFOLLOWED = (
    Unfollowed(scaling="linear", apply=table_of(), why="the factor is ignored"),
    Unfollowed(scaling="linear", apply=table_of(rope_type="linear", factor=2.001), why="a factor by a hair off"),
    Unfollowed(scaling="dynamic", apply=with_attribute("rope_type", "default"), why="the base never grows"),
    Unfollowed(
        scaling="dynamic",
        apply=table_of(rope_type="linear", factor=2.0),
        why="scaled before the context is exceeded, as linear scaling is",
    ),
    Unfollowed(
        scaling="yarn",
        apply=table_of(**YARN | {"factor": 160 / 128}),
        why="the factor is ignored for the ratio of the lengths, as transformers 4.55 did (transformers#38224)",
    ),
    Unfollowed(scaling="yarn", apply=with_attribute("attention_scaling", 1.0), why="the attention factor is dropped"),
    Unfollowed(scaling="yarn", apply=table_of(**YARN | {"truncate": False}), why="the ends of the ramp are not moved"),
    Unfollowed(scaling="yarn", apply=table_of(**YARN | {"beta_slow": 3}), why="the ramp ends elsewhere"),
    Unfollowed(scaling="llama3", apply=table_of(), why="the factor is ignored"),
    Unfollowed(
        scaling="llama3",
        apply=table_of(**LLAMA3 | {"original_max_position_embeddings": 128, "high_freq_factor": 1.000001}),
        why="a step in place of the smooth part",
    ),
    Unfollowed(scaling="longrope", apply=with_attribute("rope_type", "default"), why="the short factors, always"),
    Unfollowed(scaling="longrope", apply=sets_exchanged, why="the long factors for short sequences and the reverse"),
    Unfollowed(
        scaling="longrope", apply=with_attribute("attention_scaling", 1.0), why="the attention factor is dropped"
    ),
)


def asked(folder: Path, scaling: str, apply: Callable[[Any], None] | None = None) -> CheckResult:
    """What `reference.oracle` says of a copy of `glm4-tiny` with that scaling."""
    if release() < (5, 0):
        pytest.skip("the definition is the newest release's meaning")
    changed(folder / "copy", "glm4-tiny", config=CONFIGS[scaling])
    settings = Settings(
        subjects=(str(folder / "copy"),),
        precision=("fp32",),
        attn=("eager",),
        checks=(ORACLE,),
        device="cpu",
        diagnose=False,
        origins={"precision": "command line"},
    )
    (result,) = answers(MutantSession(settings, on(TABLE, apply) if apply else None), (ORACLE,))
    return result


@pytest.mark.parametrize("scaling", CONFIGS)
def test_a_scaling_that_is_followed_is_let_alone(scaling: str, tmp_path: Path) -> None:
    result = asked(tmp_path, scaling)
    assert result.status == "passed", describe([result])
    measured = {name: result.measurements[name] for name in ("rotary-scale", "true-logits", "true-gradient")}
    assert all(value <= AGREED for value in measured.values()), measured


@pytest.mark.parametrize("mutant", UNFOLLOWED, ids=lambda mutant: f"{mutant.scaling}: {mutant.why}")
def test_a_scaling_that_is_not_followed_is_placed(mutant: Unfollowed, tmp_path: Path) -> None:
    result = asked(tmp_path, mutant.scaling, mutant.apply)
    assert result.status == "failed", describe([result])
    assert result.finding is not None
    assert (result.finding.module, result.finding.cause) == (TABLE, "semantic-error")
