"""Clean models of other families and odd shapes raise nothing: each row once gave a false alarm or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from numerics_suite.engine.calls import call_model
from numerics_suite.engine.dropout import WithoutDropout
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.observations.local_error import local_errors
from numerics_suite.observations.nondifferentiable import Kinks
from numerics_suite.observations.roundoff import gradient_errors
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.families import family_of
from numerics_suite.suite.session import SuiteSession

SMALL = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def save(folder: Path, model_class: str, config_class: str, **config: object) -> str:
    """A checkpoint with random weights, as save_pretrained writes it."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    model.save_pretrained(folder)
    return str(folder)


def statuses(subject: str, checks: tuple[str, ...] = (), precision: str = "bf16", **changes: object) -> dict[str, str]:
    """What each check says of the checkpoint; the reason or title beside a status that is neither passed nor skipped."""
    settings = Settings(
        **{
            "subjects": (subject,),
            "precision": (precision,),
            "attn": ("eager",),
            "checks": checks,
            "device": "cpu",
            "max_examples": 3,
            "seq_len": 12,
            "origins": {"precision": "command line"},
            **changes,
        }
    )
    session = SuiteSession(settings)
    found = {}
    for question in session.plan.questions:
        result = session.answer(question)[0]
        said = result.finding.title if result.finding else result.reason
        found[question.check] = result.status if result.status in {"passed", "skipped"} else f"{result.status}: {said}"
    return found


def assert_clean(found: dict[str, str]) -> None:
    """No finding; a fault that the installed training stack is known to have is not the model's."""
    stack = found.get("train.trainer", "").startswith("accepted: ")
    others = {check: said for check, said in found.items() if not (stack and check == "train.trainer")}
    assert {check: said for check, said in others.items() if said not in {"passed", "skipped"}} == {}
    assert "passed" in found.values()


def bert(folder: Path, **config: object) -> str:
    return save(folder, "BertForSequenceClassification", "BertConfig", **{**BODY, "intermediate_size": 64, **config})


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_label_is_a_row_of_numbers(tmp_path, kind):
    folder = bert(tmp_path, num_labels=3, problem_type=kind)
    found = statuses(folder, ("reference.gradient", "train.labels", "train.descends"), attn=("default",))
    assert found == dict.fromkeys(found, "passed")


def test_an_encoder_is_not_causal_and_pools_its_own_way(tmp_path):
    found = statuses(bert(tmp_path, num_labels=3))
    assert found["forward.causal"] == found["forward.pooling"] == "skipped"
    # Without rotary positions the gradient of a key's bias cancels to nothing.
    assert found["train.accumulation"] == found["train.checkpointing"] == found["forward.padding"] == "passed"
    assert_clean(found)


def test_an_encoder_for_regression(tmp_path):
    assert_clean(statuses(bert(tmp_path, num_labels=1), ("forward.*", "train.*")))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_dropout_that_attention_asks_for_itself(tmp_path, attn):
    config = {**SMALL, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    folder = save(tmp_path, "GPT2LMHeadModel", "GPT2Config", **config)
    found = statuses(folder, ("train.*", "forward.padding", "forward.causal"), attn=(attn,))
    assert found["train.checkpointing"] == "passed"
    assert_clean(found)


def test_dropout_as_a_number_of_a_layers_own(tmp_path):
    config = {**BODY, "ffn_dim": 64, "word_embed_proj_dim": 32}
    folder = save(tmp_path, "OPTForCausalLM", "OPTConfig", **config)
    assert_clean(statuses(folder, ("train.*",)))


def test_rows_of_two_tokens():
    """Trained on two tokens, a language model's queries and keys have no gradient by definition."""
    shape = {"seq_len": 2, "batch_size": 1}
    assert_clean(statuses("fixture:glm-tiny", ("train.*", "reference.*"), precision="fp32", **shape))


def test_few_labels_and_few_tokens(tmp_path):
    """Eight logits are too few to take a ratio of errors over."""
    config = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "num_labels": 2}
    folder = save(tmp_path, "GlmForTokenClassification", "GlmConfig", **config)
    for seed in range(3):
        found = statuses(folder, ("reference.end-to-end",), "amp-bf16", seed=seed, seq_len=2, batch_size=2)
        assert found == {"reference.end-to-end": "passed"}


def test_a_fresh_regression_head_has_something_to_learn(tmp_path):
    config = {**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "num_labels": 1}
    folder = save(tmp_path, "GlmForSequenceClassification", "GlmConfig", **config)
    assert_clean(statuses(folder, ("train.*",), "fp32", batch_size=1))


