"""The effect of a key of config.json: whether this release reads it, or the built model has its value anyway."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from numerics_suite.subjects.built_model import built_with, without_adapter

SAME_MEANING = (
    frozenset({"hidden_act", "hidden_activation", "activation_function"}),
    frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}),
    frozenset({"vocab_size", "padded_vocab_size"}),
    frozenset({"layer_norm_eps", "layernorm_epsilon", "rms_norm_eps", "layer_norm_epsilon"}),
)
"""Different names of one key in families and releases."""

ROWS = frozenset({"vocab_size", "padded_vocab_size"})


def is_read(config_class: type, raw: Mapping[str, Any], key: str) -> bool:
    """Whether another value of the key makes another config, beyond the key itself.

    A key may be taken up under another name (`first_k_dense_replace` becomes a list of layers), so a class's declared
    names are not enough.

    Args:
        config_class: of the built model.
        raw: config.json.
        key: of it.
    """
    given = _made(config_class, raw)
    # The base class of 5.x moves the rope keys about in every config, whether or not the model looks at them.
    if given is None or key.startswith("rope_") or key == "partial_rotary_factor":
        return False
    mine = {name: value for name, value in given.items() if name != key}
    for other in _others(raw, key):
        made = _made(config_class, other)
        if made is not None and {name: value for name, value in made.items() if name != key} != mine:
            return True
    return False


def is_derived(config_class: type, raw: Mapping[str, Any], key: str) -> bool:
    """Whether the class derives the file's value from the other keys.

    Args:
        config_class: of the built model.
        raw: config.json.
        key: of it.
    """
    made = _made(config_class, {name: value for name, value in raw.items() if name != key})
    return made is not None and key in made and bool(made[key] == raw[key])


def is_converted(config_class: type, raw: Mapping[str, Any], key: str, built: Any) -> bool:
    """Whether the built model's value is this release's conversion of the file's value.

    Gemma 3 halves the window of bidirectional attention on load. The file's value was read if another one leads to
    another result.

    Args:
        config_class: of the built model.
        raw: config.json.
        key: of it.
        built: the model's value.
    """
    given = _made(config_class, raw)
    if given is None or given.get(key) != built:
        return False
    made = (_made(config_class, other) for other in _others(raw, key) if key in other)
    return any(other is not None and other.get(key) != built for other in made)


def has_effect(model: nn.Module, key: str, value: Any) -> bool:
    """Whether the built model has the key's value although this release does not read the key.

    Args:
        model: as built.
        key: of config.json.
        value: the file's.
    """
    config = model.config
    names = next((names for names in SAME_MEANING if key in names), frozenset({key}))
    others = [getattr(config, name) for name in names - {key} if getattr(config, name, None) is not None]
    if others and all(other == value for other in others):
        return True
    if key in ROWS and isinstance(value, int):
        return embedding_rows(model) == value
    held = [vars(module)[name] for module in model.modules() for name in names if name in vars(module)]
    return bool(held) and all(type(one) is type(value) and one == value for one in held)


def is_built_from(model: nn.Module, key: str, value: Any) -> bool:
    """Whether another value of the key builds another model, which may read keys that its config class ignores.

    Another model has other shapes, other buffers, or other numbers in its modules; a class that refuses the other value
    counts too.

    Args:
        model: as built.
        key: of config.json.
        value: the file's, which the built config must hold.
    """
    base = without_adapter(model)
    others = list(_other_values(value)) if getattr(base.config, key, None) == value else []
    same = built_with(base, {}) if others else None
    if same is None:
        return False
    made = (built_with(base, {key: other}) for other in others)
    return any(other is None or not _alike(same, other) for other in made)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return _structure(one) == _structure(other) and all(
        torch.equal(left, right) for left, right in zip(one.buffers(), other.buffers(), strict=True)
    )


def _structure(model: nn.Module) -> dict[str, Any]:
    """Classes, shapes, and what each module holds as a plain value."""
    found: dict[str, Any] = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    found |= {f"{name} buffer": buffer.shape for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        found |= {
            f"{name}:{key}": held
            for key, held in vars(module).items()
            if isinstance(held, bool | int | float | str | torch.dtype)
        }
        found[f"{name}:"] = type(module)
    return found


def embedding_rows(model: nn.Module) -> int:
    """Rows of the input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def other_word_counts(model: nn.Module, raw: Mapping[str, Any], key: str) -> bool:
    """Whether the file gives the number of rows under two keys, and the model was built from the other one.

    ChatGLM's code uses `padded_vocab_size` and ignores `vocab_size`.

    Args:
        model: as built.
        raw: config.json.
        key: of it.
    """
    return key in ROWS and any(raw.get(other) == embedding_rows(model) for other in ROWS - {key})


def rope_is_built(model: nn.Module, rope: Mapping[str, Any], known: set[str]) -> bool:
    """Whether rotary parameters that a release before 5.0 does not read equal those that it built the model with.

    Args:
        model: as built.
        rope: `rope_parameters` of config.json.
        known: keys that this release reads.
    """
    config: Any = model.config
    inner = {name: value for name, value in rope.items() if name not in {"rope_type", "type"}}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    own = getattr(config, "rope_scaling", None) or {}
    if scaled and own.get("rope_type", own.get("type")) != rope.get("rope_type", rope.get("type")):
        return False
    return all(name in known and getattr(config, name, own.get(name)) == value for name, value in inner.items())


def _made(config_class: Any, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config object's attributes for a file's content; None if the class refuses it.

    `to_dict` is not used: it may undo what loading did.
    """
    try:
        config = config_class.from_dict(copy.deepcopy(dict(raw)))
        made: dict[str, Any] = {**config.to_dict(), **vars(config)}
    except Exception:  # noqa: BLE001 - a class may refuse a value in any way, and then says nothing about the key
        return None
    return made


def _others(raw: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """The file without the key, and with another value of it."""
    yield {name: value for name, value in raw.items() if name != key}
    if not isinstance(raw[key], str):
        yield from ({**raw, key: other} for other in _other_values(raw[key]))


def _other_values(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value * 2 or 1
    elif isinstance(value, str):
        yield f"{value}-other"
