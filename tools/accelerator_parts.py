"""The parts of tools/on_accelerator.py: what each measures on a device, and whether it is as it should be.

Each part is a function from a :class:`Setup` to an :class:`Outcome`. They ask through `numerics-suite check` and `record` in this
process, and through the session of tests/mutants, so torch is imported once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from numerics_suite.baselines.store import load, save
from numerics_suite.cli.main import main
from numerics_suite.core.errors import CheckError
from numerics_suite.core.numbers import nan_last, revived
from numerics_suite.devices.device import (
    default_precisions,
    describe_device,
    is_for_tests,
    lacks,
    lacks_attention,
)
from numerics_suite.devices.kinds import CPU, device_module, kind_of
from numerics_suite.devices.memory import release
from numerics_suite.devices.precisions import PRECISIONS
from numerics_suite.engine.environment import package_versions
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.subjects.fixtures import fixture_names

if TYPE_CHECKING:
    from mutants.catalogue import Mutant

ROOT = Path(__file__).resolve().parents[1]
Value: TypeAlias = "str | int | float | None"
Verdict: TypeAlias = Literal["met", "not met", "not applicable"]
Results: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, str, str, str]
"""Check, subject, precision and attention: what a question is on any device."""

LATE = "time ran out before everything was begun; --minutes gives more"
MOST_TOLD = 3
"""Ids that a reason lists before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        fixtures: shipped checkpoints, by name.
        pair: those of `baseline`: a language model and a classifier.
        attentions: implementations that every device has.
        precisions: of those that the device runs well, only these; empty for all.
        mutants: that are to be caught.
        workers: processes that share the device, as `-n` takes them.
        cpu_workers: processes of runs on the CPU.
        rounds: of the watch's benchmark.
        whole: the figures are those of the page; on an accelerator the watch runs on a billion parameters.
    """

    fixtures: tuple[str, ...]
    pair: tuple[str, ...]
    attentions: tuple[str, ...] = ("eager", "sdpa")
    precisions: tuple[str, ...] = ()
    mutants: int
    workers: str
    cpu_workers: str
    rounds: int
    whole: bool


def whole_sizes() -> Sizes:
    """What the page is written from."""
    return Sizes(
        fixtures=tuple(fixture_names()),
        pair=("glm4-tiny", "glm4-tiny-classifier"),
        mutants=30,
        # The models are tiny: a device waits for Python, and four processes keep it four times as busy.
        workers=str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        cpu_workers="auto",
        rounds=30,
        whole=True,
    )


SMALL = Sizes(
    fixtures=("glm4-tiny",),
    pair=("glm4-tiny",),
    attentions=("sdpa",),
    precisions=("fp32", "bf16"),
    mutants=3,
    workers="0",
    cpu_workers="0",
    rounds=6,
    whole=False,
)
"""Enough to see that every part runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where and how much is measured.

    Attributes:
        device: as resolved.
        sizes: of the run.
        folder: for files that nobody keeps; the current folder while parts run.
        deadline: of `time.monotonic`, for all parts together: after it no cell, mutant or part is begun.
    """

    device: str
    sizes: Sizes
    folder: Path
    deadline: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.deadline

    @property
    def max_time(self) -> tuple[str, ...]:
        """The option of `check` that gives it what is left of the time."""
        if math.isinf(self.deadline):
            return ()
        return "--max-time", str(max(1, round(self.deadline - time.monotonic())))

    @property
    def is_accelerator(self) -> bool:
        """Whether its figures are a GPU's: neither the CPU's nor those of a stand-in for tests."""
        return kind_of(self.device) != CPU and not is_for_tests(kind_of(self.device))

    def precisions(self, *, references: bool = True) -> tuple[str, ...]:
        """What the device runs well, and fp64.

        Args:
            references: fp64 is among them, which is the reference itself.
        """
        # tf32 and pure-fp16 are not clean by design: the one rounds too much, the other trains without an eps.
        names = (*default_precisions(self.device), *(("fp64",) if references else ()))
        return tuple(
            name
            for name in names
            if not lacks(PRECISIONS[name], self.device) and name in (self.sizes.precisions or names)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a part found.

    Attributes:
        verdict: whether its aim is met.
        reason: one line that says why, or what stands out.
        columns: names of what a row holds.
        rows: figures.
    """

    verdict: Verdict
    reason: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Value, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """An outcome, with where and when it was measured.

    Attributes:
        name: of :data:`PARTS`.
        verdict: as of the outcome.
        reason: as of the outcome.
        columns: as of the outcome.
        rows: as of the outcome.
        seconds: that it took.
        device: with the model of an accelerator.
        versions: torch's and transformers'.
        published: the figures are a GPU's in whole size, and have a place on the page.
    """

    name: str
    verdict: Verdict
    reason: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    seconds: float
    device: str
    versions: str
    published: bool


