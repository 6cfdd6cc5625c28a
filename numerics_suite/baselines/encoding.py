"""Cells to one JSON object and one set of arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from numerics_suite.baselines.batch_match import CANCELLED
from numerics_suite.baselines.json_reader import Node
from numerics_suite.baselines.packing import Packer, joined, narrowed, repeated
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
from numerics_suite.core.numbers import jsonable, revived
from numerics_suite.core.records import Cell

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from numerics_suite.baselines.records import Floats

Arrays = Mapping[str, "NDArray[Any]"]
NUMBERS = ("error", "inherent", "headroom_bits")
PLAIN: Mapping[str, Any] = {
    **dict.fromkeys((*NUMBERS, "true_loss"), float),
    "error_count": int,
    "bits": Mapping[str, str],
    "headroom_module": str | None,
    "curve": TrainingCurve,
    "left_out": Mapping[str, str],
}
"""Fields of a cell that stand in its JSON as they are, with their types."""

Shape = tuple[int, ...]
GRADIENT_ROWS = tuple[tuple[str, Shape, int], ...]
MODULE_ROWS = tuple[tuple[str, str, Shape | None, int, Shape | None, int], ...]
TENSOR_ROWS = tuple[tuple[str, str, Shape, int], ...]
"""Names, dtypes or classes, shapes and counts; a module's of what came in and of what went out."""


class Parts:
    """Texts that cells share, each held once under the name of its kind."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        self.held: dict[str, list[Any]] = {}

    def put(self, kind: str, value: Any) -> int:
        """Hold a value of JSON's own types and give its index."""
        known = self.held.setdefault(kind, [])
        if value not in known:
            known.append(value)
        return known.index(value)


