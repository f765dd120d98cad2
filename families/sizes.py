"""A small configuration of any family: its own defaults, with everything that costs memory or time made tiny."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 100
HIDDEN = 64
WINDOW = 6
POSITIONS = 512

SMALL: dict[str, Any] = {
    # tokens
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "image_token_id": 99,
    "image_token_index": 99,
    "audio_token_id": 98,
    "audio_token_index": 98,
    "video_token_id": 97,
    "video_token_index": 97,
    "vision_start_token_id": 96,
    "vision_end_token_id": 95,
    "boi_token_id": 96,
    "eoi_token_id": 95,
    "boa_token_id": 94,
    "eoa_token_id": 93,
    # width
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "n_embd": HIDDEN,
    "embed_dim": HIDDEN,
    "emb_dim": HIDDEN,
    "embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "projection_dim": HIDDEN,
    "intermediate_size": 96,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "n_inner": 64,
    "d_ff": 64,
    "dim_ff": 64,
    "d_inner": 64,
    "intermediate_size_mlp": 64,
    "mlp_dim": 64,
    "hidden_size_per_layer_input": 8,
    # depth
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "depth": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    # heads
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "d_kv": 16,
    "dim_head": 16,
    "d_head": 16,
    "rotary_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 12,
    "num_kv_shared_layers": 0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # what attention may reach
    "max_position_embeddings": POSITIONS,
    "max_sequence_length": POSITIONS,
    "n_positions": POSITIONS,
    "max_seq_len": POSITIONS,
    "sliding_window": WINDOW,
    "attention_chunk_size": 8,
    "index_topk": 64,
    "index_n_heads": 16,  # with few, many scores are exactly 0 after relu, and which of them is chosen is the order's doing
    "index_head_dim": 16,
    # recurrent layers
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
    # pictures and sound, of which no model sees any here
    "image_size": 28,
    "patch_size": 14,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "initializer_range": 0.02,
}
"""By the names that configs use; a name that a config does not have is not given to it."""

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")


def small(base: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What to build a config like ``base`` from: its class gets these arguments.

    Parts (``text_config``, ``vision_config``, …) are made small by themselves; a mapping in ``overrides`` under the name of a
    part is for that part. An override that is None where the default is not leaves the default alone if it is :data:`KEEP`.
    """
    known = set(base.to_dict()) | set(type(base).attribute_map)
    given = {name: value for name, value in SMALL.items() if name in known}
    if {"kv_lora_rank", "qk_rope_head_dim"} <= known:
        # Heads of latent attention: what is rotated is a part of each, and every query head has its own keys.
        latent = {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": SMALL["num_attention_heads"]}
        given |= {name: value for name, value in latent.items() if name in known}
    given |= layers_of_every_kind(base)
    for name in type(base).sub_configs:
        part = getattr(base, name, None)
        if isinstance(part, PreTrainedConfig):
            given[name] = type(part)(**small(part, overrides.get(name) or {}))
    parts = type(base).sub_configs
    given |= {name: value for name, value in overrides.items() if name not in parts or not isinstance(value, Mapping)}
    given = {name: value for name, value in given.items() if value is not KEEP}
    types = given.get("layer_types") or given.get(type(base).attribute_map.get("layer_types", ""))
    if types:
        given |= {name: len(types) for name in COUNTS if name in known and name not in overrides}
    return copy.deepcopy(given)


class _Keep:
    def __repr__(self) -> str:
        return "KEEP"

    def __deepcopy__(self, memo: Any) -> _Keep:
        return self


KEEP = _Keep()
"""As an override: the family's own default instead of the small value."""


def layers_of_every_kind(base: PreTrainedConfig) -> dict[str, Any]:
    """The lists that a config keeps per layer, cut down to one layer of every kind that occurs, and at least two layers."""
    count = next((getattr(base, name) for name in COUNTS if isinstance(getattr(base, name, None), int)), 0)
    lists = {
        name: value
        for name, value in base.to_dict().items()
        if isinstance(value, list) and count > 2 and len(value) == count and not isinstance(value[0], dict)
    }
    if not lists:
        return {}
    kinds = list(zip(*(map(repr, value) for value in lists.values()), strict=True))
    chosen = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:6]
    chosen += [i for i in range(count) if i not in chosen][: max(0, 2 - len(chosen))]
    chosen.sort()
    cut: dict[str, Any] = {
        name: [SMALL[name]] * len(chosen) if name in SMALL else [value[i] for i in chosen] for name, value in lists.items()
    }
    return cut | {name: len(chosen) for name in COUNTS if isinstance(getattr(base, name, None), int)}
