"""load.complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.adapters import adapter_task, read_adapter
from numerics_suite.subjects.built_model import without_adapter
from numerics_suite.subjects.files import read_tensor, tensor_headers
from numerics_suite.subjects.load import Loaded
from numerics_suite.subjects.notes import ignored_by_design
from numerics_suite.subjects.scales import without_scales
from numerics_suite.subjects.tasks import CLASSIFICATION, head_parts, head_tensors


@check(scope="precision", needs=("checkpoint",))
def complete(context: CellContext) -> Iterable[Measurement]:
    """Did every stored weight reach the model, unchanged, and is every weight of the model but a new head stored?"""
    lacking = _without_scales(context)
    yield _count("without-scales", lacking)
    if lacking:
        return  # what is loaded of them says nothing more, and may need another device
    loaded = context.loaded
    yield _count("lost-head", _lost_head(context))
    yield _renamed(context, loaded)
    names: list[tuple[str, tuple[str, ...]]] = [
        ("missing", tuple(name for name in loaded.missing if name not in loaded.new_head)),
        ("unexpected", _unexpected(loaded)),
        ("mismatched", loaded.mismatched),
    ]
    for name, found in names:
        yield _count(name, found, _shapes(context, loaded) if name == "mismatched" else None)
    changed = () if context.subject.adapter_base or context.subject.quantized else tuple(_changed(context, loaded))
    yield _count("changed", changed)


def _shapes(context: CellContext, loaded: Loaded) -> dict[str, Fact]:
    """The first shape that differs; empty stored tensors come from sharded training that did not gather its weights."""
    stored = {} if context.subject.path is None else tensor_headers(context.subject.path)
    shapes = {name: tuple(stored[name][1]) for name in loaded.mismatched if name in stored}
    if not shapes:
        return {}
    first, built = next(iter(shapes)), dict(loaded.model.named_parameters())
    empty = sum(0 in shape for shape in shapes.values())
    facts: dict[str, Fact] = {"stored shape": str(list(shapes[first]))}
    if first in built:
        facts["built shape"] = str(list(built[first].shape))
    return facts | ({"stored without any element": empty} if empty else {})


def _count(name: str, found: tuple[str, ...], facts: dict[str, Fact] | None = None) -> Measurement:
    return Measurement(
        name=name,
        value=len(found),
        unit="tensors",
        module=found[0].rpartition(".")[0] if found else None,
        parameters=found,
        facts=facts or {},
    )


def _without_scales(context: CellContext) -> tuple[str, ...]:
    """Quantised weights whose scales are not in the files, so that their codes are read as values."""
    subject = context.subject
    folder = subject.adapter_base or subject.path
    return () if folder is None else without_scales(tensor_headers(Path(folder)), subject.config)


def _lost_head(context: CellContext) -> tuple[str, ...]:
    """The head of an adapter that was trained with one and does not hold it; a base's own head is not the trained one."""
    subject = context.subject
    if not subject.adapter_base or subject.path is None or subject.task not in CLASSIFICATION:
        return ()
    adapter, family = read_adapter(subject.path), context.family
    if adapter_task(adapter) != subject.task or head_tensors(tensor_headers(subject.path), family, subject.task):
        return ()
    if not context.loaded.new_head and not set(head_parts(family, subject.task)) & set(
        adapter.get("modules_to_save") or ()
    ):
        return ()
    named = head_tensors((name for name, _ in context.model.named_parameters()), family, subject.task)
    return named or context.loaded.new_head


def _renamed(context: CellContext, loaded: Loaded) -> Measurement:
    """Weights that are complete in the files, under a name that the model does not know."""
    assert context.subject.path is not None
    stored = tensor_headers(context.subject.path)
    wanted = dict(loaded.model.named_parameters())
    homeless = [name for name in loaded.unexpected if name in stored]
    found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for name in loaded.missing:
        if name in loaded.new_head or name not in wanted:
            continue
        shape = tuple(wanted[name].shape)
        for other in (other for other in homeless if tuple(stored[other][1]) == shape):
            # A wrapper of training (peft's `base_layer`, `modules_to_save.default`) adds parts within a name, others before it.
            added = _added_parts(name, other)
            if added or other.split(".")[-2:] == name.split(".")[-2:]:
                found.setdefault(added or _prefixes(other, name), []).append((name, other))
    if not found:
        return Measurement(name="renamed", value=0, unit="tensors")
    pairs = max(found.values(), key=len)
    names = tuple(dict.fromkeys(name for name, _ in pairs))
    return Measurement(
        name="renamed",
        value=len(names),
        unit="tensors",
        module=names[0].rpartition(".")[0],
        parameters=names,
        facts={"stored as": pairs[0][1], "looked for as": names[0]},
    )


def _added_parts(name: str, other: str) -> tuple[str, ...]:
    """The parts that another name has within this one, empty where it begins otherwise or has none."""
    left, added = name.split("."), []
    if other.partition(".")[0] != left[0]:
        return ()
    for part in other.split("."):
        if left and part == left[0]:
            left.pop(0)
        else:
            added.append(part)
    return () if left else tuple(added)


def _prefixes(one: str, other: str) -> tuple[str, str]:
    """The prefixes of both names before their longest common suffix of whole parts."""
    left, right = one.split("."), other.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return "".join(f"{part}." for part in left), "".join(f"{part}." for part in right)


def _unexpected(loaded: Loaded) -> tuple[str, ...]:
    """Stored tensors with no place in the model, except those that the plan names and another task's head."""
    left_out = set(ignored_by_design(loaded.unexpected, type(without_adapter(loaded.model))))
    if loaded.new_head:
        heads = {"lm_head", "output_layer", "score", "classifier", "classifier_head"}
        left_out |= {name for name in loaded.unexpected if heads & set(name.split("."))}
    return tuple(name for name in loaded.unexpected if name not in left_out)


def _changed(context: CellContext, loaded: Loaded) -> Iterable[str]:
    """Parameters whose value is not the stored one cast to the parameter's dtype; tied ones are load.tied's."""
    path = context.subject.path
    assert path is not None
    stored = tensor_headers(path)
    owners = Counter(id(parameter) for _, parameter in loaded.model.named_parameters(remove_duplicate=False))
    for name, parameter in loaded.model.named_parameters():
        if name not in stored or name in loaded.mismatched or tuple(stored[name][1]) != tuple(parameter.shape):
            continue
        if owners[id(parameter)] > 1:
            continue
        if not _same_bits(read_tensor(path, name).to(parameter.dtype), parameter.detach().cpu()):
            yield name


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if torch.equal(left, right):  # makes no masks, which of a large weight would take more memory than itself
        return True
    # NaN payloads survive a copy; comparing as NaN-equal keeps load.finite's finding out of this one.
    return bool(((left == right) | (left.isnan() & right.isnan())).all())