def measured(name: str, setup: Setup) -> Part:
    """Run one part; whatever goes wrong in it is its own verdict, so that the other parts run.

    Args:
        name: of :data:`PARTS`.
        setup: of the run.
    """
    begun = time.perf_counter()
    with _current_folder(setup.folder):
        try:
            late = Outcome(verdict="not met", reason=LATE)
            outcome = late if setup.is_over else PARTS[name].measure(setup)
        except Exception as error:  # noqa: BLE001 - one part's failure never hides the others
            line = (str(error).strip().splitlines() or [""])[0]
            outcome = Outcome(verdict="not met", reason=f"{type(error).__name__}: {line}")
    release(setup.device)
    packages = package_versions()
    return Part(
        name=name,
        verdict=outcome.verdict,
        reason=outcome.reason,
        columns=outcome.columns,
        rows=outcome.rows,
        seconds=round(time.perf_counter() - begun, 1),
        device=describe_device(setup.device),
        versions=f"torch {packages['torch']}, transformers {packages['transformers']}",
        published=setup.is_accelerator and setup.sizes.whole,
    )


@contextlib.contextmanager
def _current_folder(folder: Path) -> Iterator[None]:
    """Within it that is the current folder, so that no settings and baselines of another project take part."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# --- the commands ------------------------------------------------------------------------------------------------------


def commanded(out: Path, *arguments: str) -> Results:
    """The answer of a command of numerics-suite, run in this process; findings are an answer, bad input is none.

    Args:
        out: where it writes the answer.
        arguments: the command and its own.

    Raises:
        CheckError: it gave no answer.
    """
    out.unlink(missing_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([*arguments, "--no-extensions", "--quiet", "--json", str(out)])
    if not out.exists():
        last = (said.getvalue().strip().splitlines() or ["no message"])[-1]
        message = f"numerics-suite {arguments[0]} ended with {status}: {last}"
        raise CheckError(message)
    answer: Results = revived(json.loads(out.read_text(encoding="utf-8")))
    return answer


def checked(
    setup: Setup, subjects: Iterable[str], *arguments: str, workers: str | None = None, device: str = ""
) -> Results:
    """The results file of `numerics-suite check` over shipped checkpoints.

    Args:
        setup: of the run.
        subjects: names of fixtures.
        arguments: of the command, besides the device.
        workers: None for those of the setup.
        device: empty for that of the setup.

    Raises:
        CheckError: there is none.
    """
    return commanded(
        setup.folder / "results.json",
        "check",
        *(f"fixture:{name}" for name in subjects),
        *("--device", device or setup.device, "-n", workers or setup.sizes.workers),
        *("--no-diagnose", *setup.max_time, *arguments),
    )


def statuses(results: Results) -> dict[Key, str]:
    """The status of every question."""
    return {
        (check["check"], check["subject"], check["precision"], check["attn"]): check["status"]
        for check in results["checks"]
    }


def problems(results: Results) -> list[str]:
    """One line for each finding and error, and one where time ran out."""
    late = [LATE] if is_incomplete(results) else []
    return late + [
        f"{check['id']}: {check['reason'] or check['finding']['title']}"
        for check in results["checks"]
        if check["status"] in {"failed", "error"}
    ]


def is_incomplete(results: Results) -> bool:
    """Whether cells were left out for lack of time."""
    return bool(results["exit_status"] == 5)


def listed(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = len(lines) - MOST_TOLD
    return "; ".join(lines[:MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")


def judged(lines: Sequence[str], otherwise: str) -> tuple[Verdict, str]:
    """Met where there is no line that says what is wrong."""
    return ("not met", listed(lines)) if lines else ("met", otherwise)


def grids(setup: Setup, precisions: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Options of each grid of precisions and attentions; flash-attn has no kernel for 32 and 64 bits."""
    yield "--precision", ",".join(precisions), "--attn", ",".join(setup.sizes.attentions)
    short = [name for name in precisions if PRECISIONS[name].computes_in in {"bfloat16", "float16"}]
    if short and has_flash(setup.device):
        yield "--precision", ",".join(short), "--attn", "flash_attention_2"


