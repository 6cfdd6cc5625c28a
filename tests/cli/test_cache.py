"""`numerics-suite cache`: what is kept is listed with its size, and goes when it is told to, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import numerics_suite
from numerics_suite.cli.main import main
from numerics_suite.versions import locks
from numerics_suite.versions.markers import LAYOUT, MARKER, locks_folder

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(folder))
    monkeypatch.delenv("NUMERICS_SUITE_CACHE_LIMIT", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def make_entry(cache: Path, name: str, *, days: float = 0, size: int = 1 << 16) -> Path:
    folder = cache / "environments" / name
    (folder / "attempt" / "bin").mkdir(parents=True)
    (folder / "attempt" / "bin" / "python").write_bytes(os.urandom(size))
    versions = {"transformers": "4.50.0", "torch": "2.6.0+cpu", "python": "3.11.7"}
    content = {"layout": LAYOUT, "recipe": {}, "python": "attempt/bin/python", "versions": versions, "made_at": ""}
    (folder / MARKER).write_text(json.dumps(content), encoding="utf-8")
    then = time.time() - days * DAY
    os.utime(folder / MARKER, (then, then))
    return folder


def make_fixture(cache: Path, name: str = "smollm2-glm-1-1") -> Path:
    folder = cache / "fixtures" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["cache", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *arguments: str) -> str:
    status, out, err = ended(capsys, *arguments)
    assert (status, out, err.count("\n")) == (4, "", 1)
    return err.removeprefix("numerics-suite: error: ").strip()


def test_an_empty_cache(capsys, cache):
    assert ended(capsys, "list") == (0, f"0 entries, 0 B (shared files once) in {cache}; limit 20.0 GB\n", "")
    assert ended(capsys, "list", "--quiet") == (0, "", "")
    assert ended(capsys, "clean", "--all") == (0, "0 removed, 0 B of their own\n", "")


def test_list_says_what_how_large_and_when(capsys, cache, monkeypatch):
    monkeypatch.setenv("NUMERICS_SUITE_CACHE_LIMIT", "5 GB")
    make_entry(cache, "old", days=3)
    make_entry(cache, "new")
    make_fixture(cache)
    (cache / "environments" / "half" / "attempt").mkdir(parents=True)
    status, out, err = ended(capsys, "list")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "3 days ago" in lines["old"]
    assert "environment: transformers 4.50.0, torch 2.6.0+cpu, python 3.11.7" in lines["old"]
    assert "just now" in lines["new"]
    assert lines["half"].endswith("environment: unfinished")
    assert lines["smollm2-glm-1-1"].endswith("fixture: smollm2-glm-1-1")
    assert out.splitlines()[-1].startswith("4 entries, ")
    assert out.endswith("limit 5.0 GB\n")


def test_list_as_json(capsys, cache):
    folder = make_entry(cache, "old", days=3)
    os.link(folder / "attempt" / "bin" / "python", make_entry(cache, "new") / "shared")
    status, out, err = ended(capsys, "list", "--json", "-")
    answer = json.loads(out)
    assert (status, err, answer["command"], answer["limit_bytes"]) == (0, "", "cache", 20 * 10**9)
    assert answer["bytes"] < sum(entry["bytes"] for entry in answer["entries"])
    first, second = answer["entries"]
    assert (first["name"], first["kind"], first["finished"]) == ("new", "environment", True)
    assert second["own_bytes"] < 1 << 16 <= second["bytes"]
    assert ended(capsys, "list", "--json", "answer.json")[0] == 0
    assert json.loads(Path("answer.json").read_text(encoding="utf-8"))["entries"] == answer["entries"]


def test_clean_removes_what_is_named(capsys, cache):
    gone, stays = make_entry(cache, "py3.11-tf4.50"), make_entry(cache, "py3.11-tf5.8")
    status, out, err = ended(capsys, "clean", "py3.11-tf4.*", "--yes")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "removed py3.11-tf4.50"
    assert not gone.exists()
    assert stays.exists()


def test_clean_removes_what_was_not_used(capsys, cache):
    gone, stays = make_entry(cache, "old", days=31), make_entry(cache, "new", days=29)
    status, out, _ = ended(capsys, "clean", "--unused", "30", "--yes", "--json", "-")
    answer = json.loads(out)
    assert (status, [entry["name"] for entry in answer["removed"]], answer["kept"]) == (0, ["old"], [])
    assert not gone.exists()
    assert stays.exists()


def test_clean_down_to_a_limit_takes_those_used_longest_ago(capsys, cache):
    folders = [make_entry(cache, f"e{days}", days=days, size=1 << 20) for days in (3, 2, 1)]
    fixture = make_fixture(cache)
    assert ended(capsys, "clean", "--limit", "2.5MB", "--yes", "--quiet") == (0, "", "")
    assert [folder.exists() for folder in (*folders, fixture)] == [False, True, True, True]


def test_clean_all_takes_broken_ones_too(capsys, cache):
    make_entry(cache, "whole")
    (make_entry(cache, "torn") / MARKER).write_text('{"layout"', encoding="utf-8")
    (cache / "environments" / "half" / "attempt").mkdir(parents=True)
    make_fixture(cache)
    make_fixture(cache, ".smollm2-glm-unfinished")
    assert ended(capsys, "clean", "--all", "--yes")[0] == 0
    assert json.loads(ended(capsys, "list", "--json", "-")[1])["entries"] == []


def test_what_a_process_uses_stays_and_is_said(capsys, cache):
    folder = make_entry(cache, "busy")
    use = locks.Use(locks_folder(), "busy")
    assert ended(capsys, "clean", "--all", "--yes", "--quiet") == (0, "kept busy: a process uses it\n", "")
    assert folder.exists()
    use.end()
    assert ended(capsys, "clean", "--all", "--yes", "--quiet") == (0, "", "")
    assert not folder.exists()


def test_what_a_process_makes_stays(capsys, cache):
    folder = make_entry(cache, "busy")
    with locks.alone(locks_folder(), "busy"):
        assert ended(capsys, "clean", "--all", "--yes")[1].startswith("kept busy")
    assert folder.exists()


def test_without_a_terminal_yes_is_needed(capsys, cache, monkeypatch):
    folder = make_entry(cache, "one")
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(capsys, "clean", "--all") == "clean would remove one; add --yes"
    assert folder.exists()


@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("n\n", True), ("", True)])
def test_a_person_is_asked(capsys, cache, monkeypatch, answer, stays):
    class Terminal:
        def isatty(self):
            return True

        def readline(self):
            return answer

    folder = make_entry(cache, "one")
    monkeypatch.setattr(sys, "stdin", Terminal())
    status, _, err = ended(capsys, "clean", "one")
    assert "remove one? [y/N]" in err
    assert (status, folder.exists()) == (4 if stays else 0, stays)


def test_nothing_outside_the_cache_is_removed(capsys, cache, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (cache / "environments").mkdir(parents=True)
    (cache / "environments" / "link").symlink_to(outside)
    make_entry(cache, "one")
    for name in ("link", "..", "../../precious", str(outside)):
        assert refused(capsys, "clean", name, "--yes").startswith(f"the cache has no '{name}'")
    assert ended(capsys, "clean", "--all", "--yes")[0] == 0
    assert outside.is_dir()


def test_a_link_inside_an_entry_is_removed_and_not_followed(capsys, cache, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("", encoding="utf-8")
    (make_entry(cache, "one") / "link").symlink_to(tmp_path / "precious")
    assert ended(capsys, "clean", "--all", "--yes")[0] == 0
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cache: no action given (known: list, clean)"),
        (["lst"], "unknown action 'lst'; did you mean 'list'? (known: list, clean)"),
        (["list", "x"], "list takes no names; it lists everything"),
        (["list", "--all"], "list takes no --all; it lists everything"),
        (["clean"], "clean: name entries, or give one of --all, --unused DAYS, --limit SIZE; numerics-suite cache list names them"),
        (["clean", "--all", "x"], "clean: name entries, or give one of --all, --unused DAYS, --limit SIZE; numerics-suite cache list names them"),
        (["clean", "--unused", "soon"], "--unused: 'soon' is no number of days"),
        (["clean", "--unused", "nan"], "--unused: 'nan' is no number of days"),
        (["clean", "--unused", "-1"], "--unused: '-1' is no number of days"),
        (["clean", "--limit", "much"], "'much' is no size: give one such as 20 GB or 500 MB"),
        (["clean", "onf"], "the cache has no 'onf'; did you mean 'one'?"),
        (["clean", "--al"], "unknown option '--al'; did you mean '--all'?"),
        (["list", "--json", "/no/such/folder/x.json"], "--json: cannot write /no/such/folder/x.json: no folder /no/such/folder"),
    ],
)  # fmt: skip
def test_bad_usage(capsys, cache, arguments, message):
    folder = make_entry(cache, "one")
    assert refused(capsys, *arguments) == message
    assert folder.exists()


def test_a_bad_limit_is_named(capsys, monkeypatch):
    monkeypatch.setenv("NUMERICS_SUITE_CACHE_LIMIT", "plenty")
    assert (
        refused(capsys, "list") == "NUMERICS_SUITE_CACHE_LIMIT: 'plenty' is no size: give one such as 20 GB or 500 MB"
    )


def test_as_a_process(cache):
    make_entry(cache, "one")
    done = subprocess.run(
        [sys.executable, "-m", "numerics_suite", "cache", "clean", "--all"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "numerics-suite: error: clean would remove one; add --yes\n"
