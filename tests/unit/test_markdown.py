"""Markdown: what it tells, in which order, within which size; and that no text of the results is markup."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from unit.sample_documents import (
    HOSTILE,
    RELEASES,
    bisect_document,
    comparison_document,
    everything,
    matrix_document,
    run_of,
    uninitialised,
)
from unit.sample_run import finding, result, sample_run

from numerics_suite.core.records import RunResult
from numerics_suite.reports.against import against
from numerics_suite.reports.comment import MARKER, MOST_LETTERS, comment_markdown
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.lines import printable
from numerics_suite.reports.markdown import summary_markdown
from numerics_suite.reports.markup import code, fenced, joined, table, text, without_folders

GITHUBS = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def of_run(run: RunResult, label: str = "x") -> Documents:
    return Documents(runs=(CheckRun(label=label, result=run),))


def visible(markdown: str) -> str:
    """What a reader sees of one line."""
    shown = re.sub(r"<[^>]*>", "", GITHUBS.render(markdown))
    return html.unescape(shown).replace("\u200b", "").strip()


# --- any text ----------------------------------------------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=[]), max_size=40) | st.text("`|\\<>&$*_[]()~#@!%-+=:. 1a\n", max_size=40)


@settings(max_examples=300, deadline=None)
@example(HOSTILE)
@example("1. a")
@example("- a")
@example("---")
@example("===")
@example("# a")
@given(ANY)
def test_a_text_is_seen_as_it_is_and_is_no_markup(given_text):
    rendered = GITHUBS.render(f"x\n\n{text(given_text)}\n\ny")
    assert rendered.startswith("<p>x</p>\n")
    assert rendered.endswith("<p>y</p>\n")
    assert set(re.findall(r"<[^>]*>", rendered)) <= {"<p>", "</p>"}
    assert visible(text(given_text)) == printable(given_text)


@settings(max_examples=300, deadline=None)
@example(HOSTILE)
@given(ANY)
def test_code_is_seen_as_it_is_and_is_no_markup(given_text):
    rendered = GITHUBS.render(f"x {code(given_text)} y")
    assert set(re.findall(r"<[^>]*>", rendered)) <= {"<p>", "</p>", "<code>", "</code>"}
    assert visible(f"x {code(given_text)} y") == f"x {printable(given_text)} y"


@settings(max_examples=200, deadline=None)
@example(HOSTILE, HOSTILE)
@example("a\\", "|b")
@given(ANY, ANY)
def test_a_cell_of_a_table_stays_one(first, second):
    rendered = GITHUBS.render(table(("a", "b"), [(text(first), code(second)), (code(first), text(second))]))
    cells = re.findall(r"<td>(.*?)</td>", rendered)
    shown = [html.unescape(re.sub(r"<[^>]*>", "", cell)).replace("\u200b", "") for cell in cells]
    assert shown == [printable(first), printable(second)] * 2


@pytest.mark.parametrize("word", ["@octocat", "#12", "!12", "%12", "x @org/team", "(@a)"])
def test_nobody_is_mentioned(word):
    assert not re.search(r"[@#!%]\w", text(word).replace("&#8203;", "\u200b"))


def test_a_fence_is_longer_than_any_within():
    rendered = GITHUBS.render(fenced("a\n````\n<b>\x1b[31m\n```", "sh"))
    assert rendered == '<pre><code class="language-sh">a\n````\n&lt;b&gt;?[31m\n```\n</code></pre>\n'


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("cannot read /home/me/x/y.json: gone", "cannot read …/y.json: gone"),
        (r"C:\Users\me\x.py is", "…/x.py is"),
        ("file:///home/me/x.txt", "…/x.txt"),
        ("log (/tmp/a/b.log)", "log (…/b.log)"),
        ("--baseline=/a/b/c", "--baseline=…/c"),
        ("./my/ckpt ../a/b ~/.cache/x and/or n/a 1/2", "./my/ckpt ../a/b ~/.cache/x and/or n/a 1/2"),
        ("see https://a.example/b/c", "see https://a.example/b/c"),
    ],
)
def test_paths_from_a_root_keep_their_last_part(told, wanted):
    assert without_folders(told) == wanted


def test_blocks_are_whole_or_counted():
    def rest(count):
        return f"({count} more)"

    assert joined(["a" * 10, "", "b" * 10], 100, rest) == "a" * 10 + "\n\n" + "b" * 10 + "\n"
    short = joined(["a" * 10, "b" * 10, "c" * 10], 40, rest)
    assert short == "a" * 10 + "\n\n" + "b" * 10 + "\n\n(1 more)\n"
    assert len(short) <= 40


# --- the summary -------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_then_what_to_do():
    lines = [line for line in summary_markdown(Documents(matrices=(matrix_document(),))).splitlines() if line]
    assert lines[:5] == [
        "## numerics-suite: FAIL",
        "**In transformers 5.8.0 to 5.8.1: No code initialised score.weight of 5.8.0: no code writes to the memory of score.weight, so it holds whatever was there before: NaN in one process, zeros in another (uninitialised-parameters).**",
        "2 failed · 8 passed",
        "What to do:",
        "- use transformers 5.9.0 or newer, or stay with transformers 5.7.0; leave out 5.8.0 to 5.8.1 -- tried, works",
    ]


def test_versions_that_say_the_same_share_a_row():
    told = summary_markdown(Documents(matrices=(matrix_document(),)))
    assert "| `5.9.0 … 5.10.0` | passed |  |  |" in told
    assert (
        "| `5.8.0` | **failed** | `load.head-init` | contract against 5.7.0 in `score`: glm4-tiny-classifier bf16 |"
        in told
    )
    assert told.count("| `5.") == 5


def test_a_finding_is_a_block_with_its_cures_and_its_command():
    told = summary_markdown(of_run(sample_run()))
    block = told[told.index("### 2. ") : told.index("### 3. ")]
    assert block.startswith(
        "### 2. 6 output elements are NaN or infinite: aten.mul.Tensor of finite inputs exceeds the largest number of its dtype (overflow)."
    )
    assert "- **where** model.layers.3.mlp; aten.mul.Tensor at modeling\\_glm4.py:123".replace("\\", "") in block
    assert "- **measured** 6 elements; none is allowed" in block
    assert "- **fix** use bfloat16, whose range is float32's (amp-bf16) -- tried, works: 0 elements" in block
    assert "```sh\nnumerics-suite check './my checkpoint' --name glm4-tiny-classifier --checks forward.finite" in block
    assert "- **share not finite** NaN" in block


def test_what_did_not_run_and_what_is_accepted_is_told():
    told = summary_markdown(of_run(sample_run()))
    assert "### Could not be carried out\n\n| check | on | reason |" in told
    assert (
        "| forward.padding | glm4-tiny-classifier in fp16 | out of memory: 3.20 GiB asked, 1048576 bytes free |" in told
    )
    assert "| `train.clip` | glm4-tiny-classifier · bf16 · eager · cpu | Clipping leaves the gradient norm" in told
    assert "(divergence). | known since 5.8 |" in told
    assert "<details><summary>8 checks skipped</summary>" in told
    assert "- accept entry (check=load.tied) matched no finding of this run: remove it" in told


def test_a_pass_is_short():
    told = summary_markdown(of_run(run_of(result("load.config", "fp32"))))
    assert [line for line in told.splitlines() if line][:3] == [
        "## numerics-suite: PASS",
        "**Every check that ran passed: 1 result**",
        "1 passed",
    ]
    assert "###" not in told


def test_a_comparison_is_a_table_worst_first():
    told = summary_markdown(Documents(comparisons=(comparison_document(),)))
    kinds = re.findall(r"^\| \*\*(\w+)\*\*", told, re.MULTILINE)
    assert kinds == ["missing", "changed", "worse", "contract", "better", "rounding"]
    assert "| **worse** | glm-worse (causal-lm) bf16/sdpa/cpu | `model.layers.0` | Infinity |" in told


def test_a_bisection_tells_its_boundary():
    told = summary_markdown(Documents(bisections=(bisect_document(),)))
    assert (
        "### transformers 5.8.0 is the first bad version, 5.7.0 is good: No code initialised score.weight of 5.8.0: no code writes"
        in told
    )
    assert "- **last good** 5.7.0\n- **first bad** 5.8.0" in told
    assert "```sh\nnumerics-suite matrix x --transformers 5.7.0,5.8.0" in told


@pytest.mark.parametrize("printer", [summary_markdown, comment_markdown])
def test_everything_hostile_renders_to_what_was_meant(printer):
    told = printer(everything())
    rendered = GITHUBS.render(told)
    tags = {re.split(r"[\s>]", tag[1:])[0].strip("/") for tag in re.findall(r"<[^!][^>]*>", rendered)}
    assert tags <= {"h2", "h3", "p", "strong", "em", "ul", "li", "code", "pre", "details", "summary"} | {
        "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert "<a " not in rendered
    assert rendered.count("<details>") == rendered.count("</details>")
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", told, flags=re.DOTALL)
    assert "@octocat" not in plain
    assert printer(everything()) == told
    told.encode()


def test_a_summary_keeps_within_its_size():
    run = run_of(*(replace(uninitialised("x"), check=f"load.c{at}") for at in range(300)))
    told = summary_markdown(of_run(run), most=50_000)
    assert len(told.encode()) <= 50_000
    assert re.search(r"\*\d+ parts more than there is room for", told)
    assert told.startswith("## numerics-suite: FAIL")


# --- the comment -------------------------------------------------------------------------------------------------------


def test_only_what_changed_is_told():
    new = run_of(
        uninitialised("5.8.0"),
        result("forward.finite", "bf16", status="failed", finding=finding("overflow", "a known one")),
        result("forward.cache", "bf16"),
        result("train.amp", "bf16", status="skipped", reason="no autocast"),
        result("train.clip", "bf16", status="error", reason="out of memory, see /home/me/log.txt"),
        result("train.labels", "bf16", status="accepted", reason="known", finding=finding("wrong-loss", "x")),
    )
    old = run_of(
        result("load.head-init", "bf16", "sdpa", measurements={"uninitialised": 0.0}),
        result("forward.finite", "bf16", status="failed", finding=finding("overflow", "a known one")),
        result("forward.cache", "bf16", status="failed", finding=finding("cache-mismatch", "x")),
        result("train.amp", "bf16"),
        result("train.clip", "bf16"),
        result("train.labels", "bf16"),
        result("reference.local", "bf16"),
        environment={"python": "3.11.7", "device": "cpu", "packages": {"torch": "2.13.0", "transformers": "5.7.0"}},
    )
    told = comment_markdown(of_run(new), of_run(old))
    assert told.startswith(f"{MARKER}\n## numerics-suite: FAIL\n\n**1 new finding**, 1 fixed, 1 still there\n")
    assert "transformers `5.7.0` → `5.24.0`" in told
    assert (
        "### No code initialised score.weight of 5.8.0: no code writes to the memory of score.weight, so it holds whatever was there before: NaN in one process, zeros in another (uninitialised-parameters).\n\n- **before** passed, uninitialised 0"
        in told
    )
    assert "a known one" not in told
    assert "### Fixed\n\n| check | subject | cells | why |" in told
    assert "| `forward.cache` | glm4-tiny-classifier | bf16 · eager · cpu | was cache-mismatch |" in told
    assert "| `train.amp` | glm4-tiny-classifier | bf16 · eager · cpu | no autocast |" in told
    assert "| `reference.local` | glm4-tiny-classifier | bf16 · eager · cpu | not in these results |" in told
    assert "| `train.clip` | glm4-tiny-classifier | bf16 · eager · cpu | out of memory, see …/log.txt |" in told
    assert "| `train.labels` | glm4-tiny-classifier | bf16 · eager · cpu | wrong-loss: known |" in told


def test_a_finding_is_fixed_only_where_it_was_asked_again():
    old = run_of(uninitialised("x"))
    for now in (result("load.head-init", "bf16", "sdpa", "skipped", reason="no"), None):
        told = comment_markdown(of_run(run_of(*[one for one in (now,) if one])), of_run(old))
        assert "### Fixed" not in told
        assert "### Not asked any more" in told
    assert "### Fixed" in comment_markdown(of_run(run_of(result("load.head-init", "bf16", "sdpa"))), of_run(old))


def test_another_cause_is_a_new_finding():
    old = uninitialised("x")
    new = replace(old, finding=replace(old.finding, cause="bad-initialisation"))
    told = comment_markdown(of_run(run_of(new)), of_run(run_of(old)))
    assert "**1 new finding**" in told
    assert "- **before** failed (`uninitialised-parameters`), uninitialised 1" in told


def test_the_same_results_are_no_news():
    told = comment_markdown(everything(), everything())
    assert told == (
        f"{MARKER}\n## numerics-suite: FAIL\n\nno new finding, 5 still there\n\nNothing changed against the earlier results.\n"
    )


def test_another_machine_device_and_time_give_the_same_text():
    run = sample_run()
    elsewhere = replace(
        run,
        started_at="2031-01-01T00:00:00+09:00",
        duration_s=1.0,
        checks=tuple(replace(check, duration_s=7.0) for check in run.checks),
    )
    assert comment_markdown(of_run(run), of_run(run)) == comment_markdown(
        of_run(elsewhere, "y"), of_run(elsewhere, "z")
    )
    assert comment_markdown(of_run(run)) == comment_markdown(of_run(elsewhere))
    assert "2026" not in comment_markdown(of_run(run))


def test_versions_are_held_against_the_same_versions():
    earlier = Documents(matrices=(matrix_document(RELEASES[:3]),))
    now = Documents(matrices=(matrix_document(RELEASES[:4], broken=RELEASES[1:4]),))
    told = comment_markdown(now, earlier)
    # 5.9.0 was not in the earlier matrix, whose newest version fails alike, so its finding is no news; the version is.
    assert "no new finding, 1 still there" in told
    assert "| `5.9.0` | **failed** | `load.head-init` |  |" in told
    assert "`5.8.0`" not in told


def test_a_version_that_breaks_is_news():
    earlier = Documents(matrices=(matrix_document(RELEASES[:2], broken=()),))
    told = comment_markdown(Documents(matrices=(matrix_document(RELEASES[:2]),)), earlier)
    assert "**1 new finding**" in told
    assert "first bad transformers 5.8.0; last good transformers 5.7.0" in told
    fixed = comment_markdown(earlier, Documents(matrices=(matrix_document(RELEASES[:2]),)))
    assert (
        "| `load.head-init` | glm4-tiny-classifier | bf16 · sdpa · cpu; 5.8.0 | was uninitialised-parameters |" in fixed
    )


def test_a_summary_without_its_results_is_held_against_too():
    def bare(document):
        return Documents(matrices=(replace(document, runs=(None,) * len(document.runs)),))

    good, bad = matrix_document(RELEASES[:2], broken=()), matrix_document(RELEASES[:2])
    assert "**1 new finding**" in comment_markdown(bare(bad), bare(good))
    assert "### Fixed" in comment_markdown(bare(good), bare(bad))


def test_a_run_is_held_against_the_newest_of_a_matrix():
    turns = against(of_run(run_of(uninitialised("x"))), Documents(matrices=(matrix_document(RELEASES[:3]),))).turns
    assert [turn.kind for turn in turns if turn.told.check == "load.head-init"] == ["still"]


def test_differences_that_were_there_before_are_no_news():
    now, before = comparison_document(), comparison_document()
    fewer = replace(
        before,
        content={
            **before.content,
            "subjects": [item for item in before.content["subjects"] if item["kind"] != "worse"],
        },
    )
    told = comment_markdown(Documents(comparisons=(now,)), Documents(comparisons=(fewer,)))
    assert re.findall(r"^\| \*\*(\w+)\*\*", told, re.MULTILINE) == ["worse"]


def test_a_comment_keeps_within_its_size():
    run = run_of(*(replace(uninitialised("x"), check=f"load.c{at}") for at in range(300)))
    told = comment_markdown(of_run(run))
    assert len(told) <= MOST_LETTERS
    assert re.search(r"\*\d+ parts more than there is room for: see the report\.\*", told)


def test_no_path_of_the_machine_is_told(tmp_path):
    folder = tmp_path / "deep" / "checkpoint"
    facts = replace(sample_run().subjects[0], source=str(folder))
    found = uninitialised("x")
    found = replace(
        found, finding=replace(found.finding, reproducer=str(folder / "reproduce.py"), explanation=f"see {folder}/log")
    )
    told = comment_markdown(of_run(run_of(found, subjects=(facts,))))
    assert str(tmp_path) not in told
    assert "numerics-suite check …/checkpoint" in told
    whole = matrix_document()
    lost = replace(whole.result.cells[-1], reason=f"it broke (log: {folder}/log.txt)")
    cells = replace(whole.result, cells=(*whole.result.cells[:-1], lost))
    assert "it broke (log: …/log.txt)" in comment_markdown(Documents(matrices=(replace(whole, result=cells),)))
    assert str(Path.home()) not in told
