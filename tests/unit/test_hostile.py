"""Whatever a results file holds is data in every printer: it is shown, and changes neither structure nor a terminal's state."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt
from unit.report_samples import bisection, comparison, regression
from unit.sample_documents import HOSTILE
from unit.sample_run import sample_run

from numerics_suite.baselines.records import Recorded
from numerics_suite.cli import main as command
from numerics_suite.cli import supervisor
from numerics_suite.cli.main import main
from numerics_suite.cli.output import say
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.findings import finding_to_json
from numerics_suite.core.numbers import jsonable
from numerics_suite.diagnosis.scripts import parts
from numerics_suite.diagnosis.scripts.scene import ScriptContext
from numerics_suite.reports.documents import Documents, read_documents
from numerics_suite.reports.github import annotation_lines
from numerics_suite.reports.matrix import matrix_to_json, table_lines
from numerics_suite.reports.recording import RecordTerminal
from numerics_suite.reports.results import to_json
from numerics_suite.reports.terminal import Terminal
from numerics_suite.reports.text import finding_text, summary_lines
from numerics_suite.suite.items import _shown

BENIGN = "word"
WORDS = {
    "everything": HOSTILE,
    "commands": "::error::x\n::add-mask::y\r\n##[error]z\n::stop-commands::t",
    "terminal": "\x1b[2J\x1b]0;title\x07\x1b[31m\x9b2J\x08\x08\x7f\x00",
    "directions": "\u202e\u2066\u200f\u2028\u2029\u0085\ufeff\u200b",
    "markdown": "# a\n- b\n1. c\n```\nd\n```\n| e | f |\n<!-- numerics-suite -->\n[g](http://h) ![i](j) <http://k> https://l.org @m #1 \\",
    "html": "</script></style></pre></td><script>alert(1)</script><img src=x onerror=alert(1)>&lt;\"'`{{7*7}}${1}",
    "xml": "]]><testcase name='x'/><!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]>&y;\ufffe\uffff\ud800",
    "long": "x" * 5_000 + " " + "y " * 2_000,
}


def documents(folder: Path, word: str) -> Documents:
    """A run, a matrix, a comparison and a search, in which the word takes the place of every text that a reader lets pass."""
    matrix = matrix_to_json(regression(with_runs=False).matrices[0].result)
    for cell in matrix["cells"]:
        cell["results"] = None
    search = bisection()
    found = {"finding": finding_to_json(search.finding)} if search.finding else {}
    contents = [to_json(sample_run()), matrix, jsonable(comparison().content), jsonable({**search.content, **found})]
    for content in contents:
        plain = json.loads(json.dumps(content))
        path = folder / f"{plain['command']}.json"
        let_pass: dict[tuple[str, ...], bool] = {}  # the tool's own words, such as a status, are refused by the reader
        for place, holder, key in list(texts(plain)):
            before, holder[key] = holder[key], word
            if place not in let_pass:
                let_pass[place] = _readable(path, plain)
            if not let_pass[place]:
                holder[key] = before
        for holder, key in [*names(plain)]:
            holder[word] = holder.pop(key)
        assert _readable(path, plain)
        assert json.dumps(plain).count(json.dumps(word)) > 20
    return read_documents(sorted(folder.glob("*.json")))


def texts(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every text: the names on the way to it, what holds it, and where."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        place = (*at, key) if isinstance(key, str) else at
        if isinstance(inner, str):
            yield place, value, key
        else:
            yield from texts(inner, place)


def names(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """One key of every table whose keys are a user's, a package's or a measurement's."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"measurements", "evidence", "packages", "settings"} and isinstance(inner, dict) and inner:
                yield inner, list(inner)[-1]
            else:
                yield from names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from names(inner)


def _readable(path: Path, content: Any) -> bool:
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        read_documents([path])
    except BadInputError:
        return False
    return True


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and what addresses a browser would follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.targets = list[tuple[str, ...]](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attributes)))
        self.targets |= {str(value) for name, value in attributes if name in {"href", "src"} and value}


def of_terminal(found: Documents) -> str:
    """What `check`, `matrix`, `bisect` and the pytest plugin print, on something that is no terminal."""
    stream = io.StringIO()
    terminal = Terminal(stream=stream)
    for run in found.runs:
        for done, result in enumerate(run.result.checks):
            terminal.progress(done, len(run.result.checks), result)
        terminal.rehearsals(run.result.rehearsals)
        terminal.summary(run.result)
        lines = [*summary_lines(run.result)]
        lines += [line for result in run.result.checks if result.finding for line in finding_text(result).splitlines()]
        stream.write("\n".join(lines) + "\n")
    for matrix in found.matrices:
        terminal.show(table_lines(matrix.result, 80))
    return stream.getvalue()


