"""Do the oracles say what the families compute, and do they see and place a model that computes something else?"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
import weakref
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from numerics_suite.definitions import (
    ANSWER,
    OracleUnavailable,
    capture_states,
    exact_inv_freq,
    file_weights,
    first_difference,
    oracle_for,
    rotary_budget,
    rotary_roundoffs,
    run_oracle,
    tensor_weights,
)
from numerics_suite.definitions.glm import Glm
from numerics_suite.definitions.glm4 import Glm4
from numerics_suite.definitions.run import CHUNK_ROWS
from numerics_suite.definitions.trace import agree
from numerics_suite.engine.true_fp64 import run_true_fp64

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numerics_suite.core.records import Task
    from numerics_suite.definitions import OracleRun, Weights

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TASKS: dict[Task, str] = {
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "num_labels": 3,
}


def fill(model: nn.Module) -> None:
    """Weights of a fair size from the names, so that every one of them matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = torch.Generator().manual_seed(sum(map(ord, name)) + len(name))
            noise = torch.randn(parameter.shape, generator=seed) * 0.3
            parameter.copy_(noise + 1 if parameter.ndim == 1 and "norm" in name else noise)


def build(family: str, task: Task = "causal-lm", attn: str = "eager", **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny bf16 model of that family, and its `config.json`."""
    if family == "chatglm":
        package = sys.modules.setdefault("oracle_test_chatglm", types.ModuleType("oracle_test_chatglm"))
        package.__path__ = [str(FIXTURES / "chatglm-tiny")]
        code = importlib.import_module("oracle_test_chatglm.modeling_chatglm")
        raw = json.loads((FIXTURES / "chatglm-tiny" / "config.json").read_text()) | {"num_labels": 3} | changes
        kind = "ForConditionalGeneration" if task == "causal-lm" else "ForSequenceClassification"
        model = getattr(code, f"ChatGLM{kind}")._from_config(code.ChatGLMConfig(**raw), attn_implementation=attn)
        fill(model.to(torch.bfloat16))
        return model.eval(), raw
    prefix = {"glm": "Glm", "glm4": "Glm4"}[family]
    config = getattr(transformers, f"{prefix}Config")(**CONFIG | changes)
    model = getattr(transformers, prefix + TASKS[task])._from_config(config, attn_implementation=attn)
    fill(model.to(torch.bfloat16))
    return model.eval(), json.loads(config.to_json_string())


def make_batch(task: Task = "causal-lm", side: str | None = "left", labels: int | None = None) -> dict[str, Tensor]:
    """Three rows, two of them padded on that side; the labels that follow padding are ignored."""
    seed = torch.Generator().manual_seed(3)
    rows, length = 3, 9
    ids = torch.randint(2, CONFIG["vocab_size"], (rows, length), generator=seed)
    columns, pads = torch.arange(length), torch.tensor([[0], [2], [5]])
    mask = {"left": columns >= pads, "right": columns < length - pads, None: columns >= 0 * pads}[side].long()
    ids = ids.masked_fill(mask == 0, CONFIG["pad_token_id"])
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "sequence-classification":
        return batch | {"labels": torch.randint(0, 3, (rows,), generator=seed)}
    targets = torch.randint(0, labels or (3 if task == "token-classification" else 96), (rows, length), generator=seed)
    before = torch.cat((mask[:, :1], mask[:, :-1]), dim=-1)
    return batch | {"labels": targets.masked_fill((mask == 0) | (before == 0), -100)}


@dataclass(frozen=True)
class Comparison:
    """What a model's true float64 run and its oracle say of each other."""

    first: str | None
    logits: bool
    loss: bool
    gradients: tuple[str, ...]
    oracle: OracleRun


def compare(  # noqa: PLR0917 - the parts of one comparison
    family: str,
    model: Any,
    config: Mapping[str, Any],
    weights: Weights,
    batch: dict[str, Tensor],
    task: Task = "causal-lm",
    *,
    rounded_table: bool = True,
    rotary: str | None = None,
) -> Comparison:
    """Hold a model to its definition; `gradients` names the weights whose gradients differ or are missing."""
    table = next(value for name, value in model.named_buffers() if name.endswith("inv_freq") and "original" not in name)
    own = table if rounded_table else None  # the exact one where the run computes it anew, without rounding
    oracle = run_oracle(
        family, config, weights, batch, task=task, inv_freq=own, rotary=rotary, gradients=True, trace=True
    )
    with capture_states(model, oracle.states) as states:
        run = run_true_fp64(model, batch, gradients=True)
    assert run.left_out == ()
    assert run.gradients is not None
    assert oracle.loss is not None
    states[ANSWER] = run.outputs["logits"]
    mask = batch["attention_mask"].bool() if task != "sequence-classification" else ...
    names = sorted(oracle.gradients.keys() | run.gradients.keys())
    wrong = [
        name
        for name in names
        if name not in run.gradients or name not in oracle.gradients
        or not agree(run.gradients[name], oracle.gradients[name])
    ]  # fmt: skip
    return Comparison(
        first=first_difference(states, oracle.states, mask=batch["attention_mask"]),
        logits=agree(run.outputs["logits"][mask], oracle.logits[mask]),
        loss=agree(run.outputs["loss"], oracle.loss),
        gradients=tuple(wrong),
        oracle=oracle,
    )


def stored(model: nn.Module) -> Weights:
    """The model's weights as a checkpoint would hold them, before anyone spoils the model."""
    return tensor_weights({name: tensor.clone() for name, tensor in model.state_dict().items()})


SUBJECTS = [(family, task) for family in ("glm", "glm4") for task in TASKS]
SUBJECTS += [("chatglm", "causal-lm"), ("chatglm", "sequence-classification")]


@pytest.mark.parametrize(("family", "task"), SUBJECTS)
@pytest.mark.parametrize(("attn", "side"), [("eager", "left"), ("sdpa", "right"), ("sdpa", None)])
def test_a_clean_model_is_its_definition(family: str, task: Task, attn: str, side: str | None) -> None:
    if family == "chatglm" and side == "right":
        side = "left"  # the only side that the family is padded on
    model, config = build(family, task, attn)
    result = compare(family, model, config, stored(model), make_batch(task, side), task)
    assert (result.first, result.logits, result.loss, result.gradients) == (None, True, True, ())
    assert len(result.oracle.gradients) == len(list(model.parameters()))


VARIANTS: list[dict[str, Any]] = [
    {"attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu"},
    {"partial_rotary_factor": 1.0, "rope_theta": 500.0, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    {"num_key_value_heads": 4, "head_dim": 16, "hidden_act": "relu"},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_what_the_config_varies_is_followed(family: str, changes: dict[str, Any]) -> None:
    model, config = build(family, **changes)
    result = compare(family, model, config, stored(model), make_batch())
    assert (result.first, result.logits, result.loss, result.gradients) == (None, True, True, ())


@pytest.mark.parametrize("name", ["glm-tiny", "glm4-tiny-classifier", "chatglm-tiny", "chatglm-tiny-classifier"])
def test_the_shipped_checkpoints_are_read_from_their_files(name: str) -> None:
    family, folder = name.partition("-")[0], FIXTURES / name
    task: Task = "sequence-classification" if "classifier" in name else "causal-lm"
    config = json.loads((folder / "config.json").read_text())
    changes = {"num_labels": len(config.get("id2label", "xx"))} if family == "chatglm" else config
    model, _ = build(family, task, **changes)
    model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.bfloat16).state_dict())
    batch = make_batch(task)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, config["pad_token_id"])
    result = compare(family, model, config, file_weights(folder, torch.bfloat16), batch, task)
    assert (result.first, result.logits, result.loss, result.gradients) == (None, True, True, ())


