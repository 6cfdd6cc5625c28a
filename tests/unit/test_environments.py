"""Environments per version, made by the real uv from tiny wheels; the `slow` ones from real releases."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from unit.package_index import RUNNING_TORCH, RUNNING_TRANSFORMERS, only_from, write_everything, write_wheel

import numerics_suite
from numerics_suite.core.errors import BadInputError, UnsupportedError
from numerics_suite.versions import environments, installation, installers, locks, retention, self_link
from numerics_suite.versions.environments import Wanted, ensure
from numerics_suite.versions.markers import MARKER, environments_folder, locks_folder, read_marker

WITH_PACKAGE = {"PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])}


@pytest.fixture(scope="session")
def _wheels(tmp_path_factory):
    folder = write_everything(tmp_path_factory.mktemp("wheels"), "4.50.0", "4.50.1", "4.51.0rc1")
    broken = "import no_such_module_at_all"
    write_wheel(folder, "transformers", "4.60.0", code=broken)
    write_wheel(folder, "transformers", "4.61.0", requires=("not-there>=3",))
    write_wheel(folder, "transformers", "4.62.0", code="__version__ = '4.0.0'")
    write_wheel(folder, "transformers", "4.63.0", code="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    return folder


@pytest.fixture
def wheels(_wheels, tmp_path, monkeypatch):
    only_from(monkeypatch, _wheels, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environments, "_failed", {})
    monkeypatch.setattr(retention, "RELAXED", 0)
    monkeypatch.setattr(retention, "_look_again_at", 0.0)
    return _wheels


def asked(environment, program: str) -> str:
    done = subprocess.run(
        [str(environment.python), "-c", program],
        env=environment.variables(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_made_once_and_then_reused_quickly(wheels, monkeypatch):
    said: list[str] = []
    first = ensure(Wanted(transformers="4.50.0"), on_progress=said.append)
    assert first.made
    assert said == [f"making an environment: transformers 4.50.0, torch {RUNNING_TORCH}, Python {first.python_version}"]
    monkeypatch.setattr(installation, "build", lambda *_: pytest.fail("made again"))
    started = time.perf_counter()
    second = ensure(Wanted(transformers="4.50.0"), on_progress=said.append)
    assert time.perf_counter() - started < 0.5  # 0.01 s on an idle machine
    assert (second.made, second.python, len(said)) == (False, first.python, 1)


def test_what_is_in_it(wheels):
    environment = ensure(Wanted(transformers="4.50.0"))
    assert (environment.transformers, environment.torch) == ("4.50.0", f"{RUNNING_TORCH}+cpu")
    assert asked(environment, "import transformers, torch; print(transformers.__version__, torch.__version__)") == (
        f"4.50.0 {RUNNING_TORCH}+cpu"
    )
    assert environment.command("numerics_suite", "check", "--list")[1:] == ["-m", "numerics_suite", "check", "--list"]


def test_what_is_open_is_as_it_runs_here(wheels):
    environment = ensure(Wanted())
    assert environment.transformers == RUNNING_TRANSFORMERS
    assert environment.python_version == sys.version.split()[0]
    assert ensure(Wanted(transformers=RUNNING_TRANSFORMERS, torch=RUNNING_TORCH)).folder == environment.folder


def test_another_package_is_of_the_release_that_was_chosen(wheels):
    for release in ("1.2.0", "1.3.0"):
        write_wheel(wheels, "accelerate", release)
    older = ensure(Wanted(transformers="4.50.0", others=(("accelerate", "1.2.0"),)))
    program = "import accelerate, transformers; print(accelerate.__version__, transformers.__version__)"
    assert asked(older, program) == "1.2.0 4.50.0"
    newer = ensure(Wanted(transformers="4.50.0", others=(("accelerate", "1.3.0"),)))
    assert (asked(newer, program), newer.name != older.name) == ("1.3.0 4.50.0", True)
    with pytest.raises(UnsupportedError, match="accelerate"):
        ensure(Wanted(transformers="4.50.0", others=(("accelerate", "9.9.9"),)))


def test_a_pre_release_can_be_named(wheels):
    assert ensure(Wanted(transformers="4.51.0rc1")).transformers == "4.51.0rc1"


def test_numerics_suite_is_the_running_copy_and_nothing_else_comes_along(wheels):
    environment = ensure(Wanted(transformers="4.50.0"))
    program = """
        import importlib.metadata as metadata, importlib.util, numerics_suite, pathlib
        plugins = [point.value for point in metadata.entry_points(group="pytest11")]
        print(pathlib.Path(numerics_suite.__file__).resolve(), metadata.version("numerics-suite"), *plugins)
        print(importlib.util.find_spec("ruff"), importlib.util.find_spec("mypy"))
    """
    first, second = asked(environment, textwrap.dedent(program)).splitlines()
    assert first == f"{Path(numerics_suite.__file__).resolve()} {numerics_suite.__version__} numerics_suite.plugin"
    assert second == "None None"


def test_the_fixtures_are_found_through_the_link(wheels):
    environment = ensure(Wanted(transformers="4.50.0"))
    program = "from numerics_suite.subjects.fixtures import fixture_path; print(fixture_path('glm4-tiny'))"
    assert (Path(asked(environment, program)) / "config.json").is_file()


def test_where_links_are_impossible_the_package_is_copied(wheels, monkeypatch):
    monkeypatch.setattr(self_link, "_link", lambda *_: False)
    environment = ensure(Wanted(transformers="4.50.0"))
    program = "from numerics_suite.subjects.fixtures import fixture_path; print(fixture_path('glm4-tiny'))"
    found = Path(asked(environment, program))
    assert (found / "config.json").is_file()
    assert self_link.sites_folder() in found.parents
    assert environment.variables() == environment.variables()


def test_variables_of_the_running_environment_do_not_leak(wheels, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "others" / "transformers").mkdir(parents=True)
    (tmp_path / "site" / "a-1.dist-info").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(tmp_path / name) for name in ("others", "mine", "site")))
    monkeypatch.setenv("VIRTUAL_ENV", "/elsewhere")
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    monkeypatch.setenv("MINE", "1")
    variables = ensure(Wanted(transformers="4.50.0")).variables()
    assert not {"VIRTUAL_ENV", "PYTHONHOME"} & set(variables)
    assert variables["PYTHONPATH"].split(os.pathsep)[1:] == [str(tmp_path / "mine")]
    assert (variables["PYTHONNOUSERSITE"], variables["MINE"]) == ("1", "1")


def test_no_global_state_is_touched(wheels, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    ensure(Wanted(transformers="4.50.0"))
    assert not list(home.rglob("*"))


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"transformers": "4.99.0"}, "no index has transformers 4.99.0"),
        ({"transformers": "4.60.0"}, "transformers 4.60.0 cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ({"transformers": "4.61.0"}, "not-there"),
        ({"transformers": "4.62.0"}, "transformers 4.62.0 was installed and 4.0.0 is imported"),
        ({"transformers": "4.63.0"}, "the process was ended by signal 9"),
        ({"transformers": "4.1.0"}, "numerics-suite needs transformers>=4.46, and 4.1.0 is older"),
        ({"python": "3.99"}, "an environment of Python 3.99 cannot be made"),
        ({"python": "/no/python"}, "No interpreter found at path"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_line_with_its_reason(wheels, wanted, reason):
    with pytest.raises(UnsupportedError) as raised:
        ensure(Wanted(**wanted))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(environments_folder().glob("*"))


def test_a_failure_is_remembered_for_the_process(wheels, monkeypatch):
    with pytest.raises(UnsupportedError):
        ensure(Wanted(transformers="4.60.0"))
    monkeypatch.setattr(installation, "build", lambda *_: pytest.fail("tried again"))
    with pytest.raises(UnsupportedError, match="no_such_module_at_all"):
        ensure(Wanted(transformers="4.60.0"))


@pytest.mark.parametrize("version", ["newest", "4.50 ", "4.x"])
def test_a_malformed_version_is_refused(wheels, version):
    if version == "4.50 ":
        assert ensure(Wanted(transformers="4.50.0 ")).transformers == "4.50.0"
        return
    with pytest.raises(BadInputError, match="is not a version of transformers"):
        ensure(Wanted(transformers=version))


def test_a_constraint_is_respected_and_named(wheels, tmp_path, monkeypatch):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("transformers<4.50.1\n", encoding="utf-8")
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    assert ensure(Wanted(transformers="4.50.0")).transformers == "4.50.0"
    with pytest.raises(UnsupportedError, match=r"a constraint allows transformers<4\.50\.1 only"):
        ensure(Wanted(transformers="4.50.1"))


def test_other_package_sources_are_another_environment(wheels, tmp_path, monkeypatch):
    first = ensure(Wanted(transformers="4.50.0"))
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("rich<100\n", encoding="utf-8")
    monkeypatch.setenv("UV_CONSTRAINT", str(constraints))
    assert ensure(Wanted(transformers="4.50.0")).folder != first.folder


def test_no_network_is_one_line(wheels, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(UnsupportedError, match=r"no network: http://127\.0\.0\.1:9/simple/\S* cannot be reached$"):
        ensure(Wanted(transformers="4.50.0"))
    assert not environments._failed  # it may be back in a moment


def test_uv_missing_says_how_to_install_it(wheels, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(BadInputError, match="pip install uv"):
        ensure(Wanted(transformers="4.50.0"))


def test_a_full_disk_is_one_line_and_nothing_stays(wheels, monkeypatch):
    complaint = "error: Failed to install: a.whl\n  Caused by: No space left on device (os error 28)"
    real = installers.run_quietly
    monkeypatch.setattr(
        installers,
        "run_quietly",
        lambda command, *rest: (2, "", complaint) if "install" in command else real(command, *rest),
    )
    with pytest.raises(BadInputError, match=r"^the disk is full: transformers 4\.50\.0"):
        ensure(Wanted(transformers="4.50.0"))
    assert not list(environments_folder().glob("*"))


def test_a_cache_that_cannot_be_written_is_one_line(wheels, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        BadInputError, match=r"^cannot make an environment in .*NUMERICS_SUITE_CACHE names another folder"
    ):
        ensure(Wanted(transformers="4.50.0"))


@pytest.mark.parametrize("damage", ["marker", "half", "other-layout", "python"])
def test_a_damaged_environment_is_made_anew(wheels, damage):
    environment = ensure(Wanted(transformers="4.50.0"))
    marker = environment.folder / MARKER
    if damage == "marker":
        marker.unlink()
    elif damage == "half":
        marker.write_text(marker.read_text(encoding="utf-8")[:100], encoding="utf-8")
    elif damage == "other-layout":
        marker.write_text(
            json.dumps({**json.loads(marker.read_text(encoding="utf-8")), "layout": -1}), encoding="utf-8"
        )
    else:
        environment.python.unlink()
    again = ensure(Wanted(transformers="4.50.0"))
    assert again.made
    assert asked(again, "import transformers; print(transformers.__version__)") == "4.50.0"
    assert len([path for path in again.folder.iterdir() if path.is_dir()]) == 1


def test_an_interruption_leaves_nothing(wheels, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(installation, "import_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure(Wanted(transformers="4.50.0"))
    assert not list(environments_folder().glob("*"))


MAKER = """
import sys
from numerics_suite.versions.environments import Wanted, ensure
environment = ensure(Wanted(transformers="4.50.0"))
print(environment.made, environment.python, flush=True)
sys.stdin.read()
"""


def start_maker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER], text=True, env={**os.environ, **WITH_PACKAGE},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_makers_at_once_make_one(wheels):
    makers = [start_maker() for _ in range(4)]
    answers = [maker.communicate("")[0].split() for maker in makers]
    assert sorted(made for made, _ in answers) == ["False", "False", "False", "True"]
    assert len({python for _, python in answers}) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
@pytest.mark.slow
def test_makers_killed_at_random_moments_leave_nothing_that_is_used(wheels):
    chance = random.Random(6)
    for _ in range(12):
        maker = start_maker()
        time.sleep(chance.uniform(0.05, 1.2))
        maker.kill()
        maker.wait()
        maker.communicate()
        for folder in environments_folder().glob("*"):
            marker = read_marker(folder)
            if marker is not None:  # then it is whole
                python = folder / marker["python"]
                assert subprocess.run([python, "-c", "import torch, transformers, rich"], check=False).returncode == 0
                retention.remove(next(entry for entry in retention.entries() if entry.path == folder))
    environment = ensure(Wanted(transformers="4.50.0"))
    assert asked(environment, "import torch, transformers, rich; print(transformers.__version__)") == "4.50.0"


def test_over_the_limit_those_used_longest_ago_go(wheels, monkeypatch):
    monkeypatch.setenv(retention.LIMIT_VARIABLE, "10 GB")
    old, newer = (ensure(Wanted(transformers=version)) for version in ("4.50.0", "4.50.1"))
    os.utime(old.folder / MARKER, (1, 1))
    old.release()
    newer.release()
    most = retention.disk_use([entry for entry in retention.entries() if entry.kind == "environment"])
    monkeypatch.setenv(retention.LIMIT_VARIABLE, str(most))
    said: list[str] = []
    third = ensure(Wanted(transformers=RUNNING_TRANSFORMERS), on_progress=said.append)
    assert not old.folder.exists()
    assert newer.folder.exists()
    assert third.folder.exists()
    assert said[-1].startswith(f"removed {old.name} from the cache, over its limit")


def test_what_a_process_uses_is_not_removed(wheels, monkeypatch):
    maker = start_maker()
    assert maker.stdout.readline().startswith("True")
    (entry,) = retention.entries()
    monkeypatch.setenv(retention.LIMIT_VARIABLE, "1")
    retention.make_room(lambda _: None)
    assert not retention.remove(entry)
    assert entry.path.is_dir()
    maker.kill()
    maker.communicate()
    assert retention.remove(entry)
    assert not entry.path.exists()
    assert not list(locks_folder().glob("*.use-*"))


def test_shared_files_count_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / "environments" / name).mkdir(parents=True)
    shared = tmp_path / "environments" / "a" / "shared"
    shared.write_bytes(os.urandom(1 << 20))
    os.link(shared, tmp_path / "environments" / "b" / "shared")
    (tmp_path / "environments" / "b" / "own").write_bytes(os.urandom(1 << 18))
    found = {entry.name: entry for entry in retention.entries()}
    assert retention.disk_use(list(found.values())) == (1 << 20) + (1 << 18)
    assert (found["a"].bytes, found["a"].own_bytes) == (1 << 20, 0)
    assert (found["b"].bytes, found["b"].own_bytes) == ((1 << 20) + (1 << 18), 1 << 18)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20 GB", 2 * 10**10), ("1.5G", 15 * 10**8), ("500mb", 5 * 10**8), ("7", 7), ("2TiB", 2 * 10**12)],
)
def test_sizes(text, size):
    assert retention.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1 PB", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    with pytest.raises(BadInputError, match="is no size"):
        retention.parse_size(text)
    monkeypatch.setenv(retention.LIMIT_VARIABLE, text or "x")
    with pytest.raises(BadInputError, match=r"^NUMERICS_SUITE_CACHE_LIMIT: "):
        retention.size_limit()


def test_the_files_are_not_looked_at_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path))
    monkeypatch.setattr(retention, "_look_again_at", 0.0)
    monkeypatch.setattr(retention, "RELAXED", 10**9)
    retention.make_room(lambda _: None)
    monkeypatch.setattr(retention, "entries", lambda: pytest.fail("looked again"))
    retention.make_room(lambda _: None)


def test_two_users_of_one_environment(tmp_path):
    uses = [locks.Use(tmp_path, "e") for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 1
    uses[0].end()
    uses[0].end()
    assert locks.is_used(tmp_path, "e")
    uses[1].end()
    assert not locks.is_used(tmp_path, "e")


UV_SAYS = [
    (
        "  × No solution found when resolving dependencies:\n  ╰─▶ Because there is no version of transformers==4.99.0 and you require\n"
        "      transformers==4.99.0, we can conclude that your requirements are unsatisfiable.\n",
        "no index has transformers 4.99.0",
    ),
    (
        "error: No solution found when resolving dependencies\n  cause: Because torch==1.0.0 has no wheels with a matching Python ABI tag (e.g., `cp311`) "
        "and you require torch==1.0.0, we can conclude that your requirements are unsatisfiable.\n\nhint: You require CPython 3.11 (`cp311`), "
        "but we only found wheels for `torch` (v1.0.0) with the following Python ABI tags: `cp27m`\n",
        "no wheel of torch 1.0.0 for Python 3.11",
    ),
    (
        "warning: x\nerror: Failed to build `tokenizers==0.8.0rc4`\n  cause: The build backend returned an error\n\n         [stderr]\n         error: no Rust\n\n"
        "hint: `tokenizers` (v0.8.0rc4) was included because `transformers` (v3.0.0) depends on `tokenizers`\n",
        "tokenizers 0.8.0rc4, which transformers 3.0.0 needs, has no wheel here and cannot be built",
    ),
    ("error: something new\n", "something new"),
    ("", "uv gives no reason"),
]  # fmt: skip


@pytest.mark.parametrize(("complaint", "reason"), UV_SAYS)
def test_the_reason_out_of_what_uv_says(complaint, reason):
    assert installers.why(complaint) == reason


BACKEND = """
import zipfile
def build_wheel(directory, *_):
    name = "transformers-9.0.0.dev0-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.write("src/__init__.py", "transformers/__init__.py")
        wheel.writestr("transformers-9.0.0.dev0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: transformers\\nVersion: 9.0.0.dev0\\n")
        wheel.writestr("transformers-9.0.0.dev0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("transformers-9.0.0.dev0.dist-info/RECORD", "")
    return name
"""


def test_transformers_from_a_commit_and_not_from_the_working_tree(wheels, tmp_path):
    clone = tmp_path / "clone"
    (clone / "src").mkdir(parents=True)
    (clone / "backend.py").write_text(BACKEND, encoding="utf-8")
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (clone / "pyproject.toml").write_text(
        project + '[project]\nname = "transformers"\nversion = "9.0.0.dev0"\n', encoding="utf-8"
    )

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(clone), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    commits = []
    for number in (1, 2):
        (clone / "src" / "__init__.py").write_text(f"__version__ = '9.0.0.dev0'\nNUMBER = {number}\n", encoding="utf-8")
        git("add", ".")
        git("commit", "-q", "-m", str(number))
        commits.append(git("rev-parse", "HEAD"))
    (clone / "src" / "__init__.py").write_text("NUMBER = 3", encoding="utf-8")
    for number, commit in enumerate(commits, 1):
        environment = ensure(Wanted(transformers_source=clone, transformers_commit=commit))
        assert (environment.made, environment.transformers) == (True, "9.0.0.dev0")
        assert asked(environment, "import transformers; print(transformers.NUMBER)") == str(number)
    assert not ensure(Wanted(transformers_source=clone, transformers_commit=commits[0])).made
    with pytest.raises(BadInputError, match=r"commit nonsense of .* cannot be read"):
        ensure(Wanted(transformers_source=clone, transformers_commit="nonsense"))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.51.3", "5.8.1"])
def test_a_real_release_checks_a_fixture(version, tmp_path):
    """From the user's own package sources, into the user's own cache."""
    environment = ensure(Wanted(transformers=version))
    command = environment.command(
        "numerics_suite",
        "check",
        "fixture:glm4-tiny",
        "--precision",
        "fp32",
        "--attn",
        "sdpa",
        "--checks",
        "load.*",
        "-n",
        "0",
        "--json",
        "-",
    )
    done = subprocess.run(
        command, env=environment.variables(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    result = json.loads(done.stdout)
    assert (done.returncode, result["verdict"]) == (0, "pass")
    assert result["environment"]["packages"]["transformers"] == version
