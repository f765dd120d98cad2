"""One attention layer (H 32, G 8, D 128, fp32) on each workload: ours, a dense mask, a loop over nodes, and the limit.

``limit`` is an unmasked flash call over the same queries with the same number of (query, key) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.measure import interleaved
from benchmarks.workloads import WORKLOADS
from leattn import CompiledPrompt
from leattn.backends.batch import Batch, MaskRequest
from leattn.backends.sparse import Plan, sparse_attention

HEADS, GROUPS, SIZE = 32, 8, 128
GOALS = {"a": "≥ 25× dense", "b": "≥ 14× dense", "c": "≥ 1.7× dense", "d": "≥ 22× dense", "e": "≤ 1.02 plain", "g": "≤ loop"}
MAX_DENSE = 6000


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """One row per workload; correctness is checked before anything is timed."""
    for name, make in WORKLOADS.items():
        if not (quick and name in "ef"):
            yield _row(name, make(), 3 if quick else 7)


@torch.no_grad()
def _row(name: str, prompt: CompiledPrompt, repeats: int) -> dict[str, Any]:
    size = len(prompt)
    query, key, value = (torch.randn(1, heads, size, SIZE) for heads in (HEADS, GROUPS, GROUPS))
    batch = Batch([prompt], torch.device("cpu"))
    plan = Plan(batch, MaskRequest(1, range(size), size, None, torch.float32, torch.device("cpu"), None))
    keys = max(1, round(prompt.pairs / size))
    rivals = {
        "sparse": lambda: sparse_attention(None, query, key, value, plan)[0],
        "loop": lambda: _loop(prompt, query, key, value),
        "limit": lambda: sdpa(query, key[:, :, :keys], value[:, :, :keys], enable_gqa=True),
    }
    if size <= MAX_DENSE:
        mask = prompt.dense_mask()
        rivals["dense"] = lambda: sdpa(query, key, value, mask, enable_gqa=True)
    if prompt.visible.is_causal:
        rivals["plain"] = lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)
    reference = rivals["loop"]()
    torch.testing.assert_close(rivals["sparse"]().transpose(1, 2), reference, rtol=1e-4, atol=1e-4)
    if "dense" in rivals:
        torch.testing.assert_close(rivals["dense"](), reference, rtol=1e-4, atol=1e-4)
    seconds = interleaved(rivals, repeats)
    ratios = {f"{rival} / sparse": seconds[rival] / seconds["sparse"] for rival in rivals if rival != "sparse"}
    return {"what": f"attention {name}", "tokens": size, "goal": GOALS.get(name, ""), "seconds": seconds, "ratios": ratios}


def _loop(prompt: CompiledPrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The simplest structure-aware way: node by node, keys gathered, one small mask."""
    output = torch.empty_like(query)
    for i, runs in enumerate(prompt.visible.runs):
        start, stop = prompt.offsets[i], prompt.offsets[i + 1]
        spans = [slice(prompt.offsets[a], prompt.offsets[b]) for a, b in runs] + [slice(start, stop)]
        keys, values = (torch.cat([x[:, :, span] for span in spans], 2) for x in (key, value))
        length, total = stop - start, keys.shape[2]
        mask = torch.arange(total) <= torch.arange(total - length, total)[:, None]
        causal = total == length
        output[:, :, start:stop] = sdpa(
            query[:, :, start:stop], keys, values, None if causal else mask, is_causal=causal, enable_gqa=True
        )
    return output
