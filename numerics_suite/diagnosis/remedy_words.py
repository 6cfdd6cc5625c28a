"""What each remedy of the contract means for a user, in a line, and which costs the user least."""

from __future__ import annotations

DESCRIPTIONS = {
    "init-head": "initialise the new head once, before it is first trained: nn.init.xavier_uniform_(weight), nn.init.zeros_(bias)",
    "default-input-dtypes": "leave input_ids, attention_mask and labels in int64 from the tokenizer on, since rounded ids cannot be restored; cast floating tensors only",
    "set-pad-token": "give the tokenizer a pad token and set pad_token_id in config.json to its id",
    "fix-tokenizer": "change the checkpoint's tokenizer code so that the installed transformers can call it",
    "separate-rows": "give packed rows position_ids that restart, and attention that ends at each row",
    "fix-padding": "pad on the side on which the model ignores padding (tokenizer.padding_side), and pass the attention mask; if that is the right, give generate(), which needs left padding, rows of equal length",
    "count-labels": "see that every batch has labels other than -100: cut the prompt, not the answer, or raise the maximum length; check at your own length (--seq-len)",
    "fix-config": "write in config.json what the weights were trained with, in keys that the installed transformers reads",
    "save-head": 'save the head with the adapter (modules_to_save=["score"] in its LoraConfig)',
    "cast-after-loading": "after loading, cast only what is in another dtype: head.to(dtype), not model.to(dtype), which rounds buffers",
    "load-with-dtype": "load with from_pretrained(dtype=...), not model.to(dtype), so that buffers keep their dtype",
    "rebuild-optimizer": "create the optimizer after the model has its final parameters",
    "non-reentrant-checkpointing": 'call model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
    "clip-grad-norm": "clip the total gradient norm to 1.0 (torch.nn.utils.clip_grad_norm_, --max-grad-norm 1.0)",
    "larger-optimizer-eps": "give the optimizer an eps that float16 holds: AdamW(eps=1e-4)",
    "tune-loss-scale": "start the GradScaler at a scale that suits this model's gradients (init_scale, growth_interval)",
    "lower-learning-rate": "lower the learning rate until the loss on one small batch falls, and stay well below the largest that works",
    "eager-attention": 'work around it: load with attn_implementation="eager"; the defect in this attention stays',
    "sdpa-attention": 'work around it: load with attn_implementation="sdpa"; the defect in this attention stays',
    "use-amp-bf16": "keep float32 parameters, with bfloat16 autocast (amp-bf16)",
    "keep-in-fp32": "compute this module in float32 and cast its result back",
    "fp32-master-weights": "keep the narrow parameters, and let the optimizer update a float32 copy of each (master weights)",
    "stochastic-rounding": "round updates stochastically, so that small steps count on average",
    "disable-amp": "train without autocast, in fp32",
    "raise-learning-rate": "raise the learning rate until steps change the weights; only if it was too low by mistake, since it changes the experiment",
    "reload-weights": "fetch the checkpoint again and compare its SHA-256",
    "newer-version": "install a transformers release without the defect",
    "pin-version": "pin transformers to the last release without the defect",
}
"""What each remedy of the contract means for a user, cheapest first: a line of code, a setting, speed, memory, another experiment, other files."""

FOR_CAUSE = {
    (
        "fix-config",
        "untied-weights",
    ): "if the model was trained with one embedding, call model.tie_weights(); if with two, set tie_word_embeddings to false in "
    "config.json",
    **dict.fromkeys(
        ((name, "tokenizer-incompatible") for name in ("newer-version", "pin-version")),
        "install a transformers release that the tokenizer's code was written for",
    ),
    (
        "use-amp-bf16",
        "rounded-update",
    ): "train in amp-bf16: float32 parameters and optimizer, bfloat16 arithmetic under autocast",
    **dict.fromkeys(
        (("use-amp-bf16", cause) for cause in ("overflow", "underflow")),
        "compute in bfloat16, which has the range of float32, with float32 parameters (amp-bf16)",
    ),
}
"""By remedy and cause: what it means where the reason for it is another than elsewhere."""

COST = tuple(DESCRIPTIONS)
"""Every remedy of the contract, cheapest for the user first."""
