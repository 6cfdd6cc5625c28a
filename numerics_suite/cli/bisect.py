"""`numerics-suite bisect`: the first version at which the verdict changes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.matrix import SHARED, add_version_options, baseline_of, jobs_of, telling_what_is_kept
from numerics_suite.cli.output import deliver, for_people, unfinished_answer, write_json
from numerics_suite.cli.parser import CommandParser
from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.settings.options import add_cli_options
from numerics_suite.settings.table import OPTIONS
from numerics_suite.settings.tree import COMMAND_LINE, DESTINATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numerics_suite.core.versions import BisectResult
    from numerics_suite.reports.bisect import BisectTerminal
    from numerics_suite.settings.tree import Settings
    from numerics_suite.versions.candidates import Candidate
    from numerics_suite.versions.matrix import MatrixPlan
    from numerics_suite.versions.result_store import ResultStore

EXAMPLES = """\
  numerics-suite bisect ./my-checkpoint --good 5.7.0 --bad 5.24.0
      the whole suite at both ends, then what fails at the bad one alone
  numerics-suite bisect ./my-checkpoint --good 4.57.6 --bad 5.0.0 \\
          --check baseline.contract
      a baseline is recorded at the good end and compared with the others
  numerics-suite bisect ./my-checkpoint --package torch --good 2.8.0 --bad 2.9.1
  numerics-suite bisect ./my-checkpoint --package accelerate --good 1.2.1 \\
          --bad 1.3.0 --check train.trainer
      releases of accelerate, under the transformers that is installed here
  numerics-suite bisect ./my-checkpoint --git ../transformers \\
          --good v5.7.0 --bad main
      commits of a clone, which is only read
  numerics-suite bisect org/name --package checkpoint --good 1a2b3c --bad main
      revisions of a checkpoint, in the environment at hand

exit status:
  0 found, 2 interrupted, 3 internal error,
  4 bad input, or an end does not hold
"""

PACKAGES = ("transformers", "torch", "accelerate", "peft", "trl", "tokenizers", "checkpoint")
OUT = Path(".numerics/bisect")
LEFT_OUT = {"list_only", "checks", "skip"}
"""Options of `matrix` that a search has no use for."""


def make_parser() -> CommandParser:
    """The parser of `bisect`."""
    parser = CommandParser(
        "bisect",
        usage="SUBJECT --good V --bad V [OPTIONS]",
        description="Finds the first version at which the verdict changes.",
        examples=EXAMPLES,
    )
    group = parser.add_argument_group("versions")
    group.add_argument("--good", metavar="V", help="a version, ref or revision that passes")
    group.add_argument("--bad", metavar="V", help="a later one that fails")
    group.add_argument("--package", metavar="NAME", help="one of: " + ", ".join(PACKAGES) + " (default: transformers)")
    group.add_argument(
        "--check", dest="checks", metavar="ID", help="the check that decides (default: what fails at the bad end)"
    )
    group.add_argument("--git", metavar="PATH", help="V is a ref of this clone of transformers")
    group.add_argument("--transformers", metavar="V", help="in every environment (default: the installed one)")
    group.add_argument("--torch", metavar="V", help="in every environment (default: the installed one)")
    group.add_argument("--python", metavar="V", help="in every environment (default: this one)")
    add_version_options(parser, out=OUT)
    add_cli_options(parser, tuple(name for name in SHARED if name not in LEFT_OUT))
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `bisect` and return its exit status.

    Raises:
        BadInputError: the input cannot be used, or an end does not hold.
    """
    settings, own = make_parser().parse_settings(arguments)
    typed = settings.subjects if settings.origin("subjects") == COMMAND_LINE else ()
    _refuse_contradictions(own, typed)
    return _bisect(settings, own)


def _refuse_contradictions(own: Mapping[str, Any], subjects: Sequence[str]) -> None:
    """Options that do not go together, before anything is looked up."""
    package = own["package"]
    message = None
    if len(subjects) != 1:
        message = f"bisect takes one SUBJECT, and {len(subjects)} were given"
    elif own["good"] is None or own["bad"] is None:
        message = f"bisect needs both ends: --{'good' if own['good'] is None else 'bad'} is missing"
    elif package is not None and package not in PACKAGES:
        message = f"--package: unknown '{package}'{nearest(package, PACKAGES)} (known: {', '.join(PACKAGES)})"
    elif own["git"] is not None and package not in {None, "transformers"}:
        message = f"--git searches transformers, and --package {package} was given"
    elif package in {None, "transformers"} and own["transformers"] is not None:
        message = "--transformers is what is searched; leave it out"
    elif package == "torch" and own["torch"] is not None:
        message = "--torch is what is searched; leave it out"
    elif package == "checkpoint" and any(own[name] for name in ("transformers", "torch", "python")):
        message = "--package checkpoint runs in the environment at hand; leave --transformers, --torch and --python out"
    if message is not None:
        raise BadInputError(message)


