"""Baselines of made-up cells: what a small decoder would leave, and what becomes of it when something changes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from numerics_suite.baselines.records import (
    AnswerRecord,
    CellBaseline,
    GradientRecord,
    ModuleRecord,
    Sketch,
    StoredBatch,
    TensorRecord,
    TrainingCurve,
)
from numerics_suite.core.records import Cell

WIDTH, VOCABULARY, ROWS, LENGTH = 64, 512, 4, 16
BLOCK = (
    ("input_layernorm", "RMSNorm"),
    ("self_attn.q_proj", "Linear"),
    ("self_attn.k_proj", "Linear"),
    ("self_attn.v_proj", "Linear"),
    ("self_attn.o_proj", "Linear"),
    ("self_attn", "Attention"),
    ("post_attention_layernorm", "RMSNorm"),
    ("mlp.gate_up_proj", "Linear"),
    ("mlp.activation_fn", "SiLU"),
    ("mlp.down_proj", "Linear"),
    ("mlp", "MLP"),
    ("", "DecoderLayer"),
)
LOCAL = {"RMSNorm": 0.61, "Linear": 0.43, "Attention": 1.15, "MLP": 1.0, "DecoderLayer": 2.4}


def sketch(seed: int, *shape: int, rms: float = 1.0) -> Sketch:
    draws = np.random.default_rng(seed).standard_normal(8) * rms
    return Sketch(shape=shape, count=int(np.prod(shape)), rms=rms, projections=draws)


def module_names(blocks: int) -> list[tuple[str, str]]:
    inner = [(f"model.layers.{index}.{name}".rstrip("."), kind) for index in range(blocks) for name, kind in BLOCK]
    return [("model.embed_tokens", "Embedding"), *inner, ("model.norm", "RMSNorm"), ("lm_head", "Linear")]


def baseline(
    *,
    precision: str = "bf16",
    attn: str = "eager",
    subject: str = "glm4-tiny",
    blocks: int = 4,
    vocabulary: int = VOCABULARY,
    parameters: int = 40,
    whole: bool = False,
    noise: float = 0.0,
    **changes: Any,
) -> CellBaseline:
    """A cell; `noise` moves every true fp64 number by so much of its size, as another order of its sum would."""
    draw = np.random.default_rng(7)
    shake = np.random.default_rng(zlib.crc32(f"{precision} {attn}".encode()))

    def moved(values: Any) -> Any:
        return values * (1 + noise * shake.standard_normal(np.shape(values)))

    def moved_sketch(made: Sketch) -> Sketch:
        return replace(made, rms=float(moved(made.rms)), projections=moved(made.projections))

    tokens = ROWS * LENGTH
    wide = vocabulary if whole else 64
    values = moved(draw.standard_normal((tokens, wide)))
    tops = np.zeros((0, 8)) if whole else moved(np.sort(draw.standard_normal((tokens, 8)) + 4)[:, ::-1])
    ids = np.zeros((0, 8), np.int64) if whole else draw.integers(0, vocabulary, (tokens, 8))
    modules = tuple(
        ModuleRecord(
            name=name,
            kind=kind,
            given=None if kind == "Embedding" else moved_sketch(sketch(2 * index, tokens, WIDTH)),
            gave=moved_sketch(sketch(2 * index + 1, tokens, WIDTH)),
            local_error=LOCAL.get(kind),
            local_count=tokens * WIDTH if kind in LOCAL else 0,
        )
        for index, (name, kind) in enumerate(module_names(blocks))
    )
    made = CellBaseline(
        cell=Cell(subject=subject, precision=precision, attn=attn, device="cpu", task="causal-lm"),
        subject={
            "source": f"fixture:{subject}", "revision": None, "digest": "sha256:0123", "family": "glm4",
            "model_class": "Glm4ForCausalLM", "parameters": 120_000, "stored_dtype": "bfloat16",
        },
        environment={
            "python": "3.11.9", "platform": "Linux-x86_64", "machine": "x86_64",
            "packages": {"torch": "2.13.0", "transformers": "5.24.0"},
        },
        recipe={"seed": 0, "steps": 5, "optimizer": "adamw", "lr": 1e-4},
        batches=tuple(
            StoredBatch(
                name=name,
                tensors={
                    "input_ids": draw.integers(0, vocabulary, (ROWS, LENGTH)),
                    "attention_mask": np.ones((ROWS, LENGTH), np.int64),
                    "labels": draw.integers(-100, vocabulary, (ROWS, LENGTH)),
                },
            )
            for name in ("right", "training")
        ),
        answers=(
            AnswerRecord(name="right.logits", values=values, whole=whole, top_values=tops, top_ids=ids, rms=1.0),
        ),
        true_loss=float(moved(6.25)),
        gradients=tuple(
            GradientRecord(name=f"layers.{index}.weight", gradient=moved_sketch(sketch(1000 + index, WIDTH, WIDTH, rms=1e-3)))
            for index in range(parameters)
        ),
        modules=modules,
        error=0.01,
        inherent=0.0099,
        error_count=tokens * WIDTH,
        bits={"logits": f"l-{precision}-{attn}", "loss": "x", "gradients": "g", "decoding": "d", "cell": f"c-{precision}-{attn}"},
        headroom_bits=110.5,
        headroom_module="model.layers.0.mlp",
        curve=TrainingCurve(
            losses=(6.26, 6.11, 5.98, 5.84, 5.71, 5.6), norms=(1.0, 1.1, 1.0, 0.9, 0.9),
            true_losses=(6.25, 6.10, 5.97, 5.83, 5.70, 5.59), true_norms=(1.0, 1.1, 1.0, 0.9, 0.9),
        ),
        contract={
            "signature": ["input_ids", "attention_mask", "labels"], "outputs": {"loss": "float32", "logits": "bfloat16"},
            "default_dtype": "bfloat16", "cache": "DynamicCache", "head": {"initialised": True},
        },
        checks=("forward.finite", "reference.local", "train.finite"),
        tensors=tuple(
            TensorRecord(name=f"layers.{index}.weight", dtype="bfloat16", values=sketch(5000 + index, WIDTH, WIDTH))
            for index in range(parameters)
        ),
    )  # fmt: skip
    return replace(made, **changes)


def with_bits(made: CellBaseline, **parts: str) -> CellBaseline:
    """The cell with other bits in some parts."""
    bits = {**made.bits, **parts}
    return replace(
        made, bits={**bits, "cell": "-".join(bits[name] for name in ("logits", "loss", "gradients", "decoding"))}
    )


def with_module(made: CellBaseline, of: str, /, **changes: Any) -> CellBaseline:
    """The cell with one module changed."""
    assert any(module.name == of for module in made.modules)
    return replace(made, modules=tuple(replace(item, **changes) if item.name == of else item for item in made.modules))


def moved_sketch(made: Sketch | None, by: float) -> Sketch:
    """The sketch moved by so many root mean squares."""
    assert made is not None
    return replace(
        made, projections=made.projections + by * made.rms * np.array([1.0] + [0.0] * (made.projections.size - 1))
    )


def renamed(made: CellBaseline, names: Mapping[str, str]) -> CellBaseline:
    """The cell with modules renamed by the beginnings of their names."""

    def other(name: str) -> str:
        for old, new in names.items():
            if name == old or name.startswith(f"{old}."):
                return new + name[len(old) :]
        return name

    return replace(made, modules=tuple(replace(item, name=other(item.name)) for item in made.modules))


def same(left: Any, right: Any) -> bool:
    """Whether two records hold the same, arrays by value and dtype, NaN equal to NaN."""
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return bool(
            left.dtype == right.dtype
            and left.shape == right.shape
            and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
        )
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if hasattr(left, "__dataclass_fields__"):
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__
        )
    return bool(left == right)
