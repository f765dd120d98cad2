"""What reading documents in another way than as they are costs: the same graph with a group and without."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import leattn
from benchmarks.cached import DOCUMENTS
from benchmarks.measure import check_close, interleaved
from benchmarks.models import random_ids, small_llama
from benchmarks.row import Effort, Goal, Measured, Row
from leattn import CompiledPrompt, ICLNode

DOCUMENT, QUESTION, NEW = 128, 64, 32
TOLERANCE = 2e-3


def prompts(document: int) -> tuple[CompiledPrompt, CompiledPrompt]:
    """A header, 16 documents behind it and a question, which reads the documents as they are, and at a temperature."""
    header = ICLNode(random_ids(16, DOCUMENTS + 1), id="header")
    nodes = [ICLNode(random_ids(document, seed), [header], f"document {seed}") for seed in range(DOCUMENTS)]
    question = random_ids(QUESTION, DOCUMENTS)
    plain = ICLNode(question, [header, *nodes], id="question")
    return leattn.compile_prompt(plain), leattn.compile_prompt(
        ICLNode(question, [header, leattn.read(nodes, temperature=0.8, scale=0.9)], "question")
    )


@torch.no_grad()
def measure(effort: Effort) -> Measured:
    """One forward on the sparse backend, and greedy tokens after it; eager says whether the reading is right."""
    model, new = small_llama(), effort.length(NEW)
    plain, read = prompts(effort.length(DOCUMENT))
    eager, sparse = (leattn.forward(model, read, backend=name, use_cache=False).logits for name in ("eager", "sparse"))
    check_close("sparse", sparse, eager, TOLERANCE)

    def forward(prompt: CompiledPrompt) -> Callable[[], Any]:
        return lambda: leattn.forward(model, prompt, backend="sparse", use_cache=True, logits_to_keep=1).logits

    def decode(prompt: CompiledPrompt, tokens: int) -> Callable[[], Any]:
        return lambda: leattn.generate(model, prompt, backend="sparse", max_new_tokens=tokens).token_ids

    rivals = {"as they are": forward(plain), "read": forward(read)}
    for tokens in (1, new):
        rivals |= {f"as they are, {tokens} tokens": decode(plain, tokens), f"read, {tokens} tokens": decode(read, tokens)}
    times = interleaved(rivals, effort.rounds)
    steps = {name: times.without(f"{name}, {new} tokens", f"{name}, 1 tokens") for name in ("as they are", "read")}
    ratio = statistics.median(a / b for a, b in zip(steps["read"], steps["as they are"], strict=True))
    return Measured(times.medians(), {"read / as they are": times.ratio("read", "as they are"), "the same, decode": ratio})


ROWS = (
    Row(
        "readings",
        "a question of 64 tokens that reads 16 documents of 128 at a temperature, and as they are; 32 tokens after it",
        measure,
        (Goal("read / as they are", "≤", 1.05), Goal("the same, decode", "≤", 1.05)),
        frozenset({"model", "quick"}),
    ),
)
