"""The watch within Trainer, accelerate, peft and FSDP2, which call models and optimizers in their own ways."""

# ruff: noqa: PT012 - a whole loop is what raises or warns

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from unit.watched_models import Decoder, ids, train

from numerics_suite import NumericsCallback, NumericsError, watch
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.training_watch.patches import TAPS

TEXTS = Path(__file__).resolve().parents[2] / "fixtures" / "texts.jsonl"


@pytest.fixture(scope="module")
def texts():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fixture_path("glm-tiny-classifier"))
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()[:32]]
    written = tokenizer([row["text"] for row in rows], padding="max_length", truncation=True, max_length=24)
    return [
        {
            "input_ids": written["input_ids"][i],
            "attention_mask": written["attention_mask"][i],
            "labels": rows[i]["label"] % 2,
        }
        for i in range(len(rows))
    ]


def classifier():
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        fixture_path("glm-tiny-classifier"), num_labels=2, ignore_mismatched_sizes=True
    ).float()


def trainer_of(model, texts, folder, callback, *, steps=6, **more):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Logger(TrainerCallback):
        """A logger as Trainer's own are: before the user's callbacks."""

        def __init__(self):
            self.rows = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.rows.append(dict(logs))

    options = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-4,
               "logging_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **more}  # fmt: skip
    logger = Logger()
    return Trainer(
        model=model, args=TrainingArguments(**options), train_dataset=texts, callbacks=[logger, callback]
    ), logger


def nothing_left(model):
    return not model._forward_hooks and not model._forward_pre_hooks and not any(tap.methods for tap in TAPS.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_logs_the_figures_through_its_own_loggers(texts, tmp_path):
    model, callback = classifier(), NumericsCallback()
    trainer, logger = trainer_of(model, texts, tmp_path, callback, gradient_accumulation_steps=2)
    trainer.train()
    watched = callback.watch
    assert (watched.step, watched.finding, watched.warnings) == (6, None, [])
    assert sum(len(reading.values.get("loss", ())) for reading in watched.readings) == 12
    names = {
        f"numerics/{name}" for name in ("loss", "largest_logit", "gradient_norm", "parameter_norm", "update_ratio")
    }
    logged = [row for row in logger.rows if "loss" in row]
    assert len(logged) == 3
    assert all(names <= set(row) for row in logged)
    assert names <= set(trainer.state.log_history[0])
    assert logged[-1]["numerics/gradient_norm"] == pytest.approx(logged[-1]["grad_norm"], rel=1e-5)
    assert nothing_left(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_is_stopped_at_the_bad_step(texts, tmp_path):
    model, callback = classifier(), NumericsCallback(bundle=tmp_path / "bundle")
    seen = []

    def spoil(module, args, kwargs):
        seen.append(1)
        if len(seen) == 4:
            with torch.no_grad():
                module.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")

    handle = model.register_forward_pre_hook(spoil, with_kwargs=True)
    trainer, _ = trainer_of(model, texts, tmp_path, callback)
    with pytest.raises(NumericsError) as caught:
        trainer.train()
    handle.remove()
    assert (caught.value.finding.step, caught.value.finding.module) == (4, "model.layers.0.self_attn.o_proj")
    assert (tmp_path / "bundle" / "bundle.json").is_file()
    assert nothing_left(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_articles_head_of_nan_is_told_at_step_1(texts, tmp_path):
    model, callback = classifier(), NumericsCallback()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    trainer, _ = trainer_of(model, texts, tmp_path, callback)
    with pytest.raises(NumericsError) as caught:
        trainer.train()
    assert (caught.value.finding.step, caught.value.finding.cause) == (1, "uninitialised-parameters")
    assert caught.value.finding.parameters == ("score.weight",)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainers_own_bfloat16_is_watched(texts, tmp_path):
    model, callback = classifier(), NumericsCallback()
    trainer, _ = trainer_of(model, texts, tmp_path, callback, steps=3, bf16=True)
    trainer.train()
    assert callback.watch.step == 3
    assert callback.watch.warnings == []


def test_accelerate_with_accumulation_and_its_wrapped_optimizer():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Decoder()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    with watch(model, optimizer) as w:
        for part in range(8):
            with accelerator.accumulate(model):
                batch = ids(part)
                accelerator.backward(model(input_ids=batch, labels=batch)["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert w.step == 4
    assert w.values["numerics/gradient_norm"] == pytest.approx(float(norm))
    assert nothing_left(model)


def test_lora_trains_the_adapter_and_a_bad_one_is_named():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(fixture_path("glm-tiny")).float()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = ids(0) % base.config.vocab_size
    with pytest.raises(NumericsError) as caught, watch(model, optimizer) as w:
        for step in range(1, 6):
            if step == 4:
                with torch.no_grad():
                    next(p for name, p in model.named_parameters() if "layers.1" in name and "lora_B" in name).fill_(
                        float("nan")
                    )
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (caught.value.finding.step, w.warnings) == (4, [])
    assert "layers.1" in caught.value.finding.module
    assert "lora_B" in caught.value.finding.parameters[0]


@pytest.fixture
def one_process(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp2_is_watched_by_its_local_shards(one_process, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Decoder()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert hasattr(next(model.parameters()), "_local_tensor")
    with watch(model, optimizer, snapshot_every=2) as w:
        train(model, optimizer, 5)
    assert (w.step, w.finding, w.warnings) == (5, None, [])
    assert {"numerics/gradient_norm", "numerics/update_ratio"} <= set(w.values)
    with torch.no_grad():
        model.lm_head.weight.to_local()[0, 0] = float("nan")
    with pytest.raises(NumericsError) as caught, watch(model, optimizer, bundle=tmp_path / "b"):
        train(model, optimizer, 1, start=6)
    assert (tmp_path / "b" / "bundle.json").is_file()
    assert caught.value.finding.parameters == ("lm_head.weight",)
