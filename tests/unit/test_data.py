"""`--data`: a seeded sample of a file of any size, its three forms, and which of its labels count."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Finding
from numerics_suite.diagnosis.reproducer import reproducer
from numerics_suite.inputs import data_file
from numerics_suite.inputs.data_batch import data_batch, encode
from numerics_suite.inputs.data_file import read_sample
from numerics_suite.inputs.labels import IGNORED, counted_labels, empty_batches
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.suite.session import SuiteSession

LONG = "the rain in spain falls mainly on plain fields while a quick brown fox jumps over lazy dogs "


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fixture_path("glm-tiny"))


def written(path, *rows, between=b"\n"):
    path.write_bytes(between.join(json.dumps(row, ensure_ascii=False).encode() for row in rows))
    return path


def learnt(tokenizer, path):
    """The texts of a file's first row that are learnt, and those that are not."""
    ids, counts = encode(read_sample(path, size=1, seed=0).examples[0], tokenizer)
    parts = ([token for token, count in zip(ids, counts, strict=True) if count is wanted] for wanted in (True, False))
    return tuple(tokenizer.decode(part) for part in parts)


def test_a_sample_is_seeded_and_every_row_is_as_likely(tmp_path):
    path = written(tmp_path / "rows.jsonl", *({"text": str(number)} for number in range(40)))
    drawn = [[int(e.text) for e in read_sample(path, size=8, seed=seed).examples] for seed in range(200)]
    assert drawn[0] == [int(e.text) for e in read_sample(path, size=8, seed=0).examples]
    assert all(rows == sorted(set(rows)) and len(rows) == 8 for rows in drawn)
    counts = [sum(number in rows for rows in drawn) for number in range(40)]
    # Binomial, 200 draws at 1/5: 40 on average and 5.7 standard deviation; five of them are 28.
    assert 40 - 28 <= min(counts) <= max(counts) <= 40 + 28
    assert str(read_sample(path, size=8, seed=3)) == "8 of 40 texts, drawn with seed 3"
    assert str(read_sample(path, size=50, seed=3)) == "40 texts"


def test_memory_is_bounded_by_the_sample(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"text": "x" * 400}) + "\n") * 20_000)
    tracemalloc.start()
    sample = read_sample(path, size=8, seed=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (sample.rows, len(sample.examples)) == (20_000, 8)
    assert most < path.stat().st_size / 10


def test_a_line_without_an_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr("numerics_suite.inputs.data_file.LONGEST_LINE", 1 << 20)
    path = written(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b" * (1 << 20)})
    with pytest.raises(BadInputError, match="line 2: is longer than 1 MiB"):
        read_sample(path, size=8, seed=0)


def test_only_a_line_feed_ends_a_line_and_a_mark_may_begin_it(tmp_path):
    path = written(tmp_path / "rows.jsonl", {"text": "a\u2028b\x85c"}, {"text": "d"}, between=b"\r\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [example.text for example in read_sample(path, size=8, seed=0).examples] == ["a\u2028b\x85c", "d"]


def test_no_other_control_character_ends_a_line_of_a_conversation(tmp_path):
    text = "a\x0bb\x0cc\x1cd\x1ee\u2029f"
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": text}, {"prompt": "g", "completion": "h"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    # JSON itself escapes those below U+0020, so only a reader that splits before it parses would meet them.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_sample(path, size=8, seed=0).examples) == 2


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "a", "completion": "b"}, ("a", "b")),
        ({"prompt": "a", "answer": "b"}, ("a", " b")),
        ({"prompt": "a\n", "response": "b"}, ("a\n", "b")),
        ({"instruction": "a", "input": "c", "output": "b"}, ("a\nc", " b")),
        ({"instruction": "a", "input": "", "output": "b"}, ("a", " b")),
        ({"question": "a", "answer": "b", "id": 3}, ("a", " b")),
    ],
)
def test_the_usual_names_of_prompts_and_answers_are_known(tmp_path, row, texts):
    (example,) = data_file._examples(written(tmp_path / "rows.jsonl", row))
    assert (example.form, example.text, example.completion) == ("prompt", *texts)


def test_a_completion_is_learnt_and_its_prompt_is_not(tmp_path, tokenizer):
    path = written(tmp_path / "rows.jsonl", {"prompt": "what is the capital? ", "completion": "paris it is"})
    what, rest = learnt(tokenizer, path)
    assert what.strip() == "paris it is<|endoftext|>"
    assert rest.strip().endswith("what is the capital?")


def test_what_the_assistant_says_is_learnt(tmp_path, tokenizer):
    said = [
        ("system", "be brief"),
        ("user", "capital?"),
        ("assistant", "paris"),
        ("user", "sure?"),
        ("assistant", "yes"),
    ]
    messages = [{"role": role, "content": content} for role, content in said]
    what, rest = learnt(tokenizer, written(tmp_path / "rows.jsonl", {"messages": messages}))
    assert what.replace("\n", "") == "parisyes"
    assert all(word in rest for word in ("be brief", "capital?", "sure?", "<|assistant|>"))


