"""Time to first token of a question over documents that were seen before."""

from __future__ import annotations

from collections.abc import Callable

import torch

import leattn
from benchmarks.measure import Disagreement, check_close, interleaved
from benchmarks.models import cache_of, keys_and_values, random_ids, small_llama
from benchmarks.row import Effort, Goal, Measured, Row
from leattn import CompiledPrompt, ICLNode

DOCUMENTS, DOCUMENT, QUESTION = 16, 128, 16
TOLERANCE = 2e-3
"""On logits of about ±10, fp32: what two orders of summation differ by."""


@torch.no_grad()
def measure(effort: Effort) -> Measured:
    """Every way to the logits of the question's tokens ``[1, 16, V]``, from a prompt that is compiled already."""
    model = small_llama()
    prompt = retrieval_prompt(effort.length(DOCUMENT))
    size, documents = len(prompt), len(prompt) - QUESTION
    positions, mask = prompt.position_ids, prompt.dense_mask()[None, None]
    store = leattn.KVStore(max_bytes=1 << 30)

    def dense() -> torch.Tensor:
        return model(
            prompt.input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=QUESTION
        ).logits

    def plain() -> torch.Tensor:
        return model(prompt.input_ids, use_cache=True, logits_to_keep=QUESTION).logits

    def cold() -> torch.Tensor:
        return leattn.forward(model, prompt, use_cache=True, logits_to_keep=QUESTION).logits

    def warm() -> torch.Tensor:
        return leattn.forward(model, prompt, kv_store=store).logits

    # The limit knows the assembled keys and values of all documents, and copies them once: into what the question extends.
    full = model(prompt.input_ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    assembled = keys_and_values(full, documents)

    def limit() -> torch.Tensor:
        cache = cache_of(assembled)
        return model(prompt.input_ids[:, documents:], position_ids=positions[:, documents:], past_key_values=cache).logits

    reference = dense()
    check_close("leattn with an empty store", warm(), reference, TOLERANCE)
    rivals: dict[str, Callable[[], torch.Tensor]] = {"warm": warm, "cold": cold, "limit": limit}
    for name, run in rivals.items():
        check_close(name, run(), reference, TOLERANCE)
    check_reuse(model, prompt, store, documents)
    times = interleaved({**rivals, "HF dense mask": dense, "HF plain causal": plain}, effort.rounds)
    return Measured(
        times.medians(),
        {
            "warm / limit": times.ratio("warm", "limit"),
            "HF dense mask / warm": times.ratio("HF dense mask", "warm"),
            "HF plain causal / warm": times.ratio("HF plain causal", "warm"),
            "HF dense mask / cold": times.ratio("HF dense mask", "cold"),
            "largest error of a logit": float((warm() - reference).abs().max()),
        },
        (f"{size} tokens; plain causal on the concatenated text computes something else and is there to compare with",),
    )


def retrieval_prompt(document: int) -> CompiledPrompt:
    """16 documents that do not see each other, and a question that sees all."""
    nodes = [ICLNode(random_ids(document, seed), id=f"document {seed}") for seed in range(DOCUMENTS)]
    return leattn.compile_prompt(ICLNode(random_ids(QUESTION, DOCUMENTS), nodes, id="question"))


def check_reuse(model: object, prompt: CompiledPrompt, store: object, documents: int) -> None:
    """The documents come out of the store: otherwise a warm run measures a cold one."""
    stats = leattn.generate(model, prompt, kv_store=store, max_new_tokens=1).stats
    if (stats.reused, stats.computed) != (documents, QUESTION):
        raise Disagreement(
            f"{stats.reused} tokens were reused and {stats.computed} computed, not {documents} and {QUESTION}; "
            "nothing was timed"
        )


ROWS = (
    Row(
        "cached",
        "time to first token, 16 documents of 128 tokens known, a question of 16",
        measure,
        (Goal("warm / limit", "≤", 1.25), Goal("HF dense mask / warm", "≥", 50)),
        frozenset({"model", "quick"}),
    ),
)
