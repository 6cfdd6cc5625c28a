"""`fix-config` applied: a copy of the checkpoint's folder in which config.json alone is another, and what the release builds from it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from numerics_suite.checks.load.config import TEXT
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Finding, Subject
from numerics_suite.definitions import file_weights
from numerics_suite.diagnosis.config_rewrites import (
    OF_ROPE,
    SYNONYMS,
    Rewriting,
    in_words_that_are_read,
    of_dtype,
    of_stored_sizes,
    tied_as_stored,
)
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects import compat
from numerics_suite.subjects.files import tensor_headers
from numerics_suite.subjects.load import Loaded

CONFIG = "config.json"
CLASSIFIER = "AutoModelForSequenceClassification"
"""The key of auto_map that names a classifier's class."""

ELSEWHERE = {
    "merged-edges": "not tried: no key of config.json clamps ids, the model's code does",
    "out-of-range": "not tried: no key of config.json gives the stored embedding more rows; use the checkpoint's own tokenizer",
}
"""By measurement: findings that name this remedy and that another file or the code has to cure."""


AS_STORED = frozenset({"stored-apart", "ignored-dtype", "wrong-shape"})
"""By measurement: findings whose check itself says that the rewritten file is right, as no definition could say better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """A model built from another config.json.

    Attributes:
        meant: the same model, whose answers must match what the user's own file means; None where that has not changed, or where the stored tensors decide.
        how: which keys to write, and what the release then builds.
    """

    context: CellContext
    meant: CellContext | None
    how: str


def fixed_configs(context: CellContext, finding: Finding) -> Iterator[Fixed]:
    """The cell on a copy of its folder with the config rewritten; the copy lasts until the next is asked for.

    Args:
        context: the cell; its files are only read.
        finding: of `load.*`, `inputs.*`, `forward.pooling` or `reference.oracle`.

    Raises:
        NotApplicableError: there is nothing to rewrite, with the reason.
    """
    subject = context.subject
    measurement = str(finding.evidence.get("measurement", ""))
    if measurement in ELSEWHERE:
        raise NotApplicableError(ELSEWHERE[measurement])
    if subject.path is None and measurement == "wrongly-tied":
        yield Fixed(
            context=context.variant(change=_tie),
            meant=None,
            how="with model.tie_weights(), or the weight of the output embedding set to that of the input embedding",
        )
        return
    if subject.path is None:
        reason = "does not apply: a factory's model has no config.json; set its config where your code builds the model"
        raise NotApplicableError(reason)
    rewriting = _rewriting(context, finding)
    with _copied(subject, rewriting.config) as copy:
        fixed = context.variant(subject=copy)
        meant = None if measurement in AS_STORED else context.variant(subject=replace(copy, config=rewriting.meaning))
        how = f"{rewriting}, {_built(context, fixed, rewriting)}"
        yield Fixed(context=fixed, meant=meant, how="; ".join((how, *rewriting.left)))


def _rewriting(context: CellContext, finding: Finding) -> Rewriting:
    raw, built = context.subject.config, context.model.config
    measurement = finding.evidence.get("measurement")
    known = compat.known_config_keys(type(built))
    if measurement == "wrong-shape":
        return _of_own_code(context)
    if measurement == "mismatched":
        return of_stored_sizes(raw, known, built, _shapes(context.subject))
    if measurement in {"wrongly-tied", "stored-apart"}:
        return _tied(context)
    if measurement == "ignored-dtype":
        return of_dtype(raw, context.recipe.parameters, compat.dtype_keyword())
    of_rotary = ("rotary-excess", "rotary-scale")
    if any(name.startswith(f"{TEXT}.") for name in finding.parameters):
        return _of_text_part(context, finding.parameters)
    of_table = measurement in of_rotary or any(f"also {name}" in finding.evidence for name in of_rotary)
    keys = tuple(key for key in OF_ROPE if key in raw) if of_table else finding.parameters
    return in_words_that_are_read(raw, known, keys)


def _of_text_part(context: CellContext, keys: tuple[str, ...]) -> Rewriting:
    """The file with another `text_config`, the section that says what the language part of a model of pictures is."""
    raw, section = context.subject.config, f"{TEXT}."
    known = compat.known_config_keys(type(getattr(context.model.config, TEXT)))
    part = in_words_that_are_read(raw[TEXT], known, (key.removeprefix(section) for key in keys))
    return replace(
        part,
        config={**raw, TEXT: part.config},
        meaning={**raw, TEXT: part.meaning},
        written={f"{section}{key}": value for key, value in part.written.items()},
        dropped=tuple(f"{section}{key}" for key in part.dropped),
    )


def _of_own_code(context: CellContext) -> Rewriting:
    """The class of the checkpoint's own code that is a sequence classifier by name, where auto_map names another."""
    raw = context.subject.config
    target = str((raw.get("auto_map") or {}).get(CLASSIFIER, ""))
    file, _, named = target.rpartition("--")[2].partition(".")
    code = _folder(context.subject) / f"{file}.py"
    text = code.read_text(encoding="utf-8") if target and "--" not in target and code.is_file() else ""
    other = next(
        (name for name in re.findall(r"^class (\w+ForSequenceClassification)\b", text, re.MULTILINE) if name != named),
        None,
    )
    if other is None:
        reason = "not tried: no key of config.json gives the logits another shape; the class that is named, or its own code, does"
        raise NotApplicableError(reason)
    written = {"auto_map": {**raw["auto_map"], CLASSIFIER: f"{file}.{other}"}}
    config = {**raw, **written}
    return Rewriting(config=config, meaning=config, written={f"auto_map.{CLASSIFIER}": f"{file}.{other}"}, dropped=())


