"""ChatGLM of 2023 with several defects at once: each is named, each remedy is judged by its own, and what follows has one root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unit.test_chatglm_2023 import CAUSAL, CLASSIFIER, changed
from unit.test_consequences import answered
from unit.test_pipeline import OLD

from numerics_suite.core.records import Finding, RunResult
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.session import SuiteSession

HALF, SKIPPED = {"legacy_half_head": True}, {"legacy_skip_head_init": True}
CLASSIFY = {"task": "sequence-classification"}


def run_of(folder: str, checks: tuple[str, ...], *precision: str, **changes: object) -> RunResult:
    return answered(
        SuiteSession(
            Settings(
                **{
                    "subjects": (folder,),
                    "precision": precision,
                    "attn": ("default",),
                    "checks": checks,
                    "device": "cpu",
                    "max_examples": 2,
                    "seq_len": 12,
                    "trust_remote_code": True,
                    "origins": {"precision": "command line"},
                    **changes,
                }
            )
        )
    )


def findings(run: RunResult) -> dict[str, Finding]:
    assert not [each.reason for each in run.checks if each.status == "error"]
    return {each.check: each.finding for each in run.checks if each.finding is not None}


def verified(finding: Finding) -> dict[str, tuple[str, ...]]:
    return {remedy.name: remedy.together for remedy in finding.remedies if remedy.verified}


def effect(finding: Finding, name: str) -> str:
    return next(remedy.effect for remedy in finding.remedies if remedy.name == name)


def with_old_tokenizer(folder: str) -> str:
    """The checkpoint with a tokenizer of its own code that raises in every release since 4.45."""
    place = Path(folder)
    (place / "tokenizer.json").unlink()
    (place / "tokenization_old.py").write_text(OLD.format(name="OldTokenizer", more="", first=""), "utf-8")
    written = {
        "tokenizer_class": "OldTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_old.OldTokenizer", None]},
    }
    (place / "tokenizer_config.json").write_text(json.dumps(written), "utf-8")
    (place / "special_tokens_map.json").unlink(missing_ok=True)
    return folder


def test_a_half_head_is_the_root_of_every_exception_that_it_ends_in(tmp_path):
    checks = ("load.dtype", "inputs.ids-dtype", "inputs.mask-dtype", "forward.finite", "train.finite")
    found = findings(run_of(changed(tmp_path, CLASSIFIER, **HALF), checks, "bf16"))
    root = found.pop("load.dtype")
    assert (root.cause, verified(root)) == ("low-precision-section", {"cast-after-loading": ()})
    assert root.evidence["confidence"] == "high: seen, not concluded"
    assert "change its code, or cast after every load" in str(root.evidence["the class"])
    assert set(found) == set(checks[1:])
    assert {(each.cause, str(each.consequence_of).partition("/")[0]) for each in found.values()} == {
        ("model-raises", "load.dtype")
    }


@pytest.mark.parametrize("rest", ["config.torch_dtype", "torch.get_default_dtype()"])
def test_the_line_that_names_half_is_told_with_what_to_write(rest, tmp_path):
    """As the rest of the file builds; written so, the checkpoint passes, saved and loaded again too."""
    own = "torch.half if config.legacy_half_head else torch.get_default_dtype()"
    folder = changed(tmp_path, CLASSIFIER, code=(own, "torch.half"))
    code = Path(folder, "modeling_chatglm.py")
    if rest.startswith("config"):
        code.write_text(f"# builds in config.torch_dtype\n{code.read_text('utf-8')}", "utf-8")
    told = str(findings(run_of(folder, ("load.dtype",), "bf16"))["load.dtype"].evidence["the class"])
    line = next(at for at, text in enumerate(code.read_text("utf-8").splitlines(), 1) if "dtype=torch.half" in text)
    assert f"write dtype={rest} for dtype=torch.half at modeling_chatglm.py:{line}, which" in told
    code.write_text(code.read_text("utf-8").replace("dtype=torch.half", f"dtype={rest}"), "utf-8")
    assert findings(run_of(folder, ("load.dtype", "load.roundtrip"), "bf16")) == {}


def test_a_line_that_would_not_help_is_not_told(tmp_path):
    """The class casts its head a second time."""
    own = "torch.half if config.legacy_half_head else torch.get_default_dtype()"
    folder = changed(tmp_path, CLASSIFIER, code=(own, "torch.half"))
    code = Path(folder, "modeling_chatglm.py")
    text = code.read_text("utf-8")
    assert text.count("        self.post_init()") >= 1
    at = text.rindex("        self.post_init()")
    code.write_text(f"{text[:at]}        self.classifier_head.half()\n{text[at:]}", "utf-8")
    told = str(findings(run_of(folder, ("load.dtype",), "bf16"))["load.dtype"].evidence["the class"])
    assert told.endswith("in float16 whatever is asked for: change its code, or cast after every load")


def test_each_precision_has_a_root_of_its_own(tmp_path):
    run = run_of(changed(tmp_path, CLASSIFIER, **HALF), ("load.dtype", "forward.finite"), "bf16", "fp32")
    ends = [each for each in run.checks if each.check == "forward.finite"]
    assert len(ends) == 2
    for each in ends:
        assert each.finding.consequence_of == each.id.replace("forward.finite", "load.dtype")


@pytest.mark.parametrize("defects", [HALF, SKIPPED, {}], ids=["half head", "head without values", "sound"])
def test_a_tokenizer_is_judged_where_the_model_cannot_run(defects, tmp_path):
    name, new = (CAUSAL, CLASSIFY) if defects == SKIPPED else (CLASSIFIER, {})
    folder = with_old_tokenizer(changed(tmp_path, name, **defects))
    found = findings(run_of(folder, ("load.dtype", "load.head-init", "inputs.pipeline"), "bf16", **new))
    finding = found.pop("inputs.pipeline")
    assert (finding.cause, verified(finding)["fix-tokenizer"]) == ("tokenizer-incompatible", ())
    assert ("a finding of its own" in effect(finding, "fix-tokenizer")) == bool(defects)
    assert len(found) == bool(defects)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_new_head_without_values_that_comes_back_in_half(precision, tmp_path):
    """From 5.0 on it is made in float16 too. Before, a float32 head loses bits on its trip, which a cast alone does not bring back."""
    folder = changed(tmp_path, CAUSAL, **HALF, **SKIPPED)
    found = findings(run_of(folder, ("load.dtype", "load.head-init", "load.roundtrip"), precision, **CLASSIFY))
    assert verified(found.pop("load.head-init")) == {"init-head": ()}
    ((check, finding),) = found.items()
    assert (finding.cause, finding.consequence_of) == ("low-precision-section", None)
    assert verified(finding) == {"cast-after-loading": ()}
    told = effect(finding, "cast-after-loading")
    assert told.endswith("beside init-head (load.head-init), a finding of its own")
    assert ("with the stored values" in told) == (check == "load.roundtrip" and precision == "fp32")
    assert "builds classifier_head.weight, classifier_head.bias in float16" in str(finding.evidence["the class"])


def test_a_remedy_that_hides_the_defect_itself_is_refused(tmp_path):
    """The head's values are the cause here, so no other remedy counts as long as they stay."""
    folder = changed(tmp_path, CAUSAL, **SKIPPED)
    found = findings(run_of(folder, ("forward.finite", "train.finite"), "fp32", **CLASSIFY))
    assert {each.cause for each in found.values()} == {"uninitialised-parameters"}
    assert [verified(each) for each in found.values()] == [{"init-head": ()}] * 2


def test_in_pure_float16_head_and_eps_cure_together(tmp_path):
    folder = changed(tmp_path, CAUSAL, **HALF, **SKIPPED)
    found = findings(run_of(folder, ("load.head-init", "train.finite"), "pure-fp16", **CLASSIFY))
    pair = {"init-head": ("larger-optimizer-eps",), "larger-optimizer-eps": ("init-head",)}
    assert [verified(each) for each in found.values()] == [pair, pair]
    assert "optimizer-underflow is behind it" in effect(found["load.head-init"], "init-head")


def test_what_is_left_once_the_head_is_cured_is_the_eps(tmp_path):
    folder = changed(tmp_path, CLASSIFIER, **HALF)
    found = findings(run_of(folder, ("load.*", "forward.finite", "train.finite"), "pure-fp16"))
    assert list(found) == ["train.finite"]
    assert found["train.finite"].cause == "optimizer-underflow"
    assert "larger-optimizer-eps" in verified(found["train.finite"])