def encode(cells: Sequence[CellBaseline]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What is text and what are arrays of the cells of one subject and task."""
    parts, packer = Parts(), Packer()
    written = [_cell(item, parts, packer) for item in cells]
    return {"parts": parts.held, "cells": written}, packer.arrays


def _cell(item: CellBaseline, parts: Parts, packer: Packer) -> dict[str, Any]:
    return {
        "precision": item.cell.precision,
        "attn": item.cell.attn,
        "device": item.cell.device,
        **{name: jsonable(getattr(item, name)) for name in NUMBERS},
        "error_count": int(item.error_count),
        "headroom_module": item.headroom_module,
        "true_loss": jsonable(packer.number("true_loss", item.true_loss)),
        "bits": dict(item.bits),
        "curve": {field.name: jsonable(getattr(item.curve, field.name)) for field in fields(TrainingCurve)},
        "left_out": dict(item.left_out),
        "subject": parts.put("subject", jsonable(item.subject)),
        "environment": parts.put("environment", jsonable(item.environment)),
        "recipe": parts.put("recipe", jsonable(item.recipe)),
        "contract": parts.put("contract", jsonable(item.contract)),
        "checks": parts.put("checks", list(item.checks)),
        "batches": parts.put("batches", [_batch(batch, packer) for batch in item.batches]),
        "answers": parts.put("answers", [_answer(answer, packer) for answer in item.answers]),
        "gradients": parts.put("gradients", _gradients(item.gradients, parts, packer)),
        "modules": parts.put("modules", _modules(item.modules, parts, packer)),
        "local_errors": _local_errors(item, packer),
        "gradient_errors": _gradient_errors(item, packer),
        "uses": parts.put("batches", [_batch(batch, packer) for batch in item.uses]),
        "use_answers": parts.put("answers", [_answer(answer, packer) for answer in item.use_answers]),
        "use_modules": parts.put("modules", _modules(item.use_modules, parts, packer)),
        "tensors": parts.put("tensors", _tensors(item.tensors, parts, packer)),
    }


def _batch(batch: StoredBatch, packer: Packer) -> dict[str, Any]:
    tensors = {
        name: {"dtype": value.dtype.name, "array": packer.put(f"{batch.name}.{name}", narrowed(value))}
        for name, value in batch.tensors.items()
    }
    return {"name": batch.name, "tensors": tensors}


def _answer(answer: AnswerRecord, packer: Packer) -> dict[str, Any]:
    role = f"answers.{answer.name}"
    return {
        "name": answer.name,
        "whole": answer.whole,
        "rms": jsonable(packer.number(f"{role}.rms", answer.rms)),
        "values": packer.put_true(f"{role}.values", answer.values, answer.rms),
        "top_values": packer.put_true(f"{role}.top_values", answer.top_values, answer.rms),
        "top_ids": packer.put_integers(f"{role}.top_ids", answer.top_ids),
    }


def _gradients(records: Sequence[GradientRecord], parts: Parts, packer: Packer) -> dict[str, Any]:
    rows = [[record.name, list(record.gradient.shape), int(record.gradient.count)] for record in records]
    sketches = [record.gradient for record in records]
    return {"rows": parts.put("gradient_rows", rows), **_sketches("gradients", sketches, packer)}


def _modules(records: Sequence[ModuleRecord], parts: Parts, packer: Packer) -> dict[str, Any]:
    rows = [[record.name, record.kind, *_size(record.given), *_size(record.gave)] for record in records]
    return {
        "rows": parts.put("module_rows", rows),
        "given": _sketches("given", [record.given for record in records if record.given is not None], packer),
        "gave": _sketches("gave", [record.gave for record in records if record.gave is not None], packer),
    }


def _tensors(records: Sequence[TensorRecord], parts: Parts, packer: Packer) -> dict[str, Any]:
    rows = [[record.name, record.dtype, list(record.values.shape), int(record.values.count)] for record in records]
    sketches = [record.values for record in records]
    return {"rows": parts.put("tensor_rows", rows), **_sketches("tensors", sketches, packer)}


def _size(sketch: Sketch | None) -> list[Any]:
    return [None, 0] if sketch is None else [list(sketch.shape), int(sketch.count)]


def _sketches(role: str, sketches: Sequence[Sketch], packer: Packer) -> dict[str, Any]:
    """Their root mean squares `[n]`, and their projections one behind the other."""
    rms = np.array([sketch.rms for sketch in sketches], dtype=np.float64)
    widths = [int(np.size(sketch.projections)) for sketch in sketches]
    largest = float(np.max(rms[np.isfinite(rms)], initial=0.0))
    scale = np.where(rms <= CANCELLED * largest, largest, rms)
    return {
        "widths": widths[0] if len(set(widths)) == 1 else widths,
        "rms": packer.put_true(f"{role}.rms", rms, scale),
        "projections": packer.put_true(
            f"{role}.projections", joined([sketch.projections for sketch in sketches]), repeated(scale, widths)
        ),
    }


def _local_errors(item: CellBaseline, packer: Packer) -> dict[str, str]:
    """Errors `[modules]` and counts; a count below zero stands for one that was not measured."""
    errors = [0.0 if module.local_error is None else module.local_error for module in item.modules]
    counts = [-1 - module.local_count if module.local_error is None else module.local_count for module in item.modules]
    return {
        "errors": packer.put("local_errors", np.array(errors, dtype=np.float64)),
        "counts": packer.put_integers("local_counts", np.array(counts, dtype=np.int64)),
    }


def _gradient_errors(item: CellBaseline, packer: Packer) -> str:
    """Errors `[parameters]`, below zero where there is none."""
    errors = [-1.0 if record.error is None else record.error for record in item.gradients]
    return packer.put("gradient_errors", np.array(errors, dtype=np.float64))


# --- and back ----------------------------------------------------------------------------------------------------------


class Decoder:
    """Reads the cells of one file."""

    def __init__(self, content: Node, arrays: Arrays, subject: str, task: str) -> None:
        """Begin with the file's content."""
        self.content, self.arrays, self.subject, self.task = content, arrays, subject, task

    def cells(self) -> tuple[CellBaseline, ...]:
        """Every cell.

        Raises:
            BadInputError: a value is missing or of the wrong type; the message names the file and the place.
        """
        return tuple(self._cell(node) for node in self.content.get("cells").items())

    def _part(self, cell: Node, kind: str, key: str | None = None) -> Node:
        return self.content.get("parts").get(kind).at(cell.get(key or kind).read(int))

    def _array(self, node: Node, shape: tuple[int | None, ...] | None = None) -> NDArray[Any]:
        name = node.read(str)
        if name not in self.arrays:
            message = f"the tensor file has no '{name}'"
            raise node.wrong(message)
        found = self.arrays[name]
        if shape is not None and (
            found.ndim != len(shape)
            or any(want not in {None, have} for want, have in zip(shape, found.shape, strict=True))
        ):
            message = f"'{name}' has the shape {list(found.shape)}"
            raise node.wrong(message)
        return found

    def _floats(self, node: Node, *shape: int | None) -> Floats:
        found = self._array(node, shape or None)
        if found.dtype != np.float64:
            message = f"'{found.dtype.name}' where float64 is meant"
            raise node.wrong(message)
        return found

    def _cell(self, node: Node) -> CellBaseline:
        names = {name: node.get(name).read(str) for name in ("precision", "attn", "device")}
        return CellBaseline(
            cell=Cell(subject=self.subject, task=self.task, **names),
            subject=revived(self._part(node, "subject").read(dict)),
            environment=revived(self._part(node, "environment").read(dict)),
            recipe=revived(self._part(node, "recipe").read(dict)),
            batches=tuple(self._batch(batch) for batch in self._part(node, "batches").items()),
            answers=tuple(self._answer(answer) for answer in self._part(node, "answers").items()),
            gradients=self._gradients(self._part(node, "gradients"), node.get("gradient_errors")),
            modules=self._modules(self._part(node, "modules"), node.get("local_errors")),
            contract=revived(self._part(node, "contract").read(dict)),
            checks=self._part(node, "checks").read(tuple[str, ...]),
            **{name: node.get(name).read(kind) for name, kind in PLAIN.items()},
            **(self._since_2(node) if self.content.get("schema_version").read(int) > 1 else {}),
        )

    def _since_2(self, node: Node) -> dict[str, Any]:
        return {
            "uses": tuple(self._batch(batch) for batch in self._part(node, "batches", "uses").items()),
            "use_answers": tuple(self._answer(each) for each in self._part(node, "answers", "use_answers").items()),
            "use_modules": self._modules(self._part(node, "modules", "use_modules")),
            "tensors": self._tensors(self._part(node, "tensors")),
        }

    def _tensors(self, node: Node) -> tuple[TensorRecord, ...]:
        rows = self._part(node, "tensor_rows", "rows").read(TENSOR_ROWS)
        found = self._sketches(node, [row[2:] for row in rows])
        return tuple(
            TensorRecord(name=row[0], dtype=row[1], values=values) for row, values in zip(rows, found, strict=True)
        )

    def _batch(self, node: Node) -> StoredBatch:
        tensors = {}
        for name in node.get("tensors").read(dict):
            entry = node.get("tensors").get(name)
            dtype = entry.get("dtype")
            try:
                wanted = np.dtype(dtype.read(str))
            except TypeError:
                message = f"'{dtype.value}' is no dtype"
                raise dtype.wrong(message) from None
            tensors[name] = self._array(entry.get("array")).astype(wanted)
        return StoredBatch(name=node.get("name").read(str), tensors=tensors)

    def _answer(self, node: Node) -> AnswerRecord:
        return AnswerRecord(
            name=node.get("name").read(str),
            values=self._floats(node.get("values")),
            whole=node.get("whole").read(bool),
            top_values=self._floats(node.get("top_values")),
            top_ids=self._array(node.get("top_ids")).astype(np.int64),
            rms=node.get("rms").read(float),
        )

    def _gradients(self, node: Node, own: Node) -> tuple[GradientRecord, ...]:
        rows = self._part(node, "gradient_rows", "rows").read(GRADIENT_ROWS)
        found = self._sketches(node, [row[1:] for row in rows])
        errors = self._floats(own, len(rows))
        return tuple(
            GradientRecord(name=name, gradient=gradient, error=None if error < 0 else float(error))
            for (name, *_), gradient, error in zip(rows, found, errors, strict=True)
        )

    def _modules(self, node: Node, local: Node | None = None) -> tuple[ModuleRecord, ...]:
        rows = self._part(node, "module_rows", "rows").read(MODULE_ROWS)
        errors = np.zeros(len(rows)) if local is None else self._floats(local.get("errors"), len(rows))
        counts = np.full(len(rows), -1) if local is None else self._array(local.get("counts"), (len(rows),))
        states = {}
        for name, first in (("given", 2), ("gave", 4)):
            present = [row[first : first + 2] for row in rows if row[first] is not None]
            sketches = iter(self._sketches(node.get(name), present))
            states[name] = [None if row[first] is None else next(sketches) for row in rows]
        return tuple(
            ModuleRecord(
                name=row[0],
                kind=row[1],
                given=states["given"][index],
                gave=states["gave"][index],
                local_error=float(errors[index]) if counts[index] >= 0 else None,
                local_count=int(counts[index]) if counts[index] >= 0 else -1 - int(counts[index]),
            )
            for index, row in enumerate(rows)
        )

    def _sketches(self, node: Node, sizes: Sequence[tuple[tuple[int, ...], int]]) -> list[Sketch]:
        widths = node.get("widths")
        each = widths.read(Shape) if isinstance(widths.value, list) else (widths.read(int),) * len(sizes)
        if len(each) != len(sizes):
            message = f"has {len(each)} entries for {len(sizes)} rows"
            raise widths.wrong(message)
        rms = self._floats(node.get("rms"), len(sizes))
        projections = self._floats(node.get("projections"), sum(each))
        ends = np.cumsum(each, dtype=np.int64) if each else np.zeros(0, dtype=np.int64)
        return [
            Sketch(shape=shape, count=count, rms=float(value), projections=projections[end - width : end])
            for (shape, count), value, end, width in zip(sizes, rms, ends, each, strict=True)
        ]
