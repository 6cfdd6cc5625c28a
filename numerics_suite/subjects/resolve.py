"""Resolves SUBJECT: from text to a :class:`Subject`; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from numerics_suite.core.activity import doing
from numerics_suite.core.errors import BadInputError, CheckError, UnsupportedError
from numerics_suite.core.lifeline import known, lifeline
from numerics_suite.core.records import Subject, Task
from numerics_suite.subjects import compat, fixtures, validate
from numerics_suite.subjects.adapters import adapter_task, base_folder, read_adapter, refuse_unusable
from numerics_suite.subjects.factory import PREFIX as FACTORY
from numerics_suite.subjects.factory import call_factory
from numerics_suite.subjects.families import Family, family_of
from numerics_suite.subjects.files import digest, joint_digest, stored_dtype, stored_tensors
from numerics_suite.subjects.hub import parse_hub_id, snapshot
from numerics_suite.subjects.layers import shallower
from numerics_suite.subjects.notes import adapter_notes, checkpoint_notes
from numerics_suite.subjects.tasks import (
    CLASSIFICATION,
    architectures,
    choose_task,
    config_labels,
    needs_new_head,
    stored_labels,
    task_of_class,
)

FIXTURE = "fixture:"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a SUBJECT's files are, before anything in them is read."""

    id: str
    kind: Literal["directory", "hub", "fixture"]
    path: Path
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """The options for a subject; see :func:`resolve`."""

    task: str = "auto"
    num_labels: int | None = None
    layers: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    digests: bool = True


def resolve(  # noqa: PLR0913  # keywords, each an option of the command
    source: str,
    *,
    name: str | None = None,
    task: str = "auto",
    num_labels: int | None = None,
    layers: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    digests: bool = True,
) -> Subject:
    """Resolve one SUBJECT.

    Args:
        source: a directory, `org/name[@revision]`, `fixture:NAME` or `factory:module:function`.
        name: `--name`; else the fixture's name, the hub id without revision, the directory's or the function's own name.
        task: `auto` or a task.
        num_labels: of a classification head; None takes the config's.
        layers: `first:N` or `every:N` for a shallower model of the same weights, None for all layers.
        trust_remote_code: the checkpoint's own code may run.
        allow_pickle: pickled weights may be read.
        digests: take the digest, for which every byte of the files is read.

    Raises:
        BadInputError: it cannot be used; one line with file, key and fix.
        UnsupportedError: another release of transformers is needed, or this one has no class for the task.
    """
    if num_labels is not None and num_labels < 1:
        message = f"--num-labels {num_labels}: must be at least 1"
        raise BadInputError(message)
    wanted = _Wanted(
        task=task,
        num_labels=num_labels,
        layers=layers,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        digests=digests,
    )
    if source.startswith(FACTORY):
        if layers is not None:
            message = f"--layers {layers}: {source} has no checkpoint files to make a shallower model of"
            raise BadInputError(message)
        return _from_factory(source, name, wanted)
    return _from_files(source, _place(source, allow_pickle=allow_pickle), name, wanted)


def resolve_all(  # noqa: PLR0913  # keywords, each an option of the command
    sources: Sequence[str],
    names: Sequence[str] = (),
    *,
    task: str = "auto",
    num_labels: int | None = None,
    layers: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    digests: bool = True,
) -> tuple[Subject, ...]:
    """Resolve several SUBJECTs, each with a name of its own.

    Args:
        sources: as typed.
        names: of the first ones, in their order.
        task: as :func:`resolve`, and so the rest.
        num_labels: see there.
        layers: see there.
        trust_remote_code: see there.
        allow_pickle: see there.
        digests: see there.

    Raises:
        BadInputError: one cannot be used, there are more names than subjects, or two names are alike.
        UnsupportedError: as :func:`resolve`.
    """
    if len(names) > len(sources):
        message = f"--name is given {len(names)} times for {len(sources)} subjects"
        raise BadInputError(message)
    given = [*names, *[None] * (len(sources) - len(names))]

    def read(source: str, name: str | None) -> Subject:
        with doing(f"reading {source}"):
            return resolve(
                source,
                name=name,
                task=task,
                num_labels=num_labels,
                layers=layers,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                digests=digests,
            )

    subjects = tuple(read(source, name) for source, name in zip(sources, given, strict=True))
    seen: dict[str, str] = {}
    for subject in subjects:
        if subject.id in seen:
            message = f"'{seen[subject.id]}' and '{subject.source}' are both named '{subject.id}': tell them apart with --name"
            raise BadInputError(message)
        seen[subject.id] = subject.source
    return subjects


