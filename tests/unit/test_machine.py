"""What a run takes of the machine: CPUs that it may use, bytes that it reads, memory that it maps."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from numerics_suite.core import machine
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects import files
from numerics_suite.subjects.fixtures import fixture_path, trusted_fixture
from numerics_suite.subjects.load import load
from numerics_suite.subjects.resolve import resolve
from numerics_suite.suite import session as suite_session
from numerics_suite.suite.session import SuiteSession

Grants = dict[str, str]


@pytest.mark.parametrize(
    ("groups", "grants", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        # The tightest of those above counts, and a path of the host that is not there counts for nothing.
        ("0::/pod/one\n", {"pod/one/cpu.max": "max 100000", "pod/cpu.max": "400000 100000"}, 4.0),
        ("0::/kubepods/x\n", {"cpu.max": "200000 100000"}, 2.0),
        # Version 1, and both beside each other.
        ("4:cpu,cpuacct:/d\n", {"cpu,cpuacct/d/cpu.cfs_quota_us": "50000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "unified/cpu.max": "300000 100000"}, 3.0),
        ("5:devices:/\n", {}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_container(tmp_path: Path, groups: str, grants: Grants, quota: float | None) -> None:
    _write_groups(tmp_path, groups, grants)
    assert machine.cpu_quota(tmp_path) == quota


def _write_groups(root: Path, groups: str, grants: Grants) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in grants.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


OF_TWO = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 300\ninactive_file 150\nactive_file 50\n"}
OF_ONE = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "850", "memory.stat": "total_inactive_file 40\n"}


@pytest.mark.parametrize(
    ("groups", "grants", "free"),
    [
        # Pages of files are used by the group, and can be had.
        ("0::/pod\n", {f"pod/{name}": value for name, value in OF_TWO.items()}, 500),
        ("0::/pod\n", {f"pod/{name}": value for name, value in {**OF_TWO, "memory.max": "max"}.items()}, 2048),
        ("0::/host/pod\n", OF_TWO, 500),
        ("4:memory:/d\n", {f"memory/d/{name}": value for name, value in OF_ONE.items()}, 90),
        (
            "4:memory:/d\n",
            {f"memory/{name}": value for name, value in {**OF_ONE, "memory.limit_in_bytes": "100"}.items()},
            0,
        ),
        ("5:devices:/\n", {}, 2048),
    ],
)
def test_memory_is_what_a_container_leaves(tmp_path: Path, groups: str, grants: Grants, free: int) -> None:
    _write_groups(tmp_path, groups, grants)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2 kB\n")
    assert machine.available_bytes(tmp_path) == free


def test_a_system_that_says_nothing_of_its_memory(tmp_path: Path) -> None:
    assert machine.available_bytes(tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.9, 2), (0.5, 1), (64.0, 8)])
def test_cores_are_those_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.core_count() == cores


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be digested."""
    seen: list[str] = []
    real = files.sha256_of

    def counted(file: Path) -> str:
        seen.append(file.name)
        return real(file)

    monkeypatch.setattr(files, "sha256_of", counted)
    monkeypatch.setattr(files, "_digests", {})
    return seen


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture_path("chatglm-tiny"), tmp_path / "copy"))


def touched(weights: Path) -> None:
    weights.touch()


def replaced(weights: Path) -> None:
    """Another file of the same size and time: only its inode and its ctime tell."""
    told = weights.stat()
    other = weights.with_name("other")
    other.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    os.utime(other, ns=(told.st_atime_ns, told.st_mtime_ns))
    other.replace(weights)


def patched(weights: Path) -> None:
    """One byte changed in its place, and the time set back."""
    told = weights.stat()
    with weights.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    os.utime(weights, ns=(told.st_atime_ns, told.st_mtime_ns))


def test_weights_are_read_once_and_code_each_time(checkpoint: Path, reads: list[str]) -> None:
    first = files.digest(checkpoint)
    assert files.digest(checkpoint) == first
    assert reads.count("model.safetensors") == 1
    code = next(checkpoint.glob("*.py"))
    assert reads.count(code.name) == 2
    told = code.stat()
    code.write_bytes(code.read_bytes()[:-1] + b" ")
    os.utime(code, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert files.digest(checkpoint) != first


@pytest.mark.parametrize("change", [touched, replaced, patched])
def test_weights_in_another_state_are_read_again(
    checkpoint: Path, reads: list[str], change: Callable[[Path], None]
) -> None:
    first = files.digest(checkpoint)
    change(checkpoint / "model.safetensors")
    again = files.digest(checkpoint)
    assert reads.count("model.safetensors") == 2
    assert (again == first) == (change is touched)


def test_a_worker_continues_the_session_with_its_plan(
    checkpoint: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker resolves nothing again and reads no weights to know them: what it needs of the plan is data."""
    settings = Settings(
        subjects=(str(checkpoint), "factory:unit.script_models:sound"), trust_remote_code=True, max_time=1e6
    )
    session = SuiteSession(settings, reproducers=checkpoint)
    session.prepare()
    assert session.deadline is not None
    session.answered = {"id": {"status": "passed"}}
    read = list(reads)
    monkeypatch.setattr(suite_session, "make_plan", None)
    worker = pickle.loads(pickle.dumps(session))
    assert worker.plan == session.plan
    for name in ("settings", "answered", "earlier", "deadline", "reproducers", "board"):
        assert getattr(worker, name) == getattr(session, name)
    assert reads == read


def test_the_code_of_a_fixture_is_trusted_for_what_it_says_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    from numerics_suite.subjects import fixtures

    root = Path(shutil.copytree(fixtures.fixtures_root(), tmp_path / "fixtures"))
    monkeypatch.setattr(fixtures, "fixtures_root", lambda: root)
    folder = root / "chatglm-tiny"
    assert trusted_fixture(folder)
    code = next(folder.glob("*.py"))
    told = code.stat()
    code.write_bytes(code.read_bytes()[:-1] + b" ")
    os.utime(code, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert not trusted_fixture(folder)
    assert fixtures.known_digest(folder) == fixtures.fixture_digest(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_weights_in_the_stored_dtype_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """So processes that load one checkpoint share its pages."""
    folder = Path(shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "copy"))
    subject = resolve(str(folder))
    assert subject.stored_dtype is not None
    model = load(subject, dtype=subject.stored_dtype, attn="sdpa", poison=True).model
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    mapped = [
        name
        for name, parameter in model.named_parameters()
        if any(begin <= parameter.data_ptr() < end for begin, end in ranges)
    ]
    assert mapped == [name for name, _ in model.named_parameters()]


def test_weights_that_do_not_fit_are_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from numerics_suite.core.errors import CheckError
    from numerics_suite.subjects import memory as loading

    subject = resolve(str(fixture_path("glm4-tiny")))
    assert subject.parameters is not None
    monkeypatch.setattr(loading, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(loading, "swap_bytes", lambda: 500)
    other = "float32" if subject.stored_dtype != "float32" else "bfloat16"
    with pytest.raises(
        CheckError, match=r"out of memory on cpu: \d+ bytes asked for the weights in \w+, 1500 bytes free"
    ):
        load(subject, dtype=other, attn="sdpa")
    assert subject.stored_dtype is not None
    load(subject, dtype=subject.stored_dtype, attn="sdpa")  # mapped: they need no memory of their own
    monkeypatch.setattr(loading, "swap_bytes", lambda: 10**9)
    load(subject, dtype=other, attn="sdpa")
