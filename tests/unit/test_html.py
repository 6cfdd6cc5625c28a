"""The HTML report as text: what it says, that no text of a results file leaves its place, and that it stays small."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from unit import report_samples
from unit.sample_run import sample_run

import numerics_suite
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import RunResult
from numerics_suite.core.versions import MatrixResult
from numerics_suite.reports.documents import CheckRun, Documents, Matrix
from numerics_suite.reports.html import render, write_html
from numerics_suite.reports.html.assets import STATIC
from numerics_suite.reports.view.reproducers import MARK

LARGEST = 8_000_000
"""Bytes of a page of 5,000 cells."""

VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})


class Page(HTMLParser):
    """The page as elements: texts, attributes, ids, whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def data(self, name: str) -> Any:
        return next(json.loads(text) for attributes, text in self.scripts if attributes.get("id") == name)

    def count(self, tag: str, cls: str = "") -> int:
        return sum(
            (name == tag and cls in (attributes.get("class") or "").split()) or (name == tag and not cls)
            for name, attributes in self.tags
        )


def one(run: RunResult, label: str = "results") -> Documents:
    return Documents(runs=(CheckRun(label=label, result=run),))


@pytest.fixture(scope="module")
def everything() -> Page:
    return Page(render(report_samples.everything()))


@pytest.mark.parametrize("name", ["regression", "all_green", "hostile", "everything"])
def test_every_tag_is_closed_and_every_link_leads_somewhere(name: str) -> None:
    page = Page(render(getattr(report_samples, name)()))
    assert not page.wrong
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {link[1:] for link in links if link} <= set(ids)
    named = {name for _, attributes in page.tags for name in (attributes.get("aria-labelledby") or "").split()}
    assert named <= set(ids)


def test_headings_are_in_order() -> None:
    for name in ("regression", "everything", "all_green"):
        page = Page(render(getattr(report_samples, name)()))
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(level <= before + 1 for before, level in itertools.pairwise(levels))


def test_the_same_documents_give_the_same_text() -> None:
    assert render(report_samples.everything()) == render(report_samples.everything())


def test_the_first_screen_says_what_broke_in_which_version_and_what_to_do() -> None:
    text = render(report_samples.regression())
    hero = Page(text[text.index('<header class="hero') : text.index('<div id="filtered">')]).text
    assert "× FAIL" in hero
    assert "In transformers 5.8.0 to 5.8.1: Never initialised: " in hero
    assert "first bad transformers 5.8.0" in hero
    assert "last good transformers 5.7.0" in hero
    assert "good again transformers 5.9.0" in hero
    assert "use transformers 5.9.0 or newer, or stay with transformers 5.7.0; leave out 5.8.0 to 5.8.1" in hero
    assert "✓ works initialise the head by hand" in hero
    assert "seen by load.head-init, forward.finite, train.finite" in hero
    assert "5.23.0 rounding" in hero


def test_a_matrix_without_its_results_files_says_the_same_of_versions() -> None:
    page = Page(render(report_samples.regression(with_runs=False)))
    assert "In transformers 5.8.0 to 5.8.1: Never initialised: " in page.text
    assert "good again transformers 5.9.0" in page.text
    assert page.count("article", "card") == 3


def test_a_regression_that_is_still_there_says_with_which_version_to_stay() -> None:
    matrix = report_samples.regression().matrices[0]
    cut = Matrix(result=MatrixResult(cells=matrix.result.cells[:4], folder=Path()), runs=matrix.runs[:4])
    text = Page(render(Documents(matrices=(cut,)))).text
    assert "still bad transformers 5.8.1, the newest that was tried" in text
    assert "✓ works stay with transformers 5.7.0" in text
    assert "or newer" not in text


def test_what_is_bad_in_every_version_blames_none() -> None:
    matrix = report_samples.regression().matrices[0]
    cut = Matrix(result=MatrixResult(cells=matrix.result.cells[2:4], folder=Path()), runs=matrix.runs[2:4])
    text = Page(render(Documents(matrices=(cut,)))).text
    assert "In transformers" not in text
    assert "all 2 that were tried, up to transformers 5.8.1" in text
    assert "✓ works stay with" not in text


