"""Every mixture-of-experts family of transformers, as tiny as its config allows."""

from __future__ import annotations

import functools

import torch

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
COMMON |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
COMMON |= dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2)
COMMON |= dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1)
"""What a family's config does not have is left out of it."""

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}
ALL, LATER = (1, 2, 3), (2, 3)

# model type -> (what differs from COMMON, the layers that route, something stands beside the routed experts)
FAMILIES = {
    "afmoe": ({"num_dense_layers": 1}, LATER, True),
    "aria_text": ({}, ALL, True),
    "axk1": ({}, LATER, True),
    "axk2": ({}, LATER, True),
    "bailing_hybrid": ({}, LATER, True),
    "beam": ({"mlp_layer_types": ["dense", "sparse", "sparse"]}, LATER, False),
    "cohere2_moe": ({}, ALL, True),
    "dbrx": ({}, ALL, False),
    "deepseek_v2": ({}, LATER, True),
    "deepseek_v3": ({}, LATER, True),
    "deepseek_v32": ({}, LATER, True),
    "deepseek_v4": ({"mlp_layer_types": ["hash_moe", "moe", "moe"]}, ALL, True),
    "dots1": ({}, LATER, True),
    "dots3_note_text": ({"head_dim": 16, "index_head_dim": 8, "index_n_heads": 2}, LATER, True),
    "ernie4_5_moe": ({"moe_layer_start_index": 1}, LATER, True),
    "exaone_moe": ({}, LATER, True),
    "flex_olmo": ({}, ALL, False),
    "flint": ({"mlp_only_layers": [1]}, (1, 3), True),
    "gemma4_text": ({"enable_moe_block": True, "vocab_size_per_layer_input": 64}, ALL, True),
    "glm4_moe": ({}, LATER, True),
    "glm4_moe_lite": ({}, LATER, True),
    "glm_moe_dsa": ({}, LATER, True),
    "gpt_oss": ({}, ALL, False),
    "granitemoe": ({}, ALL, False),
    "granitemoe_swa": ({}, ALL, True),
    "granitemoehybrid": (MAMBA | {"layer_types": ["mamba", "attention", "mamba"]}, ALL, True),
    "granitemoeshared": ({}, ALL, True),
    "hunyuan_v1_moe": ({}, ALL, True),
    "hy_v3": ({}, LATER, True),
    "hy_v4": ({}, LATER, True),
    "inkling2_text": ({}, ALL, False),
    "inkling_text": ({"n_shared_experts": 2}, ALL, True),
    "jamba": ({"use_mamba_kernels": False}, (2,), False),
    "jetmoe": (
        {"num_attention_heads": 4, "num_key_value_heads": 2, "kv_channels": 8, "pad_token_id": None},
        ALL,
        False,
    ),
    "kimi_linear": ({"linear_head_dim": 8, "linear_num_heads": 2}, LATER, True),
    "kolibri1": ({}, ALL, True),
    "laguna": ({"moe_router_logit_softcapping": 2.0}, LATER, True),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}, LATER, False),
    "llama4_text": ({"interleave_moe_layer_step": 2, "intermediate_size_mlp": 24}, (2,), True),
    "longcat_flash": (
        {"num_layers": 3, "zero_expert_num": 1, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16},
        ALL,
        False,
    ),
    "mellum": ({}, ALL, False),
    "mimo_v2_flash": ({"head_dim": 24, "num_attention_heads": 4}, LATER, False),
    "minimax": ({}, ALL, False),
    "minimax_m2": ({}, ALL, False),
    "minimax_m3_vl_text": ({}, ALL, True),
    "mixtral": ({}, ALL, False),
    "nemotron_h": (NEMOTRON | {"layers_block_type": ["mamba", "moe", "attention", "moe"]}, (2, 4), True),
    "olmoe": ({}, ALL, False),
    "phimoe": ({}, ALL, False),
    "qwen2_moe": ({"mlp_only_layers": [1]}, (1, 3), True),
    "qwen3_5_moe_text": ({}, ALL, True),
    "qwen3_moe": ({"mlp_only_layers": [1]}, (1, 3), False),
    "qwen3_next": ({}, ALL, True),
    "qwen4_exp_text": ({}, ALL, True),
    "solar_open": ({}, ALL, True),
    "zaya": ({"num_experts_per_tok": 1, "router_hidden_size": 8}, ALL, False),
}


def installed() -> dict[str, type]:
    """The configs of transformers' causal language models, by model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name: CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING}


def tiny_moe_config(family: str, **changes):
    config = installed()[family]
    if family == "dbrx":
        experts = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
        experts |= {"hidden_size": 16} if hasattr(config().ffn_config, "hidden_size") else {}
        size = {"d_model": 16, "n_heads": 2, "n_layers": 3, "max_seq_len": 64, "vocab_size": 64, "pad_token_id": None}
        return config(**size, ffn_config=experts, attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0})
    names = {name: name for name in config().to_dict()} | config.attribute_map  # one number may have several names
    common = {names[k]: v for k, v in COMMON.items() if k in names}
    return config(**(common | {names.get(k, k): v for k, v in (FAMILIES[family][0] | changes).items()}))


def build_tiny_moe(family: str, seed: int = 0, **changes):
    """A tiny model of a family in evaluation mode, with routers that are far from even."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_moe_config(family, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model.eval()


shared_tiny_moe = functools.cache(build_tiny_moe)
"""The same, made once; tests may not change it."""