def shown_and_not_obeyed(text: str) -> None:
    """Neither a terminal nor GitHub's runner does anything but show these lines."""
    for line in text.split("\n"):
        assert line.isprintable(), repr(line[:200])
        assert not line.lstrip().startswith("::"), line[:200]
        assert "##[" not in line, line[:200]


def structure_of_markdown(text: str) -> set[tuple[str, ...]]:
    """The kinds of tags that the Markdown becomes, as GitHub would let them through."""
    reader = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    page = Tags(reader.render(text))
    assert not page.targets
    return set(page.tags)


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Documents, Path]:
    folder = tmp_path_factory.mktemp("benign")
    found = documents(folder, BENIGN)
    return found, report(folder)


def report(folder: Path) -> Path:
    """The report of the folder's documents, made by the command."""
    out = folder / "out"
    assert main(["report", *map(str, sorted(folder.glob("*.json"))), "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(params=list(WORDS))
def word(request: pytest.FixtureRequest) -> str:
    return WORDS[request.param]


def test_every_printer_shows_a_hostile_document_and_obeys_nothing_in_it(
    tmp_path: Path, word: str, benign: tuple[Documents, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    found = documents(tmp_path, word)
    out, plain = report(tmp_path), benign[1]

    def both(name: str, read: Callable[[str], Any]) -> tuple[Any, Any]:
        return tuple(read((folder / name).read_text(encoding="utf-8")) for folder in (out, plain))  # type: ignore[return-value]

    shown_and_not_obeyed(of_terminal(found))
    for line in annotation_lines(found):
        assert line.isprintable()
        assert re.fullmatch(r"::(error|notice) [^:\n]*::.*", line), line[:200]
    hostile, harmless = both("index.html", Tags)
    assert set(hostile.tags) <= set(harmless.tags)
    assert hostile.tags.count(("script",)) == harmless.tags.count(("script",))
    assert not [target for target in hostile.targets if not target.startswith(("#", "data:"))]
    for name in ("summary.md", "comment.md"):
        text = (out / name).read_text(encoding="utf-8")
        assert all(line.isprintable() for line in text.split("\n"))
        running = re.sub(r"(?s)^(`{3,}).*?^\1$|`[^`\n]*`|<code>.*?</code>|&#\w+;", " ", text, flags=re.MULTILINE)
        assert running.count("<!--") == (name == "comment.md")
        assert not re.search(r"(?<!\w)[@#](?=\w)", running), name
        hostile, harmless = both(name, structure_of_markdown)
        # What has no room is counted in a line of its own, in italics.
        counted = {("em",)} if "more than there is room for" in text else set()
        assert hostile <= harmless | counted | {("code",), ("p",), ("br",)}
    hostile, harmless = both(
        "junit.xml",
        lambda text: [(one.tag, *sorted(one.attrib)) for one in ET.fromstring(text.encode()).iter()],
    )
    assert hostile == harmless
    sarif = json.loads((out / "results.sarif").read_text(encoding="utf-8"))
    for _, holder, key in texts(sarif):
        assert all(line.isprintable() for line in holder[key].split("\n")), holder[key][:200]
        assert key not in {"text", "markdown"} or not re.search(r"(?<!\\)\]\(", holder[key])  # would be a link


def test_what_an_exception_says_is_shown_and_not_obeyed(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = _shown(f"load.finite/glm/bf16: error: {word}\nTraceback\n{word}")
    cell = sample_run().checks[0].cell
    RecordTerminal(stream=io.StringIO(), quiet=False).cell(Recorded(done=1, total=1, cell=cell, error=word), None)
    supervisor._tell(3, word)
    command._end(3, word)
    say(f"note: {word}")
    said = capsys.readouterr()
    shown_and_not_obeyed(f"{printed}\n{said.out}{said.err}")


def test_a_name_is_no_code_in_a_reproducer(word: str) -> None:
    quote = 3 * '"'
    for title in (word, f"{quote}\nimport os\n{quote}", f"\\{quote}", f"{word}{quote}+x+{quote}"):
        cell = sample_run().checks[0].cell
        found = SimpleNamespace(title=title, cause="unknown", module='a{__import__("os")}"; import os #')
        scene: Any = SimpleNamespace(
            finding=found, source="config", check="load.finite", context=SimpleNamespace(cell=cell)
        )
        (only,) = ast.parse("\n".join(parts._opening(scene))).body
        assert isinstance(only, ast.Expr)
        assert isinstance(only.value, ast.Constant)
        assert not set(ScriptContext.module.fget(scene)) & set("{}\"'\\")  # type: ignore[attr-defined]