def test_equal_findings_are_one_card_with_every_cell(everything: Page) -> None:
    cards = [attributes for tag, attributes in everything.tags if tag == "article" and "data-status" in attributes]
    # Of the matrix: three checks over two subjects and two versions; of the run: eight, three and one cells, one accepted.
    assert len(cards) == 3 + 3 + 1
    assert [card["data-status"] for card in cards] == ["failed"] * 6 + ["accepted"]
    assert "amp-fp16 (eager, sdpa), bf16 (eager, sdpa), fp16 (eager, sdpa), fp32 (eager, sdpa) · cpu" in everything.text
    assert "5.8.0, 5.8.1 glm-tiny bf16 · sdpa · cpu" in everything.text


def test_findings_of_other_modules_are_other_cards() -> None:
    run = sample_run()
    moved = [
        replace(check, finding=replace(check.finding, module="model.layers.7.self_attn"))
        if at == 1 and check.finding
        else check
        for at, check in enumerate(run.checks)
    ]
    before, after = Page(render(one(run))), Page(render(one(replace(run, checks=tuple(moved)))))
    assert after.count("article", "card") == before.count("article", "card") + 1


def test_layers_of_one_module_are_one_card() -> None:
    documents = report_samples.regression()
    run = next(run for run in documents.every_run if run.result.verdict == "fail").result
    checks = [
        replace(check, finding=replace(check.finding, module=f"model.layers.{at}.mlp", parameters=()))
        if check.finding
        else check
        for at, check in enumerate(run.checks)
    ]
    assert Page(render(one(replace(run, checks=tuple(checks))))).count("article", "card") == 3


def test_numbers_that_are_not_finite_are_said(everything: Page) -> None:
    assert "NaN" in everything.text
    assert "Infinity" in everything.text
    assert "-Infinity" not in everything.text  # of the sample run: last-loss, which no budget judges
    data = everything.data("grid-data")
    column = next(check for check in data["checks"] if check["id"] == "train.finite")
    assert "NaN" in column["values"]
    assert "Infinity" in next(check for check in data["checks"] if check["id"] == "load.head-init")["values"]
    for check in data["checks"]:
        assert len(check["statuses"]) == data["size"]


def test_series_tables_hold_what_is_not_finite() -> None:
    page = Page(render(report_samples.hostile()))
    assert page.count("figure", "plot") == 2
    cells = [text.strip() for text in page.texts]
    assert cells.count("NaN") >= 1
    assert cells.count("Infinity") >= 1


def test_no_text_of_a_results_file_becomes_markup() -> None:
    text = render(report_samples.hostile())
    page = Page(text)
    assert page.count("img") == 0
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "</script><img" not in text
    assert "\u2028" not in text
    assert "\u202e" not in text
    assert page.text.count("</script><img src=x onerror=alert(1)>") > 20
    data = page.data("grid-data")
    assert any("</script>" in value for dimension in data["dimensions"] for value in dimension["values"])
    assert len(page.scripts) == 5


def test_scripts_are_named_by_digest_and_nothing_is_fetched() -> None:
    page = Page(render(report_samples.hostile()))
    policy = next(
        attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    )
    assert policy is not None
    programs = [text for attributes, text in page.scripts if "type" not in attributes]
    assert len(programs) == 4
    for text in programs:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
    assert not [attributes for _, attributes in page.tags if "src" in attributes]
    assert {attributes.get("href") for tag, attributes in page.tags if tag == "link"} == {"data:,"}


def test_the_libraries_are_there_only_where_something_is_drawn() -> None:
    assert len(render(report_samples.all_green())) > 500_000
    text = render(report_samples.regression(with_runs=False))
    assert len(text) < 120_000
    programs = [text for attributes, text in Page(text).scripts if "type" not in attributes]
    assert len(programs) == 2


def test_an_empty_report_says_so() -> None:
    page = Page(render(Documents()))
    assert "There is nothing to report" in page.text
    assert page.count("section") == 0


def test_a_run_without_a_check_is_incomplete() -> None:
    page = Page(render(one(replace(sample_run(), checks=(), verdict="pass", exit_status=5, notes=()))))
    assert "INCOMPLETE" in page.text
    assert "PASS" not in page.text


def test_an_error_without_a_finding_is_told_first() -> None:
    run = sample_run()
    errors = tuple(check for check in run.checks if check.status in {"error", "passed"})
    page = Page(render(one(replace(run, checks=errors, verdict="error", exit_status=3))))
    assert "! ERROR" in page.text
    assert "Could not be carried out: forward.padding" in page.text
    assert "out of memory: 3.20 GiB asked, 1048576 bytes free" in page.text


