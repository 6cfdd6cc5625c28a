"""A hundred small training scripts that fail, each in a known way: what `watch` catches, and what its bundle must show again.

A script is a model, the way it is trained and a fault. The models are of transformers' classes, plain or with an adapter, but for those of a script's
own, which a factory makes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

PRELUDE = """\
import contextlib, math, sys
import torch
from torch import nn

torch.manual_seed({seed})
"""

CONFIG = "dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)"

MODELS = {
    "glm": f"from transformers import GlmConfig, GlmForCausalLM\nmodel = GlmForCausalLM(GlmConfig(**{CONFIG}))\n",
    "glm4": f"from transformers import Glm4Config, Glm4ForCausalLM\nmodel = Glm4ForCausalLM(Glm4Config(**{CONFIG}))\n",
    "llama-tied": f"from transformers import LlamaConfig, LlamaForCausalLM\nmodel = LlamaForCausalLM(LlamaConfig(**{CONFIG}, tie_word_embeddings=True))\n",
    "classifier": f"from transformers import Glm4Config, Glm4ForSequenceClassification\nmodel = Glm4ForSequenceClassification(Glm4Config(**{CONFIG}, num_labels=3))\n",
}
ADAPTERS = {
    "none": "",
    "lora": "from peft import LoraConfig, get_peft_model\nmodel = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=['q_proj', 'v_proj']))\n",
    "lora-task": "from peft import LoraConfig, get_peft_model\nmodel = get_peft_model(model, LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], rank_pattern={'down_proj': 2}, modules_to_save=['lm_head'], task_type='CAUSAL_LM'))\n",
    "lora-classifier": "from peft import LoraConfig, get_peft_model\nmodel = get_peft_model(model, LoraConfig(r=4, target_modules=['q_proj'], task_type='SEQ_CLS'))\n",
    "lora-head": "from peft import LoraConfig, get_peft_model\nmodel = get_peft_model(model, LoraConfig(r=4, target_modules=['q_proj', 'v_proj', 'lm_head']))\n",
    "ia3": "from peft import IA3Config, get_peft_model\nmodel = get_peft_model(model, IA3Config(target_modules=['k_proj', 'v_proj', 'down_proj'], feedforward_modules=['down_proj']))\n",
}
LAYERS = "layers = [module for module in model.modules() if type(module).__name__.endswith('DecoderLayer')]\n"

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW(trained, lr={lr})",
    "adam": "torch.optim.Adam(trained, lr={lr})",
    "sgd": "torch.optim.SGD(trained, lr={lr})",
    "momentum": "torch.optim.SGD(trained, lr={lr}, momentum=0.9)",
    "rmsprop": "torch.optim.RMSprop(trained, lr={lr})",
    "groups": "torch.optim.AdamW([{{'params': trained[::2], 'weight_decay': 0.1}}, {{'params': trained[1::2], 'lr': {lr} / 2}}], lr={lr})",
}

LOOP = """\
trained = [p for p in model.parameters() if p.requires_grad]
{before}
optimizer = {optimizer}
{after}
scaler = torch.amp.GradScaler("cpu", enabled={scaled}{scaler})
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: {schedule})
generator = torch.Generator().manual_seed(1)
model.train()
for step in range(1, {steps} + 1):
    for part in range({parts}):
        ids = torch.randint(1, 96, (2, 10), generator=generator)
        labels = {labels}
        batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
{each}
        with torch.autocast("cpu", dtype=torch.{autocast}, enabled={cast}):
            {loss}
        scaler.scale(loss / {parts}).backward()
    if {clip}:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), {clip})
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    optimizer.zero_grad()
print("done")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One script.

    Attributes:
        name: unique, in words.
        text: of the script.
        causes: any of which the watch may name.
        factory: `module:function` that makes its model again, where its class is the script's own.
    """

    name: str
    text: str
    causes: frozenset[str]
    factory: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is put into a script, and what it is called."""

    causes: frozenset[str]
    before: str = ""
    after: str = ""
    each: str = ""
    lr: str = "1e-3"
    scaler: str = ""
    steps: int = 6


def _named(*causes: str) -> frozenset[str]:
    return frozenset(causes)


SPOILED = "{condition}[p for n, p in model.named_parameters() if {which}][0].data.view(-1)[3] = float('{value}')"


