"""Can a checkpoint's folder be used? Finds every mistake visible in its files, before anything is built."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError, UnsupportedError, nearest
from numerics_suite.subjects import compat
from numerics_suite.subjects.families import FAMILIES, Family, family_of
from numerics_suite.subjects.files import StoredTensor, pickle_files, read_json, safetensors_files
from numerics_suite.subjects.tasks import architectures

FIRST_RELEASES: Mapping[str, str] = {
    **{kind: family.first_release for family in FAMILIES if family.first_release for kind in family.model_types},
    "glm4v": "4.53",
    "glm4v_moe": "4.55",
    "glm4_moe_lite": "5.0",
    "glm46v": "5.0",
    "glm_image": "5.0",
    "glmasr": "5.0",
    "glm_moe_dsa": "5.2",
    "glm_ocr": "5.1",
}
"""The first transformers release that has a model type of the GLM line."""


CHATGLM_6B = ("position_encoding_2d", "inner_hidden_size", "gmask_token_id")
"""Keys that only the config of ChatGLM-6B (2023) has; its successors have the same model type and other code."""


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json` of a checkpoint.

    Raises:
        BadInputError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        message = f"{folder} has no config.json; name the folder that holds it"
        raise BadInputError(message)
    return read_json(path)


def check_supported(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Check that the installed transformers, or the checkpoint's own code, supports architecture and config.

    Raises:
        BadInputError: no known code has it, or its code may not run without `--trust-remote-code`.
        UnsupportedError: another release of transformers has it.
    """
    check_model_type(folder, config, trust_remote_code=trust_remote_code)
    if needs_remote_code(config):
        _check_code_is_there(folder, config)
        return
    unknown = [name for name in architectures(config) if not compat.knows_architecture(name)]
    if unknown and not _registered(config):
        message = f"{folder / 'config.json'}: architectures names {unknown[0]}, which transformers {compat.version()} does not have"
        raise BadInputError(message)
    _check_config_is_taken(folder)


