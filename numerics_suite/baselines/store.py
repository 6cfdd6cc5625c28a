"""A folder of baselines, made to live in git.

Of each subject and task there is `SUBJECT--TASK.json`, which people can read, and the arrays in
`SUBJECT--TASK.<digest>.safetensors`, whose name and SHA-256 the JSON holds. The tensor file is written first, then the JSON
is replaced in one step, then what no JSON names any more is removed: whenever this is cut short, the folder holds a whole
baseline, the old one or the new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from numerics_suite.baselines.json_reader import Node
from numerics_suite.baselines.records import OLDEST_SCHEMA, SCHEMA_VERSION, CellBaseline
from numerics_suite.core.atomic import ensure_writable, write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.json_text import LARGEST, parse_json, read_bytes
from numerics_suite.core.records import Cell

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "numerics-suite baseline"
TRIES = 5
"""Times that a reader looks again when a writer replaced the tensor file between its two reads."""

LINE = 160
"""Columns up to which a value of the JSON stays on one line."""


class Baselines(Mapping[Cell, CellBaseline]):
    """The cells of one folder by their keys: the cell with the kind of its device."""

    def __init__(self, folder: Path, cells: Sequence[CellBaseline]) -> None:
        """Keep the cells in the order of their keys."""
        self.folder = folder
        self._cells = {key_of(item.cell): item for item in sorted(cells, key=lambda item: key_of(item.cell))}

    def __getitem__(self, cell: Cell) -> CellBaseline:
        """The baseline of a cell; the number of its device does not matter."""
        return self._cells[key_of(cell)]

    def __contains__(self, cell: object) -> bool:
        """Whether the cell has a baseline here."""
        return isinstance(cell, Cell) and key_of(cell) in self._cells

    def __iter__(self) -> Iterator[Cell]:
        """The keys, sorted."""
        return iter(self._cells)

    def __len__(self) -> int:
        """Number of cells."""
        return len(self._cells)


def key_of(cell: Cell) -> Cell:
    """The cell with the kind of its device: `cuda` for `cuda:1`."""
    kind = cell.device.partition(":")[0]
    return Cell(subject=cell.subject, precision=cell.precision, attn=cell.attn, device=kind, task=cell.task)


def described(cell: Cell) -> str:
    """A cell with its task, for messages: `glm4-tiny/bf16/sdpa/cpu (causal-lm)`."""
    return f"{key_of(cell).id} ({cell.task})"


def stem_of(subject: str, task: str) -> str:
    """What the names of its files begin with; a slash of a hub id becomes `+`, which no name holds."""
    return f"{quote(subject, safe='/').replace('/', '+')}--{task}"


# --- reading -----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Baselines:
    """Every baseline of a folder.

    Args:
        folder: with the files of :func:`save`; others than `*.json` are left alone.

    Raises:
        BadInputError: no folder, nothing in it, or a file that is torn, foreign or of another schema; the line names it.
    """
    if not folder.exists():
        message = f"no folder of baselines at {folder}; numerics-suite record --baseline {folder} writes one"
        raise BadInputError(message)
    if not folder.is_dir():
        message = f"{folder} is a file, not a folder of baselines"
        raise BadInputError(message)
    files = _json_files(folder)
    if not files:
        message = f"{folder} holds no baseline; numerics-suite record --baseline {folder} writes one"
        raise BadInputError(message)
    owner: dict[Cell, Path] = {}
    cells: list[CellBaseline] = []
    for file in files:
        for item in _load_file(file):
            key = key_of(item.cell)
            if key in owner:
                message = f"{owner[key]} and {file} both hold {described(key)}: delete one"
                raise BadInputError(message)
            owner[key] = file
            cells.append(item)
    return Baselines(folder, cells)


def _json_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except OSError as error:
        message = f"cannot read {folder}: {error.strerror or error}"
        raise BadInputError(message) from None


def _load_file(file: Path) -> tuple[CellBaseline, ...]:
    from numerics_suite.baselines.encoding import Decoder

    for tries_left in reversed(range(TRIES)):
        text = _read(file)
        content = Node(_parsed(text, file), str(file))
        tensors = content.get("tensors")
        name, digest = tensors.get("file").read(str), tensors.get("sha256").read(str)
        path = file.parent / name
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            message = f"'{name}' is no tensor file beside it"
            raise tensors.wrong(message)
        if not path.is_file() and tries_left and _read(file) != text:
            continue
        arrays = _arrays(path, digest, file)
        decoder = Decoder(content, arrays, content.get("subject").read(str), content.get("task").read(str))
        return decoder.cells()
    message = f"{file}: replaced {TRIES} times while it was read; try again"
    raise BadInputError(message)


def _read(path: Path, largest: int = LARGEST) -> bytes:
    try:
        return read_bytes(path, largest)
    except (OSError, ValueError) as error:
        message = f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        raise BadInputError(message) from None


def _parsed(text: bytes, file: Path) -> Any:
    """The JSON object of a baseline of this schema.

    Raises:
        BadInputError: torn, foreign, or of another schema.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        message = f"{file}: not valid JSON{where}: torn or edited; restore it from git, or delete it and record again"
        raise BadInputError(message) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        message = f"{file}: not a baseline of numerics-suite; move it out of the folder"
        raise BadInputError(message)
    version = content.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int):
        message = f"{file}: schema_version must be a whole number; restore it from git, or delete it and record again"
        raise BadInputError(message)
    if version > SCHEMA_VERSION:
        message = (
            f"{file}: schema_version {version} is newer than the {SCHEMA_VERSION} that this release reads; "
            "upgrade numerics-suite"
        )
        raise BadInputError(message)
    if version < OLDEST_SCHEMA:
        message = (
            f"{file}: schema_version {version} is older than the {OLDEST_SCHEMA} that this release reads; "
            "delete it and record again"
        )
        raise BadInputError(message)
    return content


