"""load.finite, load.tied and load.complete: what is in the files, what is not, and clean files that say nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mutants.article_checkpoints import changed
from mutants.driver import release
from safetensors.torch import load_file, save_file
from unit.test_clean_models import BODY, save, statuses
from unit.test_loading_dtypes import MOE, answer

from numerics_suite.cli.main import main
from numerics_suite.subjects.files import StoredTensor
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.subjects.notes import checkpoint_notes
from numerics_suite.subjects.resolve import resolve
from numerics_suite.subjects.scales import without_scales

TABLE = 'self.register_buffer("inv_freq", rotary_frequencies(config), persistent=True)'
CLASSIFY = {"task": "sequence-classification"}


# --- names and shapes in the files ---------------------------------------------------------------------------------


MISTRAL = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "num_labels": 3}


def with_tensors(folder, change):
    """A classifier whose stored tensors are others."""
    folder = Path(save(folder, "MistralForSequenceClassification", "MistralConfig", **MISTRAL))
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("score.weight", "score.modules_to_save.default.weight"),
        ("q_proj.weight", "q_proj.base_layer.weight"),
        ("model.", "_orig_mod.model."),
    ],
)
def test_names_that_a_wrapper_of_training_left(tmp_path, old, new):
    """A model that peft or torch.compile had wrapped, saved as if it were the plain one."""
    folder = with_tensors(tmp_path, lambda held: {name.replace(old, new): value for name, value in held.items()})
    finding = answer(folder, "load.complete", "fp32")[0].finding
    assert (finding.cause, finding.evidence["measurement"]) == ("missing-weights", "renamed")
    assert new in finding.title
    stored, looked_for = finding.evidence["stored as"], finding.evidence["looked for as"]
    assert stored.replace(new, old) == looked_for
    assert set(finding.parameters) == {name for name in finding.parameters if old in name}


def test_tensors_that_sharded_training_left_empty(tmp_path):
    """DeepSpeed's third stage, saved without gathering: names without values."""
    folder = with_tensors(
        tmp_path, lambda held: {name: torch.empty(0) if "mlp" in name else value for name, value in held.items()}
    )
    finding = answer(folder, "load.complete", "fp32")[0].finding
    assert (finding.cause, len(finding.parameters)) == ("lost-weights", 6)
    told = {name: finding.evidence[name] for name in ("stored shape", "built shape", "stored without any element")}
    assert told == {"stored shape": "[0]", "built shape": told["built shape"], "stored without any element": 6}


# --- buffers that nobody wrote -----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["torch.arange(8.0)", "torch.arange(8)"])
def test_a_buffer_that_the_load_leaves_unwritten(tmp_path, made):
    own = f'{TABLE}\n        self.register_buffer("window", {made}, persistent=False)'
    result, remedies = answer(
        changed(tmp_path / tmp_path.name, "chatglm-tiny", code=(TABLE, own)), "load.finite", "fp32"
    )
    if release() < (5,):  # nothing is built on the meta device there, so the constructor's values stay
        assert result.status == "passed"
        return
    assert result.finding.cause == "uninitialised-buffer"
    assert result.finding.parameters == ("transformer.rotary_pos_emb.window",)
    assert list(remedies) in (["newer-version"], [])


@pytest.mark.skipif(release() < (5,), reason="nothing is built on the meta device there")
def test_what_an_unwritten_buffer_leaves_says_nothing_of_padding_or_of_the_file(tmp_path):
    made = "self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)"
    own = f'{made}\n        self.register_buffer("scale", torch.arange(8.0), persistent=False)'
    folder = changed(tmp_path / tmp_path.name, "chatglm-tiny", code=(made, own))
    code = folder / "modeling_chatglm.py"
    text = code.read_text("utf-8").replace(
        "self.word_embeddings(input_ids)", "self.word_embeddings(input_ids) * self.scale[1]"
    )
    code.write_text(text, "utf-8")
    found = statuses(str(folder), ("load.*", "inputs.pipeline", "forward.batch"), "fp32", trust_remote_code=True)
    assert {check for check, said in found.items() if said.startswith(("failed", "error"))} == {"load.finite"}
    assert found["forward.batch"] == "skipped"