@pytest.mark.parametrize(
    ("config", "causal", "sides"),
    [
        ({"model_type": "bert", "type_vocab_size": 2}, False, ("right",)),
        ({"model_type": "distilbert"}, False, ("right",)),
        ({"model_type": "modernbert"}, False, ("right",)),
        ({"model_type": "bert", "type_vocab_size": 2, "is_decoder": True}, True, ("left", "right")),
        ({"model_type": "gpt2"}, True, ("right",)),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, False, ("left", "right")),
        ({"model_type": "gemma2", "use_bidirectional_attention": None}, True, ("left", "right")),
        ({"model_type": "llama"}, True, ("left", "right")),
        ({"model_type": "glm4"}, True, ("left", "right")),
    ],
)
def test_what_a_family_is_asked(config, causal, sides):
    family = family_of(config)
    assert (family.causal, family.padding_sides) == (causal, sides)


def test_a_gradient_that_cancels_is_measured_against_the_largest():
    one = torch.ones(2, dtype=torch.float64)
    want = {"weight": one, "bias": 1e-17 * one, "unused": 0 * one}
    assert gradient_errors({**want, "bias": -1e-17 * one}, want)["bias"] < 1e-10
    assert gradient_errors({**want, "bias": 1e-9 * one}, want)["bias"] > 1e-10
    assert gradient_errors({**want, "unused": 1e-9 * one}, want)["unused"] > 1e-10
    # A small gradient of its own is no remainder: half of it wrong is half wrong.
    small = {"weight": one, "bias": 1e-8 * one}
    assert gradient_errors({**small, "bias": 2e-8 * one}, small)["bias"] == pytest.approx(1)
    assert gradient_errors({"weight": one}, want) == {"weight": 0.0}
    nan = gradient_errors({**want, "bias": one * float("nan")}, want)["bias"]
    assert nan != nan


def test_no_dropout_however_it_is_asked_for():
    values = torch.ones(64, 64)
    attention = nn.MultiheadAttention(64, 2, dropout=0.9)
    queries = torch.randn(1, 2, 8, 16)
    asked = {
        "module": lambda: nn.Dropout(0.9)(values),
        "function": lambda: functional.dropout(values, 0.9, training=True),
        "torch": lambda: torch.dropout(values, 0.9, True),
        "alpha": lambda: functional.alpha_dropout(values, 0.9, training=True),
        "channels": lambda: nn.Dropout1d(0.5)(values),
        "attention": lambda: functional.scaled_dot_product_attention(queries, queries, queries, dropout_p=0.9),
        "positional": lambda: functional.scaled_dot_product_attention(queries, queries, queries, None, 0.9),
        "multi-head": lambda: attention(values, values, values)[0],
    }
    for name, ask in asked.items():
        assert not torch.equal(ask(), ask()), name
        with WithoutDropout():
            assert torch.equal(ask(), ask()), name
    assert not torch.equal(asked["module"](), values)


@pytest.mark.parametrize("fixture", ["glm-tiny", "glm4-tiny-classifier", "chatglm-tiny"])
def test_fp64_is_float64_throughout(fixture):
    """With float64 parameters alone, a left-padded row of eager attention is NaN in every release."""
    assert_clean(statuses(f"fixture:{fixture}", ("forward.*", "train.*"), "fp64"))


def test_experts_and_a_float32_router_in_fp64(tmp_path):
    pytest.importorskip("transformers.models.glm4_moe")
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    shape = {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 16}
    folder = save(tmp_path, "Glm4MoeForCausalLM", "Glm4MoeConfig", **{**BODY, **shape, **experts})
    assert_clean(statuses(folder, ("forward.*", "train.*"), "fp64"))


class Nested(nn.Module):
    """Puts out tensors inside tuples inside a dict, as an LSTM does, and integers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        made = self.linear(x)
        return {"a": [made], "b": (made, None, made.argmax(-1))}


def nested() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Nested(), {"x": torch.ones(2, 4)}


class Integral(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


def integral() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Integral(), {"x": torch.ones(2, 4)}


def lstm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return nn.LSTM(4, 8, batch_first=True), {"input": torch.ones(2, 3, 4)}


def frozen() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return nn.Linear(4, 4).requires_grad_(requires_grad=False), {"input": torch.ones(2, 4)}


def normed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    layers = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.Dropout(0.5)
    return nn.Sequential(*layers), {"input": torch.ones(2, 3, 8)}


def language_model(**batch: torch.Tensor) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    shape = {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    config = transformers.GlmConfig(**{**BODY, **shape})
    return transformers.GlmForCausalLM(config), batch


def ids_only() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return language_model(input_ids=torch.arange(1, 15).reshape(2, 7))


def no_label_counts() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.arange(1, 15).reshape(14, 1)
    return language_model(input_ids=ids, labels=ids)


def some_labels_count() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Of two rows in fourteen: the batch is one, whatever --batch-size says."""
    ids = torch.arange(1, 43).reshape(14, 3)
    return language_model(input_ids=ids, labels=torch.where(torch.arange(14)[:, None] % 7 == 0, ids, -100))


