"""A small Llama with random weights, and what a user of transformers alone does with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

VOCABULARY = 1024


def small_llama(*, layers: int = 8, hidden: int = 512) -> LlamaForCausalLM:
    """8 layers, hidden 512, fp32, sdpa, no end-of-sequence token: every run generates as many tokens as it was asked for.

    Weights are larger than usual, so that the likeliest two tokens differ by more than rounding.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.do_sample = False
    return model


def random_ids(count: int, seed: int) -> list[int]:
    """Token ids other than padding."""
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cache_of(keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds these tensors ``[B, G, S, D]`` themselves; the first update copies them, once."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(keys_and_values):
        cache.update(keys[:, :, :0], values[:, :, :0], layer)
        cache.layers[layer].keys, cache.layers[layer].values = keys, values
    return cache


def keys_and_values(cache: DynamicCache, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first ``tokens`` columns of every layer, ``[B, G, tokens, D]``, in memory of their own."""
    return [(layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone()) for layer in cache.layers]