def has_flash(device: str) -> bool:
    """Whether the package flash-attn can be used on the device."""
    return importlib.util.find_spec("flash_attn") is not None and lacks_attention("flash_attention_2", device) is None


# --- clean -------------------------------------------------------------------------------------------------------------

FEW = ("--max-examples", "2", "--steps", "2", "--skip", "baseline.*")


def clean(setup: Setup) -> Outcome:
    """Every check of the fixtures on the device, and on the CPU for comparison."""
    here: dict[Key, str] = {}
    wrong: list[str] = []
    for grid in grids(setup, setup.precisions()):
        results = checked(setup, setup.sizes.fixtures, *grid, *FEW)
        here |= statuses(results)
        wrong += problems(results)
    lost: list[Key] = []
    if kind_of(setup.device) != CPU:
        names = [name for name in setup.precisions() if not lacks(PRECISIONS[name], CPU)]
        grid = ("--precision", ",".join(names), "--attn", ",".join(setup.sizes.attentions))
        there = checked(setup, setup.sizes.fixtures, *grid, *FEW, workers=setup.sizes.cpu_workers, device=CPU)
        wrong += [f"on the CPU: {line}" for line in problems(there)]
        lost = skipped_here(here, statuses(there))
    wrong += [
        f"{check} of {subject}/{precision}/{attn} runs on the CPU only" for check, subject, precision, attn in lost
    ]
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (_, _, precision, attn), status in here.items():
        counts[precision, attn][status] += 1
    known = ("passed", "skipped", "failed", "error")
    rows = tuple(
        (*cell, *(found[status] for status in known), sum(key[2:] == cell for key in lost))
        for cell, found in sorted(counts.items())
    )
    flash = "flash-attn is among them" if has_flash(setup.device) else "flash-attn cannot be used here"
    verdict, reason = judged(wrong, f"{len(here)} answers over {len(setup.sizes.fixtures)} fixtures; {flash}")
    columns = ("precision", "attention", "passed", "skipped", "failed", "error", "skipped here only")
    return Outcome(verdict=verdict, reason=reason, columns=columns, rows=rows)


def skipped_here(here: Mapping[Key, str], there: Mapping[Key, str]) -> list[Key]:
    """Questions that have an answer there and none here."""
    return [key for key, status in there.items() if status != "skipped" and here.get(key, "skipped") == "skipped"]


# --- ratios ------------------------------------------------------------------------------------------------------------

RATIO_CHECKS = ("reference.end-to-end", "reference.local", "reference.gradient")
UNLIMITED = frozenset({"kernel-ratio"})
"""Measurements that no budget judges and a reader wants to see all the same."""


