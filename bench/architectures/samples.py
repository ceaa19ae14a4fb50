"""One tiny configuration for each architecture that upstream may send.

What makes an architecture special is switched on and small enough to show on short documents: windows of 8
tokens, soft caps that bite, scales that aren't 1.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

WINDOW = 8
SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # far from uniform predictions, so that an error shows
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# What is random while a model trains: no architecture's own name for it is left out.
RANDOM = {
    name: 0.1
    for name in (
        *("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "embedding_dropout"),
        *(
            "resid_dropout",
            "embed_dropout",
            "attn_dropout",
            "attn_pdrop",
            "resid_pdrop",
            "embd_pdrop",
            "emb_pdrop",
        ),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "layerdrop"),
        *("input_jitter_noise", "router_jitter_noise"),
    )
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512}
WINDOWED = {"sliding_window": WINDOW}
MAMBA_HEADS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
PER_LAYER = {
    **WINDOWED,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 1000,
    "num_kv_shared_layers": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


class Sample(Struct, frozen=True):
    """One architecture: its `model_type`, and where its tiny configuration differs from SMALL."""

    model_type: str
    changes: dict[str, Any] = {}
    variant: str = ""  # of several samples of one type
    leave_out: tuple[str, ...] = ()  # of SMALL: what this configuration class computes itself

    @property
    def has_experts(self) -> bool:
        """Whether a router sends each token to some of several experts."""
        return any("experts" in key and value for key, value in self.changes.items())

    @property
    def name(self) -> str:
        """The model type, with the variant if there are several."""
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type


_DECODERS = (
    Sample("llama"),
    Sample(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "llama3-rope",
    ),
    Sample("mistral", WINDOWED),
    Sample("ministral", WINDOWED),
    Sample("ministral3"),
    Sample("qwen2"),
    Sample(
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
        "yarn",
    ),
    Sample("qwen3"),
    Sample("phi", {"partial_rotary_factor": 0.5}),
    Sample("phi3", WINDOWED),
    Sample(
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",  # rows on both sides of the original positions
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 12,
            },
            "original_max_position_embeddings": 12,
        },
        "longrope",
    ),
    Sample("gemma"),
    Sample(
        "gemma2",
        {
            **WINDOWED,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    Sample("gemma3_text", {**WINDOWED, "query_pre_attn_scalar": 16}),
    Sample("gpt_neox"),
    Sample("gpt2", {**GPT, "n_inner": 128}),
    Sample("gpt_bigcode", {**GPT, "n_inner": 128}),
    Sample("gptj", {**GPT, "rotary_dim": 8}),
    Sample("codegen", {**GPT, "rotary_dim": 8}),
    Sample(
        "gpt_neo",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    Sample("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    Sample(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
        leave_out=("head_dim",),
    ),
    Sample("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}, "alibi", ("head_dim",)),
    Sample("bloom", {"n_layer": 2, "n_head": 4}),
    Sample("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512}),
    Sample("stablelm", {"use_qkv_bias": True}),
    Sample("starcoder2", WINDOWED),
    Sample("cohere", {"logit_scale": 0.25}),
    Sample("cohere2", {**WINDOWED, "logit_scale": 0.25}),
    Sample(
        "granite",
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    Sample("glm"),
    Sample("glm4"),
    Sample("nemotron"),
    Sample("arcee"),
    Sample("olmo"),
    Sample("olmo2"),
    Sample("olmo3", WINDOWED),
    Sample("smollm3"),
    Sample("exaone4", WINDOWED),
    Sample("seed_oss"),
    Sample("helium"),
    Sample("apertus"),
    Sample("ernie4_5"),
    Sample("hunyuan_v1_dense"),
    Sample("minicpm3", LATENT),
    Sample("persimmon"),
    Sample("biogpt"),
    Sample("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    Sample("nanochat"),
    Sample("diffllama", {"attention_dropout": 0.0}),
    Sample("cwm", WINDOWED),
    Sample(
        "gemma3n_text",
        {**PER_LAYER, "laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": [128, 128]},
    ),
    Sample("gemma4_text", {**PER_LAYER, "global_head_dim": 16}),
    Sample("vaultgemma", {**WINDOWED, "query_pre_attn_scalar": 16}),
    Sample("granite_swa", WINDOWED),
    Sample("internlm3"),
    Sample("jais2"),
    Sample("bitnet"),
    Sample("iquestcoder"),
    Sample("hyperclovax"),
    Sample("gpt_neox_japanese"),
    Sample("openai-gpt", GPT),
    Sample("ctrl", {**GPT, "dff": 128}),
)
_WRAPPERS = (
    Sample("gemma3"),
    Sample("gemma4"),
    Sample("qwen3_5"),
    Sample("qwen3_5_text", DELTA_NET),
)
_MIXTURES = (
    Sample("mixtral", {"num_local_experts": 4}),
    Sample("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    Sample("qwen3_moe", EXPERTS),
    Sample("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Sample("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Sample("gpt_oss", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Sample("deepseek_v2", {**ROUTED, **LATENT}),
    Sample("deepseek_v3", {**ROUTED, **LATENT}),
    Sample("glm4_moe", ROUTED),
    Sample("glm4_moe_lite", {**ROUTED, **LATENT}),
    Sample(
        "granitemoeshared", {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64}
    ),
    Sample("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}),
    Sample("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    Sample("exaone_moe", {**EXPERTS, **WINDOWED}),
    Sample("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    Sample("afmoe", {**EXPERTS, **WINDOWED}),
    Sample("dots1", {**ROUTED, "n_shared_experts": 1}),
    Sample("solar_open", ROUTED),
    Sample("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Sample("mimo_v2_flash", ROUTED),
    Sample("jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}),
)
_RECURRENT = (
    Sample("falcon_h1", {**MAMBA_HEADS, "mamba_n_heads": 4, "mamba_d_ssm": 64}),
    Sample("qwen3_next", {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 64}),
    Sample("bamba", {**MAMBA_HEADS, "attn_layer_indices": [1]}),
    Sample(
        "granitemoehybrid",
        {
            **MAMBA_HEADS,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
        },
    ),
    Sample("recurrent_gemma", {"lru_width": 64, "num_hidden_layers": 3, "attention_window_size": WINDOW}),
    Sample("mamba", {"state_size": 8}),
    Sample("mamba2", {"state_size": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 16}),
    Sample("falcon_mamba", {"state_size": 8}),
    Sample(
        "jamba",
        {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    Sample("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}),
    Sample("lfm2_moe", {"layer_types": ["conv", "full_attention"], **EXPERTS, "num_dense_layers": 1}),
    Sample("qwen3_5_moe_text", {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 64}),
    Sample(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    Sample("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"]}),
    Sample(
        "minimax",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    Sample("rwkv"),
)
SAMPLES = (*_DECODERS, *_WRAPPERS, *_MIXTURES, *_RECURRENT)
