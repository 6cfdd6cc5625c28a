"""Tiny checkpoints of other families, with weights at the scale of a trained model: one row of `FAMILIES` each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENS = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
PLAIN = {key: value for key, value in BODY.items() if key != "intermediate_size"}
GROUPED = {**BODY, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
GPT2 = {**TOKENS, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
LM, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
THREE = {"num_labels": 3}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = {
    **HEADED,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", LM, GROUPED),
    "llama-dynamic": ("Llama", LM, {**GROUPED, "max_position_embeddings": 12, "rope_scaling": DYNAMIC}),
    "llama-classifier": ("Llama", CLASSIFIER, {**GROUPED, **THREE}),
    "mistral": ("Mistral", LM, {**HEADED, "sliding_window": 6}),
    "mixtral": ("Mixtral", LM, {**EXPERTS, "router_jitter_noise": 0.0}),
    "mixtral-router-loss": ("Mixtral", LM, {**EXPERTS, "output_router_logits": True}),
    "qwen2": ("Qwen2", LM, GROUPED),
    "qwen2-classifier": ("Qwen2", CLASSIFIER, {**GROUPED, **THREE}),
    "qwen2_moe": (
        "Qwen2Moe",
        LM,
        {**GROUPED, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "num_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
    "qwen3": ("Qwen3", LM, HEADED),
    "qwen3-classifier": ("Qwen3", CLASSIFIER, {**HEADED, **THREE}),
    "qwen3_moe": (
        "Qwen3Moe",
        LM,
        {**HEADED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_next": (
        "Qwen3Next",
        LM,
        {**HYBRID, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
    "gemma": ("Gemma", LM, HEADED),
    "gemma2": ("Gemma2", LM, {**HEADED, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3_text": (
        "Gemma3",
        LM,
        {**HEADED, "sliding_window": 6, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("Phi", LM, GROUPED),
    "phi3": ("Phi3", LM, GROUPED),
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoX", LM, BODY),
    "gptj": ("GPTJ", LM, {**GPT2, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeo",
        LM,
        {**TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
    "gpt_bigcode": ("GPTBigCode", LM, GPT2),
    "codegen": ("CodeGen", LM, {**GPT2, "rotary_dim": 4}),
    "opt": ("OPT", LM, {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", LM, {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom-classifier": ("Bloom", CLASSIFIER, {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4, **THREE}),
    "falcon": ("Falcon", LM, {**PLAIN, "ffn_hidden_size": 64}),
    "biogpt": ("BioGpt", LM, BODY),
    "biogpt-classifier": ("BioGpt", CLASSIFIER, {**BODY, **THREE}),
    "bert": ("Bert", CLASSIFIER, {**BODY, **THREE}),
    "roberta": ("Roberta", CLASSIFIER, {**BODY, **THREE}),
    "xlm-roberta": ("XLMRoberta", CLASSIFIER, {**BODY, **THREE}),
    "deberta-v2": (
        "DebertaV2",
        CLASSIFIER,
        {**BODY, **THREE, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
        | {"max_relative_positions": 32},
    ),
    "electra": ("Electra", CLASSIFIER, {**BODY, **THREE, "embedding_size": 32}),
    "albert": ("Albert", CLASSIFIER, {**BODY, **THREE, "embedding_size": 16}),
    "distilbert": (
        "DistilBert",
        CLASSIFIER,
        {"vocab_size": 300, "pad_token_id": 0, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        | {"max_position_embeddings": 128, **THREE},
    ),
    "modernbert": (
        "ModernBert",
        CLASSIFIER,
        {**BODY, **THREE, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "xlnet": (
        "XLNet",
        CLASSIFIER,
        {"vocab_size": 300, "pad_token_id": 0, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, **THREE},
    ),
    "megatron-bert": ("MegatronBert", LM, {**BODY, "is_decoder": True}),
    "rembert": (
        "RemBert",
        LM,
        {**BODY, "is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 32},
    ),
    "big_bird": ("BigBird", LM, {**BODY, "is_decoder": True, "attention_type": "original_full"}),
    "deepseek_v3": (
        "DeepseekV3",
        LM,
        {**GROUPED, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2}
        | {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16}
        | {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "olmo2": ("Olmo2", LM, GROUPED),
    "olmoe": ("Olmoe", LM, {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", LM, GROUPED),
    "starcoder2": ("Starcoder2", LM, GROUPED),
    "stablelm": ("StableLm", LM, GROUPED),
    "mamba": ("Mamba", LM, MAMBA),
    "mamba2": ("Mamba2", LM, {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "bamba": (
        "Bamba",
        LM,
        {**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}
        | {"mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "granite": ("Granite", LM, GROUPED),
    "smollm3": ("SmolLM3", LM, {**GROUPED, "no_rope_layer_interval": 2}),
    "ernie4_5": ("Ernie4_5", LM, HEADED),
    "gpt_oss": ("GptOss", LM, {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "jamba": (
        "Jamba",
        LM,
        {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False}
        | {"mamba_dt_rank": 4},
    ),
}
"""Name → prefix of the classes, ending of the model's class, config."""


def model_class(name: str) -> str:
    """The class of the row's model."""
    prefix, ending, _ = FAMILIES[name]
    return prefix + ending


def missing_in_release(name: str) -> bool:
    """Whether the installed transformers lacks the family."""
    import transformers

    return not hasattr(transformers, model_class(name))


def build(name: str, folder: Path, **changes: object) -> str:
    """Write the row's checkpoint, in float32, as save_pretrained writes it; returns the folder.

    Args:
        name: a key of :data:`FAMILIES`.
        folder: made if need be.
        changes: of the config.
    """
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model_class(name))
    model = made(made.config_class(**FAMILIES[name][2] | changes))
    _settle(model)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _settle(model: nn.Module) -> None:
    """Matrices that keep variance: a fresh model's are so small that a layer adds nothing to its input."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif name == "bias" and isinstance(module, nn.Linear):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
