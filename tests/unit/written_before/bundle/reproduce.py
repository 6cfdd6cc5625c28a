"""Runs the caught step again: python reproduce.py [CHECKPOINT]

Ends with 1 where a value is not finite (the finding is reproduced), with 0 where all are, with 4 without a model, with 3 where
it cannot be run. For a model of your own, make it in build().
"""
import contextlib
import json
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
BUNDLE = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
TENSORS = load_file(HERE / "batches.safetensors")
MODEL = BUNDLE["model"]


def build():
    adapter, cls = MODEL["adapter"], None
    if MODEL["config"] is not None:
        import transformers

        cls = getattr(transformers, adapter["base"] if adapter else MODEL["class"], None)
    if cls is None:
        print(f"make the model in build(): {MODEL['module']}.{MODEL['class']}", file=sys.stderr)
        sys.exit(4)
    options = {"torch_dtype": getattr(torch, MODEL["dtype"]), "attn_implementation": MODEL["attn"]}
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else None
    if adapter:
        import peft

        if checkpoint is not None and (Path(checkpoint) / "adapter_config.json").is_file():
            base = peft.PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
            return peft.PeftModel.from_pretrained(cls.from_pretrained(base, **options), checkpoint, is_trainable=True)
    if checkpoint is not None:
        model = cls.from_pretrained(checkpoint, **options)
    else:
        config = cls.config_class.from_dict(MODEL["config"])
        config._attn_implementation = MODEL["attn"]
        model = cls(config)
    if adapter:
        model = peft.get_peft_model(model, getattr(peft, adapter["class"])(**adapter["config"]), adapter["name"])
    return model


def unpacked(value):
    kind, inner = next(iter(value.items()))
    if kind == "tensor":
        return TENSORS[inner]
    if kind == "dict":
        return {name: unpacked(item) for name, item in inner.items()}
    if kind in ("list", "tuple"):
        return [unpacked(item) for item in inner]
    return inner if kind == "value" else None


def optimizers(model, loop):
    named, made = dict(model.named_parameters()), []
    states = load_file(HERE / "optimizer.safetensors") if (HERE / "optimizer.safetensors").is_file() else {}
    for each in loop["optimizers"]:
        plain = [{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in each["groups"]]
        groups = [{**group, "params": [named[n] for n in names]} for group, names in zip(plain, each["names"])]
        made.append(getattr(torch.optim, each["kind"])(groups))
        for name, kept in each["state"].items():
            made[-1].state[named[name]] = {k: states[v["tensor"]] if "tensor" in v else v["value"] for k, v in kept.items()}
    return made


def passes(model, calls, scale):
    """Forward and backward; what is not finite, by name."""
    model.zero_grad()
    for number, call in enumerate(calls, 1):
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(call["rng"]["cpu"]), dtype=torch.uint8))
        with contextlib.ExitStack() as stack:
            for kind, dtype in call["autocast"].items():
                stack.enter_context(torch.autocast(kind, dtype=getattr(torch, dtype)))
            kwargs = {name: unpacked(value) for name, value in call["kwargs"].items()}
            output = model(*[unpacked(value) for value in call["args"]], **kwargs)
        named = dict(output) if hasattr(output, "items") else {"output": output}
        for name, value in named.items():
            if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
                yield f"{name} of forward pass {number}"
        if isinstance(named.get("loss"), torch.Tensor):
            (named["loss"] * scale / len(calls)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            yield f"gradient of {name}"


def step(model, made, loop, number, scale):
    """The optimizers' part of a step, as the loop did it; a GradScaler skips gradients that are not finite."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)
        if not all(torch.isfinite(g).all() for g in gradients):
            return
    if loop["max_norm"] is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), loop["max_norm"])
    for index, optimizer in enumerate(made):
        for place, group in enumerate(optimizer.param_groups):
            if str(number) in loop["rates"]:
                kept = loop["rates"][str(number)][index][place]
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
        optimizer.step()


def main():
    print(f"caught at step {BUNDLE['step']}: {BUNDLE['finding']['title']}")
    model, stored = build(), HERE / "parameters.safetensors"
    loop = BUNDLE["loop"] if stored.is_file() and len(sys.argv) < 2 else None
    if stored.is_file() and len(sys.argv) < 2:
        values = load_file(stored)
        for name, parameter in model.named_parameters():
            parameter.data = values[name]
    elif len(sys.argv) < 2:
        print("this bundle holds no parameters: python reproduce.py CHECKPOINT", file=sys.stderr)
        sys.exit(4)
    model.train(MODEL["training"])
    made = optimizers(model, loop) if loop else []
    scale = float(loop["scale"] if loop else BUNDLE["loss_scale"])
    bad, numbers = [], sorted({call["step"] for call in BUNDLE["calls"]})
    for number in numbers:
        if number > BUNDLE["step"] or number < (loop["start"] if loop else BUNDLE["step"]) or bad:
            continue
        bad = list(passes(model, [call for call in BUNDLE["calls"] if call["step"] == number], scale))
        if scale != 1 and number < BUNDLE["step"]:
            bad = [name for name in bad if not name.startswith("gradient")]  # a GradScaler skips these
        if loop and not bad:
            step(model, made, loop, number, scale)
            spoiled = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
            bad += [f"{name} after step {number}" for name in spoiled]
    print("not finite: " + ", ".join(bad[:4]) if bad else "every value is finite")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    try:
        main()
    except Exception:  # Python would end with 1, which stands for the finding
        traceback.print_exc()
        sys.exit(3)
