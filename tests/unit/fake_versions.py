"""A world of made-up releases: what each says is written in a JSON file, and cells run in this very interpreter.

World: `{"RELEASE": {"failed": [check…], "error": [check…], "bits": text, "moved": module, "unsupported": [subject…],
"install": reason, "end": "exit" | "kill" | "garbage", "seconds": number, "began": FILE,
"seconds_of_the_first_run": number}}`; a release without an entry passes everything.

As a program: `fake_versions.py WORLD COMMAND…` is the command line in that world; `fake_versions.py cell JOB` is a cell, which in
tests is a fork of a process that has torch loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError, UnsupportedError

CHECKS = ("load.head-init", "forward.finite", "train.finite")
TASK = "causal-lm"


def cell_command(*arguments: str) -> list[str]:
    """The command line of a cell."""
    # Cells of a program have command lines of their own, by which a test finds those that outlive it.
    if __name__ == "__main__" or not hasattr(os, "pidfd_open"):
        return [sys.executable, __file__, "cell", *arguments]
    from preloaded import python

    # A job says how many threads its cell has, and a fork has as many as these tests.
    threads = os.environ["OMP_NUM_THREADS"]
    return ["env", f"OMP_NUM_THREADS={threads}", python(), __file__, "cell", *arguments]


class FakeEnvironment:
    """Runs this file instead of the package."""

    def __init__(self, world: Path, transformers: str, torch: str, release: str | None = None) -> None:
        self.given = {"FAKE_WORLD": str(world), "FAKE_TRANSFORMERS": transformers, "FAKE_TORCH": torch}
        self.given["FAKE_RELEASE"] = release or transformers

    def command(self, module: str, *arguments: str) -> list[str]:
        assert module == "numerics_suite.versions.cell"
        return cell_command(*arguments)

    def variables(self) -> dict[str, str]:
        return {**os.environ, **self.given}

    def release(self) -> None:
        pass


def install(world: Path, put: Any, releases: list[str], asked: list[str] | None = None) -> None:
    """Put the world in the place of index and environments.

    Args:
        world: its file.
        put: monkeypatch's `setattr`, or like it.
        releases: of every package.
        asked: collects the releases of which an environment is wanted.
    """
    from packaging.version import Version

    from numerics_suite.versions import candidates, combinations, matrix, ray_backend
    from numerics_suite.versions.recipes import make_recipe
    from numerics_suite.versions.specs import choose

    known = sorted(map(Version, releases))

    def ensure(what: Any, *, on_progress: Any = None) -> FakeEnvironment:
        recipe = make_recipe(what)
        if asked is not None:
            asked.append(recipe.transformers)
        told = json.loads(world.read_text(encoding="utf-8"))
        # What a release of another package says is written as that of transformers is.
        release = recipe.others[-1][1] if recipe.others else recipe.transformers
        entry = told.get(release, {})
        if "no uv" in told:
            raise BadInputError(told["no uv"])
        if "install" in entry:
            raise UnsupportedError(entry["install"])
        return FakeEnvironment(world, recipe.transformers, recipe.torch, *([release] if recipe.others else []))

    def resolve(package: str, spec: str, *, pre: bool = False, python: str | None = None) -> list[str]:
        told = json.loads(world.read_text(encoding="utf-8"))
        if "no network" in told:
            raise BadInputError(told["no network"])
        return [str(version) for version in choose(package, spec, known, pre=pre)]

    run_on_node = ray_backend.run_on_node

    def on_node(job: Any) -> Any:
        """The task of a node, which takes no part in what was put in place here: this file is the program, so Ray carries it there."""
        from numerics_suite.versions import environments

        environments.ensure = ensure
        return run_on_node(job)

    put(matrix, "ensure", ensure)
    put(ray_backend, "run_on_node", on_node)
    put(combinations, "resolve", resolve)
    put(candidates, "released", lambda *_, **__: known)


# --- a cell ------------------------------------------------------------------------------------------------------------


def cell(path: Path) -> None:
    """Answer a job as the world says."""
    from numerics_suite.core.atomic import write_atomic
    from numerics_suite.reports.results import dump, write_results
    from numerics_suite.versions.cell import end_with_parent
    from numerics_suite.versions.job import BASELINE, DONE, RESULTS, read_job

    end_with_parent()
    job, folder = read_job(path), path.parent
    release = os.environ.get("FAKE_RELEASE", os.environ["FAKE_TRANSFORMERS"])
    told = json.loads(Path(os.environ["FAKE_WORLD"]).read_text(encoding="utf-8")).get(release, {})
    if release == "by-config":
        told = {"failed": ["forward.finite"]} if config_of(job.settings.subjects[0])["bad"] else {}
    if "began" in told:  # on which node of a cluster
        log = Path(told["began"])
        again = log.exists() and f"{release} " in log.read_text(encoding="utf-8")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{release} {os.environ['RAY_RAYLET_PID']}\n")
        time.sleep(0 if again else told.get("seconds_of_the_first_run", 0))
    sys.stdout.write(f"cell of {release}\n")
    sys.stdout.flush()
    time.sleep(told.get("seconds", 0))
    ended(told.get("end"), folder)
    sources = job.settings.subjects
    names = [
        name or source.partition(":")[2]
        for name, source in zip([*job.settings.names, *[None] * len(sources)], sources, strict=False)
    ]
    lacking = {
        name: f"transformers {release} has no {name}; 5.2.0 is the first that has it"
        for name in told.get("unsupported", ())
    }
    done: dict[str, Any] = {
        "results": False,
        "baseline": False,
        "reason": None,
        "unsupported": lacking,
        "status": "passed",
    }
    done["held"] = {
        "transformers": os.environ["FAKE_TRANSFORMERS"],
        "torch": f"{os.environ['FAKE_TORCH']}+cpu",
        "python": "3.11.9",
    }
    if set(names) <= set(lacking):
        done |= {"status": "unsupported", "reason": "; ".join(lacking.values())}
    else:
        if job.check:
            result = answers(job.settings, told, names, lacking, release)
            write_results(folder / RESULTS, result)
            done |= {"results": True, "status": {"pass": "passed", "fail": "failed", "error": "error"}[result.verdict]}
        if job.record:
            from numerics_suite.baselines.store import save

            save(folder / BASELINE, [recorded(told, name) for name in names if name not in lacking], force=True)
            done["baseline"] = True
    write_atomic(folder / DONE, dump(done))


def config_of(source: str) -> dict[str, Any]:
    """The config of a directory, or of a revision in the hub's cache."""
    folder = Path(source)
    if not folder.is_dir():
        name, _, revision = source.partition("@")
        folder = Path("hub") / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    told: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return told