def _spoils(step: int, value: str, which: str = "'down_proj' in n") -> str:
    return "        " + SPOILED.format(condition=f"if step == {step} and part == 0: ", value=value, which=which)


RUN_AWAY = _named("divergence", "overflow", "invalid-operation", "optimizer-underflow")
FAULTS = {
    "weight that becomes NaN": Fault(
        causes=_named("divergence", "corrupt-weights", "invalid-operation"), each=_spoils(3, "nan")
    ),
    "weight that becomes inf": Fault(
        causes=_named("divergence", "corrupt-weights", "invalid-operation", "overflow"),
        each=_spoils(2, "inf", "'q_proj' in n"),
    ),
    "weight that was NaN": Fault(
        causes=_named("corrupt-weights", "uninitialised-parameters"),
        before=SPOILED.format(condition="", value="nan", which="'o_proj' in n"),
    ),
    "trained weight that was inf": Fault(
        causes=_named("corrupt-weights", "uninitialised-parameters"),
        before="trained[-1].data.view(-1)[0] = float('inf')",
    ),
    "labels of which none counts": Fault(
        causes=_named("no-counted-labels"), each="        if step == 3: batch['labels'] = torch.full_like(labels, -100)"
    ),
    "rate that overflows": Fault(causes=RUN_AWAY, lr="1e30", steps=8),
    "rate far too high": Fault(causes=RUN_AWAY | {"loss-scaling"}, lr="1e4", steps=16),
    "rate that diverges": Fault(causes=_named("divergence", "overflow"), lr="1.0", steps=40),
    "eps of 0": Fault(
        causes=_named("optimizer-underflow", "divergence", "invalid-operation"),
        after="for g in optimizer.param_groups: g['eps'] = 0.0",
        steps=4,
    ),
    "updates that round away": Fault(  # zeros hold every step, however small it is
        causes=_named("rounded-update"),
        lr="1e-8",
        before="[nn.init.constant_(p, 0.1) for n, p in model.named_parameters() if n.endswith('bias')]",
    ),
    "optimizer of copies": Fault(
        causes=_named("untrained-parameters"),
        before="import copy; twin = copy.deepcopy(model); trained = [p for p in twin.parameters() if p.requires_grad]",
    ),
    "optimizer from before a resize": Fault(
        causes=_named("untrained-parameters"), after="model.resize_token_embeddings(104)"
    ),
    "reentrant checkpoints": Fault(
        causes=_named("untrained-parameters"),
        after="model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': True})\nmodel.get_input_embeddings()._forward_hooks.clear()",
    ),
    "scale that no step fits": Fault(
        causes=_named("loss-scaling"), scaler=", init_scale=2.0**70, backoff_factor=0.999", steps=24
    ),
    "scale that hardly comes down": Fault(
        causes=_named("loss-scaling"), scaler=", init_scale=2.0**120, backoff_factor=0.99", steps=24
    ),
    "frozen after its gradients were made": Fault(
        causes=_named("wrong-gradient"),
        each="        if step == 3 and part == 0:\n            kept = [p for n, p in model.named_parameters() if 'layers.0' in n and p.requires_grad]\n            for p in kept: p.requires_grad_(False); p.grad = torch.ones_like(p)\n            optimizer.zero_grad = lambda: [setattr(p, 'grad', None) for p in trained if p.requires_grad]",
    ),
    "tied pair of two tensors": Fault(
        causes=_named("untied-weights"),
        before="model.lm_head = nn.Linear(32, 96, bias=False); model.model.embed_tokens.weight.requires_grad_(False); trained = [p for p in model.parameters() if p.requires_grad]",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a script trains."""

    model: str = "glm"
    adapter: str = "none"
    dtype: str = "float32"
    optimizer: str = "adamw"
    autocast: str | None = None
    scaled: bool = False
    clip: str = "0"
    parts: int = 1
    warm_up: bool = False
    outside: bool = False
    """The loop computes its loss outside of the model."""

    @property
    def name(self) -> str:
        words = [self.model, self.adapter, self.dtype, self.optimizer]
        words += [f"autocast-{self.autocast}"] if self.autocast else []
        words += ["scaled"] if self.scaled else []
        words += [f"clip-{self.clip}"] if self.clip != "0" else []
        words += [f"parts-{self.parts}"] if self.parts > 1 else []
        words += ["warm-up"] if self.warm_up else []
        words += ["loss-outside"] if self.outside else []
        return " ".join(words)


FULL = (
    Way(),
    Way(model="glm4", optimizer="sgd", clip="1.0"),
    Way(model="llama-tied", optimizer="momentum", parts=2),
    Way(model="classifier", optimizer="adam", clip="0.5", parts=3),
    Way(model="glm4", autocast="bfloat16", clip="1.0", warm_up=True),
    Way(optimizer="groups", autocast="float16", scaled=True, clip="1.0"),
    Way(dtype="bfloat16", optimizer="adamw", parts=2),
    Way(model="glm4", optimizer="rmsprop"),
)
ADAPTED = (
    Way(adapter="lora"),
    Way(model="glm4", adapter="lora-task", dtype="bfloat16", clip="1.0"),
    Way(adapter="lora", dtype="float16", autocast="float16", scaled=True),
    Way(model="glm4", adapter="ia3", optimizer="momentum", parts=2),
    Way(model="classifier", adapter="lora-classifier", optimizer="groups", autocast="bfloat16", clip="1.0"),
    Way(model="llama-tied", adapter="lora", dtype="float16", autocast="bfloat16", optimizer="sgd"),
)
SCALED = (
    Way(autocast="float16", scaled=True),
    Way(model="glm4", autocast="float16", scaled=True, clip="1.0", parts=2),
    Way(adapter="lora", dtype="float16", autocast="float16", scaled=True, optimizer="sgd"),
    Way(model="classifier", adapter="lora-classifier", autocast="float16", scaled=True),
)
NARROW = (
    Way(dtype="bfloat16"),
    Way(model="glm4", dtype="bfloat16", clip="1.0", parts=2),
    Way(model="glm4", dtype="bfloat16", optimizer="adam", clip="0.5"),
    Way(model="classifier", dtype="bfloat16", optimizer="adam"),
    Way(model="glm4", dtype="bfloat16", optimizer="groups"),
    Way(dtype="bfloat16", optimizer="adam", parts=2),
)


def _script(fault: str, way: Way, seed: int) -> Script:
    found = FAULTS[fault]
    dtype = "" if way.dtype == "float32" else f"model.to(torch.{way.dtype})\n"
    labels = "torch.randint(0, 3, (2,), generator=generator)" if way.model == "classifier" else "ids.clone()"
    inside = "loss = model(**batch).loss"
    outside = "logits = model(ids, attention_mask=batch['attention_mask']).logits; loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())"
    loop = LOOP.format(
        loss=outside if way.outside else inside,
        before=found.before,
        after=found.after,
        each=found.each,
        optimizer=OPTIMIZERS[way.optimizer].format(lr=found.lr),
        scaled=way.scaled,
        scaler=found.scaler,
        schedule="min(1.0, k / 2)" if way.warm_up else "1.0",
        steps=found.steps,
        parts=way.parts,
        labels=labels,
        autocast=way.autocast or "bfloat16",
        cast=way.autocast is not None,
        clip=way.clip,
    )
    # Adapters in float32 on a base in half precision, as peft makes them.
    text = PRELUDE.format(seed=seed) + MODELS[way.model] + dtype + ADAPTERS[way.adapter] + loop
    return Script(name=f"{fault}: {way.name}", text=text, causes=found.causes)


def _ways_of(fault: str) -> tuple[Way, ...]:  # noqa: PLR0911 - a line for each
    if fault == "updates that round away":
        return NARROW
    if fault.startswith("scale that"):
        return SCALED
    if fault == "reentrant checkpoints":
        head = {"lora": "lora-head", "ia3": "lora-head"}  # something outside of the checkpoints must have a gradient
        return tuple(replace(way, adapter=head.get(way.adapter, way.adapter)) for way in ADAPTED)
    if fault == "optimizer from before a resize":
        return tuple(
            way for way in FULL if way.model.startswith("glm") and way.optimizer != "groups"
        )  # a head of its own
    if fault == "tied pair of two tensors":
        return tuple(
            Way(model="llama-tied", optimizer=name, clip=clip)
            for name, clip in (("adamw", "0"), ("momentum", "1.0"), ("sgd", "0"))
        )
    if fault == "eps of 0":
        return tuple(
            Way(model=name, dtype=dtype, optimizer="adam")
            for name, dtype in (("glm", "float32"), ("glm4", "bfloat16"), ("classifier", "float32"))
        )
    if fault == "rate that diverges":
        return tuple(
            Way(model=name, optimizer=kind, clip=clip, parts=parts)
            for name, kind, clip, parts in (
                ("glm", "adamw", "0", 1),
                ("glm4", "adam", "1.0", 2),
                ("llama-tied", "rmsprop", "0", 1),
                ("glm4", "groups", "1.0", 1),
            )
        )
    if fault == "frozen after its gradients were made":
        return tuple(
            Way(model=name, optimizer=kind)
            for name, kind in (("glm", "adamw"), ("glm4", "momentum"), ("llama-tied", "adam"))
        )
    if fault == "optimizer of copies":
        return (*FULL[:4], *ADAPTED[:3])
    return (*FULL, *ADAPTED)


OUTSIDE = (
    "weight that becomes NaN",
    "rate that overflows",
    "updates that round away",
    "optimizer of copies",
)


def _both(fault: str) -> tuple[Way, ...]:
    """The ways, the second one of some faults with a loss of the loop's own too."""
    first, second, *rest = _ways_of(fault)
    own = [replace(second, outside=True)] if fault in OUTSIDE else []
    return (first, *own, second, *rest)


OWN = """\
import sys
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden):
        inner = self.down(torch.nn.functional.silu(self.up(self.norm(hidden))))
        return hidden + {inner}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(16, 50)

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.lm_head(hidden)
        return {{"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}}

def make():
    return Model().to(torch.{dtype})

if __name__ == "__main__":
    torch.manual_seed(0)
    model = make()
    for layer in model.layers:
        nn.init.constant_(layer.norm.bias, 0.1)
    optimizer = torch.optim.{optimizer}
    scaler = torch.amp.GradScaler("cpu", enabled={scaled})
    for step in range(30):
        ids = torch.randint(0, 50, (2, 8))
        scaler.scale(model(ids, labels=ids)["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    print("done")
"""


def _own(index: int) -> Script:
    adamw = "AdamW(model.parameters(), lr=1e-3)"
    fault, causes, inner, dtype, optimizer, scaled = (
        ("a branch that is detached", _named("dead-gradient"), "inner.detach()", "float32", adamw, False),
        ("a branch whose gradient is zero", _named("dead-gradient"), "(inner + inner.detach() - inner)", "float32", adamw, False),
        ("a root of zero", _named("invalid-operation"), "(inner + (inner * 0).sqrt())", "float32", adamw, False),
        ("a root of zero under a scale", _named("loss-scaling"), "(inner + (inner * 0).sqrt())", "float32", adamw, True),
        ("a quotient of zeros", _named("invalid-operation"), "inner / (inner * 0)", "float32", adamw, False),
        ("a rate of 30", _named("divergence"), "inner", "float32", "SGD(model.parameters(), lr=30)", False),
        ("updates that round away", _named("rounded-update"), "inner", "bfloat16", "AdamW(model.parameters(), lr=1e-8)", False),
        ("an exponential that overflows", _named("overflow"), "(inner * 1e4).exp()", "float16", "SGD(model.parameters(), lr=1e-3)", False),
    )[index]  # fmt: skip
    name = f"own_{index}"
    text = OWN.format(inner=inner, dtype=dtype, optimizer=optimizer, scaled=scaled)
    return Script(name=f"{fault}: its own class", text=text, causes=causes, factory=f"{name}:make")


def scripts() -> Iterator[Script]:
    """The hundred: each fault in each way that it fits, evenly chosen."""
    own = [_own(index) for index in range(8)]
    every = {fault: [_script(fault, way, seed) for seed, way in enumerate(_both(fault))] for fault in FAULTS}
    chosen: list[Script] = []
    while len(chosen) + len(own) < 100:
        rest = [found.pop(0) for found in every.values() if found]
        if not rest:
            break
        chosen += rest[: 100 - len(own) - len(chosen)]
    yield from chosen
    yield from own
