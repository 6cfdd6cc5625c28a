"""Is each rotary scaling what its publication says, in both layouts, and does the oracle see a model that scales otherwise?"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from mpmath import mp, mpf
from unit.test_definitions import CONFIG, build, compare, make_batch, stored

from numerics_suite.definitions import (
    OracleUnavailable,
    exact_inv_freq,
    exact_rotary,
    rotary_boundary,
    rotary_budget,
    rotary_roundoffs,
)
from numerics_suite.definitions.trace import first_difference, turn_scale
from numerics_suite.devices.condition import Condition
from numerics_suite.devices.precisions import precision
from numerics_suite.engine.rotary import longest_of_one_table, table_at_length
from numerics_suite.engine.runner import Runner
from numerics_suite.subjects.compat import release

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS = (None, 16, 32, 33, 40, 200)
PAIRS = 4
SHORT, LONG = [1.0, 1.25, 2.0, 2.5], [1.5, 3.0, 6.0, 12.5]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 32,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn-not-truncated": YARN | {"truncate": False},
    "yarn-with-ends": YARN | {"beta_fast": 8, "beta_slow": 2},
    "yarn-with-attention-factor": YARN | {"attention_factor": 1.5},
    "yarn-with-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.5},
    "yarn-of-the-lengths": YARN | {"factor": None},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "longrope-with-attention-factor": LONGROPE | {"attention_factor": 1.25},
    "longrope-of-the-lengths": LONGROPE | {"factor": None},
}
SIZES = {"max_position_embeddings": 32, "head_dim": 16, "rope_theta": 500.0}
"""A small base, so that some pairs turn often in 32 positions and some never do; half of 16 numbers is rotated."""


def sizes(name: str) -> dict[str, Any]:
    """Of a config with that section; the ratio of its lengths is another one than its factor."""
    return SIZES | ({} if SECTIONS[name]["rope_type"] == "dynamic" else {"max_position_embeddings": 160})


def layout4(name: str, section: dict[str, Any] | None = None) -> dict[str, Any]:
    return sizes(name) | {"partial_rotary_factor": 0.5, "rope_scaling": section or SECTIONS[name]}


def layout5(name: str) -> dict[str, Any]:
    """The same in the words of transformers 5."""
    own = sizes(name)
    return {
        "head_dim": own["head_dim"],
        "max_position_embeddings": own["max_position_embeddings"],
        "rope_parameters": SECTIONS[name] | {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    }


# --- Each formula once more, to 40 digits, with the paper's words for it. ---


def plain(pair: int) -> Any:
    return mpf(500) ** (-mpf(2 * pair) / 8)


def by_paper(name: str, length: int | None) -> tuple[list[Any], Any]:
    """Frequencies and scale of one section."""
    with mp.workdps(40):
        section = SECTIONS[name]
        kind = section["rope_type"]
        factor = mpf(160) / 32 if section.get("factor") is None else mpf(section["factor"])
        return {
            "linear": lambda: ([plain(i) / factor for i in range(PAIRS)], 1),
            "dynamic": lambda: (ntk(factor, length), 1),
            "yarn": lambda: (yarn(section, factor), temperature(section, factor)),
            "llama3": lambda: ([wave(section, plain(i)) for i in range(PAIRS)], 1),
            "longrope": lambda: longrope(section, factor, length),
        }[kind]()


def ntk(factor: Any, length: int | None) -> list[Any]:
    """NTK-aware scaling by the ratio of this sequence to the context, from 1 on."""
    ratio = mpf(max(length or 0, 32)) / 32
    base = 500 * (factor * ratio - factor + 1) ** (mpf(8) / 6)
    return [base ** (-mpf(2 * i) / 8) for i in range(PAIRS)]


def yarn(section: dict[str, Any], factor: Any) -> list[Any]:
    def turns_at(turns: int) -> Any:
        return 8 * mp.log(mpf(32) / (2 * mp.pi * turns)) / (2 * mp.log(500))

    low, high = turns_at(section.get("beta_fast", 32)), turns_at(section.get("beta_slow", 1))
    if section.get("truncate", True):
        low, high = mp.floor(low), mp.ceil(high)
    low, high = max(low, mpf(0)), min(high, mpf(7))
    kept = [1 - min(max((i - low) / (high - low), mpf(0)), mpf(1)) for i in range(PAIRS)]
    return [plain(i) * share + plain(i) / factor * (1 - share) for i, share in enumerate(kept)]


def temperature(section: dict[str, Any], factor: Any) -> Any:
    if "attention_factor" in section:
        return mpf(section["attention_factor"])
    if "mscale" in section:
        above, below = (mpf(section[key]) / 10 * mp.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        return above / below
    return mp.log(factor) / 10 + 1


def wave(section: dict[str, Any], frequency: Any) -> Any:
    length = 2 * mp.pi / frequency
    low, high = section["low_freq_factor"], section["high_freq_factor"]
    if length < 32 / high:
        return frequency
    if length > 32 / low:
        return frequency / section["factor"]
    smooth = (32 / length - low) / (high - low)
    return (1 - smooth) * frequency / section["factor"] + smooth * frequency


def longrope(section: dict[str, Any], factor: Any, length: int | None) -> tuple[list[Any], Any]:
    divisors = LONG if (length or 0) > 32 else SHORT
    scale = section.get("attention_factor") or mp.sqrt(1 + mp.log(factor) / mp.log(32))
    return [plain(i) / mpf(divisor) for i, divisor in enumerate(divisors)], scale


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_scaling_is_what_its_publication_says_in_both_layouts(family: str, name: str) -> None:
    for length in LENGTHS:
        frequencies, scale = by_paper(name, length)
        for config in (layout4(name), layout5(name)):
            table = exact_rotary(family, config, length)
            assert table.inv_freq.dtype is torch.float64
            assert table.inv_freq.tolist() == pytest.approx([float(value) for value in frequencies], rel=1e-14)
            assert table.scale == pytest.approx(float(scale), rel=1e-14)


def test_numbers_worked_out_by_hand() -> None:
    base = {"head_dim": 4, "partial_rotary_factor": 1.0, "rope_theta": 10_000.0, "max_position_embeddings": 100}
    assert exact_inv_freq("glm4", base | {"rope_scaling": {"type": "linear", "factor": 4}}).tolist() == [0.25, 0.0025]
    dynamic = base | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    # 2 · 300 / 100 - 1 = 5, to the power of 4 / 2: the base is 250,000, whose root is 500.
    assert exact_inv_freq("glm4", dynamic, 300).tolist() == pytest.approx([1, 1 / 500], rel=1e-15)
    assert exact_inv_freq("glm4", dynamic, 100).tolist() == pytest.approx([1, 1 / 100], rel=1e-15)
    # Turns within 10,000 positions: 1,592 and 16. Both ends of the ramp, at 32 and 1 turns, are rounded out to 0 and 2.
    table = exact_rotary("glm4", base | {"rope_scaling": YARN | {"original_max_position_embeddings": 10_000}})
    assert table.inv_freq.tolist() == pytest.approx([1, 0.01 * (0.5 + 0.5 / 4)], rel=1e-15)
    assert table.scale == pytest.approx(1.138629436111989, rel=1e-15)
    # Waves of 6.28 and 628 positions; the context of 32 over 4 and 1 is 8 and 32.
    assert exact_inv_freq("glm4", base | {"rope_scaling": LLAMA3}).tolist() == [1, 0.01 / 8]


def from_transformers(family: str, config: dict[str, Any], length: int | None) -> tuple[torch.Tensor, float]:
    """What the installed release computes, in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    built = getattr(transformers, {"glm": "GlmConfig", "glm4": "Glm4Config"}[family])(**config)
    kind = (config.get("rope_scaling") or config.get("rope_parameters"))["rope_type"]
    table, scale = ROPE_INIT_FUNCTIONS[kind](built, torch.device("cpu"), seq_len=length)
    return table, float(scale)