def ratios(setup: Setup) -> Outcome:
    """Kernel ratios and what else the budgets of `reference.*` rest on, each beside its limit."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    wrong: list[str] = []
    for grid in grids(setup, setup.precisions(references=False)):
        options = ("--checks", ",".join(RATIO_CHECKS), "--max-examples", "1")
        results = checked(setup, setup.sizes.fixtures, *grid, *options)
        wrong += problems(results)
        for check in results["checks"]:
            known = {*budgets_of(check["check"]), *UNLIMITED}
            for name, value in check["measurements"].items():
                if name in known:
                    values[f"{check['check']}: {name}", check["precision"], check["attn"]].append(value)
    # What is zero everywhere (a table look-up, ops in a coarser float) says nothing about a constant.
    shown = {key: found for key, found in sorted(values.items()) if any(value != 0 for value in found)}
    rows = tuple(
        (*key, min(found), statistics.median(found), max(found, key=nan_last), _limit(key[0]))
        for key, found in shown.items()
    )
    wrong += [] if rows else ["nothing was measured"]
    verdict, reason = judged(wrong, _nearest_to_limit(rows))
    columns = ("measurement", "precision", "attention", "least", "median", "most", "limit")
    return Outcome(verdict=verdict, reason=reason, columns=columns, rows=rows)


def _limit(measurement: str) -> float | None:
    check, _, name = measurement.partition(": ")
    budget = budgets_of(check).get(name)
    return None if budget is None else budget.limit


def _nearest_to_limit(rows: Iterable[tuple[Any, ...]]) -> str:
    limited = [row for row in rows if row[-1]]
    if not limited:
        return ""
    measurement, precision, attn, *_, most, limit = max(limited, key=lambda row: nan_last(row[-2]) / row[-1])
    return f"nearest to its limit: {measurement} in {precision} with {attn}, {most:.3g} of {limit:g}"


# --- tf32 --------------------------------------------------------------------------------------------------------------

FACTOR = 100
"""TF32 keeps 10 bits of 23: its error is thousands of float32's, and 100 leaves no doubt."""


def tf32(setup: Setup) -> Outcome:
    """Whether TF32 is caught where a run asks for float32, and kept out of a float32 cell where the user has it on."""
    reason = lacks(PRECISIONS["tf32"], setup.device)
    if reason:
        return Outcome(verdict="not applicable", reason=reason)
    before = torch.get_float32_matmul_precision()
    rows: list[tuple[Value, ...]] = []
    wrong: list[str] = []
    for attn in setup.sizes.attentions:
        own = _end_to_end(setup, "fp32", attn)
        rounded = _end_to_end(setup, "tf32", attn)
        torch.set_float32_matmul_precision("medium")
        try:
            switched = _end_to_end(setup, "fp32", attn)
        finally:
            torch.set_float32_matmul_precision(before)
        for what, found in (("fp32", own), ("tf32", rounded), ("fp32, TF32 switched on by the user", switched)):
            measurements = found["measurements"]
            rows.append((what, attn, measurements.get("kernel-ratio"), measurements.get("excess"), found["status"]))
        wrong += tf32_problems(attn, own, rounded, switched)
    verdict, told = judged(wrong, f"limit of the excess: {_limit('reference.end-to-end: excess')}")
    columns = ("precision", "attention", "kernel ratio", "excess", "status")
    return Outcome(verdict=verdict, reason=told, columns=columns, rows=tuple(rows))


def _end_to_end(setup: Setup, precision: str, attn: str) -> dict[str, Any]:
    options = ("--precision", precision, "--attn", attn, "--checks", "reference.end-to-end")
    (found,) = checked(setup, ("glm4-tiny",), *options, workers="0")["checks"]
    check: dict[str, Any] = found
    return check


def tf32_problems(
    attn: str, own: Mapping[str, Any], rounded: Mapping[str, Any], switched: Mapping[str, Any]
) -> Iterator[str]:
    """What speaks against the aim: float32 that is not clean, and TF32 that is not seen.

    Args:
        attn: of the three answers of `reference.end-to-end`.
        own: in fp32.
        rounded: in tf32.
        switched: in fp32, with TF32 switched on outside.
    """
    for what, found in (("fp32", own), ("fp32 with TF32 switched on", switched)):
        if found["status"] != "passed":
            yield f"{what}, {attn}: {found['status']}, it must pass"
    if rounded["status"] != "failed" or rounded["finding"]["cause"] != "kernel-accuracy":
        yield f"tf32, {attn}: {rounded['status']}, it must fail with kernel-accuracy"
    ratio = rounded["measurements"].get("kernel-ratio", 0) / own["measurements"].get("kernel-ratio", float("nan"))
    if not ratio > FACTOR:
        yield f"tf32, {attn}: its kernel ratio is {ratio:.3g} times that of fp32, it must be more than {FACTOR}"


