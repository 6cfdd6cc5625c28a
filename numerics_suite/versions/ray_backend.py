"""Cells spread over a Ray cluster: each is a task that makes its environment on its node through the same code.

Ray schedules, runs the cells of a lost node again and brings their files back; nothing here does. What is added: each cell asks for
the memory that its plan expects, so that a node too small gets none, and a cell that no node can hold is an error of its own and not waited for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numerics_suite
from numerics_suite.core.errors import BadInputError, UnsupportedError
from numerics_suite.subjects.fixtures import fixture_names, fixtures_root
from numerics_suite.versions.job import JOB, Job
from numerics_suite.versions.jobs import Jobs, Stopped, failed
from numerics_suite.versions.matrix import wanted_of
from numerics_suite.versions.recipes import Wanted, own_requirements

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

LOCAL = "local"
RETRIES = 3
"""Times that a cell is run again when its worker or node is lost."""

NODE_WAIT_S = 30.0
"""Seconds for which a cell is kept that no node can hold: a node that was lost may come back, and a cluster may start another."""

LOOK_S = 2.0
"""Seconds between two looks at the cluster's nodes."""

PASSED_ON = ("HF_", "PIP_", "UV_", "NUMERICS_SUITE_", "SSL_CERT_FILE")
"""Variables, by their begin, that a node needs to find checkpoints and packages as this machine does."""


