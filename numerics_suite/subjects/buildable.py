"""Can a model be built from a `config.json`, and if not, which key prevents it? Tried on the meta device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.machine import swap_bytes
from numerics_suite.devices.kinds import CPU
from numerics_suite.devices.memory import free_bytes
from numerics_suite.subjects import compat
from numerics_suite.subjects.built_model import without_values
from numerics_suite.subjects.files import StoredTensor, read_json
from numerics_suite.subjects.layers import COUNTS
from numerics_suite.subjects.quiet import quiet_transformers

_SIZE = re.compile(r"(_size|_dim|_rank|^num_\w+_(layers|heads))$")

MOST_LAYERS = 1000
"""Most layers of a config beyond those that its weights can hold; the deepest published models have some hundred, and
every layer that is built takes milliseconds even without numbers."""

_NO_VALUES = frozenset({"model_type", "auto_map", "architectures", "transformers_version", "_name_or_path"})


def refuse_impossible_sizes(folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """If a size is not positive, or is larger than any in the weights, try to build the model.

    Some sizes mean "none", and missing weights are a finding. Sizes beyond any memory, or of which no model can be
    built, would fail in every check.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        stored: its tensors.

    Raises:
        BadInputError: no model can be built from it, or none that fits into memory.
    """
    path = folder / "config.json"
    for name in COUNTS:
        value = config.get(name)
        # A layer has at least one tensor.
        if type(value) is int and value > max(MOST_LAYERS, len(stored)):
            message = f"{path}: {name} is {value}, and the weights hold {len(stored)} tensors; correct it"
            raise BadInputError(message)
    largest = max((size for tensor in stored.values() for size in tensor.shape), default=2**62)
    odd = [
        name
        for name, value in config.items()
        if type(value) is int and _SIZE.search(name) and name not in COUNTS and not 0 < value <= largest
    ]
    odd += [name for name in COUNTS if type(config.get(name)) is int and config[name] <= 0]
    named = config.get("architectures") or ()
    built = compat.class_of(named[0]) if odd and named else None
    if built is None:
        return
    values = ", ".join(f"{name} is {config[name]}" for name in odd)
    try:
        with quiet_transformers(), torch.device("meta"):
            model: nn.Module = built(_config_of(folder, config, trust_remote_code=False))
    except Exception as error:  # noqa: BLE001 - model classes raise what they like
        message = f"{path}: {values}, and no model can be built from it: {compat.last_line(error)}"
        raise BadInputError(message) from None
    asked, held = sum(p.numel() for p in model.parameters()), sum(tensor.elements for tensor in stored.values())
    if asked > 2 * held and 4 * asked > free_bytes(CPU) + swap_bytes():
        message = f"{path}: {values}, which makes a model of {asked:,} numbers, too many for this memory; the weights have {held:,}; correct it"
        raise BadInputError(message)


def why_not_loaded(
    folder: Path, task: str, model_class: str | None, error: Exception, *, trust_remote_code: bool
) -> str:
    """One line on a failed load: the file, the key at fault if there is one, the exception, and what to do.

    Args:
        folder: of the checkpoint.
        task: of the subject.
        model_class: the class that is loaded.
        error: what the load raised.
        trust_remote_code: the checkpoint's own code may run.
    """
    said = f"{type(error).__name__}: {compat.last_line(error)}"
    release, what = f"transformers {compat.version()}", model_class or "model"
    try:
        text = json.dumps(read_json(folder / "config.json"), sort_keys=True)
    except BadInputError as unread:
        return str(unread)
    fault = _fault(folder, text, task, trust_remote_code)
    if fault is None:
        return f"{folder}: {release} can build a {what} from its config.json but cannot load these weights: {said}; fetch or save them again"
    key, reason = fault
    path = folder / "config.json"
    if key:
        value = repr(json.loads(text)[key])
        shown = value if len(value) <= 60 else f"{value[:60]}…"
        return f"{path}: {key} is {shown}, with which {release} cannot build a {what} ({reason}); correct it or leave it out"
    return f"{path}: {release} cannot build a {what} from it ({reason}); compare it with one of the same model_type that loads"


@lru_cache(maxsize=32)
def _fault(folder: Path, text: str, task: str, trust_remote_code: bool) -> tuple[str, str] | None:  # noqa: FBT001 - of a cache's key
    """The key that prevents building (empty if not a single one) and the exception; None if it can be built."""
    config = json.loads(text)
    auto = compat.auto_class(task, config.get("model_type"))

    def build(content: Mapping[str, Any]) -> nn.Module:
        made = _config_of(folder, content, trust_remote_code=trust_remote_code)
        return auto.from_config(made, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

    reason = _raised(lambda: build(config))
    if reason is None:
        return None
    for key in config:
        less = {name: value for name, value in config.items() if name != key}
        if key not in _NO_VALUES and _raised(lambda less=less: build(less)) is None:  # type: ignore[misc]
            return key, reason
    return "", reason


def _raised(build: Callable[[], nn.Module]) -> str | None:
    """What building raises, in one line; None if it succeeds."""
    try:
        with without_values():
            build()
    except Exception as error:  # noqa: BLE001 - model classes raise what they like
        return f"{type(error).__name__}: {compat.last_line(error)}"
    return None


def _config_of(folder: Path, content: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """The config object for these values, of the folder's own class if its code defines one."""
    import transformers  # heavy

    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if content.get("model_type") in known:
        made: Any = known[content["model_type"]]
    else:
        made = type(
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        )
    return made.from_dict(dict(content))
