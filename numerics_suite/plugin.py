"""The pytest plugin: options, markers, parametrisation of the suite, collection of results, exit status.

Other projects' test runs load this file through its entry point, so it imports nothing heavy and does nothing until
the suite is named on the command line or `collect = true` asks for it.
"""

from __future__ import annotations

import os
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from numerics_suite.core import progress
from numerics_suite.core.activity import listening
from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.garbage import living_set_aside, none_collected
from numerics_suite.core.interrupts import interruptible
from numerics_suite.core.switch import switch_kept
from numerics_suite.settings.options import add_pytest_options, from_pytest
from numerics_suite.suite.items import numerics_question, parametrize_questions, question_of  # noqa: F401 - pytest finds the fixture
from numerics_suite.suite.stash import WORKER_SESSION, gate_key, result_key, run_key, session_key
from numerics_suite.suite.subject_fixture import numerics_subject, parametrize_subjects  # noqa: F401 - pytest finds the fixture

if TYPE_CHECKING:
    from collections.abc import Generator

    from numerics_suite.suite.session import SuiteSession

SUITE = Path(__file__).resolve().parent / "suite"
PACKAGE = "numerics_suite.suite"
NO_GPU = "-m gpu: no accelerator is visible to torch, so no gpu cell can run (--numerics-allow-no-gpu lets that pass)"

ASKS_NOTHING = ("collectonly", "showfixtures", "show_fixtures_per_test", "setuponly", "setupplan")
"""Options of pytest with which no test is run, so there is nothing to judge."""

GAVE_UP = 70
"""Status of a worker that ends on purpose. The controller reads none: it sees the connection end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--numerics-…` twins of the options of `check`."""
    add_pytest_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; with `collect = true` let a bare `pytest` collect the suite too."""
    config.addinivalue_line("markers", "gpu: runs on an accelerator")
    config.addinivalue_line("markers", "slow: takes minutes; not part of a quick run")
    kept = ExitStack()
    kept.enter_context(switch_kept())
    if _names_suite(config) and not hasattr(config, "workerinput"):
        kept.enter_context(interruptible())
    config.add_cleanup(kept.close)
    if _is_bare(config) and not _names_suite(config) and _settings(config).collect:
        config.args.append(str(SUITE))


def _is_bare(config: pytest.Config) -> bool:
    source = getattr(config, "args_source", None)
    return source is not None and source is not type(source).ARGS


def _names_suite(config: pytest.Config) -> bool:
    """Whether the command line (or `collect`) names the suite, as a package, a folder or a file of it."""
    for argument in config.args:
        path = str(argument).partition("::")[0]
        if path == PACKAGE or path.startswith(f"{PACKAGE}."):
            return True
        if Path(path).exists() and SUITE in (Path(path).resolve(), *Path(path).resolve().parents):
            return True
    return False


def _settings(config: pytest.Config) -> Any:
    try:
        return from_pytest(config)
    except NumericsSuiteError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the plan before anything is collected, so that bad input is a usage error and not a broken test."""
    config = session.config
    if not _names_suite(config):
        return
    _share_cores(config)
    run = config.stash.get(run_key, None)
    handed_on = getattr(config, "workerinput", {}).get(WORKER_SESSION)
    if run is not None:
        suite = run.session
    elif handed_on is not None:
        suite = _taken_over(config, handed_on)
    else:
        suite = _of_options(config)
    config.stash[session_key] = suite
    if not hasattr(config, "workerinput") and not any(config.getoption(name, default=False) for name in ASKS_NOTHING):
        from numerics_suite.suite.collector import Gate

        gate = Gate(suite, run=run)
        config.stash[gate_key] = gate
        config.pluginmanager.register(gate)


def _taken_over(config: pytest.Config, handed_on: bytes) -> SuiteSession:
    """In a worker, the session of the process that began it, which hears what goes on here."""
    with none_collected():
        suite: SuiteSession = pickle.loads(handed_on)  # noqa: S301 - our own process's
    progress.tell_in(suite.board)
    whole_run = ExitStack()
    config.add_cleanup(whole_run.close)
    whole_run.enter_context(living_set_aside())
    if not suite.settings.quiet:
        from numerics_suite.reports.streams import notice

        whole_run.enter_context(listening(notice))
    return suite


def _of_options(config: pytest.Config) -> SuiteSession:
    """Under plain pytest, a session of its options, with its plan made."""
    from numerics_suite.core.atomic import ensure_writable
    from numerics_suite.suite.session import SuiteSession

    settings = _settings(config)
    _refuse_gpu_run_without_gpu(config, allowed=settings.allow_no_gpu)
    suite = SuiteSession(settings)
    try:
        if settings.json and settings.json != "-":
            ensure_writable(Path(settings.json), "--numerics-json")
        if settings.report or settings.junitxml:
            from numerics_suite.reports.report import ensure_wanted

            ensure_wanted(settings.report, settings.junitxml, "--numerics-")
        suite.prepare()
    except NumericsSuiteError as error:
        raise pytest.UsageError(str(error)) from None
    return suite


