"""Further configs of a family, where real models differ from its default: that is where faults hide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from families.overrides import SLIDING

_ATTENTION_ONLY = {"layer_types": ["full_attention", "full_attention"]}
_TWICE = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


VARIANTS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "bamba": {"attention only": {"attn_layer_indices": [0, 1]}},
    "bert": {"an encoder": {"is_decoder": False}},
    "big_bird": {"full attention": {"attention_type": "original_full"}},
    "deepseek_v2": {"queries not compressed": {"q_lora_rank": None}},
    "deepseek_v3": {"queries not compressed": {"q_lora_rank": None}},
    "deepseek_v32": {"an indexer that never binds": {"index_topk": 512}},
    "doge": {"a mask that binds": {"keep_window_size": 16}},
    "falcon": {
        "ALiBi": {"alibi": True},
        "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "not parallel": {"parallel_attn": False, "multi_query": False},
    },
    "gemma3_text": {"bidirectional": {"use_bidirectional_attention": True}},
    "gemma3n_text": {
        "shared keys": {
            "layer_types": _TWICE,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        }
    },
    "gemma4_text": {
        "shared keys": {"layer_types": _TWICE, "num_kv_shared_layers": 2},
        "keys as values": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "experts": {"enable_moe_block": True},
    },
    "gemma4_unified_text": {"shared keys": {"layer_types": _TWICE, "num_kv_shared_layers": 2}},
    "gpt2": {"scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}},
    "gpt_bigcode": {"many key heads": {"multi_query": False}},
    "gpt_neo": {"no window": {"attention_types": [[["global"], 2]]}},
    "gpt_neox": {"not parallel": {"use_parallel_residual": False, "rotary_pct": 1.0}},
    "granite": {"scaled": {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 2.0}},
    "granitemoehybrid": {
        "attention only": {**_ATTENTION_ONLY, "position_embedding_type": "rope"},
        "attention only, no positions": {**_ATTENTION_ONLY, "position_embedding_type": "nope"},
        "attention only, no experts": {**_ATTENTION_ONLY, "position_embedding_type": "rope", "num_local_experts": 0},
    },
    "jamba": {"attention only": {"attn_layer_period": 1, "attn_layer_offset": 0}},
    "lfm2": {"attention only": _ATTENTION_ONLY},
    "lfm2_moe": {"attention only": _ATTENTION_ONLY},
    "llama": {
        "llama3 RoPE": _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        "linear RoPE": _rope("linear", factor=4.0),
        "yarn RoPE": _rope("yarn", factor=4.0, original_max_position_embeddings=128),
        "dynamic RoPE": {**_rope("dynamic", factor=4.0), "max_position_embeddings": 64},
        "one key head": {"num_key_value_heads": 1},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
    "llama4_text": {
        "no chunks": {**_ATTENTION_ONLY, "no_rope_layers": [1, 0]},
        "no chunks, scaled early": {**_ATTENTION_ONLY, "no_rope_layers": [1, 0], "floor_scale": 16},
    },
    "ministral3": {
        "queries scaled early": _rope(
            "yarn", factor=4.0, original_max_position_embeddings=32, llama_4_scaling_beta=0.5, beta_fast=32.0, beta_slow=1.0
        )
    },
    "mistral": {"no window": {"sliding_window": None}},
    "mixtral": {"no window": {"sliding_window": None}},
    "opt": {"projected, norm after": {"word_embed_proj_dim": 32, "do_layer_norm_before": False}},
    "phi": {"normed keys": {"qk_layernorm": True}},
    "phi3": {
        "no window": {"sliding_window": None},
        "longrope": {
            **_rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=64, factor=8.0),
            "sliding_window": None,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"window": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": SLIDING}},
    "qwen2_moe": {"window": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": SLIDING}},
    "qwen3": {"window": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": SLIDING}},
    "qwen3_5_text": {"attention only": _ATTENTION_ONLY},
    "qwen3_next": {"attention only": _ATTENTION_ONLY},
    "roberta": {"an encoder": {"is_decoder": False}},
    "stablelm": {"parallel, normed keys": {"use_parallel_residual": True, "qk_layernorm": True}},
    "xlm": {"causal": {"causal": True}},
}
"""Further configs of a type, by name, where real models differ from the default."""
