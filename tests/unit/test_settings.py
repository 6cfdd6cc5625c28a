"""Settings: precedence, origins, what each source may say, and the exact words for what cannot be used."""

from __future__ import annotations

import datetime as dt
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.config.argparsing import Parser

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Cell, CheckResult, Finding
from numerics_suite.devices.precisions import PRECISIONS as RECIPES
from numerics_suite.settings import choices
from numerics_suite.settings.accept import AcceptEntry, matches, stale
from numerics_suite.settings.options import add_pytest_options, from_command_line, from_pytest
from numerics_suite.settings.table import OPTIONS
from numerics_suite.settings.tree import Settings, to_json

TODAY = dt.date(2026, 6, 1)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    file = Path.cwd() / "pyproject.toml"
    file.write_text(f"[tool.numerics-suite]\n{text}\n", encoding="utf-8")
    return file


def pytest_config(*arguments: str, root: Path | None = None):
    parser = Parser(_ispytest=True)
    add_pytest_options(parser)
    given = parser.parse_known_args(list(arguments))
    folder = root or Path.cwd()
    return SimpleNamespace(
        getoption=lambda name, default=None: getattr(given, name, default),
        rootpath=folder,
        invocation_params=SimpleNamespace(dir=folder),
    )


def test_the_table_and_the_record_name_the_same_fields():
    named = [option.name for option in OPTIONS]
    assert sorted([*named, "accept", "origins"]) == sorted(Settings.__dataclass_fields__)


def test_the_tables_defaults_are_the_records():
    settings = Settings()
    assert {option.name: option.default for option in OPTIONS} == {
        option.name: getattr(settings, option.name) for option in OPTIONS
    }


def test_the_precisions_of_the_option_are_those_that_run():
    assert set(choices.PRECISIONS) == set(RECIPES)


def test_defaults_are_the_contracts():
    settings = from_command_line({})
    assert (settings.task, settings.precision, settings.attn, settings.device) == (
        "auto",
        None,
        ("eager", "sdpa"),
        "auto",
    )
    assert (settings.steps, settings.optimizer, settings.lr, settings.max_grad_norm) == (5, "adamw", 1e-4, None)
    assert (settings.max_examples, settings.seed, settings.batch_size, settings.seq_len) == (10, 0, 4, 64)
    assert (settings.train_scope, settings.diagnose, settings.workers) == ("auto", True, "auto")
    assert not settings.origins
    assert not settings.explicit("attn")


def test_the_command_line_is_over_pyproject_which_is_over_the_default():
    write('seed = 3\nsteps = 7\nprecision = ["fp32", "bf16"]\ndiagnose = false')
    settings = from_command_line({"seed": "4", "max_grad_norm": "0.5"})
    assert (settings.seed, settings.steps, settings.precision, settings.diagnose) == (4, 7, ("fp32", "bf16"), False)
    assert settings.origin("seed") == "command line"
    assert settings.origin("steps") == "pyproject.toml"
    assert settings.origin("lr") == "default"
    assert settings.explicit("precision")


def test_a_pytest_option_is_over_pyproject():
    write("seed = 3\nsteps = 7")
    settings = from_pytest(pytest_config("--numerics-seed=4", "--numerics-attn", "eager", "--numerics-no-diagnose"))
    assert (settings.seed, settings.steps, settings.attn, settings.diagnose) == (4, 7, ("eager",), False)
    assert settings.origins == {
        "attn": "pytest option",
        "diagnose": "pytest option",
        "seed": "pytest option",
        "steps": "pyproject.toml",
    }


def test_pytest_reads_the_pyproject_of_its_root_or_of_where_it_was_typed(tmp_path):
    write("seed = 3")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = pytest_config()
    config.rootpath = elsewhere
    assert from_pytest(config).seed == 3
    (elsewhere / "pyproject.toml").write_text("[tool.numerics-suite]\nseed = 9\n", encoding="utf-8")
    assert from_pytest(config).seed == 9


def test_paths_in_pyproject_are_relative_to_it(tmp_path, monkeypatch):
    write('data = "rows.jsonl"\nsubjects = ["model", "org/name"]')
    (tmp_path / "model").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    settings = from_command_line({})
    assert settings.data == tmp_path / "rows.jsonl"
    assert settings.subjects == (str(tmp_path / "model"), "org/name")


EVERYTHING = {
    "subjects": ["a", "b,c"],
    "names": ["x"],
    "precision": "bf16,amp-fp16,bf16",
    "checks": "forward.*,load.finite",
    "lr": "3e-5",
    "max_time": "2.5",
    "diagnose": "false",
    "trust_remote_code": "true",
    "data": "rows.jsonl",
    "json": "-",
    "workers": "3",
    "train_scope": "last:2",
    "quiet": "true",
    "device": "cuda:1",
}