def test_a_nan_that_the_code_itself_writes_is_not_uninitialised(tmp_path):
    own = f'{TABLE}\n        self.register_buffer("scale", torch.full((2,), float("nan")), persistent=True)'

    def stored(held):
        held["transformer.rotary_pos_emb.scale"] = torch.full((2,), float("nan"))

    folder = changed(tmp_path / tmp_path.name, "chatglm-tiny", code=(TABLE, own), tensors=stored)
    assert answer(folder, "load.finite", "fp32")[0].finding.cause == "corrupt-weights"


# --- tied embeddings ---------------------------------------------------------------------------------------------


def test_a_merged_adapter_on_a_tied_output_embedding(tmp_path):
    folder = changed(tmp_path / tmp_path.name, "glm-tiny", config={"tie_word_embeddings": True})
    result, remedies = answer(folder, "load.tied", "fp32")
    assert result.finding.cause == "untied-weights"
    assert result.finding.evidence["stored"].startswith("lm_head.weight differs from model.embed_tokens.weight in ")
    assert remedies["fix-config"].verified is True, remedies["fix-config"].effect
    assert "tie_word_embeddings False (was True)" in remedies["fix-config"].effect


def test_the_same_of_a_family_without_a_definition(tmp_path):
    config = {**BODY, "intermediate_size": 64, "tie_word_embeddings": False}
    save(tmp_path, "LlamaForCausalLM", "LlamaConfig", **config)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))
    result, remedies = answer(tmp_path, "load.tied", "fp32")
    assert result.finding.cause == "untied-weights"
    assert remedies["fix-config"].verified is True, remedies["fix-config"].effect


@pytest.mark.parametrize("stored", ["once", "twice the same"])
def test_tied_embeddings_that_are_stored_alike(tmp_path, stored):
    def alike(held):
        head = held.pop("lm_head.weight")
        if stored != "once":
            held["lm_head.weight"] = held["model.embed_tokens.weight"].clone().reshape(head.shape)

    folder = changed(tmp_path / tmp_path.name, "glm-tiny", config={"tie_word_embeddings": True}, tensors=alike)
    assert answer(folder, "load.tied", "fp32")[0].status == "passed"


def test_a_new_head_under_a_name_of_its_own(tmp_path):
    folder = changed(tmp_path / tmp_path.name, "chatglm-tiny")
    code = folder / "modeling_chatglm.py"
    code.write_text(code.read_text("utf-8").replace("classifier_head", "topics"), "utf-8")
    found = statuses(str(folder), ("load.complete", "load.head-init"), "fp32", trust_remote_code=True, **CLASSIFY)
    assert found == dict.fromkeys(found, "passed")
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"legacy_skip_head_init": True}), "utf-8")
    said = statuses(str(folder), ("load.head-init",), "fp32", trust_remote_code=True, **CLASSIFY)["load.head-init"]
    assert said == "failed: never initialised: topics.bias, topics.weight"


# --- adapters ----------------------------------------------------------------------------------------------------


