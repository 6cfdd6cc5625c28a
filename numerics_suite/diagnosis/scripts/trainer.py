"""The script of `train.trainer`: one step of the installed Trainer against the whole batch's gradient."""

from __future__ import annotations

from numerics_suite.diagnosis.scripts.parts import uncached
from numerics_suite.diagnosis.scripts.scene import SYMPTOM, Body, ScriptContext
from numerics_suite.inputs.labels import IGNORED

SHARE = 1e-3
"""Of the gradient: above what the float32 sections of a model in float64 round, and below every fault of counting."""

ARGUMENTS = {
    "label-smoothing": "label_smoothing_factor=0.1",
    "reentrant-checkpointing": 'gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}',
    "non-reentrant-checkpointing": 'gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}',
}
CUT = ("accumulation", "adapter", "label-smoothing")
"""Ways in which each row is a micro-batch of its own."""

WAYS = ("label-count", "accumulation", "adapter", "label-smoothing", "padding-free", *list(ARGUMENTS)[1:], "clipping")

JUDGED = [
    "off, times = float((got - wanted).norm() / wanted.norm()), float(got @ wanted / wanted.square().sum())",
    f'assert off <= {SHARE}, f"{SYMPTOM}: the optimizer gets {{times:.3g}} times the whole batch\'s gradient (off by {{off:.2g}})"',
    'print(f"not reproduced: the optimizer gets the whole batch\'s gradient, to {off:.2g}")',
]


def _one_step(scene: ScriptContext) -> list[str]:
    way = scene.measurement
    per_step = "1, gradient_accumulation_steps=len(rows)" if way in CUT else "len(rows)"
    limit = "max_norm" if way == "clipping" else "0.0"
    collator = ", data_collator=transformers.DataCollatorWithFlattening()" if way == "padding-free" else ""
    asked = f"    {ARGUMENTS[way]}," if way in ARGUMENTS else ""
    return [
        *_float64(scene),
        *_rows(scene),
        *_wanted(scene),
        "",
        "class Keeps(torch.optim.SGD):",
        "    def step(self, closure=None):",
        "        self.handed = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trained]",
        "",
        "",
        "optimizer = Keeps(trained, lr=0.0)",
        "arguments = transformers.TrainingArguments(",
        f"    tempfile.mkdtemp(), use_cpu=True, max_steps=1, per_device_train_batch_size={per_step},",
        f'    max_grad_norm={limit}, report_to="none", save_strategy="no", remove_unused_columns=False, disable_tqdm=True,',
        *([asked] if asked else []),
        ")",
        "schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)",
        f"options = dict(args=arguments, train_dataset=rows, optimizers=(optimizer, schedule){collator})",
        "transformers.Trainer(model, **options).train()",
        "got = torch.cat([gradient.flatten() for gradient in optimizer.handed])",
        *JUDGED,
    ]


def _accelerate_loop(scene: ScriptContext) -> list[str]:
    shift = "[:, 1:]" if scene.context.subject.task == "causal-lm" else ""
    counted = "[1] * len(rows)"
    if scene.context.subject.task != "sequence-classification":
        counted = f"[int((row['labels'][None]{shift} != {IGNORED}).sum()) for row in rows]"
    return [
        *_float64(scene),
        *_rows(scene),
        *_wanted(scene),
        f"counts = {counted}",
        "accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=len(rows))",
        "model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.0))",
        "for row, count in zip(rows, counts):",
        "    with accelerator.accumulate(model):",
        f"        loss = model(**{{name: value[None] for name, value in row.items()}}{uncached(scene)}).loss",
        "        accelerator.backward(loss * count / sum(counts) * len(rows))",
        "got = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])",
        *JUDGED,
    ]


def _float64(scene: ScriptContext) -> list[str]:
    first = [f'batch["labels"][:, 0] = {IGNORED}'] if scene.context.subject.task == "causal-lm" else []
    adapter = [
        'options = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)',
        "model = peft.get_peft_model(model, options)",
    ]
    return [
        "torch.set_default_dtype(torch.float64)",
        *(adapter if scene.measurement == "adapter" else []),
        "model.cpu().double().train()",
        "for module in model.modules():  # dropout off",
        "    held = [name for name, value in vars(module).items() if isinstance(value, float)]",
        '    vars(module).update({name: 0.0 for name in held if name == "p" or "dropout" in name})',
        # Eager attention in float64 gives NaN where a query sees no key, as those before a row's first token do.
        "pads = [int((mask == 0).long().cumprod(0).sum()) for mask in batch['attention_mask']]  # padding goes behind the tokens",
        "moved = {name: [row.roll(-pad) for row, pad in zip(value, pads)] for name, value in batch.items() if value.dim() > 1}",
        "batch = {**batch, **{name: torch.stack(rows) for name, rows in moved.items()}}",
        "trained = [p for p in model.parameters() if p.requires_grad]",
        *(first if scene.measurement != "label-count" else []),
    ]


def _rows(scene: ScriptContext) -> list[str]:
    if scene.measurement != "padding-free":
        return ["rows = [{name: value[row] for name, value in batch.items()} for row in range(len(batch['labels']))]"]
    return [
        "real = batch['attention_mask'].bool()",
        "names = ('input_ids', 'labels')",
        "rows = [{name: batch[name][row][real[row]].tolist() for name in names} for row in range(len(real))]",
    ]


def _wanted(scene: ScriptContext) -> list[str]:
    loss = [f"loss = model(**batch{uncached(scene)}).loss"]
    if scene.measurement == "label-smoothing":
        shift = ["scores, labels = scores[:, :-1], labels[:, 1:]"] if scene.context.subject.task == "causal-lm" else []
        loss = [
            f"scores, labels = model(**batch{uncached(scene)}).logits, batch['labels']",
            *shift,
            "scores, labels = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)",
            "loss = torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)",
        ]
    found = [
        *loss,
        "found = torch.autograd.grad(loss, trained, allow_unused=True)",
        "wanted = torch.cat([(g if g is not None else torch.zeros_like(p)).flatten() for g, p in zip(found, trained)])",
    ]
    if scene.measurement == "clipping":
        found += ["max_norm = 0.5 * float(wanted.norm())", "wanted = wanted / 2"]
    return found


TRAINER = {
    **{("train.trainer", way): Body(lines=_one_step, twins=True, rows=2) for way in WAYS},
    ("train.trainer", "accelerate-loop"): Body(lines=_accelerate_loop, twins=True, rows=2),
}
