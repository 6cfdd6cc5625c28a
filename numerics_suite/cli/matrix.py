"""`numerics-suite matrix`: `check` in one environment per version, and what changed between them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from numerics_suite.cli.output import deliver, for_people, unfinished_answer, write_json
from numerics_suite.cli.parser import CommandParser
from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.options import add_cli_options
from numerics_suite.settings.table import OPTIONS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numerics_suite.core.records import Cell
    from numerics_suite.reports.terminal import Terminal
    from numerics_suite.settings.tree import Settings
    from numerics_suite.versions.matrix import MatrixPlan
    from numerics_suite.versions.result_store import ResultStore

EXAMPLES = """\
  numerics-suite matrix ./my-checkpoint --transformers 4.57.6,5.24.0
      may this checkpoint move from one release to the other?
  numerics-suite matrix --transformers 'minors:>=4.46' --precision bf16 --jobs 2
      the shipped fixtures over the last patch release of every minor
  numerics-suite matrix ./my-checkpoint --torch latest:3 --baseline DIR
      three releases of torch, compared with your own baselines too
  numerics-suite matrix ./my-checkpoint --checks train.trainer \\
          --with 'accelerate>=1.2,<1.5' --with peft==0.17.1
      releases of other packages, under the transformers that is installed here
  numerics-suite matrix ./my-checkpoint --transformers latest:5 --list
      what would be run

What is done is kept under --out: a run that was stopped goes on where it was,
and numerics-suite report makes a report of that folder at any time.

exit status:
  0 passed, 1 a cell fails, 2 interrupted, 3 a cell has an error, 4 bad input,
  5 nothing ran
"""

SHARED = tuple(option.name for option in OPTIONS if option.name not in {"workers", "collect"})
"""Options of `check` that a command with environments has too; it starts its own processes."""

OUT = Path(".numerics/matrix")


def add_version_options(parser: argparse.ArgumentParser, *, out: Path) -> None:
    """Options of every command that makes environments."""
    group = parser.add_argument_group("environments")
    group.add_argument("--pre", action="store_true", help="pre-releases count too")
    group.add_argument("--jobs", metavar="N", help="environments at once (default: what cores and memory allow)")
    group.add_argument("--out", metavar="DIR", help=f"where results are kept (default: {out})")


def make_parser() -> CommandParser:
    """The parser of `matrix`."""
    parser = CommandParser(
        "matrix",
        usage="[SUBJECT ...] --transformers SPEC [OPTIONS]",
        description=(
            "Runs `check` in one environment per version. SPEC is a list (4.51.3,5.23.0),\n"
            "a specifier (>=4.51,<6), latest:N, or minors:>=4.46 for the last patch of\neach minor release."
        ),
        examples=EXAMPLES,
    )
    group = parser.add_argument_group("versions")
    group.add_argument("--transformers", metavar="SPEC", help="default: the installed one")
    group.add_argument("--torch", metavar="SPEC", help="default: the installed one")
    group.add_argument("--python", metavar="SPEC", help="a list such as 3.10,3.12 (default: this one)")
    group.add_argument(
        "--with",
        metavar="PACKAGE==V",
        dest="others",
        action="append",
        default=[],
        help="versions of another package: 'peft>=0.13,<0.15', accelerate:latest:3; repeat it for more",
    )
    add_version_options(parser, out=OUT)
    parser.add_argument("--ray", metavar="ADDRESS", help="spread the cells over a Ray cluster; 'local' starts one")
    add_cli_options(parser, SHARED)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `matrix` and return its exit status.

    Raises:
        BadInputError: the input cannot be used.
    """
    settings, own = make_parser().parse_settings(arguments)
    if not any(own[name] for name in ("transformers", "torch", "python", "others")):
        message = "matrix needs versions: give --transformers SPEC (or --torch, --python, --with), as in --transformers latest:3"
        raise BadInputError(message)
    return _matrix(settings, own)