@pytest.mark.skipif(release() < (5, 0), reason="the definition is the newest release's meaning")
@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("layout", [layout4, layout5])
def test_transformers_computes_the_same_up_to_the_budget(name: str, layout: Callable[[str], dict[str, Any]]) -> None:
    for head_dim in (16, 128):
        for theta in (500.0, 10_000.0, 5e6):
            config = layout(name) | {"head_dim": head_dim}
            if head_dim == 128 and "longrope" in name:
                continue
            place = config.get("rope_parameters", config)
            place["rope_theta"] = theta
            for length in LENGTHS:
                # The module hands the length over as a tensor.
                given = None if length is None else torch.tensor(length)
                table, scale = from_transformers("glm4", json.loads(json.dumps(config)), given)
                budget = rotary_budget("glm4", config, length)
                assert rotary_roundoffs("glm4", config, table, length) <= budget < 400
                assert scale == pytest.approx(exact_rotary("glm4", config, length).scale, rel=1e-15)


def test_only_a_length_beyond_the_boundary_changes_the_table() -> None:
    boundaries = {name: rotary_boundary("glm4", layout4(name)) for name in SECTIONS}
    of_kind = {name.partition("-")[0]: boundary for name, boundary in boundaries.items()}
    assert of_kind == {"linear": None, "dynamic": 32, "yarn": None, "llama3": None, "longrope": 32}
    for name, boundary in boundaries.items():
        short, at, beyond = (exact_inv_freq("glm", layout4(name), length) for length in (None, 32, 33))
        assert torch.equal(short, at)
        assert torch.equal(at, beyond) == (boundary is None)