def test_settings_survive_pickling():
    write('[[tool.numerics-suite.accept]]\ncheck = "train.*"\nreason = "knöwn, \\"quoted\\""\nuntil = 2027-01-01')
    full = from_command_line(EVERYTHING)
    assert full.precision == ("bf16", "amp-fp16")
    assert full.accept[0].reason == 'knöwn, "quoted"'
    assert pickle.loads(pickle.dumps(full)) == full


def test_the_results_file_has_every_option_but_where_the_answer_goes():
    written = to_json(from_command_line(EVERYTHING))
    assert json.loads(json.dumps(written)) == written
    assert written["precision"] == ["bf16", "amp-fp16"]
    assert written["data"] == "rows.jsonl"
    assert written["origins"]["lr"] == "command line"
    assert set(Settings.__dataclass_fields__) - set(written) == {"json", "junitxml", "quiet", "list_only", "report"}


KNOWN = "fp64, fp32, tf32, bf16, fp16, amp-bf16, amp-fp16, pure-fp16"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "bf61"}, f"--precision: unknown precision 'bf61'; did you mean 'bf16'? (known: {KNOWN})"),
        ({"precision": "bf16,"}, "--precision: has an empty item in 'bf16,'"),
        ({"attn": "edger"}, ("--attn: unknown attention implementation 'edger'; did you mean 'eager'? "
         "(known: default, eager, sdpa, flash_attention_2, flex_attention)")),
        ({"task": "causal"}, ("--task: unknown task 'causal'; did you mean 'causal-lm'? "
         "(known: auto, causal-lm, sequence-classification, token-classification)")),
        ({"steps": "0"}, "--steps: must be a whole number of at least 1, not '0'"),
        ({"steps": "1.5"}, "--steps: must be a whole number of at least 1, not '1.5'"),
        ({"seed": "-1"}, "--seed: must be a whole number from 0 to 4294967295, not '-1'"),
        ({"seq_len": "1"}, "--seq-len: must be a whole number of at least 2, not '1'"),
        ({"lr": "nan"}, "--lr: must be a number above 0, not 'nan'"),
        ({"lr": "inf"}, "--lr: must be a number above 0, not 'inf'"),
        ({"max_grad_norm": "0"}, "--max-grad-norm: must be a number above 0, not '0'"),
        ({"max_time": "soon"}, "--max-time: must be a number above 0, not 'soon'"),
        ({"optimizer": "adamww"}, "--optimizer: unknown optimizer 'adamww'; did you mean 'adamw'? (known: adamw, adam, sgd)"),
        ({"train_scope": "last"}, "--train-scope: 'last' needs a number of blocks of at least 1, as in last:2"),
        ({"train_scope": "last:0"}, "--train-scope: 'last:0' needs a number of blocks of at least 1, as in last:2"),
        ({"train_scope": "fulll"}, ("--train-scope: unknown scope 'fulll'; did you mean 'full'? "
         "(known: auto, full, head, last:K, lora)")),
        ({"checks": "forward.finit"}, "--checks: no check matches 'forward.finit'; did you mean 'forward.finite'?"),
        ({"skip": "train"}, "--skip: no check matches 'train'; did you mean 'train.*'?"),
        ({"device": "cuda:x"},
         "--device: 'cuda:x' is no device; write auto, cpu, a kind such as cuda, or an index as in cuda:0"),
        ({"device": "cuda:0,cpu:1"},
         "--device: 'cuda:0,cpu:1' is no device; write auto, cpu, a kind such as cuda, or an index as in cuda:0"),
        ({"workers": "many"}, "-n: must be 'auto' or a whole number of at least 0, not 'many'"),
        ({"subjects": ["a"], "names": ["a", "b"]}, "--name: 2 names for 1 subjects; give one per SUBJECT"),
        ({"subjects": ["a"], "names": ["a b"]}, "--name: 'a b' is no name; use letters, digits, '.', '_' and '-'"),
    ],
)  # fmt: skip
def test_words_for_what_the_command_line_cannot_say(given, message):
    with pytest.raises(BadInputError) as caught:
        from_command_line(given)
    assert str(caught.value) == message


def test_words_name_the_pytest_option():
    with pytest.raises(BadInputError, match=r"^--numerics-steps: must be a whole number of at least 1, not '0'$"):
        from_pytest(pytest_config("--numerics-steps=0"))