# --- mutants -----------------------------------------------------------------------------------------------------------

UNSTEADY = frozenset({"sum-without-an-order-bf16"})
"""Caught in some runs and missed in others, on any device; docs/mutants.md says why."""

BATCHES = 6
"""Batches that Hypothesis draws for each check, as for docs/mutants.md; the command draws 10."""


def mutants(setup: Setup) -> Outcome:
    """Defects of every area that the expected checks must catch on the device too."""
    sys.path[:0] = [path for path in (str(ROOT / "tests"), str(ROOT)) if path not in sys.path]
    from numerics_suite.subjects.quiet import quiet_transformers
    from numerics_suite.suite import driver

    shrinks, driver.SHRINKS = driver.SHRINKS, 0  # whether a batch fails is asked, not which is the smallest that does
    rows: list[tuple[Value, ...]] = []
    wrong: list[str] = []
    try:
        for mutant in mutants_of(setup.device):
            if len(rows) >= setup.sizes.mutants:
                break
            if setup.is_over:
                wrong.append(LATE)
                break
            start = time.perf_counter()
            with quiet_transformers():
                caught, complaint = caught_by(mutant, setup.device)
            if complaint is None:
                continue
            cell = f"{mutant.fixture}, {mutant.precision}, {mutant.attn}"
            rows.append((mutant.id, cell, caught, round(time.perf_counter() - start, 2)))
            wrong += [] if caught else [f"{mutant.id}: {complaint}"]
    finally:
        driver.SHRINKS = shrinks
    verdict, reason = judged(wrong, f"{len(rows)} of {len(rows)} are caught")
    return Outcome(verdict=verdict, reason=reason, columns=("mutant", "cell", "caught by", "seconds"), rows=tuple(rows))


def mutants_of(device: str) -> list[Mutant]:
    """The mutants that the device can run, the areas of the catalogue in turn.

    Of an area comes first what has a family, a precision and an attention that few before it have.

    Args:
        device: whose precisions decide.
    """
    from mutants import catalogue

    areas = [list(area.MUTANTS) for area in vars(catalogue).values() if hasattr(area, "MUTANTS")]
    possible = [[mutant for mutant in area if _runs(mutant, device)] for area in areas]
    families, cells = Counter[str](), Counter[tuple[str, str]]()
    chosen: list[Mutant] = []
    while any(possible):
        for area in possible:
            if not area:
                continue
            mutant = min(area, key=lambda one: families[one.family] + cells[one.precision, one.attn])
            area.remove(mutant)
            families[mutant.family] += 1
            cells[mutant.precision, mutant.attn] += 1
            chosen.append(mutant)
    return chosen


def _runs(mutant: Mutant, device: str) -> bool:
    return (
        bool(mutant.expected_checks)
        and not mutant.equivalent
        and mutant.id not in UNSTEADY
        and not lacks(PRECISIONS[mutant.precision], device)
        and not lacks_attention(mutant.attn, device)
    )


def caught_by(mutant: Mutant, device: str) -> tuple[str | None, str | None]:
    """The first expected check that fails, and what the checks said; no word where this release is written otherwise.

    Args:
        mutant: of the catalogue.
        device: where it runs.
    """
    from mutants.driver import describe, failures, release, run_mutant
    from mutants.editing import NoSuchPlaceError

    if mutant.family == "glm4" and release() < (4, 51):
        return None, None
    try:
        results = run_mutant(mutant, mutant.expected_checks, device=device, max_examples=BATCHES)
    except NoSuchPlaceError:
        return None, None
    if any("NoSuchPlaceError" in (result.reason or "") for result in results):
        return None, None
    return next((result.check for result in failures(results)), None), " ".join(describe(results).split())


# --- baseline ----------------------------------------------------------------------------------------------------------

KINDS = {"semantic-change": "changed", "rounding-change": "worse", "contract-change": "contract"}
FIGURES = {
    "baseline.semantics": ("true-answers", "true-gradient"),
    "baseline.precision": ("error-ratio", "excess", "local-excess"),
    "baseline.training": ("curve-growth",),
}