def _shapes(subject: Subject) -> Mapping[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in tensor_headers(_folder(subject)).items()}


def _folder(subject: Subject) -> Path:
    return Path(subject.adapter_base or str(subject.path))


def _tie(loaded: Loaded) -> Loaded:
    """Both embeddings one tensor, as the config of code's own model declares: by its own method, or where that does nothing, by hand."""
    model: Any = loaded.model
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    output, entry = model.get_output_embeddings(), model.get_input_embeddings()
    if output.weight is not entry.weight:
        output.weight = entry.weight
    return loaded


def _tied(context: CellContext) -> Rewriting:
    """Whether both embeddings are one matrix is seen in the files: the output's is absent there, or the same."""
    model, folder = context.model, _folder(context.subject)
    entry, head = (
        f"{_name_of(model, embedding)}.weight"
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    )
    stored = _shapes(context.subject)
    equal = False
    if entry in stored and stored.get(head) == stored[entry]:
        weights = file_weights(folder)
        equal = torch.equal(weights(entry), weights(head))
    return tied_as_stored(context.subject.config, stored, head=head, equal=equal)


def _name_of(model: nn.Module, wanted: object) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


@contextmanager
def _copied(subject: Subject, config: Mapping[str, Any]) -> Iterator[Subject]:
    """The subject in a folder of its own that links to the same weights and code; gone afterwards."""
    source = _folder(subject)
    with tempfile.TemporaryDirectory(prefix="numerics-suite-") as scratch:
        # transformers keeps remote code by the folder's name, and the class that an auto class found first for a config's own class.
        same_code = config.get("auto_map") == subject.config.get("auto_map")
        folder = Path(scratch) / (source.name if same_code else f"{source.name}_fixed")
        folder.mkdir()
        for file in source.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file != source / CONFIG:
                _link(file.resolve(), folder / file.relative_to(source))
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        if subject.adapter_base:
            yield replace(subject, adapter_base=str(folder), config=config)
        else:
            yield replace(subject, path=folder, config=config)


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(file)
    except OSError:  # not every file system has links
        shutil.copy2(file, place)


def _built(before: CellContext, after: CellContext, rewriting: Rewriting) -> str:
    """`transformers 5.24.0 builds rotary base 500000 (was 10000)`: what the new words change, in numbers."""
    was, now = _values(before), _values(after)
    names = {name for key in (*rewriting.written, *rewriting.dropped) for name in (key, *_synonyms(key))}
    names |= {"rotary base", "rotary pairs"}
    changed = [
        f"{name} {now[name]} (was {was.get(name)})" for name in sorted(names & now.keys()) if now[name] != was.get(name)
    ]
    kind, other = type(before.model).__name__, type(after.model).__name__
    changed += [] if kind == other else [f"{other} (was {kind})"]
    return f"transformers {compat.version()} builds {', '.join(changed) or 'the same model'}"


def _synonyms(key: str) -> tuple[str, ...]:
    return next((names for names in SYNONYMS if key in names), ())


def _values(context: CellContext) -> dict[str, Any]:
    """What the built model has: its config's values, and the rotary base as its own table has it."""
    config = context.model.config
    values = {key: getattr(config, key, None) for names in (*SYNONYMS, ("tie_word_embeddings",)) for key in names}
    table = context.rotary_table
    if table is not None and table[1].dim() == 1 and len(table[1]) > 1:
        pairs = len(table[1])
        # The k-th frequency is the base to the power of -k / pairs. The power multiplies the roundoff of a float32 by the pairs: five digits are sure.
        base = float(f"{float(table[1].double()[1]) ** -pairs:.5g}")
        values |= {"rotary base": int(base) if base.is_integer() else base, "rotary pairs": pairs}
    return {key: value for key, value in values.items() if value is not None}
