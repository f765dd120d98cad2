"""Fifty items with six labels each behind 16 demonstrations: scoring all of them, generating one token, and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

import leattn
from benchmarks.measure import Disagreement, interleaved
from benchmarks.models import random_ids, small_llama
from benchmarks.row import Effort, Goal, Measured, Row
from leattn import ICLNode, KVStore

ITEMS, DEMONSTRATIONS, LABELS = 50, 16, 6
DEMONSTRATION, ITEM = 40, 20
TOLERANCE = 1e-3


def items(count: int, demonstration: int) -> list[ICLNode]:
    """Items behind demonstrations that are made anew for each, as they come from a data set."""
    found = []
    for i in range(count):
        header = ICLNode(random_ids(8, 1000))
        demos = [ICLNode(random_ids(demonstration, seed), [header]) for seed in range(DEMONSTRATIONS)]
        found.append(ICLNode(random_ids(ITEM, 2000 + i), [header, *demos]))
    return found


def one_by_one(model: LlamaForCausalLM, prompts: list[ICLNode], labels: list[list[int]]) -> torch.Tensor:
    """A forward for each item and label, as a loop over the plain model does; log-probabilities ``[items, labels]``."""
    found = torch.empty(len(prompts), len(labels))
    for i, node in enumerate(prompts):
        prompt = leattn.compile_prompt(node)
        for c, label in enumerate(labels):
            logits = leattn.forward(model, prompt.continued(label), logits_to_keep=len(label) + 1).logits[0, :-1]
            found[i, c] = logits.log_softmax(-1).gather(1, torch.tensor(label)[:, None]).sum()
    return found


@torch.no_grad()
def measure(effort: Effort) -> Measured:
    """``score`` and ``generate`` on lists; a loop over the first item says whether the scores are right."""
    model, demonstration = small_llama(), effort.length(DEMONSTRATION)
    count = effort.length(ITEMS)
    labels = [random_ids(1 + (i == 0), 3000 + i) for i in range(LABELS)]
    scores = torch.tensor(leattn.score(model, items(1, demonstration), labels, progress=False).logprobs)
    right = one_by_one(model, items(1, demonstration), labels)
    if not torch.allclose(scores.float(), right, atol=TOLERANCE):
        raise Disagreement(f"scores differ from one forward for each label by {(scores - right).abs().max():.1e}")

    def generated() -> Any:
        return leattn.generate(model, items(count, demonstration), kv_store=KVStore(), max_new_tokens=1)

    def scored() -> Any:
        return leattn.score(model, items(count, demonstration), labels, progress=False)

    rivals: dict[str, Callable[[], Any]] = {"scored": scored, "generated": generated}
    times = interleaved(rivals, effort.rounds)
    loop = interleaved({"loop": lambda: one_by_one(model, items(1, demonstration), labels)}, 1).medians()["loop"]
    return Measured(
        times.medians(),
        {
            "scored / one token generated": times.ratio("scored", "generated"),
            "a loop over items and labels / scored": count * loop / times.medians()["scored"],
        },
        (f"the loop was timed on one of {count} items",),
    )


ROWS = (
    Row(
        "scores",
        "50 items × 6 labels of a token or two behind 16 demonstrations of 40, made anew for each item",
        measure,
        (Goal("scored / one token generated", "≤", 1.3),),
        frozenset({"model", "quick"}),
    ),
)