def _matrix(settings: Settings, own: Mapping[str, Any]) -> int:
    from numerics_suite.core.machine import core_count
    from numerics_suite.suite.check_selection import selected_checks
    from numerics_suite.versions.combinations import resolve_all
    from numerics_suite.versions.extensions import without_extensions
    from numerics_suite.versions.fingerprints import know_all
    from numerics_suite.versions.job import for_a_cell
    from numerics_suite.versions.matrix import MatrixPlan
    from numerics_suite.versions.result_store import ResultStore

    if own["ray"]:
        from numerics_suite.versions.ray_backend import refuse_without_ray

        refuse_without_ray()
    settings = without_extensions(settings)
    selected_checks(settings)  # each environment would refuse what leaves none
    known = know_all(settings)
    baseline = baseline_of(settings, [one.name for one in known])
    jobs = jobs_of(own["jobs"], max((one.weight_bytes for one in known), default=0))
    versions = resolve_all(own["transformers"], own["torch"], own["python"], own["others"], pre=own["pre"])
    threads = max(1, core_count() // jobs)
    plan = MatrixPlan(
        settings=for_a_cell(settings),
        known=known,
        cells=tuple(dict.fromkeys(versions)),
        cwd=Path.cwd(),
        threads=threads,
        baseline=baseline,
    )
    kept = ResultStore(Path(own["out"] or OUT))
    with for_people(settings) as stream:
        if settings.list_only:
            status, content = _list(plan, kept, stream)
        else:
            with unfinished_answer(settings.json, "matrix", cells=[]) as offer:
                status, content = _run(settings, plan, kept, stream, jobs=jobs, ray=own["ray"], offer=offer)
    if settings.json:
        write_json(settings.json, content, status)
    if not settings.list_only:
        _deliver(settings, kept.folder)
    return status


def _deliver(settings: Settings, folder: Path) -> None:
    from numerics_suite.reports.documents import read_documents
    from numerics_suite.reports.matrix import KEPT

    silent = settings.quiet or settings.json == "-"
    deliver(read_documents([folder / KEPT]), settings.report, settings.junitxml, silent=silent)


def _list(plan: MatrixPlan, kept: ResultStore, stream: IO[str]) -> tuple[int, dict[str, Any]]:
    from numerics_suite.reports.matrix import MatrixTerminal, planned_to_json
    from numerics_suite.versions.matrix import planned

    rows = planned(plan, kept)
    MatrixTerminal(stream=stream).planned(rows)
    return 0, planned_to_json(rows)


def _run(  # noqa: PLR0913 - keywords
    settings: Settings,
    plan: MatrixPlan,
    kept: ResultStore,
    stream: IO[str],
    *,
    jobs: int,
    ray: str | None,
    offer: Callable[..., None],
) -> tuple[int, dict[str, Any]]:
    from numerics_suite.core.atomic import write_atomic
    from numerics_suite.reports.matrix import KEPT, MatrixTerminal, kept_json, matrix_to_json
    from numerics_suite.reports.results import dump
    from numerics_suite.versions.jobs import Jobs
    from numerics_suite.versions.matrix import in_environments, run_matrix

    terminal = MatrixTerminal(stream=stream, quiet=settings.quiet, on_cells=lambda cells: offer(cells=cells))
    with kept, telling_what_is_kept(terminal, kept):
        if ray:
            from numerics_suite.versions.memory_demand import memory_demand
            from numerics_suite.versions.ray_backend import Cluster

            weights = max((one.weight_bytes for one in plan.known), default=0)
            with Cluster(ray, memory_demand(plan.settings, weights, plan.cwd)) as cluster:
                result = run_matrix(plan, kept, cluster.execute, terminal, jobs=len(plan.cells), stop=cluster.stop)
        else:
            processes = Jobs()
            result = run_matrix(plan, kept, in_environments(processes), terminal, jobs=jobs, stop=processes.stop)
        write_atomic(kept.folder / KEPT, dump(kept_json(result)), "--out")
        terminal.table(result)
    return result.exit_status, matrix_to_json(result)


@contextmanager
def telling_what_is_kept(terminal: Terminal, kept: ResultStore) -> Iterator[None]:
    """When the user stops the run, say what a second run will find."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.stop()
        done = kept.count()
        sys.stderr.write(
            f"numerics-suite: {done} finished kept in {kept.folder}; the same command goes on from there\n"
        )
        raise
    finally:
        terminal.stop()


def jobs_of(text: str | None, weight_bytes: int) -> int:
    """The number of `--jobs`; what cores and memory allow where it is not given.

    Raises:
        BadInputError: no number.
    """
    from numerics_suite.settings.parsers import integer
    from numerics_suite.versions.jobs import default_jobs

    if text is None:
        return default_jobs(weight_bytes)
    try:
        return integer(1)(text)
    except ValueError as error:
        message = f"--jobs: {error}"
        raise BadInputError(message) from None


def baseline_of(settings: Settings, subjects: Sequence[str]) -> Path | None:
    """The folder of baselines that `check` would compare with here, checked to hold a subject.

    Raises:
        BadInputError: it holds none, or was named and holds those of other subjects alone: each environment would refuse it.
    """
    from numerics_suite.suite.baseline_selection import baselines_of

    found = baselines_of(settings)
    if found is None:
        return None
    there = sorted({cell.subject for cell in found})
    if settings.baseline is not None and not set(there) & set(subjects):
        message = f"--baseline {settings.baseline}: it holds {', '.join(there)}, and nothing of {', '.join(subjects)}"
        raise BadInputError(message)
    if settings.baseline is not None and not any(_may_be_asked(cell, settings) for cell in found):
        held = sorted({f"{cell.subject} ({cell.task}) in {cell.precision}/{cell.attn}" for cell in found})
        message = f"--baseline {settings.baseline}: no cell in common with this run; it holds {', '.join(held[:6])}"
        raise BadInputError(message)
    return found.folder


def _may_be_asked(cell: Cell, settings: Settings) -> bool:
    """Whether the options that were given leave the cell, as far as that can be told without its subject."""
    precisions, attentions, tasks = settings.precision, settings.attn, {"auto", cell.task}
    attn = cell.attn == "default" or not attentions or cell.attn in attentions  # a plain module has no switch
    return attn and settings.task in tasks and (not precisions or cell.precision in precisions)
