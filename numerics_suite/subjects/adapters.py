"""A peft adapter: where is its base, and is it whole?"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Task
from numerics_suite.subjects import compat, fixtures
from numerics_suite.subjects.files import StoredTensor, read_json
from numerics_suite.subjects.hub import parse_hub_id, snapshot
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.tasks import task_of_class

_TASKS: Mapping[str, Task] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}


DECOMPOSED = ("corda", "eva", "loftq", "lora_ga", "olora", "orthogonal", "pissa")
"""Initialisations that decompose the base's weights, which the meta device does not hold."""


def read_adapter(folder: Path) -> dict[str, Any]:
    """The raw `adapter_config.json`.

    Raises:
        BadInputError: it is broken, or peft is not installed.
    """
    content = read_json(folder / "adapter_config.json")
    if importlib.util.find_spec("peft") is None:
        message = f"{folder} is an adapter, and peft is not installed: pip install 'numerics-suite[peft]'"
        raise BadInputError(message)
    return content


def refuse_unusable(folder: Path, base: Path, model_class: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that peft can load the adapter onto its base, on torch's meta device, which holds shapes and no numbers.

    Args:
        folder: of the adapter.
        base: folder of its base.
        model_class: of transformers, for the base; other classes are not checked.
        tensors: what the adapter's files hold.

    Raises:
        BadInputError: it cannot; every check would fail.
    """
    import peft  # heavy
    import torch
    import transformers

    try:
        with quiet_transformers(), torch.device("meta"):
            config: Any = peft.PeftConfig.from_pretrained(str(folder))
            built = getattr(transformers, model_class, None)
            if built is None:
                return
            config.task_type = config.modules_to_save = None  # what stands around the layers is the loader's affair
            if str(getattr(config, "init_lora_weights", "")).startswith(DECOMPOSED):
                config.init_lora_weights = False
            model: Any = peft.get_peft_model(built(transformers.AutoConfig.from_pretrained(base)), config)
            shapes = {name: tuple(value.shape) for name, value in peft.get_peft_model_state_dict(model).items()}
    except Exception as error:  # noqa: BLE001 - peft raises what it likes
        message = f"{folder / 'adapter_config.json'}: peft {peft.__version__} refuses it: {compat.last_line(error)}; install the peft that wrote it"
        raise BadInputError(message) from None
    for name, tensor in tensors.items():
        if "lora_" in name and name in shapes and tuple(tensor.shape) != shapes[name]:
            message = f"{folder}: {name} has shape {list(tensor.shape)}, and adapter_config.json makes it {list(shapes[name])}; save both again together"
            raise BadInputError(message)


def adapter_task(adapter: Mapping[str, Any]) -> Task | None:
    """The task that the adapter was trained for, None where it does not say.

    An adapter without a `task_type` names the class of its base instead.
    """
    told = _TASKS.get(str(adapter.get("task_type")))
    mapping = adapter.get("auto_mapping")
    if told is None and isinstance(mapping, Mapping):
        return task_of_class(str(mapping.get("base_model_class")))
    return told


def base_folder(folder: Path, adapter: Mapping[str, Any], *, allow_pickle: bool) -> Path:
    """The folder of the adapter's base: a path (from the adapter's folder or the working directory), fixture or hub id.

    Raises:
        BadInputError: the adapter names none, or it cannot be found.
    """
    where, base = folder / "adapter_config.json", adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        message = f"{where}: key base_model_name_or_path is missing; set it to the base's folder or hub id"
        raise BadInputError(message)
    if base.startswith("fixture:"):
        return fixtures.fixture_path(base.removeprefix("fixture:"))
    for path in (folder / base, Path(base).expanduser()):
        if path.is_dir():
            return path.resolve()
    hub_id = parse_hub_id(base)
    if hub_id is None:
        message = f"{where}: base_model_name_or_path '{base}' is not a directory; set it to the base's folder or hub id"
        raise BadInputError(message)
    revision = adapter.get("revision")
    if isinstance(revision, str) and revision and hub_id.revision is None:
        hub_id = parse_hub_id(f"{base}@{revision}") or hub_id
    return snapshot(hub_id, allow_pickle=allow_pickle)
