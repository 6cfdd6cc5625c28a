"""`--layers`: a shallower checkpoint, with some blocks of a larger one and everything outside the blocks.

It is an ordinary checkpoint folder, so every check, definition, remedy and script works on it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.files import digest, stored_tensors
from numerics_suite.subjects.fixtures import cache_dir

COUNTS = ("num_hidden_layers", "num_layers", "n_layer")
"""Keys of the number of blocks in a config: of most models, of ChatGLM, of GPT-2."""

BLOCK_LISTS = ("layers", "h", "layer", "blocks")
"""Last parts of the names under which transformers keeps a model's blocks; a list of experts, which may be longer, is none of them."""

_BLOCK = re.compile(rf"(?P<before>(?:.*?\.)?(?:{'|'.join(BLOCK_LISTS)})\.)(?P<index>\d+)(?P<after>\..+)")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def chosen(wanted: str, count: int) -> tuple[int, ...]:
    """Numbers of the blocks that are kept, in their order.

    Args:
        wanted: `first:4`, or `every:4` for each fourth from the first on.
        count: blocks of the checkpoint.

    Raises:
        BadInputError: it has fewer.
    """
    how, _, text = wanted.partition(":")
    number = int(text)
    if number > count:
        message = f"--layers {wanted}: the model has {count} layers; choose fewer"
        raise BadInputError(message)
    return tuple(range(number)) if how == "first" else tuple(range(0, count, number))


def shallower(folder: Path, config: Mapping[str, Any], wanted: str) -> tuple[Path, str]:
    """The folder of the shallower checkpoint, made once and cached beside built fixtures, and a line that describes it.

    Args:
        folder: of the checkpoint.
        config: its `config.json`.
        wanted: `first:N` or `every:N`.

    Raises:
        BadInputError: the config names no number of blocks, the weights are no safetensors, or the folder cannot be written.
    """
    key = next((name for name in COUNTS if isinstance(config.get(name), int)), None)
    stored = stored_tensors(folder)
    if key is None or not stored:
        why = f"config.json has none of {', '.join(COUNTS)}" if key is None else "it has no safetensors weights"
        message = f"--layers {wanted}: {folder} cannot be made shallower: {why}"
        raise BadInputError(message)
    kept = chosen(wanted, config[key])
    said = f"--layers {wanted}: {len(kept)} of {config[key]} layers, made of the same weights"
    name = f"{folder.name}-layers-{wanted.replace(':', '-')}-{digest(folder).partition(':')[2][:16]}"
    target = cache_dir() / "fixtures" / name
    if not (target / "config.json").is_file() or not _same_code(folder, target):
        try:
            _make(folder, target, shallower_config(config, key, kept), kept)
        except OSError as error:
            message = f"--layers {wanted}: cannot write {target}: {error.strerror or error}; NUMERICS_SUITE_CACHE names another folder"
            raise BadInputError(message) from None
    return target, said


def _same_code(folder: Path, target: Path) -> bool:
    """Whether the cached code equals the checkpoint's own, byte by byte: only that is trusted."""
    own, copied = ({file.name: file.read_bytes() for file in each.glob("*.py")} for each in (folder, target))
    return own == copied


def shallower_config(config: Mapping[str, Any], key: str, kept: tuple[int, ...]) -> dict[str, Any]:
    """The config with fewer blocks; lists with an entry per block keep the remaining blocks' entries.

    Args:
        config: of the checkpoint.
        key: that counts the blocks.
        kept: their numbers.
    """
    count = config[key]
    changed = {**config, key: len(kept)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name.endswith(("_types", "_layers", "_pattern")):
            changed[name] = [value[index] for index in kept]
    if isinstance(config.get("first_k_dense_replace"), int):
        changed["first_k_dense_replace"] = sum(index < config["first_k_dense_replace"] for index in kept)
    if "num_nextn_predict_layers" in config:
        changed["num_nextn_predict_layers"] = 0  # they are stored behind the last block, and checked with no release
    return changed


def shallower_name(name: str, kept: tuple[int, ...]) -> str | None:
    """The name of a stored tensor in the shallower checkpoint, None for one of a block that is left out.

    Args:
        name: as stored.
        kept: numbers of the blocks that are kept.
    """
    found = _BLOCK.fullmatch(name)
    if found is None:
        return name
    index = int(found["index"])
    return f"{found['before']}{kept.index(index)}{found['after']}" if index in kept else None


def _make(folder: Path, target: Path, config: Mapping[str, Any], kept: tuple[int, ...]) -> None:
    from safetensors import safe_open  # heavy
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:60]}-", dir=target.parent))
    try:
        tensors = {}
        for file in sorted({stored.file for stored in stored_tensors(folder).values()}):
            with safe_open(str(file), framework="pt") as opened:  # mapped: what is left out is never read
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    new = shallower_name(name, kept)
                    if new is not None:
                        tensors[new] = opened.get_tensor(name)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, unfinished / file.name)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (unfinished / "config.json").write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        try:
            unfinished.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process was faster, and its folder is the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