def check_model_type(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """The part of :func:`check_supported` that costs nothing: is there a usable config class?

    Raises:
        BadInputError: as there.
        UnsupportedError: as there.
    """
    path, model_type = folder / "config.json", config.get("model_type")
    if model_type == "chatglm" and any(key in config for key in CHATGLM_6B):
        message = (
            f"{path}: this is ChatGLM-6B of 2023, whose prompt is seen from both sides (prefix mask) and whose positions have two "
            "dimensions: the laws and the definition here are those of causal models; use ChatGLM2, ChatGLM3 or GLM-4"
        )
        raise BadInputError(message)
    if needs_remote_code(config):
        if not trust_remote_code:
            message = f"{path}: {_name(config)} is the checkpoint's own code (auto_map); read it, then allow it with --trust-remote-code"
            raise BadInputError(message)
        return
    if not isinstance(model_type, str) or not model_type:
        message = f"{path}: key model_type is missing; add the architecture's, such as glm4"
        raise BadInputError(message)
    if not compat.knows_model_type(model_type):
        _refuse_model_type(path, model_type)


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether only the checkpoint's own code has the architecture."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping) or "AutoConfig" not in auto_map:
        return False
    return not compat.knows_model_type(str(config.get("model_type")))


def _name(config: Mapping[str, Any]) -> str:
    return next(iter(architectures(config)), str(config.get("model_type")))


def _check_code_is_there(folder: Path, config: Mapping[str, Any]) -> None:
    for name, target in config["auto_map"].items():
        # "org/repository--file.Class" lives elsewhere.
        if not isinstance(target, str) or "--" in target:
            continue
        file = folder / f"{target.rpartition('.')[0]}.py"
        if not file.is_file():
            message = f"{folder / 'config.json'}: auto_map.{name} names {target}, and {file.name} is not in the folder; copy it there"
            raise BadInputError(message)


def is_defined(folder: Path, target: str) -> bool:
    """Whether a class that auto_map names is in its file; assumed if the file is elsewhere or cannot be parsed.

    Args:
        folder: of the checkpoint.
        target: `file.Class`, or `org/repository--file.Class`.
    """
    file, _, wanted = target.rpartition(".")
    try:
        tree = ast.parse((folder / f"{file}.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True  # the load reports it
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return bool({wanted, "*"} & names)


def _refuse_model_type(path: Path, model_type: str) -> None:
    first = FIRST_RELEASES.get(model_type) or family_of({"model_type": model_type}).first_release
    if first is not None:
        message = f"model type {model_type} needs transformers {first} or newer, {compat.version()} is installed"
        raise UnsupportedError(message)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # heavy

    message = (
        f"{path}: model_type '{model_type}' is unknown to transformers {compat.version()}"
        f"{nearest(model_type, list(CONFIG_MAPPING.keys()))}"
    )
    raise BadInputError(message)


def _registered(config: Mapping[str, Any]) -> bool:
    """Whether the user's own code registered the model type, so its classes are not transformers' own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # heavy

    return config["model_type"] in CONFIG_MAPPING and config["model_type"] not in CONFIG_MAPPING_NAMES


def _check_config_is_taken(folder: Path) -> None:
    """Let this release parse the config, so that a refused value is reported here and not as a failed load."""
    from transformers import AutoConfig  # heavy

    from numerics_suite.subjects.quiet import quiet_transformers

    try:
        with quiet_transformers():
            AutoConfig.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  # config classes raise what they like
        message = f"{folder / 'config.json'}: transformers {compat.version()} refuses it: {compat.last_line(error)}; correct that key"
        raise BadInputError(message) from None


def check_weights(folder: Path, *, allow_pickle: bool) -> None:
    """Are there weights that may be read?

    Raises:
        BadInputError: there are none, or only pickles and `--allow-pickle` was not given.
    """
    if safetensors_files(folder):
        return
    pickles = pickle_files(folder)
    if not pickles:
        message = f"{folder} has no weights; it needs model.safetensors or model.safetensors.index.json"
        raise BadInputError(message)
    if not allow_pickle:
        message = (
            f"{pickles[0]} is a pickle, which can run any code, and there is no safetensors file; "
            "convert it, or read it with --allow-pickle"
        )
        raise BadInputError(message)


def check_vocabulary(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], family: Family
) -> None:
    """Does the embedding have a row for every id of the tokenizer?

    Raises:
        BadInputError: it has fewer, or a file of the tokenizer is not JSON.
    """
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    rows, name = _embedding_rows(config, tensors, family)
    if rows is None or not path.is_file():
        return
    size = _tokenizer_size(path)
    if size > rows:
        message = (
            f"{path}: a vocabulary of {size} ids, {name} has {rows} rows (vocab_size in config.json); "
            "use this checkpoint's own tokenizer or resize the embedding"
        )
        raise BadInputError(message)


def _embedding_rows(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], family: Family
) -> tuple[int | None, str]:
    """Rows of the embedding: those of the config, of which the stored ones are filled."""
    size = config.get("padded_vocab_size", config.get("vocab_size"))
    built = size if isinstance(size, int) else None
    for name, tensor in tensors.items():
        if name.endswith(family.embedding_suffixes) and len(tensor.shape) == 2:
            stored = int(tensor.shape[0])
            return (stored, name) if built is None or stored <= built else (built, "the embedding")
    return built, "the embedding"


def _tokenizer_size(path: Path) -> int:
    """The largest id of a `tokenizer.json`, and 1."""
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        ids = [number for number in vocabulary.values() if isinstance(number, int)]
    else:  # Unigram: a list of pieces, whose place is the id
        ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    if isinstance(added, list):
        ids += [token["id"] for token in added if isinstance(token, Mapping) and isinstance(token.get("id"), int)]
    return max(ids, default=-1) + 1


def check_pad_token(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], task: str) -> None:
    """Is the pad id a token? `inputs.pipeline` reports a classifier without one.

    Raises:
        BadInputError: it is outside the embedding.
    """
    path, pad = folder / "config.json", _pad_id(folder, config)
    rows, _ = _embedding_rows(config, tensors, family_of(config))
    # -1 is what some language models say for none.
    lowest = 0 if task == "sequence-classification" else -1
    if isinstance(pad, int) and rows is not None and not lowest <= pad < rows:
        said = (
            f"pad_token_id is {pad}"
            if config.get("pad_token_id") == pad
            else f"pad_token_id is missing (default {pad})"
        )
        message = f"{path}: {said}, outside the {rows} rows of the embedding; set a pad token (remedy set-pad-token)"
        raise BadInputError(message)


def _pad_id(folder: Path, config: Mapping[str, Any]) -> object:
    """The pad id that a model would be built with: the file's, else the config class's own default."""
    if "pad_token_id" in config or needs_remote_code(config):
        return config.get("pad_token_id")
    from transformers import AutoConfig  # heavy

    from numerics_suite.subjects.quiet import quiet_transformers

    with quiet_transformers():
        return getattr(AutoConfig.from_pretrained(folder), "pad_token_id", None)


def is_adapter(folder: Path) -> bool:
    """Whether the folder is a peft adapter."""
    return (folder / "adapter_config.json").is_file()
