"""Clean runs are quiet: Trainer, accelerate and a plain loop; full, LoRA and head; float32, bfloat16 and autocast."""

from __future__ import annotations

import warnings

import pytest
import torch

from numerics_suite import NumericsCallback, NumericsWarning, watch
from numerics_suite.subjects.fixtures import fixture_path

STEPS = 14
"""Beyond the first steps that are looked at, the early batches that are kept, and the wait of a loss that rose."""

LOOPS, SCOPES, PRECISIONS = ("plain", "accelerate", "trainer"), ("full", "lora", "head"), ("fp32", "bf16", "amp")
QUICK = {("plain", "full", "fp32"), ("plain", "head", "amp")}


def model_of(scope, precision):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(fixture_path("glm4-tiny"), dtype=dtype).train()
    if scope == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad=name.startswith("lm_head"))
    if scope == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    return model


def batches(vocabulary):
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(0, vocabulary, (2, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def plain(model, precision, folder):
    optimizer = optimizer_of(model)
    with watch(model, optimizer) as it:
        for batch in batches(model.config.vocab_size):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "amp"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
    return it


def accelerate(model, precision, folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process makes accelerators of several precisions
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "amp" else "no")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    with watch(model, optimizer) as it:
        for batch in batches(model.config.vocab_size):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return it


def trainer(model, precision, folder):
    from transformers import Trainer, TrainingArguments

    rows = [
        {name: tensor[row] for name, tensor in batch.items()}
        for batch in batches(model.config.vocab_size)
        for row in range(2)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=STEPS, learning_rate=1e-3, warmup_steps=4,
        bf16=precision == "amp", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = NumericsCallback()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    return callback.watch


@pytest.mark.parametrize(
    ("loop", "scope", "precision"),
    [
        pytest.param(*run, marks=[] if run in QUICK else [pytest.mark.slow])
        for run in ((loop, scope, precision) for loop in LOOPS for scope in SCOPES for precision in PRECISIONS)
    ],
)
def test_a_clean_run_is_quiet(loop, scope, precision, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericsWarning)
        it = {"plain": plain, "accelerate": accelerate, "trainer": trainer}[loop](
            model_of(scope, precision), precision, tmp_path
        )
    assert it.finding is None
    assert it.step == STEPS