def refuse_without_ray() -> None:
    """See that Ray is installed.

    Raises:
        BadInputError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        message = "--ray needs Ray, which is not installed: pip install 'numerics-suite[ray]'"
        raise BadInputError(message)


class Cluster:
    """A connection to a cluster, on which jobs are run.

    Attributes:
        address: of the cluster; `local` starts one on this machine.
        memory: bytes that a job needs.
    """

    def __init__(self, address: str, memory: int) -> None:
        """Nothing is connected before it is entered."""
        self.address, self.memory = address, memory
        self._stopped = threading.Event()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        """Connect, and send this copy of the package to the nodes.

        Raises:
            BadInputError: no cluster answers there.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # without end by default
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._scratch = tempfile.TemporaryDirectory(prefix="numerics-suite-ray-")
        stage(Path(self._scratch.name))
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        options: dict[str, Any] = {"include_dashboard": False} if self.address == LOCAL else {}
        try:
            ray.init(
                address=self.address,
                runtime_env={"working_dir": self._scratch.name, "env_vars": variables},
                log_to_driver=False,
                logging_level="critical",
                **options,
            )
        except Exception as error:  # noqa: BLE001 - Ray raises many kinds
            self.__exit__(None, None, None)
            message = f"--ray {self.address}: no cluster answers: {_lines(error)[0]}"
            raise BadInputError(message) from None
        self._task = ray.remote(run_on_node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; a local cluster ends."""
        import ray

        ray.shutdown()
        if self._scratch is not None:
            self._scratch.cleanup()

    def stop(self) -> None:
        """Cancel what runs."""
        self._stopped.set()

    def execute(self, job: Job, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        """Run a job on some node; its files are written here.

        Raises:
            Stopped: the user stopped.
            UnsupportedError: the node cannot make the environment, or no node can hold the job.
            BadInputError: the node can make none.
        """
        from ray import exceptions

        lost = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError)
        try:
            answer = self._answer(job, tell)
        except exceptions.RayTaskError as error:
            return failed(f"its node could not run it: {_lines(error)[-1]}")
        except lost as error:
            return failed(f"its node or worker was lost {RETRIES + 1} times: {_lines(error)[0]}")
        except exceptions.RayError as error:
            return failed(f"the cluster gave no answer: {_lines(error)[0]}")
        for name, content in answer["files"].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if answer["unsupported"]:
            raise UnsupportedError(answer["unsupported"])
        if answer["bad_input"]:
            raise BadInputError(answer["bad_input"])
        done: dict[str, Any] = answer["done"]
        return done

    def _answer(self, job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
        """What the task of a job returns."""
        import ray

        needs = self._needs(job)
        amounts = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "memory": needs["memory"]}
        task = self._task.options(**amounts, max_retries=RETRIES, retry_exceptions=False)
        reference = task.remote(replace(job, wanted=_exact(job)))
        tell("running")
        nodes = Nodes(needs)
        while not ray.wait([reference], timeout=0.5)[0]:
            if self._stopped.is_set() or nodes.none_holds():
                ray.cancel(reference, force=True)
                if self._stopped.is_set():
                    raise Stopped
                raise UnsupportedError(nodes.reason())
        answer: dict[str, Any] = ray.get(reference)
        return answer

    def _needs(self, job: Job) -> dict[str, float]:
        """What a job takes of its node, by Ray's names. Its threads are those of this machine's cores; the nodes may have fewer."""
        import ray

        device = job.settings.device
        cores = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        return {
            "CPU": min(job.threads, cores) or 1,
            "GPU": 0 if device.startswith(("cpu", "auto")) else 1 + device.count(","),
            "memory": self.memory,
        }


class Nodes:
    """Whether the nodes that are there now could hold a job, were they idle.

    Attributes:
        needs: amounts of what the job takes, by Ray's names.
    """

    def __init__(self, needs: Mapping[str, float]) -> None:
        """Nothing is looked at yet."""
        self.needs = needs
        self._fitted = self._looked = time.monotonic()
        self._offers: list[Mapping[str, float]] = []

    def none_holds(self) -> bool:
        """Whether for :data:`NODE_WAIT_S` no node could."""
        import ray

        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        self._offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(offer.get(name, 0) >= amount for name, amount in self.needs.items()) for offer in self._offers):
            self._fitted = now
        return now - self._fitted >= NODE_WAIT_S

    def reason(self) -> str:
        """One line: what is needed, and what the nodes offer."""
        offers = dict.fromkeys(_amounts(offer) for offer in self._offers if offer.get("CPU"))
        return f"no node can hold it: it needs {_amounts(self.needs)}; nodes offer: {' | '.join(offers) or 'nothing'}"


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def _amounts(resources: Mapping[str, float]) -> str:
    cpus, gpus, memory = (resources.get(name, 0) for name in ("CPU", "GPU", "memory"))
    parts = [f"{cpus:g} CPU{'s' if cpus != 1 else ''}", *([f"{gpus:g} GPU{'s' if gpus != 1 else ''}"] if gpus else [])]
    return f"{', '.join(parts)} and {memory / 1e9:.1f} GB"


def stage(folder: Path) -> None:
    """Put this copy of the package, its fixtures and what it needs where Ray takes them from.

    Not a wheel: Ray would install all that a wheel needs, a torch and a transformers for each node.
    """
    package = Path(numerics_suite.__file__).resolve().parent
    fixtures = fixtures_root()
    ignore = shutil.ignore_patterns("__pycache__", "_fixtures")
    shutil.copytree(package, folder / package.name, ignore=ignore)
    places = [fixtures / name for name in (*fixture_names(default=False), "digests.json", "texts.jsonl")]
    (folder / package.name / "_fixtures").mkdir()
    for place in places:
        target = folder / package.name / "_fixtures" / place.name
        if place.is_dir():
            shutil.copytree(place, target, ignore=ignore)
        elif place.is_file():
            shutil.copy2(place, target)
    needs = "".join(f"  {json.dumps(str(requirement))},\n" for requirement in own_requirements())
    project = (
        f'[project]\nname = "numerics-suite"\nversion = "{numerics_suite.__version__}"\ndependencies = [\n{needs}]\n'
    )
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")


def _exact(job: Job) -> Wanted:
    """The environment with nothing left open: what is installed on the node must not matter."""
    versions, wanted = job.versions, job.wanted or Wanted()
    if wanted.transformers_source is not None:
        return replace(wanted, torch=versions.torch, python=versions.python)
    return wanted_of(versions)


def run_on_node(job: Job) -> Mapping[str, Any]:
    """The task: make the environment, run the job in it, and give all its files back."""
    from numerics_suite.versions.environments import ensure

    answer: dict[str, Any] = {"done": None, "files": {}, "unsupported": "", "bad_input": ""}
    with tempfile.TemporaryDirectory(prefix="numerics-suite-cell-") as scratch:
        folder, here = Path(scratch) / "cell", Path(scratch) / "cwd"
        folder.mkdir()
        here.mkdir()
        try:
            assert job.wanted is not None
            environment = ensure(job.wanted)
            # The user's folder is there on a shared file system only; a factory needs it, a checkpoint's path is absolute.
            cwd = job.cwd if Path(job.cwd).is_dir() else str(here)
            answer["done"] = Jobs().run(environment, replace(job, cwd=cwd), folder)
        except UnsupportedError as error:
            answer["unsupported"] = str(error)
        except BadInputError as error:
            answer["bad_input"] = str(error)
        answer["files"] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != JOB
        }
    return answer
