"""A user without a DAG: a plain causal prompt through leattn against the model alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import leattn
from benchmarks.branches import batched, check_tokens, reference
from benchmarks.measure import check_close, interleaved
from benchmarks.models import random_ids, small_llama
from benchmarks.row import Effort, Goal, Measured, Row
from leattn import ICLNode

PREFILL, CONTEXT, NEW = 4096, 512, 48
TOLERANCE = 2e-3


@torch.no_grad()
def measure_prefill(effort: Effort) -> Measured:
    """One forward over one node of 4096 tokens, logits of the last token."""
    model = small_llama()
    prompt = leattn.compile_prompt(ICLNode(random_ids(effort.length(PREFILL), 0)))
    rivals: dict[str, Callable[[], torch.Tensor]] = {
        "leattn": lambda: leattn.forward(model, prompt, use_cache=True, logits_to_keep=1).logits,
        "HF": lambda: model(prompt.input_ids, use_cache=True, logits_to_keep=1).logits,
    }
    check_close("leattn", rivals["leattn"](), rivals["HF"](), TOLERANCE)
    times = interleaved(rivals, effort.rounds)
    return Measured(times.medians(), {"leattn / HF": times.ratio("leattn", "HF")})


@torch.no_grad()
def measure_decode(effort: Effort) -> Measured:
    """48 greedy tokens after 512; what the first of them costs, prefill included, is taken off."""
    model, new = small_llama(), effort.length(NEW)
    prompt = leattn.compile_prompt(ICLNode(random_ids(effort.length(CONTEXT), 0)))
    ways: dict[str, Callable[[int], Any]] = {
        "leattn": lambda tokens: leattn.generate(model, prompt, max_new_tokens=tokens).token_ids,
        "HF": lambda tokens: batched(model, prompt.input_ids, tokens)[0],
    }
    expected, gaps = reference(model, prompt.input_ids, new)
    for name, way in ways.items():
        check_tokens(name, way(new)[None], expected, gaps)
    rivals = {name: lambda way=way: way(new) for name, way in ways.items()}
    rivals |= {f"{name}, first token": lambda way=way: way(1) for name, way in ways.items()}
    times = interleaved(rivals, effort.rounds)
    decode = {name: times.without(name, f"{name}, first token") for name in ways}
    ratio = statistics.median(ours / theirs for ours, theirs in zip(decode["leattn"], decode["HF"], strict=True))
    seconds = times.medians() | {f"{name}, decode": statistics.median(rounds) for name, rounds in decode.items()}
    return Measured(seconds, {"leattn / HF, decode": ratio, "leattn / HF, whole": times.ratio("leattn", "HF")})


ROWS = (
    Row(
        "plain-prefill",
        "plain causal through a model, prefill of 4096 tokens",
        measure_prefill,
        (Goal("leattn / HF", "≤", 1.02),),
        frozenset({"model"}),
    ),
    Row(
        "plain-decode",
        "plain causal through a model, 48 tokens after 512",
        measure_decode,
        (Goal("leattn / HF, decode", "≤", 1.02),),
        frozenset({"model", "quick"}),
    ),
)