# --- Power: a defect each, the state in which model and definition must part first, and what else must show it. ---


def swap_gate_and_up(model: Any, _: pytest.MonkeyPatch) -> None:
    weight = model.model.layers[1].mlp.gate_up_proj
    weight.register_forward_hook(lambda _m, _a, output: torch.cat(output.chunk(2, dim=-1)[::-1], dim=-1))


def swap_gate_and_up_after(model: Any, _: pytest.MonkeyPatch) -> None:
    unit = model.model.layers[1].mlp

    def forward(x: Tensor) -> Tensor:
        up, gate = unit.gate_up_proj(x).chunk(2, dim=-1)
        mixed: Tensor = unit.down_proj(up * unit.activation_fn(gate))
        return mixed

    unit.forward = forward


def other_activation(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].mlp.activation_fn = nn.GELU()


def tenfold_eps(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon *= 10


def tenfold_last_eps(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.norm.variance_epsilon *= 10


def other_theta(model: Any, _: pytest.MonkeyPatch) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = exact_inv_freq("glm", CONFIG | {"rope_theta": 10_100.0}).float()


def other_fraction(model: Any, _: pytest.MonkeyPatch) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = exact_inv_freq("glm", CONFIG | {"partial_rotary_factor": 1.0}).float()


def scaling_missing(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].self_attn.scaling = 1.0


def rotary_in_halves(model: Any, patch: pytest.MonkeyPatch) -> None:
    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    patch.setattr(sys.modules[type(model).__module__], "rotate_half", rotate_half)


def heads_repeated_in_turn(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules[type(model).__module__], "repeat_kv", lambda states, times: states.repeat(1, times, 1, 1))


def residual_after_norm(model: Any, _: pytest.MonkeyPatch) -> None:
    block = model.model.layers[1]

    def forward(hidden_states: Tensor, **rest: Any) -> Tensor:
        normed = block.input_layernorm(hidden_states)
        hidden = normed + block.self_attn(hidden_states=normed, **rest)[0]
        result: Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return result

    block.forward = forward


def residual_missing(model: Any, _: pytest.MonkeyPatch) -> None:
    block = model.model.layers[1]

    def forward(hidden_states: Tensor, **rest: Any) -> Tensor:
        hidden = hidden_states + block.self_attn(hidden_states=block.input_layernorm(hidden_states), **rest)[0]
        result: Tensor = block.mlp(block.post_attention_layernorm(hidden))
        return result

    block.forward = forward


def post_norm_skipped(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].post_self_attn_layernorm = nn.Identity()


def last_post_norm_skipped(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[2].post_mlp_layernorm = nn.Identity()


def norm_with_offset(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[0].post_attention_layernorm.weight.data += 1


def bias_dropped(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].self_attn.q_proj.bias.data.zero_()


def keys_and_values_exchanged(model: Any, _: pytest.MonkeyPatch) -> None:
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def embedding_scaled(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, output: output * 1.001)


def wrongly_tied(model: Any, _: pytest.MonkeyPatch) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def block_skipped(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[2].forward = lambda hidden_states, **_rest: hidden_states


def future_by_one(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Each query also sees the key after it."""
    code = sys.modules[type(model).__module__]
    right = code.eager_attention_forward

    def wrong(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> Any:
        later = torch.cat((mask[..., 1:, :], mask[..., -1:, :]), dim=-2)
        return right(module, query, key, value, later, **rest)

    patch.setattr(code, "eager_attention_forward", wrong)


def pooled_one_early(model: Any, _: pytest.MonkeyPatch) -> None:
    """The pad rule is asked of ids that are moved by one, so it takes the token before the last."""
    right = model.forward

    def forward(input_ids: Tensor, **rest: Any) -> Any:
        with_pad_last = torch.cat((input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])), dim=-1)
        keep = model.model.forward
        model.model.forward = lambda _ids, **inner: keep(input_ids, **inner)
        try:
            return right(with_pad_last, **rest)
        finally:
            model.model.forward = keep

    model.forward = forward


BLOCK = "model.layers.1"
PLACED: list[tuple[Callable[[Any, pytest.MonkeyPatch], None], str, Task, str]] = [
    (swap_gate_and_up, "glm", "causal-lm", f"{BLOCK}.mlp.gate_up_proj"),
    (swap_gate_and_up_after, "glm4", "causal-lm", f"{BLOCK}.mlp"),
    (other_activation, "glm", "causal-lm", f"{BLOCK}.mlp"),
    (tenfold_eps, "glm4", "causal-lm", f"{BLOCK}.input_layernorm"),
    (tenfold_last_eps, "glm", "causal-lm", "model.norm"),
    (other_theta, "glm", "causal-lm", "model.layers.0.self_attn"),
    (other_fraction, "glm4", "causal-lm", "model.layers.0.self_attn"),
    (scaling_missing, "glm", "causal-lm", f"{BLOCK}.self_attn"),
    (rotary_in_halves, "glm4", "causal-lm", "model.layers.0.self_attn"),
    (heads_repeated_in_turn, "glm", "causal-lm", "model.layers.0.self_attn"),
    (future_by_one, "glm4", "causal-lm", "model.layers.0.self_attn"),
    (residual_after_norm, "glm", "causal-lm", BLOCK),
    (residual_missing, "glm", "causal-lm", BLOCK),
    (post_norm_skipped, "glm4", "causal-lm", f"{BLOCK}.post_self_attn_layernorm"),
    (last_post_norm_skipped, "glm4", "causal-lm", "model.layers.2.post_mlp_layernorm"),
    (norm_with_offset, "glm", "causal-lm", "model.layers.0.post_attention_layernorm"),
    (bias_dropped, "glm", "causal-lm", f"{BLOCK}.self_attn.q_proj"),
    (keys_and_values_exchanged, "glm4", "causal-lm", f"{BLOCK}.self_attn.k_proj"),
    (embedding_scaled, "glm", "causal-lm", "model.embed_tokens"),
    (wrongly_tied, "glm", "causal-lm", "lm_head"),
    (block_skipped, "glm", "token-classification", "model.layers.2"),
    (pooled_one_early, "glm", "sequence-classification", ANSWER),
]


@pytest.mark.parametrize(
    ("spoil", "family", "task", "place"), PLACED, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_wrong_model_is_seen_and_placed(
    spoil: Callable[[Any, pytest.MonkeyPatch], None],
    family: str,
    task: Task,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, config = build(family, task)
    weights, batch = stored(model), make_batch(task, side="right")
    assert compare(family, model, config, weights, batch, task).first is None
    spoil(model, monkeypatch)
    result = compare(family, model, config, weights, batch, task)
    assert result.first == place
    assert not result.logits


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("gate and up", "transformer.encoder.layers.1.mlp"),
        ("groups before heads", "transformer.encoder.layers.1.self_attention"),
    ],
)
def test_a_chatglm_with_its_rows_in_another_order_is_seen(layout: str, place: str) -> None:
    model, config = build("chatglm")
    weights = stored(model)
    block = model.transformer.encoder.layers[1]
    if layout == "gate and up":
        linear, rows = block.mlp.dense_h_to_4h, [128, 128]
    else:
        linear, rows = block.self_attention.query_key_value, [64, 32, 32]
    linear.register_forward_hook(lambda _m, _a, out: torch.cat(out.split(rows, dim=-1)[::-1], dim=-1))
    result = compare("chatglm", model, config, weights, make_batch())
    assert (result.first or "").startswith(place)
    assert not result.logits


def test_a_shifted_label_and_a_mean_over_ignored_labels_show_in_loss_and_gradients_only() -> None:
    model, config = build("glm")
    weights, batch = stored(model), make_batch(side="right")

    def unshifted(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def over_all(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / labels[:, 1:].numel()

    for wrong in (unshifted, over_all):
        model.loss_function = wrong
        result = compare("glm", model, config, weights, batch)
        assert (result.first, result.logits, result.loss) == (None, True, False)
        assert result.gradients


def test_a_dropped_gradient_shows_in_the_gradients_only() -> None:
    model, config = build("glm4")
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: output.detach())
    result = compare("glm4", model, config, stored(model), make_batch())
    assert (result.first, result.logits, result.loss) == (None, True, True)
    assert f"{BLOCK}.mlp.down_proj.weight" in result.gradients
    assert not any(name.startswith(("model.layers.2", "lm_head", "model.norm")) for name in result.gradients)


# --- The parts that a caller relies on. ---


def run_plain(config: Mapping[str, Any], weights: Weights, **rest: Any) -> OracleRun:
    return run_oracle("glm", config, weights, make_batch(), task="causal-lm", **rest)


def test_both_config_layouts_and_the_written_defaults_say_the_same() -> None:
    model, _ = build("glm")
    sizes = {key: CONFIG[key] for key in CONFIG if key not in ("num_labels", "rms_norm_eps")}
    layout4 = {"rope_theta": 500.0, "partial_rotary_factor": 1.0, "torch_dtype": "bfloat16"}
    layout5 = {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0, "rope_type": "default"}}
    answers = [run_plain(sizes | layout, stored(model)).logits for layout in (layout4, layout5)]
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], run_plain(sizes, stored(model)).logits)
    documented = transformers.GlmConfig().to_dict()
    written = Glm.from_config({})
    names = [field.name for field in fields(written) if field.name in documented]
    assert {"rms_norm_eps", "num_key_value_heads", "head_dim", "pad_token_id"} <= set(names)
    assert {name: getattr(written, name) for name in names} == {name: documented[name] for name in names}
    assert written == Glm.from_config(json.loads(transformers.GlmConfig().to_json_string(use_diff=False)))
    every_key = json.loads(transformers.Glm4Config().to_json_string(use_diff=False))
    assert Glm4.from_config({}) == Glm4.from_config(every_key)


@pytest.mark.parametrize("family", ["glm", "glm4", "chatglm"])
@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]}}, "mrope"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 4.0}}, "proportional"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, "each type of layer"),
        ({"sliding_window": 4096}, "sliding"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"n_routed_experts": 8}, "experts"),
    ],
)
def test_what_no_definition_covers_is_refused_by_name(family: str, keys: dict[str, Any], word: str) -> None:
    covered = {"multi_query_attention": True} if family == "chatglm" else {}
    exact_inv_freq(family, covered)
    with pytest.raises(OracleUnavailable, match=word):
        exact_inv_freq(family, covered | keys)


def test_other_refusals_say_why() -> None:
    model, config = build("glm")
    four_dimensional = make_batch() | {"attention_mask": torch.ones(3, 1, 9, 9)}
    assert oracle_for("llama") is None
    with pytest.raises(OracleUnavailable, match="llama"):
        exact_inv_freq("llama", {})
    with pytest.raises(OracleUnavailable, match="multi_query_attention"):
        exact_inv_freq("chatglm", {})
    with pytest.raises(OracleUnavailable, match=r"lm_head\.weight"):
        run_plain(config, tensor_weights({n: t for n, t in model.state_dict().items() if "head" not in n}))
    with pytest.raises(OracleUnavailable, match="relu6"):
        run_plain(config | {"hidden_act": "relu6"}, stored(model))
    with pytest.raises(OracleUnavailable, match="mask"):
        run_oracle("glm", config, stored(model), four_dimensional, task="causal-lm")
    with pytest.raises(OracleUnavailable, match="safetensors"):
        file_weights(FIXTURES / "remote_code")
    with pytest.raises(ValueError, match="labels"):
        run_oracle(
            "glm", config, stored(model), {"input_ids": torch.ones(1, 2).long()}, task="causal-lm", gradients=True
        )


def test_the_table_is_judged_in_roundoffs_of_its_dtype() -> None:
    exact = exact_inv_freq("glm", {})
    assert exact.shape == (32,)
    assert [exact[0].item(), exact[-1].item()] == [1.0, 10_000.0 ** (-62 / 64)]
    for table in (exact.float(), exact.float().double(), exact.bfloat16()):
        assert 0 < rotary_roundoffs("glm", {}, table) <= 1
    for table in (
        exact.bfloat16().float(),
        exact.float() * (1 + 2**-21),
        exact[:16].float(),
        exact.float() * torch.nan,
    ):
        assert not rotary_roundoffs("glm", {}, table) <= rotary_budget("glm", {})


@pytest.mark.parametrize("head_dim", [8, 64, 128, 80, 96, 160])
@pytest.mark.parametrize("theta", [500.0, 1e4, 5e6, 1e8])
def test_a_table_as_models_compute_it_is_within_the_budget(head_dim: int, theta: float) -> None:
    config = {"head_dim": head_dim, "rope_theta": theta, "partial_rotary_factor": 1.0}
    table = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    budget = rotary_budget("glm", config)
    assert rotary_roundoffs("glm", config, table) <= budget
    assert budget == 2 or head_dim in (80, 96, 160)
    table = 1.0 / (theta * (1 + 1e-4)) ** (torch.arange(0, head_dim, 2).float() / head_dim)
    assert rotary_roundoffs("glm", config, table) > 10 * budget


def test_files_sharded_rounded_or_without_the_prefix_give_the_same_tensors(tmp_path: Path) -> None:
    model, config = build("glm")
    tensors = {name: tensor.float() + 1e-4 for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name.removeprefix("model."): tensors[name] for name in held}, tmp_path / file)
    index = {name.removeprefix("model."): file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for dtype in (None, torch.bfloat16):
        at_hand = tensor_weights({name: tensor.to(dtype or torch.float32) for name, tensor in tensors.items()})
        from_files = run_plain(config, file_weights(tmp_path, dtype), gradients=True)
        from_tensors = run_plain(config, at_hand, gradients=True)
        assert torch.equal(from_files.logits, from_tensors.logits)
        assert all(torch.equal(from_files.gradients[name], from_tensors.gradients[name]) for name in names)


def test_a_new_head_is_laid_over_the_files() -> None:
    model, config = build("glm", "sequence-classification")
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("score")}
    body = tensor_weights({name: tensor for name, tensor in model.state_dict().items() if name not in head})
    batch = make_batch("sequence-classification")
    laid = run_oracle("glm", config, body, batch, task="sequence-classification", head=head, gradients=True)
    whole = run_oracle("glm", config, stored(model), batch, task="sequence-classification")
    assert torch.equal(laid.logits, whole.logits)
    assert laid.gradients["score.weight"].shape == (3, 32)
    with pytest.raises(OracleUnavailable, match=r"score\.weight"):
        run_oracle("glm", config, body, batch, task="sequence-classification")


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_the_other_losses_of_a_sequence_classifier(kind: str) -> None:
    model, config = build("glm", "sequence-classification", num_labels=1 if kind == "regression" else 3)
    targets = (
        torch.tensor([0.5, -1.0, 2.0]) if kind == "regression" else torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    )
    batch = make_batch("sequence-classification") | {"labels": targets}
    result = compare("glm", model, config, stored(model), batch, "sequence-classification")
    assert (result.first, result.loss, result.gradients) == (None, True, ())


def test_the_pad_rule_reads_the_rightmost_other_token() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 0, 0], [5, 0, 6, 0], [0, 0, 0, 0]])
    rule = oracle_for("glm")
    assert rule is not None
    assert rule.from_config({"pad_token_id": 0}).pooled_column(ids).tolist() == [3, 1, 2, 0]
    assert rule.from_config({"pad_token_id": None}).pooled_column(ids).tolist() == [3, 3, 3, 3]


def test_given_positions_are_followed_and_a_common_shift_changes_nothing() -> None:
    model, config = build("glm")
    batch = make_batch(side=None)
    columns = torch.arange(9)[None]
    runs = [
        run_oracle("glm", config, stored(model), batch | {"position_ids": p}, task="causal-lm").logits
        for p in (columns, columns + 7, columns * 2)
    ]
    assert agree(runs[1], runs[0])
    assert not agree(runs[2], runs[0])


def test_a_nan_is_a_difference_and_a_zero_reference_allows_nothing() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    assert agree(ones + 1e-12, ones)
    assert not agree(ones * torch.nan, ones)
    assert not agree(ones, ones * torch.nan)
    assert not agree(ones[:1], ones)
    assert agree(ones * 0, ones * 0)
    assert not agree(ones * 1e-300, ones * 0)


class Watched:
    """Weights that know how much of what they gave is still alive."""

    def __init__(self, below: Weights) -> None:
        self.below, self.alive, self.peak = below, 0, 0

    def __call__(self, name: str, rows: Any = None) -> Tensor:
        tensor = self.below(name, rows)
        tensor = tensor + 0  # a storage of its own
        self.alive += tensor.numel()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._drop, tensor.numel())
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self.below.shape(name)

    def _drop(self, count: int) -> None:
        self.alive -= count


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("vocabulary", [96, 3 * CHUNK_ROWS])
def test_no_more_than_a_block_or_a_chunk_is_ever_upcast(vocabulary: int, gradients: bool) -> None:
    model, config = build("glm", num_hidden_layers=8, vocab_size=vocabulary)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    limit = max(block, min(vocabulary, CHUNK_ROWS) * CONFIG["hidden_size"])
    assert sum(parameter.numel() for parameter in model.parameters()) > 4 * limit
    watched = Watched(stored(model))
    seen: list[str] = []
    run = run_plain(config, watched, gradients=gradients, on_gradient=lambda name, _: seen.append(name))
    assert watched.alive == 0
    assert limit / 4 < watched.peak <= limit
    assert run.gradients == {}
    assert sorted(seen) == (sorted(name for name, _ in model.named_parameters()) if gradients else [])


def test_importing_the_oracles_imports_no_transformers() -> None:
    code = "import sys, numerics_suite.definitions; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