def _share_cores(config: pytest.Config) -> None:
    """In a worker, as many threads as there are cores for it: workers that each take all cores wait for each other."""
    workers = int(getattr(config, "workerinput", {}).get("workercount", 0))
    if workers > 1:
        import torch

        from numerics_suite.core.machine import core_count

        torch.set_num_threads(max(1, core_count() // workers))


def _wants_gpu_only(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr", "")
    if not expression:
        return False
    from _pytest.mark.expression import Expression

    def only_gpu(name: str, /, **_: object) -> bool:
        return name == "gpu"

    def nothing(_name: str, /, **_: object) -> bool:
        return False

    compiled = Expression.compile(expression)
    return compiled.evaluate(only_gpu) and not compiled.evaluate(nothing)


def _refuse_gpu_run_without_gpu(config: pytest.Config, *, allowed: bool) -> None:
    if allowed or not _wants_gpu_only(config):
        return
    from numerics_suite.devices.device import accelerator

    if accelerator() is None:
        pytest.exit(NO_GPU, returncode=int(pytest.ExitCode.NO_TESTS_COLLECTED))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect the suite's files whatever the host's `python_files` says."""
    if file_path.parent != SUITE or not file_path.match("test_*.py") or session_key not in parent.config.stash:
        return None
    patterns = parent.config.getini("python_files")
    if parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns):
        return None  # pytest collects it by itself
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One parameter per question of the file's group, and per cell for `numerics_subject` in a user's own tests."""
    if "numerics_subject" in metafunc.fixturenames:
        parametrize_subjects(metafunc)
    suite = metafunc.config.stash.get(session_key, None)
    if "numerics_question" in metafunc.fixturenames and suite is not None:
        parametrize_questions(metafunc, suite.plan.questions)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup` a cell is a group."""
    suite = config.stash.get(session_key, None)
    if suite is None or config.getoption("dist") != "loadgroup":
        return None
    from numerics_suite.suite.scheduling import CellScheduling

    return CellScheduling(config, log, suite.plan)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run cell by cell, so that each model is loaded once; other tests keep their place before the suite's."""
    suite = config.stash.get(session_key, None)
    if suite is None:
        return
    order = {question: index for index, question in enumerate(suite.plan.questions)}
    # A file of the suite without a question (`--checks load.*`) is left with an item that asks nothing.
    empty = [item for item in items if item.path.parent == SUITE and question_of(item) is None]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]
    items.sort(key=lambda item: order[question] if (question := question_of(item)) is not None else -1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """End a worker whose device was lost, before another cell begins: the remaining cells run in a new one."""
    suite = item.config.stash.get(session_key, None)
    if suite is None or suite.lost is None or not hasattr(item.config, "workerinput"):
        return
    question = question_of(item)
    if question is not None and question.cell != suite.lost[0]:
        os._exit(GAVE_UP)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send the result along with pytest's own report, in a form that travels between processes."""
    report = yield
    report.numerics_item = question_of(item) is not None  # type: ignore[attr-defined]
    result = item.stash.get(result_key, None)
    if result is not None and report.when == "call":
        from numerics_suite.reports.results import check_to_json

        report.numerics_result = check_to_json(result)  # type: ignore[attr-defined]
        report.numerics_gives_up = item.config.stash[session_key].lost is not None  # type: ignore[attr-defined]
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the gate what was selected."""
    gate = session.config.stash.get(gate_key, None)
    if gate is not None:
        gate.select([question for item in session.items if (question := question_of(item)) is not None])


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Judge the run as a whole and set the exit status of the contract."""
    gate = session.config.stash.get(gate_key, None)
    if gate is not None:
        _end_workers(session.config)
        session.exitstatus = gate.finish(int(exitstatus), others_failed=session.testsfailed > gate.failed_items)
        allowed = gate.settings.allow_no_gpu and _wants_gpu_only(session.config)
        if allowed and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def _end_workers(config: pytest.Config) -> None:
    """After an interrupt, end xdist's workers at once: it would wait ten seconds for each, which CI systems do not."""
    from numerics_suite.core.interrupts import requested

    controller = config.pluginmanager.getplugin("dsession")
    if controller is None or not requested():
        return
    for worker in getattr(controller, "_active_nodes", ()):
        process = getattr(getattr(worker.gateway, "_io", None), "popen", None)
        if process is not None:
            process.kill()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Under plain pytest: the verdict and the findings, as `numerics-suite check` prints them."""
    gate = config.stash.get(gate_key, None)
    if gate is not None and gate.run is None and gate.result is not None:
        gate.print_summary(terminalreporter)