def _bisect(settings: Settings, own: Mapping[str, Any]) -> int:
    from numerics_suite.core.machine import core_count
    from numerics_suite.core.numbers import revived
    from numerics_suite.reports.bisect import BisectTerminal, bisect_to_json
    from numerics_suite.reports.documents import BisectFile, Documents
    from numerics_suite.versions.extensions import without_extensions
    from numerics_suite.versions.fingerprints import know
    from numerics_suite.versions.job import for_a_cell
    from numerics_suite.versions.matrix import MatrixPlan
    from numerics_suite.versions.result_store import ResultStore

    settings = without_extensions(settings)
    prepared = for_a_cell(settings)
    what, candidates, note = _candidates(settings.subjects[0], own)
    in_hub = candidates[-1].subject if candidates[-1].exported is None else None
    known = know(in_hub or prepared.subjects[0], *settings.names[:1], allow_pickle=settings.allow_pickle)
    baseline = baseline_of(settings, [known.name])
    jobs = jobs_of(own["jobs"], known.weight_bytes)
    threads = max(1, core_count() // min(jobs, 2))
    plan = MatrixPlan(
        settings=prepared, known=(known,), cells=(), cwd=Path.cwd(), threads=threads, baseline=baseline, record=False
    )
    kept = ResultStore(Path(own["out"] or OUT))
    unanswered = unfinished_answer(settings.json, "bisect", last_good=None, first_bad=None, tested=[], finding=None)
    with for_people(settings) as stream, unanswered as offer:
        terminal = BisectTerminal(stream=stream, quiet=settings.quiet, on_steps=lambda steps: offer(tested=steps))
        found = _search(plan, what, candidates, kept, terminal, note=note, jobs=jobs, settings=settings, own=own)
    content = bisect_to_json(found)
    if settings.json:
        write_json(settings.json, content, 0)
    documents = Documents(bisections=(BisectFile(content=revived(content), finding=found.finding),))
    deliver(documents, settings.report, settings.junitxml, silent=settings.quiet or settings.json == "-")
    return 0


def _search(  # noqa: PLR0913 - keywords
    plan: MatrixPlan,
    what: str,
    candidates: Sequence[Candidate],
    kept: ResultStore,
    terminal: BisectTerminal,
    *,
    note: str,
    jobs: int,
    settings: Settings,
    own: Mapping[str, Any],
) -> BisectResult:
    from dataclasses import replace

    from numerics_suite.versions.bisect import Bisection
    from numerics_suite.versions.extensions import left_out_notes
    from numerics_suite.versions.jobs import Jobs
    from numerics_suite.versions.matrix import in_environments

    terminal.begin(what, [candidate.label for candidate in candidates], note)
    processes = Jobs()
    with kept, telling_what_is_kept(terminal, kept):
        bisection = Bisection(
            plan=plan,
            candidates=candidates,
            kept=kept,
            execute=in_environments(processes),
            audience=terminal,
            jobs=jobs,
            stop=processes.stop,
            named=bool(settings.checks),
        )
        try:
            found = bisection.find(what, _shower(settings, own))
        except BaseException:
            processes.stop()
            raise
    found = replace(found, notes=(*((note,) if note else ()), *left_out_notes()))
    terminal.story(found, diagnosed=settings.diagnose)
    return found


def _candidates(source: str, own: Mapping[str, Any]) -> tuple[str, list[Candidate], str]:
    """What is searched, the candidates, and a note on their order."""
    from numerics_suite.versions.candidates import of_clone, of_package
    from numerics_suite.versions.recipes import Wanted
    from numerics_suite.versions.revisions import of_checkpoint

    good, bad = own["good"], own["bad"]
    fixed = Wanted(transformers=own["transformers"], torch=own["torch"], python=own["python"])
    if own["git"] is not None:
        return own["git"], of_clone(Path(own["git"]).expanduser(), good, bad, fixed), ""
    if own["package"] == "checkpoint":
        candidates, note = of_checkpoint(source, good, bad)
        return "checkpoint", candidates, note
    package = own["package"] or "transformers"
    return package, of_package(package, good, bad, fixed, pre=own["pre"]), ""


def _shower(settings: Settings, own: Mapping[str, Any]) -> Callable[[Candidate, Candidate, Settings], str]:
    """The command that shows a boundary."""

    def show(good: Candidate, bad: Candidate, deciding: Settings) -> str:
        source = settings.subjects[0]
        options = [*_options(settings), "--checks", ",".join(deciding.checks)]
        if deciding.baseline is not None:
            options += ["--baseline", str(deciding.baseline)]
        fixed = [word for name in ("transformers", "torch", "python") if own[name] for word in (f"--{name}", own[name])]
        if own["git"] is not None:
            ends = ["--git", own["git"], "--good", good.label, "--bad", bad.label]
            return shlex.join(["numerics-suite", "bisect", source, *options, *fixed, *ends])
        if bad.exported is not None:
            inside = str(bad.exported.folder)
            return shlex.join(["git", "-C", str(bad.exported.repository), "diff", good.label, bad.label, "--", inside])
        if own["package"] == "checkpoint":
            return shlex.join(["numerics-suite", "check", f"{source}@{bad.label}", *options])
        package = own["package"] or "transformers"
        axis = [f"--{package}", f"{good.label},{bad.label}"]
        if package not in {"transformers", "torch"}:
            axis = [word for end in (good, bad) for word in ("--with", f"{package}=={end.label}")]
        return shlex.join(["numerics-suite", "matrix", source, *options, *fixed, *axis])

    return show


def _options(settings: Settings) -> list[str]:
    """What the user typed of `check`'s own options, as they would be typed again."""
    words: list[str] = []
    for option in OPTIONS:
        name = option.name
        if settings.origin(name) != COMMAND_LINE or name in DESTINATIONS | {"subjects", "checks", "baseline"}:
            continue
        value = getattr(settings, name)
        if option.form in {"flag", "switch"}:
            words.append(option.flags[0] if value else option.flags[0].replace("--", "--no-", 1))
        elif option.form == "repeat":
            words += [word for item in value for word in (option.flags[0], str(item))]
        else:
            words += [option.flags[0], ",".join(value) if option.many else str(value)]
    return words
