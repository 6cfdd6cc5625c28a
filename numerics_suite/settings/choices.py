"""The names that options accept, as CONTRACT.md lists them; standard library only, so that `--help` stays fast."""

from __future__ import annotations

TASKS = ("auto", "causal-lm", "sequence-classification", "token-classification")
PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "fp16", "amp-bf16", "amp-fp16", "pure-fp16")
ATTENTIONS = ("default", "eager", "sdpa", "flash_attention_2", "flex_attention")
OPTIMIZERS = ("adamw", "adam", "sgd")
EFFORTS = ("quick", "standard", "thorough")
TRAIN_SCOPES = ("auto", "full", "head", "last:K", "lora")
CAUSES = (
    "uninitialised-parameters",
    "bad-initialisation",
    "missing-weights",
    "lost-weights",
    "corrupt-weights",
    "untied-weights",
    "ignored-config",
    "wrong-input-dtype",
    "out-of-range-input",
    "overflow",
    "underflow",
    "invalid-operation",
    "fully-masked-row",
    "low-precision-section",
    "kernel-accuracy",
    "padding-leak",
    "batch-leak",
    "future-leak",
    "cache-mismatch",
    "wrong-positions",
    "wrong-pooling",
    "wrong-loss",
    "wrong-gradient",
    "dead-gradient",
    "optimizer-underflow",
    "loss-scaling",
    "divergence",
    "nondeterminism",
    "attention-mismatch",
    "semantic-error",
    "semantic-change",
    "rounding-change",
    "contract-change",
    "unknown",
    "ignored-dtype",
    "rounded-buffer",
    "uninitialised-buffer",
    "model-raises",
    "tokenizer-incompatible",
    "no-pad-token",
    "no-counted-labels",
    "lost-head",
    "wrong-output-shape",
    "rounded-update",
    "untrained-parameters",
    "packing-leak",
)