def test_what_a_file_leaves_out() -> None:
    missing = {key: value for key, value in YARN.items() if "original" not in key}
    whole = exact_rotary("glm4", layout4("yarn", YARN | {"original_max_position_embeddings": 160}))
    assert torch.equal(exact_inv_freq("glm4", layout4("yarn", missing)), whole.inv_freq)
    beside = layout4("yarn", missing) | {"original_max_position_embeddings": 32}
    assert torch.equal(exact_inv_freq("glm4", beside), exact_inv_freq("glm4", layout4("yarn")))
    old_word = {"type" if key == "rope_type" else key: value for key, value in YARN.items()}
    assert torch.equal(exact_inv_freq("glm4", layout4("yarn", old_word)), exact_inv_freq("glm4", layout4("yarn")))
    assert exact_rotary("glm4", layout4("yarn", YARN | {"factor": 0.5})).scale == 1
    both = layout5("linear") | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert rotary_boundary("glm4", both) == 160  # the 4.x section replaces the other
    for kind, keys in {"yarn": "factor", "llama3": "low_freq_factor", "longrope": "long_factor"}.items():
        section = {key: value for key, value in SECTIONS[kind].items() if key != keys}
        with pytest.raises(OracleUnavailable, match=f"'{kind}' needs the key '{keys}'"):
            exact_inv_freq("glm4", layout4(kind, section))
    with pytest.raises(OracleUnavailable, match="3 factors for 4"):
        exact_inv_freq("glm4", layout4("longrope", LONGROPE | {"short_factor": [1, 2, 3]}))
    with pytest.raises(OracleUnavailable, match="dimension of 2"):
        exact_inv_freq("glm4", layout4("dynamic") | {"head_dim": 4})


# --- A whole model. ---


def batch_of(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, CONFIG["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.skipif(release() < (5, 0), reason="the definition is the newest release's meaning")
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "yarn-with-mscale", "llama3", "longrope"])
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_scaled_model_is_its_definition(family: str, name: str) -> None:
    """Shorter and longer than the context; the table that a long run computes is not rounded there, nor is its oracle's."""
    model, config = build(family, num_hidden_layers=2, **layout4(name))
    for batch in (make_batch(), *([batch_of(45)] if rotary_boundary(family, config) else [])):
        length = batch["input_ids"].shape[1]
        result = compare(family, model, config, stored(model), batch, rounded_table=length < 32)
        assert (result.first, result.logits, result.loss, result.gradients) == (None, True, True, ())


def test_the_scale_reaches_the_rotated_half_only() -> None:
    """Scores grow by its square in what is rotated; a model with a scale of 1 parts from the definition at its table."""
    model, config = build("glm4", num_hidden_layers=2, **layout4("yarn"))
    model.model.rotary_emb.attention_scaling = 1.0
    result = compare("glm4", model, config, stored(model), make_batch(), rotary="model.rotary_emb")
    assert (result.first, result.logits) == ("model.rotary_emb", False)
    assert math.isclose(exact_rotary("glm4", config).scale, 0.1 * math.log(4) + 1)


# --- What the check is made of. ---


def test_the_table_of_a_length_is_read_without_a_trace_in_the_model() -> None:
    model, config = build("glm4", num_hidden_layers=1, **layout4("dynamic"))
    runner = Runner(model, Condition(precision=precision("fp32"), device="cpu"))
    before = {name: value.clone() for name, value in model.named_buffers()}
    for length in (16, 40, 200):
        table = table_at_length(runner, length)
        assert table is not None
        assert rotary_roundoffs("glm4", config, table, length) <= rotary_budget("glm4", config, length)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.model.rotary_emb.max_seq_len_cached == 32
    assert table_at_length(Runner(torch.nn.Linear(1, 1), runner.condition), 16) is None


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, None),
        ({"rope_scaling": YARN}, None),
        ({"rope_scaling": LONGROPE}, 32),
        ({"rope_parameters": LONGROPE}, 32),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}, 64),
        ({"rope_scaling": {"type": "longrope"}}, None),
    ],
)
def test_batches_stay_on_one_side_of_longrope_s_boundary(config: dict[str, Any], longest: int | None) -> None:
    assert longest_of_one_table(config) == longest


def test_cosines_and_sines_are_compared_in_every_known_layout() -> None:
    angles = torch.rand(1, 5, 3, dtype=torch.float64)
    own = {"rotary:turn": torch.polar(torch.ones_like(angles), angles)}
    double = [torch.cat((angles, angles), dim=-1), angles.repeat_interleave(2, dim=-1)]
    for layout in (angles, *double, angles[:, None], angles.expand(2, -1, -1)):
        given = layout[:, 0] if layout.dim() == 4 else layout
        turns = torch.polar(torch.ones_like(given), given)
        assert first_difference({"rotary:turn": turns}, own) is None
        assert first_difference({"rotary:turn": turns.conj()}, own) == "rotary"
        assert first_difference({"rotary:turn": 1.05 * turns}, own) == "rotary"
        assert turn_scale(1.5 * turns) == pytest.approx((1.5, 1.5))
    unknown = torch.polar(torch.ones(1, 5, 6), torch.rand(1, 5, 6)).to(torch.complex128)
    assert first_difference({"rotary:turn": unknown}, own) is None