KEYED = "{file}: [tool.numerics-suite] "
ENTRY = "{file}: [[tool.numerics-suite.accept]], entry 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 0", KEYED + "steps: must be a whole number of at least 1, not '0'"),
        ("steps = true", KEYED + "steps: must be text or a number, not True"),
        ("precision = [1]", KEYED + "precision: must be a list of texts, not [1]"),
        ('diagnose = "no"', KEYED + "diagnose: must be true or false, not 'no'"),
        ('accept = "x"', ("{file}: [[tool.numerics-suite.accept]] must be an array of tables: "
         "write [[tool.numerics-suite.accept]]")),
        ('[[tool.numerics-suite.accept]]\ncheck = "load.finite"', ENTRY + ": 'reason' is missing"),
        ('[[tool.numerics-suite.accept]]\ncheck = "load.finit"\nreason = "r"',
         ENTRY + ": check: no check matches 'load.finit'; did you mean 'load.finite'?"),
        ('[[tool.numerics-suite.accept]]\ncheck = "load.*"\nreason = " "', ENTRY + ": reason: must not be empty"),
        ('[[tool.numerics-suite.accept]]\ncheck = "load.*"\nreason = "r"\ntransformers = "5.x"',
         ENTRY + ": transformers: must be a version specifier as in '>=5.8,<5.9', not '5.x'"),
        ('[[tool.numerics-suite.accept]]\ncheck = "load.*"\nreason = "r"\nuntil = "soon"',
         ENTRY + ": until: must be a date as in 2026-12-31, not 'soon'"),
    ],
)  # fmt: skip
def test_words_for_what_pyproject_cannot_say(text, message):
    file = write(text)
    with pytest.raises(BadInputError) as caught:
        from_command_line({})
    assert str(caught.value) == message.format(file=file)


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        (
            "max-exampels = 3",
            KEYED + "max-exampels: unknown key; did you mean 'max-examples'? (known: subjects, names,",
        ),
        ("json = 'x'", KEYED + "json: unknown key"),
        ("= 3", "{file}: not valid TOML: "),
        (
            '[[tool.numerics-suite.accept]]\ncheck = "load.*"\nreason = "r"\nunitl = 2026-01-01',
            ENTRY + ": unknown key 'unitl'; did you mean 'until'? (known: check, reason,",
        ),
        (
            '[[tool.numerics-suite.accept]]\ncheck = "load.*"\nreason = "r"\ncause = "overflows"',
            ENTRY + ": cause: unknown cause 'overflows'; did you mean 'overflow'? (known: uninitialised-parameters,",
        ),
    ],
)
def test_words_for_unknown_keys(text, beginning):
    file = write(text)
    with pytest.raises(BadInputError) as caught:
        from_command_line({})
    assert str(caught.value).startswith(beginning.format(file=file))
    assert "\n" not in str(caught.value)


def failed(check="train.finite", cause="overflow", status="failed", **cell) -> CheckResult:
    named = {"subject": "m", "precision": "fp16", "attn": "eager", "device": "cpu", "task": "causal-lm", **cell}
    finding = Finding(cause=cause, title="t", explanation="e") if status in {"failed", "accepted"} else None
    return CheckResult(check=check, cell=Cell(**named), status=status, finding=finding)


def entry(**fields) -> AcceptEntry:
    return AcceptEntry(**{"check": "train.*", "reason": "known", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"check": "train.finite"},
        {"subject": "m", "precision": "fp16", "attn": "eager", "cause": "overflow"},
        {"transformers": ">=5.8,<5.9"},
        {"until": TODAY},
    ],
)
def test_an_entry_accepts_what_it_selects(fields):
    assert matches(entry(**fields), failed(), "5.8.1", TODAY)
    assert stale([entry(**fields)], [failed(status="accepted")], TODAY, "5.8.1") == []


@pytest.mark.parametrize(
    "fields",
    [
        {"check": "load.*"},
        {"subject": "other"},
        {"precision": "bf16"},
        {"attn": "sdpa"},
        {"cause": "underflow"},
        {"transformers": "<5.8"},
        {"until": dt.date(2026, 5, 31)},
    ],
)
def test_an_entry_accepts_nothing_else(fields):
    assert not matches(entry(**fields), failed(), "5.8.1", TODAY)


def test_a_prerelease_is_in_the_specifier():
    assert matches(entry(transformers=">=5.8"), failed(), "5.9.0.dev0", TODAY)


@pytest.mark.parametrize("status", ["passed", "skipped", "error"])
def test_an_entry_that_matched_no_finding_fails(status):
    assert stale([entry(precision="fp16")], [failed(status=status)], TODAY, "5.8.1") == [
        (
            "accept entry (check=train.*, precision=fp16) matched no finding of this run: "
            "remove it, or correct what it selects"
        )
    ]


def test_an_entry_past_its_date_fails_even_where_it_would_match():
    assert stale([entry(until=dt.date(2026, 5, 31))], [failed()], TODAY, "5.8.1") == [
        "accept entry (check=train.*, until=2026-05-31) ended on 2026-05-31: repair the finding or give a later date"
    ]


def test_an_entry_for_other_releases_is_not_asked_to_match():
    assert stale([entry(transformers="<5.8")], [failed(status="passed")], TODAY, "5.8.1") == []


def test_a_key_may_be_spelt_as_its_flag_or_twin_or_with_underscores():
    write('max_examples = 3\nsubject = ["fixture:glm-tiny"]\nname = ["x"]')
    settings = from_command_line({})
    assert (settings.max_examples, settings.subjects, settings.names) == (3, ("fixture:glm-tiny",), ("x",))