def test_a_failure_without_a_finding_says_why() -> None:
    note = "accept entry (check=load.tied) matched no finding of this run: remove it"
    green = report_samples.all_green().runs[0].result
    page = Page(render(one(replace(green, verdict="fail", exit_status=1, notes=(note,)))))
    assert "× FAIL" in page.text
    assert "Every check that ran passed" not in page.text
    assert f"<h1>A{note[1:]}</h1>" in render(one(replace(green, verdict="fail", exit_status=1, notes=(note,))))


def test_versions_of_two_packages_are_two_sequences() -> None:
    matrix = report_samples.regression().matrices[0]
    older = [replace(cell, held=replace(cell.held, torch="2.12.0")) for cell in matrix.result.cells[1:5]]
    cells, runs = (*older[:1], *matrix.result.cells[1:5]), (matrix.runs[1], *matrix.runs[1:5])
    page = Page(render(Documents(matrices=(Matrix(result=MatrixResult(cells=cells, folder=Path()), runs=runs),))))
    assert page.count("div", "strip") == 1
    assert "first bad transformers 5.8.0 (torch 2.13.0, python 3.11)" not in page.text
    assert "first bad transformers 5.8.0 (torch 2.13.0)" in page.text
    assert "5.7.0, torch 2.12.0" in page.text


def test_a_comparison_alone_says_what_to_do() -> None:
    page = Page(render(Documents(comparisons=(report_samples.comparison(),))))
    assert "× FAIL" in page.text
    assert "Glm4-tiny: worse" not in page.text
    assert "glm4-tiny: worse from model.layers.1.mlp on" in page.text
    # The folders differ in their last part alone.
    assert "stay with 5.7.0 until it is clear what that means for your code" in page.text


def test_a_comparison_names_versions_where_baselines_know_them() -> None:
    comparison = report_samples.comparison()
    subjects = [dict(item) for item in comparison.content["subjects"]]
    subjects[0]["details"] = {**subjects[0]["details"], "environment": ["transformers 5.7.0 → 5.8.1", "hostname a → b"]}
    page = Page(
        render(Documents(comparisons=(replace(comparison, content={**comparison.content, "subjects": subjects}),)))
    )
    assert "glm4-tiny: worse from model.layers.1.mlp on, transformers 5.7.0 → 5.8.1" in page.text
    assert "stay with transformers 5.7.0 until" in page.text


def test_a_bisection_alone_names_the_first_bad_version() -> None:
    page = Page(render(Documents(bisections=(report_samples.bisection(),))))
    assert "transformers 5.8.0 is the first bad version, 5.7.0 is good: Never initialised: " in page.text
    assert "5.7.1 cannot be tried: the change is in one of them or in 5.8.0" in page.text
    assert "5 of 21 versions" in page.text


def test_a_green_run_says_what_it_is_near_and_leaves_out_what_is_empty() -> None:
    page = Page(render(report_samples.all_green()))
    assert "✓ PASS" in page.text
    assert "nearest its budget" in page.text
    sections = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    assert {"map", "precision", "headroom", "training", "environment"} <= sections
    assert not {"findings", "versions", "errors", "skipped", "differences", "bisections", "rehearsal"} & sections


def test_every_plot_has_a_table_of_its_numbers(everything: Page) -> None:
    figures = everything.count("figure", "plot")
    assert figures >= 8
    heads = [attributes for tag, attributes in everything.tags if tag == "th" and "data-curve" in attributes]
    assert len({str(attributes["data-curve"]) for attributes in heads if attributes["data-kind"] == "value"}) >= 4
    assert "0.6" in everything.text


def test_the_moment_of_failure_is_in_words_too() -> None:
    assert "bf16 · 5.8.0: step 1: not finite" in Page(render(report_samples.regression())).text


def test_a_failed_curve_stands_beside_the_version_before() -> None:
    page = Page(render(report_samples.regression()))
    curves = {attributes["data-curve"] for tag, attributes in page.tags if tag == "th" and "data-curve" in attributes}
    assert {"bf16 · 5.8.0", "bf16 · 5.7.0"} <= curves


