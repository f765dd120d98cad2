"""Small random models of many families, on the CPU in fp32. Weights are larger than usual, so that differences show."""

from __future__ import annotations

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 100
WINDOW = 6
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEADS_OF_12 = {"head_dim": 12}
SMALL_GPT = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 512}
OPTIONS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": HEADS_OF_12,
    "gemma2": {**HEADS_OF_12, "sliding_window": WINDOW},
    "gemma3_text": {
        **HEADS_OF_12,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {},
    "gpt_neox": {},
    "gpt2": SMALL_GPT,
    "qwen3_moe": {**HEADS_OF_12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "gptj": {**SMALL_GPT, "rotary_dim": 8},
    "gpt_oss": {**HEADS_OF_12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 48, "n_heads": 4, "n_layers": 2},
    "mamba": {},
    "falcon": {"alibi": True},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64, **HEADS_OF_12},
    "t5": {"d_model": 48, "num_heads": 4, "d_kv": 12, "d_ff": 64, "num_layers": 2},
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2", "qwen3_moe"]
"""The families of the semantic tests."""
WINDOWED = ["mistral", "qwen2", "gemma2", "gemma3_text"]
BACKENDS = ["eager", "sdpa", "flex", "sparse"]
REFUSED = {("gemma2", "sdpa"), ("gemma2", "sparse"), ("gpt2", "flex")}
"""What transformers, or our own backend, has no kernel for; check_model says so."""
SERVED = [(family, backend) for family in FAMILIES for backend in BACKENDS if (family, backend) not in REFUSED]


def make_model(family: str, implementation: str = "eager", *, seed: int = 0, **options) -> PreTrainedModel:
    """A fresh model that a test may change."""
    torch.manual_seed(seed)
    given = {**COMMON, **OPTIONS[family], **options}
    for name in ("num_hidden_layers", "num_attention_heads"):
        if family == "gpt_neo":
            given.pop(name)
    config = AutoConfig.for_model(family, **given)
    config._attn_implementation = implementation
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


@functools.cache
def shared_model(family: str, implementation: str = "eager") -> PreTrainedModel:
    """One model for all tests that leave it as it is, which is most of them."""
    return make_model(family, implementation)
