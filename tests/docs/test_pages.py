"""Every command and file on README and docs, executed in the order in which a reader meets it, and held to what is shown."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import preloaded
import pytest
import yaml
from docs.outputs import difference
from docs.pages import EXIT, LINES, NOT_RUN, ROOT, Block, blocks_of, commands, page_paths
from docs.prepared import FROM_NOTHING, NAMES, plain_settings, prepare, shortened
from docs.shell import Done, Shell

from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.sources import read_pyproject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [page for page in page_paths() if not page.endswith(".zh.md")]
"""test_translations.py holds the others to the same blocks."""

RUN = frozenset({"bash", "python"})
WRITTEN = frozenset({"toml", "yaml", "json", "jsonl", "ini"})

pytestmark = [pytest.mark.docs, pytest.mark.xdist_group("docs")]


@pytest.fixture(scope="module")
def programs():
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs fork and pidfd_open")
    if int(version("transformers").partition(".")[0]) < 5:
        pytest.skip("the pages show what transformers 5 prints")
    return preloaded.programs()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_a_page_does_what_it_says(page, programs, tmp_path):
    follow(page, programs, tmp_path)


def follow(page: str, programs: Path, tmp_path: Path) -> None:
    """Do what a reader of the page does, in an empty folder or in one with what every reader has."""
    folder = tmp_path / "project"
    folder.mkdir()
    prepare(page, folder)
    shell = Shell(folder=folder, programs=programs)
    done: Done | None = None
    for block, following in zip_longest(blocks_of(page), blocks_of(page)[1:]):
        if shows_output(block):
            assert done is not None, f"{block.place}: an output that belongs to no command: mark why it is not compared"
            missing = difference(block.text, done.printed)
            assert missing is None, f"{block.place}: not printed: {missing}\n\nprinted:\n{done.printed}"
        elif block.language != "text":
            with plain_settings(folder) if following and shows_output(following) else nullcontext():
                done = _done(block, shell)


def shows_output(block: Block) -> bool:
    """Whether it is what the block above it prints."""
    return block.language == "text" and NOT_RUN not in block.marks


def _done(block: Block, shell: Shell) -> Done | None:
    """Run, write or check one block; gives what it printed, None for what prints nothing."""
    if block.language in WRITTEN:
        _checked(block, shell.folder)
    if block.title and not quotes(block) and NOT_RUN not in block.marks:
        place = shell.folder / block.title
        place.parent.mkdir(parents=True, exist_ok=True)
        short = block.title == "pyproject.toml" and block.page not in FROM_NOTHING
        place.write_text(shortened(block.text) if short else block.text, encoding="utf-8")
    elif block.language == "bash" and block.runnable():
        if not block.status:
            return _held(block, shell.run(block.runnable()))
        # The status is the last command's; one that fails before it would pass for it.
        *before, last = commands(block.runnable())
        for command in before:
            _held(replace(block, marks={}), shell.run(command))
        return _held(block, shell.run(last))
    elif block.language == "python" and not block.title and NOT_RUN not in block.marks:
        (shell.folder / "block.py").write_text(NAMES + block.text, encoding="utf-8")
        return _held(block, shell.run("python block.py"))
    return None


def _held(block: Block, done: Done) -> Done:
    assert done.status == block.status, f"{block.place}: exit {done.status}, not {block.status}\n{done.printed}"
    return done


def _checked(block: Block, folder: Path) -> None:
    """That a file on a page can be read, and that our section in it can be used."""
    if block.language == "toml":
        tomllib.loads(block.text)
        file = folder / "section.toml"
        file.write_text(block.text, encoding="utf-8")
        read_pyproject(file)
        file.unlink()
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "ini":
        configparser.ConfigParser(interpolation=None).read_string(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "jsonl":
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


# --- the runner itself can fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```bash\ntrue\nfalse\necho after\n```\n", "exit 1, not 0"),
        ("<!-- exit: 1 -->\n```bash\ntrue\n```\n", "exit 0, not 1"),
        ("<!-- exit: 1 -->\n```bash\nfalse\nexit 1\n```\n", "exit 1, not 0"),
        ("```bash\necho one two\n```\n\n```text\none three\n```\n", "not printed: one three"),
        ("```text\none\n```\n", "belongs to no command"),
        ("```bash\nnumerics-suite check --precison bf16\n```\n", "exit 4, not 0"),
        ('```python title="a.py"\nraise SystemExit(3)\n```\n\n```bash\npython a.py\n```\n', "exit 3, not 0"),
        ('```toml\n[tool.numerics-suite]\nprecison = ["bf16"]\n```\n', "unknown key"),
        ("```python\nmodel.nothing()\n```\n", "exit 1, not 0"),
    ],
)
def test_a_page_that_is_wrong_is_found(text, complaint, programs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises((AssertionError, BadInputError), match=complaint):
        follow(str(page), programs, tmp_path)


def test_a_page_that_is_right_passes(programs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\necho one\necho two 3.00\n```\n\n```text\n…\ntwo 3.1\n```\n", encoding="utf-8")
    follow(str(page), programs, tmp_path)


# --- what is not run says why ------------------------------------------------------------------------------------

ALL = [block for page in PAGES for block in blocks_of(page)]


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.place)
def test_a_block_is_run_or_says_why_not(block):
    assert block.language in RUN | WRITTEN | {"text"}, (
        "name its language: bash, python, text, toml, yaml, json, jsonl, ini"
    )
    assert set(block.marks) <= {NOT_RUN, EXIT, *(f"{LINES}{text}" for text in block.left_out)}, block.marks
    for key, reason in block.marks.items():
        assert len(reason.split()) >= 3 or key == EXIT, f"'{key}' needs a reason"
    for text in block.left_out:
        assert text in block.text, f"no line holds {text}: the mark is stale"


@pytest.mark.parametrize("page", PAGES)
def test_a_script_that_is_written_is_run_by_a_later_command(page):
    blocks = blocks_of(page)
    for number, block in enumerate(blocks):
        if block.language == "python" and block.title and NOT_RUN not in block.marks and not quotes(block):
            assert any(
                Path(block.title).name in later.runnable() for later in blocks[number:] if later.language == "bash"
            )


def quotes(block: Block) -> bool:
    """Whether it is a part of a file of this repository, which its title names."""
    return "/" in block.title and (ROOT / block.title).is_file()


@pytest.mark.parametrize("block", [block for block in ALL if quotes(block)], ids=lambda block: block.place)
def test_a_part_of_a_file_is_what_stands_in_the_file(block):
    def lines(text: str) -> str:
        return "\n".join(line.strip() for line in text.splitlines())  # a method stands at the margin of its block

    assert lines(block.text) in lines((ROOT / block.title).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_no_block_hides_in_an_indent(page):
    """An indented fence is another thing to GitHub than to the site, and may escape both of them and us."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if line.startswith((" ", "\t")) and "```" in line]


NOT_EXECUTED = [
    (block, command)
    for block in ALL
    if block.language == "bash"
    for command in commands(block.text)
    if block.leaves_out(command) and "numerics-suite" in command
]


@pytest.mark.parametrize(
    ("block", "command"), NOT_EXECUTED, ids=lambda value: value.place if isinstance(value, Block) else ""
)
def test_a_command_that_is_not_run_is_one_that_the_tool_takes(block, command):
    words = [Path(word).name for word in shlex.split(command, comments=True)]
    if words[-1].partition("[")[0] == "numerics-suite":
        return  # the name of the package, for an installer
    name, *arguments = words[words.index("numerics-suite") + 1 :]
    if name == "watch":
        script = next(number for number, word in enumerate(arguments) if word.endswith(".py"))
        arguments = arguments[:script]
    importlib.import_module(f"numerics_suite.cli.{name}").make_parser().parse(arguments)


def test_the_parsing_of_commands_that_are_not_run_can_fail():
    with pytest.raises(BadInputError, match="unknown option '--precison'"):
        importlib.import_module("numerics_suite.cli.check").make_parser().parse(["--precison", "bf16"])