def test_every_kind_of_document_has_its_section(everything: Page) -> None:
    sections = [attributes.get("id") for tag, attributes in everything.tags if tag == "section" and "id" in attributes]
    assert sections == [
        "findings", "map", "versions", "precision", "headroom", "training", "rehearsal", "differences", "bisections",
        "errors", "skipped", "environment",
    ]  # fmt: skip
    for words in (
        "5.3.0: cells/gone.json is gone",
        "local 1.42 in model.layers.1.mlp, 1.1 allowed",
        "the loss falls as fast as in fp32",
        "stay with transformers 5.7.0",
        "fp16 is for serving: training in it is pure-fp16 or amp-fp16",
        "accept entry (check=load.tied) matched no finding of this run: remove it",
        "known since 5.8",
        "head.score.weight.initialised: True → False",
    ):
        assert words in everything.text


def script(folder: Path, text: str) -> Documents:
    path = folder / "reproducers" / "one.py"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    run = sample_run()
    checks = tuple(
        replace(check, finding=replace(check.finding, reproducer="reproducers/one.py")) if check.finding else check
        for check in run.checks
    )
    return Documents(
        runs=(CheckRun(label="results", result=replace(run, checks=checks), path=folder / "results.json"),)
    )


def test_a_reproducer_is_there_to_copy(tmp_path: Path) -> None:
    page = Page(render(script(tmp_path, '"""Found by numerics-suite: x."""\nassert 1 < 0  # REPRODUCED\n')))
    assert "assert 1 < 0 # REPRODUCED" in page.text


def test_a_file_that_is_no_reproducer_is_not_shown(tmp_path: Path) -> None:
    page = Page(render(script(tmp_path, "password = 'secret'\n")))
    assert "secret" not in page.text
    assert "reproducers/one.py (not at hand when this page was written)" in page.text


def test_what_a_reproducer_says_of_itself_is_what_the_page_looks_for() -> None:
    folder = Path(numerics_suite.__file__).parent / "diagnosis"
    assert any(MARK in file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))


def test_the_command_asks_the_version_that_failed() -> None:
    text = Page(render(report_samples.regression())).text
    assert "numerics-suite matrix fixture:glm-tiny --checks load.head-init" in text
    assert "--transformers 5.8.0" in text


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    path = write_html(tmp_path / "new" / "report", report_samples.all_green())
    assert path == tmp_path / "new" / "report" / "index.html"
    assert path.read_text(encoding="utf-8") == render(report_samples.all_green())
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(BadInputError, match="taken"):
        write_html(tmp_path / "taken", Documents())


def test_vendored_files_are_as_published() -> None:
    folder = STATIC / "vendor"
    manifest = json.loads((folder / "vendored.json").read_text(encoding="utf-8"))
    assert {entry["file"] for entry in manifest["files"]} == {file.name for file in folder.glob("*.js")}
    licences = (folder / "LICENSES.txt").read_text(encoding="utf-8")
    for entry in manifest["files"]:
        raw = (folder / entry["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
        assert entry["version"].encode() in raw[:200]
        assert f"{entry['package']} {entry['version']}" in licences
        assert b"</script" not in raw.lower()


def test_no_program_of_the_page_ends_its_own_element() -> None:
    for file in STATIC.glob("*.js"):
        assert "</script" not in file.read_text(encoding="utf-8").lower()


@pytest.fixture(scope="module")
def big() -> str:
    return render(report_samples.many_cells())


@pytest.mark.slow
def test_5000_cells_stay_small(big: str) -> None:
    assert len(big.encode()) < LARGEST
    page = Page(big)
    data = page.data("grid-data")
    assert data["size"] == 5000
    assert sum(len(check["statuses"]) - check["statuses"].count(".") for check in data["checks"]) >= 150_000
    assert page.count("article", "card") > 200


@pytest.fixture(scope="module")
def large() -> str:
    return render(report_samples.large())


def test_what_is_left_out_of_500_cells_is_counted(large: str) -> None:
    found = re.search(
        r"Shown is the worst cell of each subject and precision; ([\d,]+) other cells are left out", large
    )
    assert found is not None
    assert int(found.group(1).replace(",", "")) > 400


def test_a_table_left_as_text_holds_the_numbers(large: str) -> None:
    found = re.search(r'<pre class="tsv"[^>]*>([^<]*)</pre>', large)
    assert found is not None
    head, *lines = found.group(1).split("\n")
    assert head.split("\t")[:3] == ["module", "class", "layer"]
    assert all(len(line.split("\t")) == len(head.split("\t")) for line in lines)
    assert all(math.isfinite(float(line.split("\t")[3].rstrip("!"))) for line in lines)
