"""Contents of a checkpoint's files, read without torch: safetensors headers, sizes, digests."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.json_text import parse_json, read_json_text

if TYPE_CHECKING:
    from torch import Tensor

TensorHeader = tuple[str, tuple[int, ...]]
"""Dtype under torch's name (`bfloat16`) and shape."""

_DTYPES: Mapping[str, tuple[str, float]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F4": ("float4_e2m1fn_x2", 0.5),
    "F6_E2M3": ("float6_e2m3", 0.75),
    "F6_E3M2": ("float6_e3m2", 0.75),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Names in a safetensors header: torch's name and bytes of an element. Source: the format's `Dtype`."""

_AGAIN = "download or copy it again"
_DIGESTED = ("*.json", "*.safetensors", "*.bin", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja")
_WEIGHTS = {".safetensors", ".bin"}
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a checkpoint.

    Attributes:
        file: the safetensors file that holds it.
        dtype: torch's name of the dtype.
        shape: as stored.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        BadInputError: it is not readable, not JSON or not an object; the message has the line.
    """
    try:
        content = read_json_text(path)
    except json.JSONDecodeError as error:
        message = f"{path} is not JSON: {error.msg} (line {error.lineno}, column {error.colno}); {_AGAIN}"
        raise BadInputError(message) from None
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read: {error}"
        raise BadInputError(message) from None
    if not isinstance(content, dict):
        message = f"{path} must hold a JSON object, but holds a {type(content).__name__}"
        raise BadInputError(message)
    return content


# --- which files ---------------------------------------------------------------------------------------------------


def safetensors_files(folder: Path) -> tuple[Path, ...]:
    """The weight files that a load would read: one file, the shards of an index, or an adapter's; empty where none is.

    Raises:
        BadInputError: the index is broken or names a shard that is missing.
    """
    if folder.is_file():
        return (folder,)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return (folder / name,)
    index = folder / "model.safetensors.index.json"
    return _shards(index) if index.is_file() else ()


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        message = f"{index}: key weight_map is missing or empty; {_AGAIN}"
        raise BadInputError(message)
    files = tuple(index.parent / name for name in sorted({str(name) for name in names.values()}))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        message = f"{index} names the shard {missing[0]} ({len(missing)} of {len(files)} are missing); {_AGAIN}"
        raise BadInputError(message)
    return files


def pickle_files(folder: Path) -> tuple[Path, ...]:
    """Weight files that are Python pickles, which can run any code when loaded."""
    return tuple(sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")]))


# --- headers -------------------------------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor that the checkpoint's safetensors files hold, by name; empty where it has none.

    Args:
        folder: a checkpoint's folder, or one file.

    Raises:
        BadInputError: a file is truncated or corrupt.
    """
    found: dict[str, StoredTensor] = {}
    for file in safetensors_files(folder):
        state = file.stat()
        found.update(_headers_of(file, state.st_size, state.st_mtime_ns))
    return found


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Dtype and shape of every stored tensor by name, as :func:`stored_tensors`."""
    return {name: (stored.dtype, stored.shape) for name, stored in stored_tensors(folder).items()}


@lru_cache(maxsize=256)
def _headers_of(file: Path, size: int, _mtime_ns: int) -> Mapping[str, StoredTensor]:
    """Read and check one file's header; the last argument only changes the cache key of a changed file."""
    header, data_bytes = _raw_header(file, size)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, begin, end = _entry(file, name, entry)
        tensors[name] = tensor
        spans.append((begin, end))
    promised = max((end for _, end in spans), default=0)
    if promised != data_bytes:
        kind = "truncated" if promised > data_bytes else "corrupt"
        message = f"{file} is {kind}: its header promises {promised} bytes of weights, it holds {data_bytes}; {_AGAIN}"
        raise BadInputError(message)
    spans.sort()
    if any(before[1] != after[0] for before, after in itertools.pairwise(spans)) or (spans and spans[0][0]):
        message = f"{file} is corrupt: the tensors in its header overlap or leave gaps; {_AGAIN}"
        raise BadInputError(message)
    return tensors


LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit, of the safetensors library."""


def _raw_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON, and the number of bytes behind it. Layout: 8 bytes length, JSON, data."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            message = f"{file} is truncated or no safetensors file: a header of {length} bytes in {size}; {_AGAIN}"
            raise BadInputError(message)
        raw = stream.read(length)
    try:
        header = parse_json(raw)
    except ValueError:  # of JSON or of UTF-8
        header = None
    if not isinstance(header, dict):
        message = f"{file} is corrupt: its header is not a JSON object; {_AGAIN}"
        raise BadInputError(message)
    return header, size - 8 - length


def _entry(file: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    try:
        (dtype, width), shape = _DTYPES[entry["dtype"]], tuple(int(length) for length in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        message = (
            f"{file} is corrupt: the header's entry for {name} has no known dtype, shape and data_offsets; {_AGAIN}"
        )
        raise BadInputError(message) from None
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.ceil(math.prod(shape) * width):
        message = f"{file} is corrupt: {name} of shape {list(shape)} does not fit its {end - begin} bytes; {_AGAIN}"
        raise BadInputError(message)
    return StoredTensor(file=file, dtype=dtype, shape=shape), begin, end


def read_tensor(folder: Path, name: str) -> Tensor:
    """One stored tensor, read alone, in its stored dtype on the CPU.

    Args:
        folder: a checkpoint's folder, or one file.
        name: as in :func:`tensor_headers`.

    Raises:
        KeyError: the checkpoint has no such tensor.
    """
    from safetensors import safe_open

    with safe_open(str(stored_tensors(folder)[name].file), framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


# --- facts ---------------------------------------------------------------------------------------------------------


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The dtype of most stored elements, None where nothing is stored."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += tensor.elements
    return elements.most_common(1)[0][0] if elements else None


def digest(folder: Path) -> str:
    """`sha256:…` over names, sizes and contents of the files of a checkpoint: config, weights, tokenizer, code.

    A file in the hub's cache is a link to a blob that is named by its own sha256, which is used instead of reading it.
    """
    total = hashlib.sha256()
    for file in sorted(_digested(folder)):
        total.update(f"{file.name}\0{file.stat().st_size}\0{_file_digest(file)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _digested(folder: Path) -> Iterator[Path]:
    return (file for pattern in _DIGESTED for file in folder.glob(pattern) if file.is_file())


def _file_digest(file: Path) -> str:
    target = file.resolve()
    if file.is_symlink() and target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
        return target.name
    if file.suffix not in _WEIGHTS:
        return sha256_of(file)  # small, and what it says decides what is run
    return read_once((file,), lambda: sha256_of(file))


FileState = tuple[str, int, int, int, int]
"""Path, size, mtime_ns, ctime_ns and inode: every write changes one of them, since only the system sets a ctime."""

_digests: dict[tuple[FileState, ...], str] = {}


def read_once(files: Iterable[Path], make: Callable[[], str]) -> str:
    """The digest of large files, read once per state of the files by this process.

    Args:
        files: that are digested.
        make: reads them.
    """
    key = tuple(_state(file) for file in sorted(files))
    if key not in _digests:
        digest_ = make()
        if key != tuple(_state(Path(state[0])) for state in key):
            return digest_  # written to while it was read: of no state in particular
        _digests[key] = digest_
    return _digests[key]


def _state(file: Path) -> FileState:
    told = file.stat()
    return str(file), told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino


def tree_digest(root: Path, files: Iterable[Path]) -> str:
    """The SHA-256 over relative names, sizes and bytes of files, in the order of the names: 64 hexadecimal digits.

    Args:
        root: that the names are relative to.
        files: below it, or it itself.
    """
    total = hashlib.sha256()
    named = {file.relative_to(root).as_posix(): file for file in files}
    for name in sorted(named):
        with named[name].open("rb") as stream:
            total.update(f"{name}\0{os.fstat(stream.fileno()).st_size}\0".encode())
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, read in pieces: 64 hexadecimal digits.

    Args:
        file: of any size.
    """
    one = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            one.update(block)
    return one.hexdigest()


def joint_digest(digests: Iterable[str]) -> str:
    """One digest for an adapter and its base."""
    return "sha256:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()
