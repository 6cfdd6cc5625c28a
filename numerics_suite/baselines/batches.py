"""The batches that a baseline is measured on: drawn once by formula, stored, and used again as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from numerics_suite.baselines.records import StoredBatch
from numerics_suite.baselines.sketch import hashed
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.inputs.labels import IGNORED
from numerics_suite.inputs.strategies import pad_rows
from numerics_suite.inputs.targets import is_row_of_numbers
from numerics_suite.inputs.vocabulary import InputSpace, Side
from numerics_suite.subjects.files import read_json
from numerics_suite.subjects.load import IDS

SIDES: Final[tuple[Side, ...]] = ("left", "right")

TRAINING: Final = "training"
OWN: Final = "own"

LENGTHS: Final = (11, 5)
"""Tokens of the rows whose answers are stored: six cells of a tiny checkpoint stay below 100 KB. Odd, and so is the next:
no number of heads is mistaken for a number of tokens."""

ALONE: Final = "alone"
"""Begins the name of a batch of one padded row, `alone-left`: code that skips a mask where there is one row shows only here."""

PADDED: Final = "padded"
"""Begins the name of a batch that is padded on a side which the family does not declare and users pad on all the same."""

LONG: Final = "long"
"""One row that reaches past the sliding window of the config."""

BEYOND: Final = 3
"""Tokens of that row past the window: two across its edge in one step, and single ones."""

LARGEST_ROW: Final = 4
"""It is asked where it has no more tokens than this many batches."""

WINDOWS: Final = ("sliding_window", "attention_window_size")

TRAINING_LENGTH: Final = 65
"""Longest row of the training batch, whose states and gradients are sketched: long enough for a window or an angle that is wrong
from some position on, and for thousands of numbers in each module's error."""


def draw_batches(context: CellContext) -> tuple[StoredBatch, ...]:
    """The batches of a cell by formula; a factory's own batch is its batch.

    Raises:
        NotApplicableError: a plain module without a batch.
    """
    own = context.loaded.batch
    if own is not None:
        return (StoredBatch(name=OWN, tensors={n: _stored(v) for n, v in own.items() if isinstance(v, Tensor)}),)
    space, seed = context.space, context.request.seed
    drawn = []
    lengths = LENGTHS[: space.max_rows]
    rows = [_row(space, f"row {index} of {seed}", length, index) for index, length in enumerate(_cut(lengths, space))]
    drawn += [_batch(side, *pad_rows(rows, side, space.pad_id)) for side in sorted(space.sides, reverse=True)]
    longest = min(TRAINING_LENGTH, context.longest, context.request.length + 1)
    return (*drawn, _training(space, context.rows, seed, longest))


def draw_uses(context: CellContext) -> tuple[StoredBatch, ...]:
    """The batches of what users run besides a plain call, drawn from the checkpoint's files: every release draws the same.

    One row alone, padded on each side that anybody pads on; two rows on those of them that the family does not declare;
    one row past the sliding window. Nothing for a factory's own batch.
    """
    if context.loaded.batch is not None or not context.takes_ids:
        return ()
    space, seed = context.space, context.request.seed
    rows = [_row(space, f"row {index} of {seed}", n, index) for index, n in enumerate(_cut(LENGTHS, space))]
    used = _used_sides(context)
    drawn = []
    for side in used:
        ids, mask = pad_rows(rows, side, space.pad_id)
        drawn.append(_batch(f"{ALONE}-{side}", ids[1:], mask[1:]))
        if side not in space.sides and space.max_rows > 1:
            drawn.append(_batch(f"{PADDED}-{side}", ids, mask))
    window = _window(context.subject.config)
    most = min(context.longest, LARGEST_ROW * context.request.rows * context.request.length)
    if window is not None and window + BEYOND <= most:
        ids, mask = pad_rows([_row(space, f"long row of {seed}", window + BEYOND, 0)], "right", space.pad_id)
        drawn.append(_batch(LONG, ids, mask))
    return tuple(drawn)