def test_a_template_that_is_absent_or_refuses_names_the_line(tmp_path, tokenizer):
    import copy

    path = written(tmp_path / "rows.jsonl", {"text": "a"}, {"messages": [{"role": "user", "content": "a"}]})
    example, other = read_sample(path, size=2, seed=0).examples[1], copy.deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(BadInputError, match=r"line 2: 'messages' needs a chat template"):
        encode(example, other)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadInputError, match=r"line 2: the chat template refuses 'messages': roles must alternate"):
        encode(example, other)


def test_labels_of_a_batch(tmp_path, tokenizer):
    rows = [{"prompt": LONG, "completion": "paris"}, {"prompt": "a ", "completion": "b"}]
    sample = read_sample(written(tmp_path / "rows.jsonl", *rows), size=8, seed=0)
    about = {"task": "causal-lm", "side": "left", "rows": 8, "pad_id": tokenizer.pad_token_id}
    cut = data_batch(sample, tokenizer, max_length=12, **about).tensors
    whole = data_batch(sample, tokenizer, max_length=512, **about).tensors
    assert counted_labels(cut["labels"], shifted=True).tolist()[0] == 0
    assert min(counted_labels(whole["labels"], shifted=True).tolist()) >= 2
    learnt_ids = whole["labels"][0][whole["labels"][0] != IGNORED]
    assert learnt_ids.tolist() == whole["input_ids"][0][-len(learnt_ids) :].tolist()


def answered(data, length, checks=("train.labels",), subject="fixture:glm-tiny", **changes):
    settings = Settings(
        subjects=(subject,), precision=("fp32",), attn=("eager",), checks=checks, device="cpu", max_examples=2,
        seq_len=length, data=data, origins={"precision": "command line"}, **changes,
    )  # fmt: skip
    session = SuiteSession(settings)
    session.findings.tries_remedies = bool(changes.get("diagnose", True))
    (question,) = session.plan.questions
    return session, session.answer(question)[0]


def test_a_prompt_that_fills_the_length_leaves_no_label(tmp_path):
    data = written(
        tmp_path / "rows.jsonl", *({"prompt": f"{number} {LONG}", "completion": "paris"} for number in range(12))
    )
    session, result = answered(data, 12)
    finding = result.finding
    assert isinstance(finding, Finding)
    assert (finding.cause, result.measurements["counted-labels"]) == ("no-counted-labels", 0)
    (remedy,) = finding.remedies
    assert (remedy.name, remedy.verified) == ("count-labels", True)
    assert "--seq-len 48" in remedy.effect or "--seq-len 96" in remedy.effect
    assert session.plan.data.startswith("8 of 12 prompts, drawn with seed 0; of their 96 tokens 0 labels count")
    context = session.context(session.plan.cells[0])
    script = reproducer("train.labels", finding, context, context.usable_own_batch)
    assert script is not None
    assert "no label counts" in script
    # Cut to nothing that matters, the same rows are sound.
    session, result = answered(data, 256)
    assert result.status == "passed"
    assert result.measurements["counted-labels"] >= 16


def test_batches_that_are_expected_to_have_no_label():
    counted = [0, 0, 0, 0, 0, 0, 3, 3]
    # 15 of the 70 ways to take 4 of 8 rows take none of the last two; an epoch of 24 rows has 6 batches.
    assert empty_batches(counted, batch=4, rows=24) == pytest.approx(6 * 15 / 70)
    assert empty_batches(counted, batch=8, rows=800) == 0
    assert empty_batches([0] * 8, batch=4, rows=24) == 6


@pytest.mark.parametrize(("bare", "cause"), [(6, "no-counted-labels"), (2, None)])
def test_some_rows_without_a_label_are_a_finding_where_a_batch_of_them_is_expected(tmp_path, bare, cause):
    prompts = [f"{number} {LONG}" if number % 8 < bare else f"{number} " for number in range(24)]
    data = written(tmp_path / "rows.jsonl", *({"prompt": prompt, "completion": "paris"} for prompt in prompts))
    session, result = answered(data, 12, diagnose=False)
    assert (result.finding and result.finding.cause) == cause
    if result.finding is not None:
        context = session.context(session.plan.cells[0])
        script = reproducer("train.labels", result.finding, context, context.usable_own_batch)
        assert script is not None
        assert "batch of those rows in which no label counts" in script


def test_no_rehearsal_of_another_batch_than_the_users(tmp_path):
    from numerics_suite.suite.rehearsal import rehearse

    data = written(tmp_path / "rows.jsonl", {"prompt": LONG, "completion": "paris"})
    session, _ = answered(data, 12, checks=("train.finite",), diagnose=False)
    assert rehearse(session) == ()
