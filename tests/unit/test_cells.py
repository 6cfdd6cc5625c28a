"""Jobs and cells themselves: what a job's file carries, what is kept, how a process ends, and one real cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from preloaded import python

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.versions import MatrixCell, MatrixResult, Versions
from numerics_suite.settings.options import from_command_line
from numerics_suite.settings.tree import to_json
from numerics_suite.versions import job as job_files
from numerics_suite.versions.fingerprints import know, know_all
from numerics_suite.versions.job import Job, for_a_cell, read_job, settings_from_json, source_digest
from numerics_suite.versions.jobs import Jobs, RunningEnvironment, Stopped, reason_of
from numerics_suite.versions.matrix import MatrixPlan
from numerics_suite.versions.result_store import ResultStore, read_done

GIVEN = {
    "subjects": ["fixture:glm4-tiny"], "names": ["mine"], "precision": "bf16,fp32", "attn": "sdpa", "seed": "7", "lr": "0.001",
    "checks": "load.*", "data": "texts.jsonl", "baseline": "base", "diagnose": "false", "max_time": "60",
}  # fmt: skip


def a_job(folder: Path, **changes) -> Job:
    settings = for_a_cell(
        from_command_line(
            {"subjects": ["fixture:glm4-tiny"], "precision": "bf16", "attn": "sdpa", "checks": "load.*"}, folder
        )
    )
    plan = MatrixPlan(settings=settings, known=know_all(settings), cells=(), cwd=folder, threads=1, record=False)
    return replace(plan.job(None), **changes)


def test_a_jobs_file_gives_the_same_settings_back(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[[tool.numerics-suite.accept]]\ncheck = "load.dtype"\nreason = "known"\nuntil = 2100-01-01\n', encoding="utf-8"
    )
    settings = from_command_line(GIVEN, tmp_path)
    assert settings.accept
    assert settings_from_json(json.loads(json.dumps(to_json(settings)))) == settings


def test_a_cell_is_asked_what_the_command_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = from_command_line(
        {
            **GIVEN,
            "json": "out.json",
            "quiet": "true",
            "workers": "3",
            "subjects": [".", "org/name", "fixture:glm-tiny"],
        }
    )
    settings = for_a_cell(typed)
    assert settings.subjects == (str(tmp_path), "org/name", "fixture:glm-tiny")
    assert (settings.workers, settings.json, settings.quiet, settings.data) == (
        0,
        None,
        False,
        tmp_path / "texts.jsonl",
    )
    assert not {"json", "quiet", "workers"} & set(settings.origins)
    asked = ("precision", "attn", "seed", "lr", "checks", "diagnose", "max_time", "names")
    assert all(getattr(settings, name) == getattr(typed, name) and settings.explicit(name) for name in asked)


def test_a_name_changes_with_all_that_an_answer_depends_on(tmp_path):
    job = a_job(tmp_path)
    others = [
        replace(job, settings=replace(job.settings, seed=1)),
        replace(job, versions=replace(job.versions, torch="2.6.0")),
        replace(job, digests={**job.digests, "glm4-tiny": "another"}),
        replace(job, digests={**job.digests, "numerics-suite": "another"}),
        replace(job, record=True),
        replace(job, threads=2),
    ]
    assert len({job.name, *(other.name for other in others)}) == 1 + len(others)
    assert job.name == a_job(tmp_path).name
    assert job.digests["numerics-suite"] == source_digest()


def test_the_parent_imports_no_torch(tmp_path):
    script = (
        "import sys\nfrom numerics_suite.cli.main import main\n"
        "import numerics_suite.versions.bisect, numerics_suite.versions.changes, numerics_suite.judgement.classify\n"
        f"status = main(['matrix', 'fixture:glm-tiny', '--python', '3.11', '--list', '--out', {str(tmp_path / 'out')!r}])\n"
        "print(status, sorted({'torch', 'transformers', 'hypothesis', 'pytest'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=RunningEnvironment().variables(),
    )
    assert done.stdout.splitlines()[-1] == "0 []"


# --- subjects ----------------------------------------------------------------------------------------------------------


def test_a_factory_is_known_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def make(): ...\n", encoding="utf-8")
    first = know("factory:mine:make")
    assert (first.name, first.digest) == ("make", know("factory:mine:make").digest)
    Path("mine.py").write_text("def make(): ...  # changed\n", encoding="utf-8")
    assert know("factory:mine:make").digest != first.digest
    assert (
        know("factory:elsewhere:make").digest != know("factory:elsewhere:make").digest
    )  # nothing is known: never reused


# --- kept --------------------------------------------------------------------------------------------------------------


def test_what_is_unfinished_never_counts(tmp_path):
    with ResultStore(tmp_path / "out") as kept:
        place = kept.begin("name")
        (place / "done.json").write_text(
            json.dumps({"status": "passed", "results": False, "reason": None}), encoding="utf-8"
        )
        assert kept.find("name") is None
        assert kept.publish("name", place) == tmp_path / "out" / "name"
        assert kept.find("name") is not None
        kept.begin("other")
    with ResultStore(tmp_path / "out") as kept:
        assert not list((tmp_path / "out" / ".unfinished").iterdir())
        assert kept.count() == 1


@pytest.mark.parametrize(
    ("done", "results", "found"),
    [
        ('{"status": "passed", "results": true, "reason": null}', True, True),
        ('{"status": "passed", "results": true, "reason": null}', False, False),
        ('{"status": "unsupported", "results": false, "reason": "x"}', False, True),
        ('{"status": "error", "results": true, "reason": "x"}', True, False),
        ('{"status": "pas', True, False),
        ("[]", True, False),
        ("{}", True, False),
    ],
)
def test_only_whole_answers_are_reused(tmp_path, done, results, found):
    place = tmp_path / "name"
    place.mkdir()
    (place / "done.json").write_text(done, encoding="utf-8")
    if results:
        (place / "results.json").write_text("{}", encoding="utf-8")
    with ResultStore(tmp_path) as kept:
        assert (kept.find("name") is not None) is found


def test_an_error_makes_room_for_the_next_answer(tmp_path):
    with ResultStore(tmp_path) as kept:
        for status in ("error", "passed"):
            place = kept.begin("name")
            (place / "done.json").write_text(
                json.dumps({"status": status, "results": False, "reason": None}), encoding="utf-8"
            )
            kept.publish("name", place)
        assert read_done(tmp_path / "name")["status"] == "passed"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(BadInputError, match=r"--out: cannot write .*file/out: Not a directory"),
        ResultStore(tmp_path / "file" / "out"),
    ):
        pass
    with pytest.raises(BadInputError, match=r"--out: cannot write /proc/"), ResultStore(Path("/proc/out")):
        pass


# --- processes ---------------------------------------------------------------------------------------------------------


class Scripted:
    """An environment whose module is a script."""

    def __init__(self, script: str) -> None:
        self.script = script

    def command(self, module, *arguments):
        return [sys.executable, "-c", self.script, *arguments]

    def variables(self):
        return dict(os.environ)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "raise ImportError('libcudart.so.12: cannot open')",
            "its process ended with status 1: ImportError: libcudart.so.12: cannot open",
        ),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL, as when memory runs out"),
        ("import os; os.kill(os.getpid(), 11)", "its process was ended by SIGSEGV"),
        ("pass", "its process ended with status 0: no output"),
    ],
)
def test_a_process_without_an_answer_is_an_error_with_its_reason(tmp_path, script, reason):
    done = Jobs().run(Scripted(script), a_job(tmp_path), tmp_path)
    assert (done["status"], done["reason"]) == ("error", reason)
    assert read_done(tmp_path) == done


def test_stopping_ends_a_process_that_will_not_listen(tmp_path):
    import threading

    jobs = Jobs()
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    threading.Timer(1.0, jobs.stop).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        jobs.run(Scripted(script), a_job(tmp_path), tmp_path)
    assert time.monotonic() - begun < 20
    with pytest.raises(Stopped):
        jobs.run(Scripted("pass"), a_job(tmp_path), tmp_path)


def test_stopping_ends_an_installer_and_leaves_no_answer(tmp_path, monkeypatch):
    import threading

    from numerics_suite.core.errors import UnsupportedError
    from numerics_suite.versions import installers, matrix
    from numerics_suite.versions.recipes import Wanted

    def ensure(_wanted, *, on_progress):
        status, _, _ = installers.run_quietly([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
        message = f"the installer ended with {status}"
        raise UnsupportedError(message)

    monkeypatch.setattr(matrix, "ensure", ensure)
    jobs = Jobs()
    threading.Timer(1.0, jobs.stop).start()
    begun = time.monotonic()
    job = a_job(tmp_path, wanted=Wanted(transformers="5.0.0"))
    with ResultStore(tmp_path / "out") as kept:
        with pytest.raises(Stopped):
            matrix.answer(job, kept, matrix.in_environments(jobs), lambda _: None)
        assert kept.count() == 0
    assert time.monotonic() - begun < 20


def test_a_log_that_is_gone_is_no_second_error(tmp_path):
    assert reason_of(3, tmp_path / "none") == "its process ended with status 3: no output"


@pytest.mark.parametrize(
    ("statuses", "status"),
    [("p", 0), ("pu", 0), ("pf", 1), ("pfe", 1), ("pe", 3), ("ue", 3), ("u", 5), ("uu", 5)],
)
def test_the_exit_status_of_a_matrix(statuses, status):
    names = {"p": "passed", "f": "failed", "e": "error", "u": "unsupported"}
    cells = tuple(MatrixCell(wanted=Versions(), held=Versions(), status=names[letter]) for letter in statuses)
    assert MatrixResult(cells=cells, folder=Path()).exit_status == status


# --- a real cell -------------------------------------------------------------------------------------------------------


def test_a_real_cell_checks_and_records_in_one_process(tmp_path, monkeypatch):
    from numerics_suite.baselines.store import load

    monkeypatch.setattr(sys, "executable", python())

    job = replace(a_job(tmp_path), record=True)
    done = Jobs().run(RunningEnvironment(), job, tmp_path)
    assert (done["status"], done["reason"], done["baseline"]) == ("passed", None, True), (
        tmp_path / job_files.LOG
    ).read_text(encoding="utf-8")
    assert read_job(tmp_path / job_files.JOB) == replace(job, wanted=None)
    results = json.loads((tmp_path / job_files.RESULTS).read_text(encoding="utf-8"))
    assert {check["check"].partition(".")[0] for check in results["checks"]} == {"load"}
    assert [cell.id for cell in load(tmp_path / job_files.BASELINE)] == ["glm4-tiny/bf16/sdpa/cpu"]
    assert {"imports", "check", "record"} == set(done["times"])


@pytest.mark.slow
def test_a_real_cell_tells_bad_input_from_what_these_versions_lack(tmp_path):
    import shutil

    from numerics_suite.subjects.fixtures import fixture_path

    given = {"subjects": ["fixture:chatglm-tiny"], "task": "token-classification", "precision": "bf16", "attn": "sdpa"}
    settings = for_a_cell(from_command_line(given, tmp_path))
    job = MatrixPlan(settings=settings, known=know_all(settings), cells=(), cwd=tmp_path, threads=1).job(None)
    (tmp_path / "a").mkdir()
    done = Jobs().run(RunningEnvironment(), job, tmp_path / "a")
    assert (done["status"], done["results"]) == ("unsupported", False), done
    assert "has no class for token-classification" in done["reason"]
    shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    settings = replace(settings, subjects=(str(tmp_path / "broken"),), task="auto")
    (tmp_path / "b").mkdir()
    done = Jobs().run(RunningEnvironment(), replace(job, settings=settings), tmp_path / "b")
    assert (done["status"], done["bad_input"]) == ("error", True), done
    assert "is not JSON" in done["reason"]


def test_checks_leave_the_path_alone(tmp_path):
    """Beside an installed copy lie other releases of torch and transformers; pytest's default puts that folder first."""
    import numerics_suite

    linked = tmp_path / "site"
    linked.mkdir()
    (linked / "numerics_suite").symlink_to(Path(numerics_suite.__file__).parent)
    script = (
        "import sys\nfrom numerics_suite.cli.main import main\nbefore = list(sys.path)\n"
        "status = main(['check', 'fixture:glm4-tiny', '--precision', 'bf16', '--attn', 'sdpa', '--checks', 'load.dtype', '-n', '0', '--quiet'])\n"
        "print(status, [path for path in sys.path if path not in before])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(linked)},
    )
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.slow
def test_scripts_of_one_release_lie_apart_from_anothers_also_where_workers_write_them(tmp_path, monkeypatch):
    from numerics_suite.subjects import compat
    from numerics_suite.suite.session import REPRODUCERS
    from numerics_suite.versions import cell

    monkeypatch.chdir(tmp_path)
    asked = {"subjects": ["fixture:glm4-tiny"], "precision": "pure-fp16", "attn": "sdpa", "checks": "train.finite"}
    job = a_job(tmp_path, settings=replace(for_a_cell(from_command_line(asked, tmp_path)), workers=1))
    for _ in range(2):  # of one process: the second cell's scripts lie where the first one's do
        result = cell._check(job, {"unsupported": {}}, cell._Clock({}))
        (check,) = result.checks
        folder = REPRODUCERS / f"transformers-{compat.version()}"
        assert check.finding.reproducer == (folder / "train.finite-glm4-tiny-pure-fp16.py").as_posix()
        assert (tmp_path / check.finding.reproducer).is_file()