def baseline(setup: Setup) -> Outcome:
    """Cells of the device against a baseline of the CPU: another order of sums, and the same function."""
    names = [name for name in setup.precisions(references=False) if not lacks(PRECISIONS[name], CPU)]
    grid = ("--precision", ",".join(names), "--attn", setup.sizes.attentions[-1])
    with tempfile.TemporaryDirectory(dir=setup.folder) as scratch:
        recorded, moved = Path(scratch) / "cpu", Path(scratch) / "device"
        answer = commanded(
            Path(scratch) / "recorded.json",
            *("record", *(f"fixture:{name}" for name in setup.sizes.pair), *grid, "--device", CPU, "--steps", "2"),
            *("--baseline", str(recorded), "-n", setup.sizes.cpu_workers),
        )
        move_baselines(recorded, moved, setup.device)
        options = ("--checks", "baseline.*", "--baseline", str(moved))
        results = checked(setup, setup.sizes.pair, *grid, *options)
    before = [f"on the CPU: {entry['error']}" for entry in answer["errors"]]
    before += [LATE] if is_incomplete(results) else []
    cells: dict[tuple[str, str, str], dict[str, Results]] = defaultdict(dict)
    for check in results["checks"]:
        cells[check["subject"], check["precision"], check["attn"]][check["check"]] = check
    rows = tuple(
        (*key, *_figures(found), ", ".join(kinds_of(found.values())) or "none of them") for key, found in cells.items()
    )
    wrong = [line for key, found in cells.items() for line in baseline_problems("/".join(key), found)]
    verdict, reason = judged(before + wrong, f"{len(cells)} cells, none of them changed")
    columns = ("subject", "precision", "attention", *(name for names in FIGURES.values() for name in names))
    return Outcome(verdict=verdict, reason=reason, columns=(*columns, "changed, worse or contract"), rows=rows)


def move_baselines(source: Path, target: Path, device: str) -> None:
    """The baselines of a folder as if recorded on another kind of device, since a cell is held to its own device's only.

    Args:
        source: folder of baselines.
        target: folder to write.
        device: that they are for.
    """
    kind = kind_of(device)
    cells = [replace(item, cell=replace(item.cell, device=kind)) for item in load(source).values()]
    save(target, cells, force=True)


def _figures(found: Mapping[str, Results]) -> Iterator[Value]:
    for check, names in FIGURES.items():
        for name in names:
            yield found.get(check, {}).get("measurements", {}).get(name)


def kinds_of(checks: Iterable[Results]) -> list[str]:
    """Kinds of change of the measurements that break their budget; a finding tells of one, and there may be several."""
    causes = {
        budget.cause
        for check in checks
        for name, budget in budgets_of(check["check"]).items()
        if name in check["measurements"] and not check["measurements"][name] <= budget.limit
    }
    return [kind for cause, kind in KINDS.items() if cause in causes]


def baseline_problems(cell: str, found: Mapping[str, Results]) -> Iterator[str]:
    """What speaks against the aim: another function, or no answer to whether it is another.

    Args:
        cell: for the message.
        found: its checks by id.
    """
    for check in found.values():
        if check["status"] == "error":
            yield f"{check['id']}: {check['reason']}"
    status = found.get("baseline.semantics", {}).get("status", "missing")
    if status != "passed":
        yield f"{cell}: baseline.semantics {status}, it must pass"
    if "changed" in kinds_of(found.values()):
        yield f"{cell}: changed"


# --- watch -------------------------------------------------------------------------------------------------------------


def watch(setup: Setup) -> Outcome:
    """What the watch adds to a training step."""
    sys.path[:0] = [path for path in (str(ROOT / "benchmarks"),) if path not in sys.path]
    import bench_watch as bench

    scale = bench.BILLION if setup.sizes.whole and setup.is_accelerator else bench.TINY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # detect_anomaly's own, which says that it is slow
        found = bench.measure(scale, setup.device, setup.sizes.rounds)
    clock, most = bench.held_clock(setup.device), bench.most_ratio(setup.device)
    rows = tuple((name.removeprefix(f"{clock}: "), value) for name, value in found.items() if name.startswith(clock))
    columns = ("way", "ratio to a bare step")
    if scale is bench.TINY:
        reason = "a step of a tiny model is no measure; the aim is for a billion parameters on an accelerator"
        return Outcome(verdict="not applicable", reason=reason, columns=columns, rows=rows)
    amortised = found[f"{clock}: amortised"]
    verdict: Verdict = "met" if amortised <= most else "not met"
    return Outcome(verdict=verdict, reason=f"amortised {amortised:.4f}, {most} allowed", columns=columns, rows=rows)