LARGEST_ARRAYS = 2**30
"""Bytes of a tensor file, which is read whole; those of a fixture are some tens of thousands."""


def _arrays(path: Path, digest: str, file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a tensor file, once its digest is the one that the JSON holds."""
    if not path.is_file():
        message = (
            f"{path}: missing, and {file.name} needs it; restore it from git, or delete {file.name} and record again"
        )
        raise BadInputError(message)
    raw = _read(path, LARGEST_ARRAYS)
    if hashlib.sha256(raw).hexdigest() != digest:
        message = (
            f"{path}: torn or edited, its SHA-256 is not the one in {file.name}; "
            f"restore it from git, or delete {file.name} and record again"
        )
        raise BadInputError(message)
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        found: dict[str, NDArray[Any]] = load_tensors(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        message = f"{path}: not a safetensors file: {error}; delete {file.name} and record again"
        raise BadInputError(message) from None
    return found


# --- writing -----------------------------------------------------------------------------------------------------------


def check_writable(folder: Path, cells: Sequence[Cell], *, force: bool) -> None:
    """See, before work begins, that these cells can be saved here; nothing is written.

    Raises:
        BadInputError: the folder cannot be written, holds what cannot be read, or has a cell already.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        kind = "a file, not a folder of baselines" if nearest == folder else f"below {nearest}, which is a file"
        message = f"--baseline: {folder} is {kind}"
        raise BadInputError(message)
    ensure_writable(nearest / "numerics-suite-baseline.json", "--baseline")
    for stem, wanted in _by_stem(cells).items():
        file = folder / f"{stem}.json"
        if file.exists():
            _refuse_present(file, _load_file(file), wanted, force=force)


def save(folder: Path, cells: Sequence[CellBaseline], *, force: bool) -> list[Path]:
    """Write cells into a folder; the other cells of the same subjects that it holds already stay.

    Args:
        folder: made where it does not exist.
        cells: of any subjects and tasks; no two of one key.
        force: overwrite cells that are there already.

    Returns:
        The JSON files that were written.

    Raises:
        BadInputError: a cell is there already, or a file cannot be read or written; earlier baselines are untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        message = f"--baseline: {folder} is a file, not a folder of baselines"
        raise BadInputError(message) from None
    except OSError as error:
        message = f"--baseline: cannot make {folder}: {error.strerror or error}"
        raise BadInputError(message) from None
    new = {key_of(item.cell): item for item in cells}
    if len(new) != len(cells):
        message = "two cells of one key are to be saved"
        raise AssertionError(message)
    with _alone(folder):
        written = []
        for stem, wanted in _by_stem(tuple(new)).items():
            file = folder / f"{stem}.json"
            present = _load_file(file) if file.exists() else ()
            _refuse_present(file, present, wanted, force=force)
            merged = {key_of(item.cell): item for item in present} | {key: new[key] for key in wanted}
            written.append((file, [merged[key] for key in sorted(merged)]))
        for file, items in written:
            _write(file, items)
    return [file for file, _ in written]


def _by_stem(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(stem_of(cell.subject, cell.task), []).append(key_of(cell))
    return dict(sorted(found.items()))


def _refuse_present(file: Path, present: Sequence[CellBaseline], wanted: Sequence[Cell], *, force: bool) -> None:
    there = sorted({key_of(item.cell) for item in present} & set(wanted))
    if there and not force:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        message = f"{file} holds {described(there[0])}{more} already; --force overwrites"
        raise BadInputError(message)


def _write(file: Path, items: Sequence[CellBaseline]) -> None:
    from safetensors.numpy import save as save_tensors

    from numerics_suite.baselines.encoding import encode

    content, arrays = encode(items)
    raw = save_tensors(arrays)
    digest = hashlib.sha256(raw).hexdigest()
    tensors = file.with_name(f"{file.name.removesuffix('.json')}.{digest[:12]}.safetensors")
    whole = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "subject": items[0].cell.subject,
        "task": items[0].cell.task,
        "tensors": {"file": tensors.name, "sha256": digest},
        **content,
    }
    if not tensors.exists() or hashlib.sha256(_read(tensors)).hexdigest() != digest:
        write_atomic(tensors, raw, "--baseline")
    write_atomic(file, laid_out(whole) + "\n", "--baseline")
    _tidy(file, tensors)


def _tidy(file: Path, tensors: Path) -> None:
    """Remove what earlier writes of this file left: tensor files that it no longer names, and unfinished ones."""
    stem = re.escape(file.name.removesuffix(".json"))
    ours = re.compile(rf"{stem}\.[0-9a-f]{{12}}\.safetensors|\.{stem}\.(json|[0-9a-f]{{12}}\.safetensors)\.\w{{8}}")
    for path in file.parent.iterdir():
        if ours.fullmatch(path.name) and path != tensors:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder, where the system has locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def laid_out(value: Any, indent: str = "") -> str:
    """JSON that a person can read and git can compare: what fits on a line stays on it, all else has a line per item."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or len(flat) + len(indent) <= LINE:
        return flat
    inner = f"{indent} "
    if isinstance(value, dict):
        items = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {laid_out(item, inner)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(f"{inner}{laid_out(item, inner)}" for item in value) + f"\n{indent}]"
