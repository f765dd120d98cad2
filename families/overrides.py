"""Per family, what its config needs beyond small sizes. Kept as data, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import SiglipVisionConfig

from families.sizes import HIDDEN, KEEP, WINDOW

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_lowrank": 8,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 12,
}
_DRAFTS = "it drafts for another model from that model's hidden states, keys and values, and reads no text by itself"


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {**_ROPE, "mrope_section": list(sections)}}


_MROPE = _mrope(2, 3, 3)

OPTIONS: dict[str, Mapping[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 200,
        "vocab_size": 260,
        "encoder_config": {"hidden_size_global": HIDDEN, "vocab_size": 260},
        "decoder_config": {"hidden_size_global": HIDDEN, "vocab_size": 260},
        "patcher_config": {"vocab_size": 260},
    },
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"moe_top_k": 2}},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN, "mlp_layer_types": ["dense", "dense"]},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 16},
    },
    "dots3_note_text": _DOTS3,
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "input_size": 16,
        }
    },
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": HIDDEN},
    "reformer": {"axial_pos_embds_dim": [24, 40], "axial_pos_shape": [16, 32]},
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 50,
        "shape_embed_dim": 16,
    },
    "stablelm": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": HIDDEN, "mamba_n_heads": 4, "mamba_d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0},
    "chameleon": {
        "vocabulary_map": {"<image>": 99, "IMGIMGBSZ": 98},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 32], **_mrope(3, 3, 2)}},
    "gemma3n": {
        "audio_config": {"vocab_size": 4, "vocab_offset": 96, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4}
    },
    "glm46v": {"vision_config": {"out_hidden_size": HIDDEN}, "text_config": _MROPE},
    "glm4v": {"vision_config": {"out_hidden_size": HIDDEN}, "text_config": _MROPE},
    "glm4v_moe": {"vision_config": {"out_hidden_size": HIDDEN}, "text_config": _mrope(1, 1, 2)},
    "glm_ocr": {"vision_config": {"out_hidden_size": HIDDEN}, "text_config": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "attention_layers": KEEP},
    "granite_docling": {"vision_config": {"out_hidden_size": HIDDEN}},
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "llama4": {"vision_config": {"vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN}},
    "mistral4": {"head_dim": 16},
    "molmo2": {"vision_config": {"image_size": [28, 28]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_omni_thinker": {"text_config": _MROPE, "audio_config": {"output_dim": HIDDEN}},
    "qwen2_5_vl": {"text_config": _MROPE, "vision_config": {"out_hidden_size": HIDDEN}},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen3_asr": {"eos_token_id": KEEP},
    "qwen3_omni_moe_thinker": {
        "audio_config": {"downsample_hidden_size": 16, "output_dim": HIDDEN},
        "vision_config": {"out_hidden_size": HIDDEN},
        "text_config": _MROPE,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Arguments of the config; under the name of a part, those of that part."""

# Without timm, gemma3n's own vision tower cannot be made; it is not looked at here, and another stands in for it.
_TOWER = SiglipVisionConfig(
    hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
)
_TOWER.vocab_size, _TOWER.vocab_offset, _TOWER.rms_norm_eps = 4, 92, 1e-6

AFTER: dict[str, Mapping[str, Any]] = {"blt": {"num_hidden_layers": 2}, "gemma3n": {"vision_config": _TOWER}}
"""Set on the config once it is made."""

PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Types whose auto class takes the whole config, and whose model wants a part of it."""

TAKE_NO_TEXT = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}

WRAPPERS = (
    "aria",
    "audioflamingo3",
    "aya_vision",
    "chameleon",
    "cohere2_vision",
    "cosmos3_omni",
    "deepseek_vl",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmasr",
    "granite_docling",
    "granite_speech",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "kimi_k25",
    "kosmos-2.5",
    "lfm2_vl",
    "lighton_ocr",
    "llama4",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "minicpmv4_7",
    "minimax_m3_vl",
    "mistral3",
    "mistral4",
    "mistral_large4",
    "mllama",
    "molmo2",
    "ovis2",
    "paddleocr_vl",
    "paligemma",
    "phi4_multimodal",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_asr",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "shieldgemma2",
    "smolvlm",
    "step3p7",
    "video_llama_3",
    "video_llava",
    "vipllava",
    "voxtral",
)
"""Models of text and pictures or sound, which are given text alone. (Those whose class also stands for a causal language model,
such as gemma3 and got_ocr2, are in the table by that.)"""