# --- 9b ----------------------------------------------------------------------------------------------------------------


MOST_MINUTES = 3.0
"""That a cell of nine billion parameters may take once the model is loaded."""

SMALL_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4000,
}
"""A few million parameters: enough to see that the part runs."""


def nine_billion(setup: Setup) -> Outcome:
    """Minutes and peak memory of one cell of a checkpoint in the shape of GLM-4 9B, whose weights are written by a formula."""
    whole = setup.sizes.whole and setup.is_accelerator
    writer = _from_file(ROOT / "fixtures" / "nine_billion.py")
    folder = setup.folder / "nine-billion"
    parameters = writer.write_checkpoint(folder, shape=writer.SHAPE if whole else SMALL_SHAPE)
    module = device_module(kind_of(setup.device))
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats()
    results = checked(setup, (), str(folder), "--precision", "bf16", "--attn", "sdpa", workers="0")
    peak = int(module.max_memory_allocated()) if hasattr(module, "max_memory_allocated") else None
    seconds: dict[str, float] = defaultdict(float)
    for check in results["checks"]:
        # The first check loads the model, so its time is no part of the three minutes.
        seconds["loading" if check["check"] == "load.complete" else check["check"].partition(".")[0]] += check[
            "duration_s"
        ]
    minutes = sum(value for name, value in seconds.items() if name != "loading") / 60
    rows: list[tuple[Value, ...]] = [(f"{name}, seconds", round(value, 1)) for name, value in seconds.items()]
    rows += [("parameters", parameters), ("peak device memory, GB", None if peak is None else round(peak / 1e9, 1))]
    rows += [
        ("skipped", f"{check['check']}: {check['reason']}")
        for check in results["checks"]
        if check["status"] == "skipped"
    ]
    wrong, columns = problems(results), ("what", "value")
    if not whole and not wrong:
        reason = "a small shape is no measure; the aim is for nine billion parameters on an accelerator"
        return Outcome(verdict="not applicable", reason=reason, columns=columns, rows=tuple(rows))
    if minutes > MOST_MINUTES and whole:
        wrong.append(f"{minutes:.1f} minutes after loading, {MOST_MINUTES:g} allowed")
    verdict, reason = judged(wrong, f"{minutes:.1f} minutes after loading, {MOST_MINUTES:g} allowed")
    return Outcome(verdict=verdict, reason=reason, columns=columns, rows=tuple(rows))


def _from_file(path: Path) -> Any:
    """A module that is no package's, from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A part before it is measured.

    Attributes:
        aim: what it must show, one sentence.
        measure: measures it.
    """

    aim: str
    measure: Callable[[Setup], Outcome]


PARTS = {
    "clean": Description(
        aim="Every check passes on the clean fixtures, and none is skipped that runs on the CPU.", measure=clean
    ),
    "ratios": Description(aim="The constants that the budgets rest on stay within their limits.", measure=ratios),
    "tf32": Description(
        aim="TF32 is caught where a run asks for float32, and kept out of a float32 cell.", measure=tf32
    ),
    "mutants": Description(aim="Mutants of every area are caught.", measure=mutants),
    "baseline": Description(aim="Against a baseline of the CPU no cell is `changed`.", measure=baseline),
    "watch": Description(
        aim="The watch adds at most 1 % to a training step of a billion parameters, amortised.", measure=watch
    ),
    "9b": Description(
        aim="A bf16 cell in the shape of GLM-4 9B takes at most 3 minutes once it is loaded.", measure=nine_billion
    ),
}
"""In the order in which they run."""
