"""`inputs.pipeline`: a tokenizer that raises, a missing pad token, padding that moves answers; and `forward.pooling`'s shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mutants.article_checkpoints import changed
from unit.test_clean_models import statuses

from numerics_suite.cli.main import main
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.subjects.load import load
from numerics_suite.subjects.resolve import resolve

OLD = '''
from transformers import PreTrainedTokenizer


class {name}(PreTrainedTokenizer):
    """A byte is a token; written before transformers handed a padding_side to _pad (4.45)."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        super().__init__(padding_side="left", pad_token="<pad>", eos_token="<pad>", **kwargs)

    @property
    def vocab_size(self):
        return 257

    def get_vocab(self):
        return {{**{{chr(byte): byte for byte in range(256)}}, "<pad>": 740}}

    def _tokenize(self, text, **kwargs):
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return 740 if token == "<pad>" else ord(token)

    def _convert_id_to_token(self, index):
        return "<pad>" if index == 740 else chr(index)

    def save_vocabulary(self, folder, filename_prefix=None):
        return ()

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None, pad_to_multiple_of=None, return_attention_mask=None{more}):
        {first}return super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, return_attention_mask=return_attention_mask
        )
'''


def edited(folder: Path, name: str, **changes: object) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def copy_of(name: str, folder: Path, *, config: dict | None = None, tokenizer: dict | None = None) -> Path:
    shutil.copytree(fixture_path(name), folder)
    edited(folder, "config.json", **(config or {}))
    edited(folder, "tokenizer_config.json", **(tokenizer or {}))
    return folder


def with_old_tokenizer(folder: Path, *, more: str = "", first: str = "") -> Path:
    """A classifier whose tokenizer is the checkpoint's own code; each copy has a class and file of its own name."""
    shutil.copytree(fixture_path("glm-tiny-classifier"), folder)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).unlink()
    name = f"Old{folder.name.title()}"
    (folder / f"tokenization_{folder.name}.py").write_text(
        OLD.format(name=name, more=more, first=first), encoding="utf-8"
    )
    named = {"AutoTokenizer": [f"tokenization_{folder.name}.{name}", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "auto_map": named}), encoding="utf-8"
    )
    return folder


def result(folder: Path, check: str = "inputs.pipeline", *more: str) -> dict:
    """The one answer of the check, from the command line."""
    results = folder.parent / "results.json"
    arguments = [
        "--precision",
        "fp32",
        "--attn",
        "eager",
        "-n",
        "0",
        "--max-examples",
        "2",
        "--seq-len",
        "12",
        "--quiet",
    ]
    main(["check", str(folder), "--checks", check, *arguments, *more, "--json", str(results)])
    (answer,) = json.loads(results.read_text(encoding="utf-8"))["checks"]
    return answer


def told(answer: dict) -> tuple[str, dict[str, bool | None]]:
    assert answer["status"] == "failed", answer["reason"]
    return answer["finding"]["cause"], {each["name"]: each["verified"] for each in answer["finding"]["remedies"]}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- the tokenizer raises --------------------------------------------------------------------------------------------


def test_a_tokenizer_of_an_older_release_is_named_and_mended(tmp_path):
    folder = with_old_tokenizer(tmp_path / "older")
    answer = result(folder, "inputs.pipeline", "--trust-remote-code")
    cause, remedies = told(answer)
    assert (cause, remedies["fix-tokenizer"]) == ("tokenizer-incompatible", True)
    assert "_pad() got an unexpected keyword argument 'padding_side'" in answer["finding"]["evidence"]["exception"]
    (effect,) = [each["effect"] for each in answer["finding"]["remedies"] if each["name"] == "fix-tokenizer"]
    assert effect.startswith(
        "parameter padding_side added to _pad: it pads on that side: exceptions of the tokenizer: 1 before, now 0"
    )


def test_one_that_takes_the_keyword_is_quiet(tmp_path):
    folder = with_old_tokenizer(tmp_path / "newer", more=", padding_side=None")
    assert result(folder, "inputs.pipeline", "--trust-remote-code")["status"] == "passed"


def test_no_remedy_is_verified_that_does_not_work(tmp_path):
    folder = with_old_tokenizer(
        tmp_path / "broken", more=", padding_side=None", first='raise KeyError("no such side")\n        '
    )
    cause, remedies = told(result(folder, "inputs.pipeline", "--trust-remote-code"))
    assert (cause, remedies["fix-tokenizer"]) == ("tokenizer-incompatible", None)


def test_a_tokenizers_own_code_runs_on_the_users_word_only(tmp_path):
    folder = with_old_tokenizer(tmp_path / "unasked", first="raise SystemExit(9)\n        ")
    answer = result(folder)
    assert answer["status"] == "skipped"
    assert "--trust-remote-code" in answer["reason"]


def test_a_class_that_this_release_lacks_is_read_from_its_json(tmp_path):
    from unittest.mock import patch

    from transformers import AutoTokenizer

    folder = copy_of("glm-tiny", tmp_path / "mine")

    def refuse(*_: object, **__: object) -> None:
        reason = "Tokenizer class NobodysTokenizer does not exist"
        raise ValueError(reason)

    with patch.object(AutoTokenizer, "from_pretrained", refuse):
        answer = result(folder)
    cause, remedies = told(answer)
    assert (cause, remedies["fix-tokenizer"]) == ("tokenizer-incompatible", True)


def test_a_package_that_is_not_installed_is_no_finding(tmp_path):
    from unittest.mock import patch

    from transformers import AutoTokenizer

    folder = copy_of("glm-tiny", tmp_path / "mine")
    with patch.object(AutoTokenizer, "from_pretrained", side_effect=ImportError("needs sentencepiece")):
        answer = result(folder)
    assert (answer["status"], "sentencepiece" in answer["reason"]) == ("skipped", True)


def test_a_remedy_that_needs_a_missing_package_is_not_verified(tmp_path):
    from unittest.mock import patch

    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = copy_of("glm-tiny", tmp_path / "mine")
    with (
        patch.object(AutoTokenizer, "from_pretrained", side_effect=ValueError("no such class")),
        patch.object(PreTrainedTokenizerFast, "from_pretrained", side_effect=ImportError("needs protobuf")),
    ):
        cause, remedies = told(result(folder))
    assert (cause, remedies["fix-tokenizer"]) == ("tokenizer-incompatible", None)


# --- no pad token ----------------------------------------------------------------------------------------------------

NONE = {"pad_token": None}


@pytest.mark.parametrize("tokenizer", [NONE, {}])
def test_a_classifier_without_a_pad_token(tokenizer, tmp_path):
    folder = copy_of("glm-tiny-classifier", tmp_path / "mine", config={"pad_token_id": None}, tokenizer=tokenizer)
    _without_map(folder)
    cause, remedies = told(result(folder))
    assert (cause, remedies) == ("no-pad-token", {"set-pad-token": True})


def _without_map(folder: Path) -> None:
    """Older releases read the pad token from a second file too."""
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.slow
def test_its_other_checks_take_a_row_at_a_time(tmp_path):
    folder = copy_of("glm-tiny-classifier", tmp_path / "mine", config={"pad_token_id": None})
    for check in ("forward.padding", "forward.pooling", "forward.batch", "train.finite", "train.labels"):
        assert result(folder, check)["status"] == "passed", check


def test_a_pad_token_of_the_config_is_enough(tmp_path):
    folder = copy_of("glm-tiny-classifier", tmp_path / "mine", tokenizer=NONE)
    _without_map(folder)
    assert result(folder)["status"] == "passed"


@pytest.mark.parametrize(
    ("fixture", "more"), [("glm-tiny", ()), ("glm-tiny-classifier", ("--batch-size", "1"))], ids=["language", "row"]
)
def test_where_nothing_is_padded_it_is_a_skip(fixture, more, tmp_path):
    folder = copy_of(fixture, tmp_path / "mine", config={"pad_token_id": None}, tokenizer=NONE)
    _without_map(folder)
    answer = result(folder, "inputs.pipeline", *more)
    assert (answer["status"], "pad" in answer["reason"]) == ("skipped", True)


# --- the side on which the tokenizer pads ----------------------------------------------------------------------------


def test_a_classifier_that_reads_the_last_column_padded_on_the_right(tmp_path):
    folder = copy_of("chatglm-tiny-classifier", tmp_path / "right", tokenizer={"padding_side": "right"})
    answer = result(folder, "inputs.pipeline", "--trust-remote-code")
    cause, remedies = told(answer)
    assert (cause, remedies["fix-padding"]) == ("padding-leak", True)
    assert answer["finding"]["evidence"]["side"] == "right"
    assert answer["finding"]["evidence"]["logits move by"] > 1e-3
    # Its family declares the left side only, so the law on padding has nothing to say.
    assert result(folder, "forward.padding", "--trust-remote-code")["status"] == "passed"


def test_pad_tokens_of_two_minds(tmp_path):
    """The tokenizer pads by one token and the classifier looks for another."""
    folder = copy_of(
        "glm-tiny-classifier", tmp_path / "mine", config={"pad_token_id": 1}, tokenizer={"padding_side": "right"}
    )
    cause, remedies = told(result(folder))
    assert (cause, remedies["set-pad-token"]) == ("padding-leak", True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fixture", ["glm-tiny", "glm4-tiny-classifier"])
def test_either_side_is_quiet_where_it_moves_nothing(fixture, side, tmp_path):
    folder = copy_of(fixture, tmp_path / "mine", tokenizer={"padding_side": side})
    answer = result(folder)
    assert answer["status"] == "passed"
    assert answer["measurements"]["padding-moves"] <= 1e-10


# --- the shape of a classifier's logits ------------------------------------------------------------------------------

POOLED = "body.last_hidden_state[:, -1]"
CLASS = "class ChatGLMForSequenceClassification("
BY_TOKEN = f"""class ChatGLMForTokenClassification(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config, output_layer=False)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, output_hidden_states=None, **_):
        body = self.transformer(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.classifier_head(body.last_hidden_state)
        return SequenceClassifierOutputWithPast(logits=logits, hidden_states=body.hidden_states)


{CLASS}"""


def test_logits_for_each_token_where_rows_were_meant(tmp_path):
    folder = changed(tmp_path / "unpooled", "chatglm-tiny-classifier", code=(POOLED, POOLED.removesuffix("[:, -1]")))
    answer = result(folder, "forward.pooling", "--trust-remote-code")
    cause, remedies = told(answer)
    assert (cause, remedies) == ("wrong-output-shape", {"fix-config": None})
    assert "must be" not in answer["finding"]["title"]


def test_logits_for_each_token_are_no_error_of_the_laws(tmp_path):
    folder = changed(tmp_path / "unpooled", "chatglm-tiny-classifier", code=(POOLED, POOLED.removesuffix("[:, -1]")))
    found = statuses(str(folder), ("inputs.pipeline", "forward.padding"), "fp32", trust_remote_code=True)
    assert found == dict.fromkeys(found, "passed")


def test_a_config_that_names_the_other_class_is_fixed(tmp_path):
    folder = changed(tmp_path / "misnamed", "chatglm-tiny-classifier", code=(CLASS, BY_TOKEN))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {
        **config["auto_map"],
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForTokenClassification",
    }
    edited(folder, "config.json", auto_map=classes)
    cause, remedies = told(result(folder, "forward.pooling", "--trust-remote-code"))
    assert (cause, remedies) == ("wrong-output-shape", {"fix-config": True})


def test_the_pad_token_is_asked_of_the_model_itself(tmp_path):
    """One that needs none is not said to lack it: this family reads the last column."""
    folder = copy_of("chatglm-tiny-classifier", tmp_path / "padless", config={"pad_token_id": None})
    subject = resolve(str(folder), trust_remote_code=True)
    assert load(subject, dtype="float32", attn="eager").model.config.pad_token_id is None
    assert result(folder, "inputs.pipeline", "--trust-remote-code")["status"] == "passed"