def _used_sides(context: CellContext) -> list[Side]:
    """Left first, on which `generate` pads: the family's sides, the tokenizer's, and `generate`'s own."""
    sides = set(context.space.sides)
    if context.subject.task == "causal-lm" and context.family.causal:
        sides.add("left")
    path = context.subject.path
    file = None if path is None else path / "tokenizer_config.json"
    if file is not None and file.is_file():
        told = read_json(file).get("padding_side")
        sides |= {side for side in SIDES if side == told}
    return [side for side in SIDES if side in sides]


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a layer with a sliding window looks back on, as the file says; None without one."""
    for owner in (config, config.get("text_config") or {}):
        sizes = [owner.get(key) for key in WINDOWS if owner.get("use_sliding_window", True) is not False]
        found = next((size for size in sizes if isinstance(size, int) and size > 1), None)
        if found is not None:
            return found
    return None


def _cut(lengths: Sequence[int], space: InputSpace) -> list[int]:
    return [min(length, space.max_length) for length in lengths]


def _row(space: InputSpace, name: str, length: int, index: int) -> list[int]:
    """Ids of one row: from both ends of the vocabulary, special ones, and any."""
    last = space.vocab_size - 1
    special = [token for token in space.special_ids if token != space.pad_id]
    planted = [[last, 0, *special[:1]], [*special[1:2], last - 1], [1, *special[2:3]], [last // 2]][index % 4]
    ids = [int(value) % space.vocab_size for value in hashed(name, length)]
    # The last tokens stay any: a row that ends with a special id is a special row.
    ids[: max(length - 1, 0)] = [*planted, *ids[len(planted) :]][: max(length - 1, 0)]
    return [_clean(token % space.vocab_size, space) for token in ids]


def _clean(token: int, space: InputSpace) -> int:
    """No pad id among real tokens: where a classifier pools then is a matter of definition."""
    return token if token != space.pad_id else (token + 1) % space.vocab_size


def _training(space: InputSpace, rows: int, seed: int, longest: int) -> StoredBatch:
    """One full row, the others at least half as long; the rules of :func:`inputs.strategies.draw_labels`."""
    shortest = min(longest, max(3, longest // 2))
    lengths = [longest - int(cut) % (longest - shortest + 1) for cut in hashed(f"lengths of {seed}", rows)]
    lengths[0] = longest
    tokens = [_row(space, f"training row {i} of {seed}", length, i + 1) for i, length in enumerate(lengths)]
    ids, mask = pad_rows(tokens, space.sides[0], space.pad_id)
    batch = _batch(TRAINING, ids, mask)
    return StoredBatch(name=TRAINING, tensors={**batch.tensors, "labels": _labels(space, ids, mask, seed).numpy()})


def _labels(space: InputSpace, ids: Tensor, mask: Tensor, seed: int) -> Tensor:
    rows, width = ids.shape
    numbers = torch.from_numpy((hashed(f"labels of {seed}", rows * width) >> np.uint64(8)).astype(np.int64))
    numbers = numbers.reshape(rows, width)
    if space.task == "sequence-classification":
        if is_row_of_numbers(space.targets, space.num_labels):
            drawn = numbers.repeat(1, -(-space.num_labels // width))[:, : space.num_labels]
            return (drawn % 2 if space.targets == "many" else 1 + drawn % 5).float()
        return 1 + numbers[:, 0] % 5 if space.targets == "numbers" else numbers[:, 0] % space.num_labels
    labels = ids.clone() if space.task == "causal-lm" else numbers % space.num_labels
    labels[mask == 0] = IGNORED
    if space.task == "causal-lm":
        labels[:, 1:][(mask[:, 1:] == 1) & (mask[:, :-1] == 0)] = IGNORED
    ignored = (numbers >> 8) % 5 == 0
    ignored[0, int(mask[0].nonzero()[-1])] = False
    labels[ignored] = IGNORED
    return labels


def _batch(name: str, ids: Tensor, mask: Tensor) -> StoredBatch:
    return StoredBatch(name=name, tensors={"input_ids": ids.numpy(), "attention_mask": mask.numpy()})


def _stored(value: Tensor) -> Any:
    """As an array; 16-bit floats, which numpy lacks in part, as float32, which holds them exactly."""
    value = value.detach().cpu()
    return (value.float() if value.dtype in {torch.bfloat16, torch.float16} else value).numpy()


def tensors_of(batch: StoredBatch, context: CellContext) -> dict[str, Any]:
    """The batch as the cell's model is called with it, on its device."""
    given: dict[str, Any] = {n: v for n, v in (context.loaded.batch or {}).items() if not isinstance(v, Tensor)}
    dtype = dtype_of(context.loaded.dtype)
    for name, array in batch.tensors.items():
        tensor = torch.from_numpy(np.array(array))
        if tensor.is_floating_point() and name not in IDS:
            tensor = tensor.to(dtype)
        given[name] = tensor.to(context.condition.main_device)
    return given


def training_of(batches: Sequence[StoredBatch]) -> StoredBatch:
    """The batch that is trained on: the one of that name, else the only one."""
    return next((batch for batch in batches if batch.name == TRAINING), batches[0])


def real_tokens(tensors: Mapping[str, Any]) -> Tensor | None:
    """`[rows, sequence]`, True at real tokens; None for a batch that has no tokens."""
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool().cpu()
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return torch.ones(ids.shape, dtype=torch.bool)
    return None
