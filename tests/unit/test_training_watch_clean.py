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


# --- other ways of a plain loop ------------------------------------------------------------------------------------------


class Sign(torch.optim.Optimizer):
    """An optimizer of somebody's own: it steps by the sign of the gradient."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def warmed(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 6))


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=STEPS + 1)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "sign": lambda p: Sign(p, lr=1e-4),
    "groups": lambda p: torch.optim.AdamW([{"params": p[::2], "weight_decay": 0.0}, {"params": p[1::2], "lr": 1e-4}], lr=1e-3),
}  # fmt: skip
WAYS = {
    **{name: {"optimizer": name} for name in OPTIMIZERS if name != "adamw"},
    "cosine": {"schedule": cosine},
    "warm-up in bf16": {"schedule": warmed, "precision": "bf16"},
    "one cycle": {"schedule": one_cycle, "clip": 1.0},
    "accumulation": {"parts": 3, "clip": 0.5},
    "accumulation in bf16": {"parts": 2, "precision": "bf16", "optimizer": "groups"},
    "checkpoints that are not reentrant": {"checkpoints": True},
    "checkpoints of an adapter": {"checkpoints": True, "scope": "lora", "precision": "amp"},
    "a gradient scaler": {"precision": "fp16", "clip": 1.0},
    "a gradient scaler of an adapter": {"precision": "fp16", "scope": "lora", "parts": 2},
    "an adapter by sgd": {"scope": "lora", "optimizer": "nesterov", "schedule": warmed},
    "a head by adafactor in bf16": {"scope": "head", "optimizer": "adafactor", "precision": "bf16"},
    "gradients zeroed in place": {"to_none": False, "clip": 1.0},
    "evaluations in between": {"evaluates": True, "schedule": cosine},
}
"""With those above fifty runs."""


def trained(model, it_of, *, optimizer="adamw", schedule=None, precision="fp32", clip=None, parts=1, to_none=True, evaluates=False):  # fmt: skip
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    scheduler = schedule(optimizer) if schedule else None
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    lower = torch.float16 if precision == "fp16" else torch.bfloat16
    with it_of(optimizer) as it:
        for batch in batches(model.config.vocab_size):
            for _ in range(parts):
                with torch.autocast("cpu", dtype=lower, enabled=precision in {"amp", "fp16"}):
                    loss = model(**batch).loss / parts
                scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=to_none)
            if scheduler is not None:
                scheduler.step()
            if evaluates:
                with torch.no_grad():
                    model.eval()(**batch)
                model.train()
    return it


def test_there_are_fifty():
    assert len(LOOPS) * len(SCOPES) * len(PRECISIONS) + len(WAYS) >= 50


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in {"sign", "accumulation"} else [pytest.mark.slow]) for way in WAYS]
)
def test_another_way_is_quiet(way):
    told = dict(WAYS[way])
    scope, checkpoints = told.pop("scope", "full"), told.pop("checkpoints", False)
    model = model_of(scope, told.get("precision", "fp32"))
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericsWarning)
        it = trained(model, lambda optimizer: watch(model, optimizer), **told)
    assert (it.finding, it.step) == (None, STEPS)