def ended(how: str | None, folder: Path) -> None:
    """End the process as the world says, with a half-written file left."""
    if how is None:
        return
    (folder / "results.json").write_text('{"schema_version": 1, "comm', encoding="utf-8")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "garbage":
        (folder / "done.json").write_text('{"status": "pas', encoding="utf-8")
        sys.exit(0)
    sys.stdout.write("Traceback (most recent call last):\nImportError: libfoo.so.1: cannot open shared object file")
    sys.exit(1)


def answers(settings: Any, told: dict[str, Any], names: list[str], lacking: dict[str, str], release: str) -> Any:
    """The results file's record."""
    from numerics_suite.core.records import Cell, CheckResult, Finding, RunResult
    from numerics_suite.settings.tree import to_json

    asked = [
        check for check in (*CHECKS, "baseline.contract") if not settings.checks or matches(check, settings.checks)
    ]
    if settings.baseline is None:
        asked = [check for check in asked if not check.startswith("baseline.")]
    checks = []
    for name in names:
        for check in asked:
            where = Cell(subject=name, precision="bf16", attn="sdpa", device="cpu", task=TASK)
            if name in lacking:
                checks.append(CheckResult(check=check, cell=where, status="skipped", reason=lacking[name]))
                continue
            status = next((one for one in ("failed", "error", "skipped") if check in told.get(one, ())), "passed")
            cause = "contract-change" if check.startswith("baseline.") else "uninitialised-parameters"
            found = Finding(cause=cause, title=f"{check} fails in {release}", explanation="x", module="score")
            checks.append(
                CheckResult(
                    check=check, cell=where, status=status, finding=found if status == "failed" else None,
                    reason="out of memory" if status in {"error", "skipped"} else None,
                )
            )  # fmt: skip
    statuses = {check.status for check in checks}
    verdict = "fail" if "failed" in statuses else "error" if "error" in statuses else "pass"
    return RunResult(
        command="check", started_at="2026-01-01T00:00:00+00:00", duration_s=0.1, verdict=verdict,
        environment={"packages": {}, "python": "3.11.9"}, settings=to_json(settings), subjects=(), checks=tuple(checks),
    )  # fmt: skip


def matches(check: str, globs: tuple[str, ...]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(check, glob) for glob in globs)


def recorded(told: dict[str, Any], name: str) -> Any:
    """The baseline's record of one subject."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from unit.sample_baseline import baseline, moved_sketch, with_bits, with_module

    made = baseline(subject=name, attn="sdpa", blocks=2)
    made = replace(made, cell=replace(made.cell, task=TASK))
    if "bits" in told:
        made = with_bits(made, logits=told["bits"], cell=told["bits"])
    if "moved" in told:
        gave = next(item.gave for item in made.modules if item.name == told["moved"])
        made = with_module(made, told["moved"], gave=moved_sketch(gave, 0.01))
        made = replace(made, answers=tuple(replace(item, values=item.values * 1.01) for item in made.answers))
    if "dtype" in told:
        made = replace(made, contract={**made.contract, "default_dtype": told["dtype"]})
    return made


def main() -> int:
    if sys.argv[1] == "cell":
        cell(Path(sys.argv[2]))
        return 0
    from numerics_suite.cli.main import main as command

    world = Path(sys.argv[1])
    install(world, setattr, json.loads(world.read_text(encoding="utf-8"))["releases"])
    return command(sys.argv[2:])


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
