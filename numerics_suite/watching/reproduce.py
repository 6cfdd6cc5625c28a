"""The script that a bundle carries: it needs torch, safetensors and, for a model of transformers, transformers."""

from __future__ import annotations

SCRIPT = '''\
"""Runs the caught step again: python reproduce.py [CHECKPOINT]

Ends with 1 where a value is not finite (the finding is reproduced), with 0 where all are, with 4 without a model.
For a model of your own, make it in build().
"""
import contextlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
BUNDLE = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
TENSORS = load_file(HERE / "batches.safetensors")
MODEL = BUNDLE["model"]


def build():
    if MODEL["config"] is None:
        print(f"make the model in build(): {MODEL['module']}.{MODEL['class']}", file=sys.stderr)
        sys.exit(4)
    import transformers

    cls = getattr(transformers, MODEL["class"])
    dtype = getattr(torch, MODEL["dtype"])
    if len(sys.argv) > 1:
        return cls.from_pretrained(sys.argv[1], torch_dtype=dtype, attn_implementation=MODEL["attn"])
    config = cls.config_class.from_dict(MODEL["config"])
    config._attn_implementation = MODEL["attn"]
    return cls(config)


def unpacked(value):
    kind, inner = next(iter(value.items()))
    if kind == "tensor":
        return TENSORS[inner]
    if kind == "dict":
        return {name: unpacked(item) for name, item in inner.items()}
    if kind in ("list", "tuple"):
        return [unpacked(item) for item in inner]
    return inner if kind == "value" else None


def main():
    print(f"caught at step {BUNDLE['step']}: {BUNDLE['finding']['title']}")
    model, stored = build(), HERE / "parameters.safetensors"
    if stored.is_file() and len(sys.argv) < 2:
        values = load_file(stored)
        for name, parameter in model.named_parameters():
            parameter.data = values[name]
    elif len(sys.argv) < 2:
        print("this bundle holds no parameters: python reproduce.py CHECKPOINT", file=sys.stderr)
        sys.exit(4)
    model.train(MODEL["training"])
    bad = []
    for number, call in enumerate((c for c in BUNDLE["calls"] if c["step"] == BUNDLE["step"]), 1):
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(call["rng"]["cpu"]), dtype=torch.uint8))
        with contextlib.ExitStack() as stack:
            for kind, dtype in call["autocast"].items():
                stack.enter_context(torch.autocast(kind, dtype=getattr(torch, dtype)))
            kwargs = {name: unpacked(value) for name, value in call["kwargs"].items()}
            output = model(*[unpacked(value) for value in call["args"]], **kwargs)
        named = dict(output) if hasattr(output, "items") else {"output": output}
        for name, value in named.items():
            if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
                bad.append(f"{name} of forward pass {number}")
        if isinstance(named.get("loss"), torch.Tensor) and not bad:
            (named["loss"] * float(BUNDLE["loss_scale"])).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad += [f"gradient of {name}" for name, grad in gradients.items() if not torch.isfinite(grad).all()]
    print("not finite: " + ", ".join(bad[:4]) if bad else "every value is finite")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
'''