def unsupported_subject(source: str, *, name: str | None = None, task: str = "auto") -> Subject:
    """A subject for which :func:`resolve` raised `UnsupportedError`: its cells are skipped.

    Raises:
        BadInputError: it cannot be used at all.
    """
    place = _place(source, allow_pickle=False)
    config = validate.read_config(_checkpoint_of(place.path))
    return Subject(
        id=name or place.id,
        source=source,
        kind=place.kind,
        task=choose_task(task, config, where=str(place.path / "config.json")),
        family=family_of(config).name,
        path=place.path,
        revision=place.revision,
        architectures=architectures(config),
        config=config,
    )


def factory_subject(source: str, *, name: str | None = None) -> Subject:
    """The subject of a factory that failed to return a module.

    Args:
        source: `factory:module:function`.
        name: `--name`.
    """
    return Subject(
        id=name or source.rpartition(":")[2], source=source, kind="factory", task="module", family=family_of({}).name
    )


# --- files ---------------------------------------------------------------------------------------------------------


def _place(source: str, *, allow_pickle: bool) -> _Place:
    """The folder that SUBJECT names; a hub id is downloaded into the cache."""
    if source.startswith(FIXTURE):
        name = source.removeprefix(FIXTURE)
        return _Place(id=name, kind="fixture", path=fixtures.fixture_path(name))
    path = Path(source).expanduser()
    if path.is_dir():
        # `.` and `..` have a name too.
        return _Place(id=path.resolve().name, kind="directory", path=path.resolve())
    hub_id = parse_hub_id(source)
    if path.exists() or hub_id is None or source.startswith((".", "/", "~")):
        what = "a file, not a directory" if path.exists() else "no such directory"
        message = (
            f"{source}: {what}; SUBJECT is a directory, org/name[@revision], fixture:NAME or factory:module:function"
        )
        raise BadInputError(message)
    folder = snapshot(hub_id, allow_pickle=allow_pickle)
    return _Place(id=hub_id.id, kind="hub", path=folder, revision=folder.name)


def _checkpoint_of(path: Path) -> Path:
    """The folder with `config.json`: an adapter's is its base's."""
    if not validate.is_adapter(path):
        return path
    return base_folder(path, read_adapter(path), allow_pickle=False)


def _from_files(source: str, place: _Place, name: str | None, wanted: _Wanted) -> Subject:
    adapter = read_adapter(place.path) if validate.is_adapter(place.path) else None
    folder = place.path
    if adapter is not None:
        folder = base_folder(place.path, adapter, allow_pickle=wanted.allow_pickle)
        validate.check_weights(place.path, allow_pickle=wanted.allow_pickle)
    config = validate.read_config(folder)
    trusted = wanted.trust_remote_code or fixtures.trusted_fixture(folder)
    shallow: tuple[str, ...] = ()
    if wanted.layers is not None:
        if adapter is not None:
            message = f"--layers {wanted.layers}: {source} is an adapter, which belongs to all layers of its base"
            raise BadInputError(message)
        validate.check_weights(folder, allow_pickle=wanted.allow_pickle)
        folder, said = shallower(folder, config, wanted.layers)
        place, shallow, config = replace(place, path=folder), (said,), validate.read_config(folder)
    validate.check_supported(folder, config, trust_remote_code=trusted)
    validate.check_weights(folder, allow_pickle=wanted.allow_pickle)
    family, tensors = family_of(config), stored_tensors(folder)
    task = _task(wanted, config, folder, adapter)
    own_code = validate.needs_remote_code(config)
    if not own_code:
        from numerics_suite.subjects.buildable import refuse_impossible_sizes  # imports torch

        refuse_impossible_sizes(folder, config, tensors)
    validate.check_vocabulary(folder, config, tensors, family)
    validate.check_pad_token(folder, config, tensors, task)
    new_head = needs_new_head(tensors, config, family, task, wanted.num_labels)
    labels, model_class = wanted.num_labels, _model_class(config, task, folder)
    notes = (*shallow, *(() if own_code or adapter is not None else checkpoint_notes(tensors, config, model_class)))
    if adapter is not None:
        held = stored_tensors(place.path)
        if not own_code:
            refuse_unusable(place.path, folder, model_class, held)
        notes = tuple(adapter_notes(place.path, held))
        labels = labels or _adapter_labels(held, family, task)
        # A head that the adapter brings is not new.
        new_head = new_head and needs_new_head(held, {}, family, task, wanted.num_labels)
        tensors = {**tensors, **held}
    return Subject(
        id=name or place.id,
        source=source,
        kind=place.kind,
        task=task,
        family=family.name,
        path=place.path,
        revision=place.revision,
        model_class=model_class,
        architectures=architectures(config),
        stored_dtype=stored_dtype(tensors) or _declared_dtype(config),
        parameters=sum(tensor.elements for tensor in tensors.values()) or None,
        digest=_digest(place, folder) if wanted.digests else None,
        num_labels=labels or config_labels(config),
        new_head=new_head,
        trust_remote_code=trusted,
        adapter_base=str(folder) if adapter is not None else None,
        quantized=bool(config.get("quantization_config")),
        notes=notes,
        config=config,
    )