def adapter(folder, *, task_type="SEQ_CLS", head=False, trained=True):
    """A LoRA for a classifier on `glm-tiny`, as peft saves it, with or without its head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(fixture_path("glm-tiny"), num_labels=3)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type=task_type, modules_to_save=["score"] if head else None
    )
    model = get_peft_model(base, config)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    if not head:  # peft adds the head of its own task types; one of another name, or of no task type, it forgets
        file = folder / "adapter_model.safetensors"
        held = {name: value for name, value in load_file(file).items() if "score" not in name}
        save_file(held, file, metadata={"format": "pt"})
        said = json.loads((folder / "adapter_config.json").read_text())
        said["modules_to_save"] = None
        (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_an_adapter_without_the_head_that_it_was_trained_with(tmp_path, task_type):
    result, remedies = answer(adapter(tmp_path, task_type=task_type), "load.complete", "fp32")
    assert result.finding.cause == "lost-head"
    assert result.finding.parameters[0].endswith("score.weight")
    assert remedies["save-head"].verified is True, remedies["save-head"].effect
    assert remedies["save-head"].effect.startswith("saved with modules_to_save=['score'] and loaded again")
    assert "the trained one is in no file" in remedies["save-head"].effect


def test_the_stored_head_of_a_base_is_not_the_one_that_the_adapter_was_trained_with(tmp_path):
    said = {
        "base_model_name_or_path": str(fixture_path("glm-tiny-classifier")),
        "modules_to_save": ["classifier", "score"],
    }
    folder = adapter(tmp_path)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, **said}))
    assert answer(folder, "load.complete", "fp32")[0].finding.cause == "lost-head"


def test_an_adapter_with_its_head_and_one_that_never_had_any(tmp_path):
    assert answer(adapter(tmp_path / "with", head=True), "load.complete", "fp32")[0].status == "passed"
    # Trained as a language model and now fine-tuned as a classifier: its head is new and was never lost.
    language = adapter(tmp_path / "without")
    said = json.loads((language / "adapter_config.json").read_text())
    (language / "adapter_config.json").write_text(json.dumps({**said, "task_type": "CAUSAL_LM"}))
    assert answer(language, "load.complete", "fp32", **CLASSIFY)[0].status == "passed"


# --- quantised weights -------------------------------------------------------------------------------------------


def fp8(folder, *, scales):
    """`glm4-tiny` in float8 with a scale for each block of 16 by 16; `scales` says of which weights it is stored."""
    shutil.copytree(fixture_path("glm4-tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    (folder / "config.json").write_text(json.dumps(config))
    held, kept = load_file(folder / "model.safetensors"), {}
    for name, value in held.items():
        if not name.endswith("proj.weight") or value.dim() != 2:
            kept[name] = value
            continue
        rows, columns = value.shape
        blocks = value.float().view(rows // 16, 16, columns // 16, 16)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        kept[name] = (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn)
        if scales(name):
            kept[f"{name}_scale_inv"] = scale.view(rows // 16, columns // 16).float()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("scales", "lacking"), [(lambda _: False, 15), (lambda name: "layers.1." not in name, 5)], ids=["none", "some"]
)
def test_quantised_weights_without_their_scales(tmp_path, scales, lacking):
    result, remedies = answer(fp8(tmp_path / "fp8", scales=scales), "load.complete")
    assert result.finding.cause == "missing-weights"
    assert "quantised weights are stored without their scales" in result.finding.title
    assert result.finding.evidence["measured"] >= lacking
    assert "reload-weights" in remedies


def test_quantised_weights_with_their_scales(tmp_path):
    assert answer(fp8(tmp_path / "fp8", scales=lambda _: True), "load.complete")[0].status in {"passed", "skipped"}


LAYOUTS = {
    "fp8": {"q.weight": ("float8_e4m3fn", (8, 8)), "q.weight_scale_inv": ("float32", (1, 1))},
    "gptq": {"q.qweight": ("int32", (1, 8)), "q.scales": ("float16", (1, 8)), "q.qzeros": ("int32", (1, 1))},
    "bitsandbytes": {"q.weight": ("uint8", (32, 1)), "q.weight.absmax": ("uint8", (2,))},
    "bitsandbytes 8": {"q.weight": ("int8", (8, 8)), "q.SCB": ("float32", (8,)), "q.weight_format": ("uint8", ())},
    "compressed-tensors": {"q.weight_packed": ("int32", (8, 1)), "q.weight_scale": ("bfloat16", (8, 1))},
    "mxfp4": {
        "mlp.experts.down_proj_blocks": ("uint8", (4, 8, 2, 16)),
        "mlp.experts.down_proj_scales": ("uint8", (4, 8, 2)),
        "mlp.experts.gate_up_proj_blocks": ("uint8", (4, 8, 2, 16)),
        "mlp.experts.gate_up_proj_scales": ("uint8", (4, 8, 2)),
    },
    "chatglm": {"q.weight": ("int8", (8, 4)), "q.weight_scale": ("float16", (8,))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_quantised_weights(layout):
    stored = {**LAYOUTS[layout], "norm.weight": ("bfloat16", (8,)), "lm_head.weight": ("bfloat16", (8, 8))}
    method = layout.partition(" ")[0]
    config = {} if method == "chatglm" else {"quantization_config": {"quant_method": method}}
    assert without_scales(stored, config) == ()
    scale = next(name for name in stored if any(part in name for part in ("scale", "SCB", "absmax")))
    assert without_scales({name: header for name, header in stored.items() if name != scale}, config)


def test_layouts_that_have_no_scale_by_design():
    sparse = {"q.bitmask": ("uint8", (8, 1)), "q.compressed": ("bfloat16", (9,))}
    assert without_scales(sparse, {"quantization_config": {"quant_method": "compressed-tensors"}}) == ()
    assert without_scales({"q.weight": ("float8_e4m3fn", (8, 8))}, {}) == ()
    unknown = {"quantization_config": {"quant_method": "torchao"}}
    assert without_scales({"q.weight": ("int8", (8, 8))}, unknown) == ()


# --- what the plan says ------------------------------------------------------------------------------------------

LEFT = "8 stored tensors (model.layers.46.*) are not loaded by this release and are lost on save"


def with_prediction_layer(folder, *, layers=2):
    """A mixture of experts with a layer for several tokens at once, which transformers leaves out by its number."""
    save(folder, "Glm4MoeForCausalLM", "Glm4MoeConfig", **{**MOE, "num_hidden_layers": layers})
    held = load_file(folder / "model.safetensors")
    own = {name: value for name, value in held.items() if name.startswith("model.layers.0.")}
    extra = {name.replace("layers.0.", "layers.46."): value.clone() for name, value in list(own.items())[:8]}
    save_file({**held, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_stored_tensors_that_the_release_leaves_out_by_design_are_a_line_and_no_finding(tmp_path, capsys):
    folder = with_prediction_layer(tmp_path / "moe")
    assert resolve(str(folder)).notes == (LEFT,)
    assert answer(folder, "load.complete")[0].status == "passed"
    results = tmp_path / "results.json"
    asked = ["check", str(folder), "--precision", "bf16", "--attn", "eager", "--checks", "load.config", "-n", "0"]
    assert main([*asked, "--json", str(results)]) == 0
    assert f"moe: {LEFT}" in capsys.readouterr().out
    (subject,) = json.loads(results.read_text())["subjects"]
    assert subject["notes"] == [LEFT]


def test_layers_that_the_model_has_and_buffers_that_it_computes_are_not_lost():
    name = "model.layers.46.mlp.up_proj.weight"
    stored = {name: StoredTensor(file=None, dtype="bfloat16", shape=(2, 2))}
    assert list(checkpoint_notes(stored, {"num_hidden_layers": 92}, "Glm4MoeForCausalLM")) == []
    assert len(list(checkpoint_notes(stored, {"num_hidden_layers": 46}, "Glm4MoeForCausalLM"))) == 1
    assert list(checkpoint_notes(stored, {"num_hidden_layers": 46}, "Glm4ForCausalLM")) == []
    assert list(checkpoint_notes(stored, {"num_hidden_layers": 46}, None)) == []


def test_an_adapter_that_was_never_trained(tmp_path):
    (note,) = resolve(str(adapter(tmp_path / "fresh", head=True, trained=False))).notes
    assert note == "every lora_B (3) is zero: this adapter was never trained and changes nothing of its base"
    assert resolve(str(adapter(tmp_path / "trained", head=True))).notes == ()