def with_positions() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.arange(1, 15).reshape(2, 7)
    return language_model(input_ids=ids, labels=ids, position_ids=torch.arange(0, 14, 2).expand(2, -1))


@pytest.mark.parametrize("name", ["nested", "lstm", "normed", "ids_only", "some_labels_count", "with_positions"])
def test_a_factory(name):
    assert_clean(statuses(f"factory:{__name__}:{name}", precision="fp32"))


def test_a_factory_whose_batch_has_no_label_that_counts():
    found = statuses(f"factory:{__name__}:no_label_counts", precision="fp32")
    title = "failed: no label counts in the factory's own batch: 14 of 14 rows have none"
    assert found.pop("train.labels") == title
    assert_clean(found)


@pytest.mark.parametrize("name", ["integral", "frozen"])
def test_a_factory_with_nothing_to_train(name):
    found = statuses(f"factory:{__name__}:{name}", precision="fp32")
    assert_clean(found)
    assert {said for check, said in found.items() if check.startswith("train.")} == {"skipped"}


def test_a_batch_without_labels_leaves_the_drawn_ones():
    assert statuses(f"factory:{__name__}:ids_only", ("train.labels",), "fp32") == {"train.labels": "passed"}


class WithoutCache(nn.Module):
    """Called with `input_ids` like a model of transformers, whose encoders knew no `use_cache` up to 4.57."""

    config = None

    def get_input_embeddings(self) -> None: ...

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_model_without_a_cache_is_not_asked_for_none():
    assert int(call_model(WithoutCache(), {"input_ids": torch.ones(())})) == 1


def test_every_floating_output_is_seen():
    assert list(floating_outputs(nested()[0](torch.ones(2, 4)))) == ["a.0", "b.0"]
    assert list(floating_outputs(lstm()[0](torch.ones(2, 3, 4)))) == ["output0", "output1.0", "output1.1"]
    assert floating_outputs(torch.ones(2, dtype=torch.int64)) == {}


def test_one_label_whose_sum_cancels_under_autocast(tmp_path):
    """Rounding both factors costs such a sum any number of roundoffs; its own rounded run costs as many."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GlmConfig(
        **{**BODY, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "num_labels": 1}
    )
    model = transformers.GlmForSequenceClassification(config)
    ids = torch.tensor([[7]])
    with torch.no_grad():
        state = model.model(ids).last_hidden_state[0, -1]
        weight = model.score.weight
        # What is left of the product after cancelling is a thousandth of its terms.
        weight -= (1 - 1e-3) * (weight @ state)[:, None] * state / state.square().sum()
    (error,) = [
        row for row in local_errors(model.eval(), {"input_ids": ids}, autocast=torch.bfloat16) if row.module == "score"
    ]
    assert error.rms_roundoffs > 2
    assert 0.85 < error.kernel_ratio < 1.2


def test_an_activation_with_a_kink(tmp_path):
    """One pre-activation that rounding moves over zero switches its gradient on or off; sdpa's rounding is its own."""
    config = {**BODY, "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}
    folder = save(tmp_path, "OPTForCausalLM", "OPTConfig", **config)
    for seed in (9, 10):
        shape = {"seed": seed, "seq_len": 24, "attn": ("sdpa",)}
        assert statuses(folder, ("reference.gradient",), "amp-fp16", **shape) == {"reference.gradient": "passed"}


@pytest.mark.parametrize(("activation", "found"), [(nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.GELU(), False)])
def test_kinks_are_seen_in_the_backward_pass(activation, found):
    kinks = Kinks()
    with kinks:
        activation(torch.ones(3, requires_grad=True)).sum().backward()
    assert kinks.found is found


def test_experts_are_held_to_the_laws_and_to_no_rounding(tmp_path):
    shape = {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "num_local_experts": 4}
    folder = save(tmp_path, "MixtralForCausalLM", "MixtralConfig", **{**BODY, **shape})
    found = statuses(folder, ("forward.*", "reference.*"))
    assert_clean(found)
    assert {found[f"forward.{law}"] for law in ("padding", "batch", "causal", "cache", "attention")} == {"passed"}
    assert found["reference.end-to-end"] == found["reference.gradient"] == "skipped"