def _task(wanted: _Wanted, config: Mapping[str, Any], folder: Path, adapter: Mapping[str, Any] | None) -> Task:
    said = adapter_task(adapter) if adapter is not None and wanted.task == "auto" else None
    return said or choose_task(wanted.task, config, where=str(folder / "config.json"))


def _adapter_labels(held: Mapping[str, Any], family: Family, task: str) -> int | None:
    return stored_labels(held, family, task) if task in CLASSIFICATION else None


def _model_class(config: Mapping[str, Any], task: Task, folder: Path) -> str:
    """The class that a load builds.

    Raises:
        UnsupportedError: neither transformers nor the checkpoint's code has one for the task.
    """
    auto = compat.auto_class_name(task)
    if validate.needs_remote_code(config):
        target = config["auto_map"].get(auto)
        if not isinstance(target, str):
            message = f"{folder / 'config.json'}: the checkpoint's code has no class for {task}; add auto_map.{auto} or choose another --task"
            raise UnsupportedError(message)
        if not validate.is_defined(folder, target):
            message = f"{folder / 'config.json'}: auto_map.{auto} names {target}, which that file does not define; correct the name"
            raise UnsupportedError(message)
        return target.rpartition(".")[2]
    found = compat.model_class_name(str(config["model_type"]), task)
    if found is None or config.get("is_encoder_decoder"):
        message = (
            f"{folder / 'config.json'}: transformers {compat.version()} has no text-only class of model type "
            f"{config['model_type']} for {task}; use factory:module:function, whose function returns (module, batch)"
        )
        raise UnsupportedError(message)
    return found


def _declared_dtype(config: Mapping[str, Any]) -> str | None:
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if isinstance(dtype, str) else None


def _digest(place: _Place, folder: Path) -> str:
    if place.kind == "fixture":
        return f"sha256:{fixtures.known_digest(place.path)}"
    own = digest(place.path)
    return own if folder == place.path else joint_digest((own, digest(folder)))


# --- factories -----------------------------------------------------------------------------------------------------


def _from_factory(source: str, name: str | None, wanted: _Wanted) -> Subject:
    """Call the factory once to see what it makes; the module is dropped."""
    if (how := known().lost.get(source)) is not None:
        message = f"{source} returned no module: {how}"
        raise CheckError(message)
    watched = lifeline()
    if watched is not None:
        watched.asking(source, "planning")
    module, batch = call_factory(source)
    if watched is not None:
        watched.idle()
    config: dict[str, Any] = {}
    task: Task = "module"
    language_model = compat.is_language_model(module)
    if language_model:
        # As in `config.json`: JSON's own types, which travel to workers whatever the user put into the config.
        config = json.loads(json.dumps(module.config.to_dict(), default=str, skipkeys=True))  # type: ignore[union-attr, operator]
        task = task_of_class(type(module).__name__) or "module"
    if wanted.task not in ("auto", task):
        message = f"{source} makes a {type(module).__name__}, which is not a model for --task {wanted.task}; leave --task out or choose its own"
        raise BadInputError(message)
    elements = sum(parameter.numel() for parameter in module.parameters())
    return Subject(
        id=name or source.rpartition(":")[2],
        source=source,
        kind="factory",
        task=task,
        family=family_of(config).name,
        model_class=type(module).__name__,
        architectures=architectures(config),
        stored_dtype=_held_dtype(module),
        parameters=elements,
        num_labels=config_labels(config),
        lacks_batch=batch is None and not language_model,
        config=config,
    )


def _held_dtype(module: Any) -> str | None:
    """The dtype of most elements."""
    elements: dict[str, int] = {}
    for parameter in module.parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        elements[dtype] = elements.get(dtype, 0) + parameter.numel()
    return max(elements, key=lambda dtype: elements[dtype], default=None)
