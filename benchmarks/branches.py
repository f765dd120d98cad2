"""16 questions over one context, each answered in 32 tokens: one sequence of branches against what transformers offers.

All questions have one length, so that transformers' batches need no padding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

import leattn
from benchmarks.measure import Disagreement, interleaved, peak_megabytes
from benchmarks.models import random_ids, small_llama
from benchmarks.row import Effort, Goal, Measured, Row
from leattn import CompiledPrompt, ICLNode

BRANCHES, QUESTION, NEW = 16, 16, 32
ONCE = 0.25
"""A branch brings 48 tokens of its own to a context of 1024; one that copied the context would bring more than 1 context."""
TIE = 1e-3
"""The reference's best two logits: nearer than this, rounding may decide."""


def texts(context: int, branches: int = BRANCHES) -> torch.Tensor:
    """Context and question of each branch, ``[branches, context + 16]``."""
    shared = random_ids(context, 0)
    return torch.tensor([shared + random_ids(QUESTION, 1 + i) for i in range(branches)])


def branching_prompt(rows: torch.Tensor) -> CompiledPrompt:
    """The same as a graph: the context, and each question as a sink that sees it."""
    context = ICLNode(rows[0, :-QUESTION], id="context")
    return leattn.compile_prompt([ICLNode(row[-QUESTION:], [context], id=f"Q{i}") for i, row in enumerate(rows)])


def together(model: LlamaForCausalLM, prompt: CompiledPrompt, new: int) -> torch.Tensor:
    """All branches by leattn, the new ids ``[branches, new]``."""
    token_ids = leattn.generate(model, prompt, max_new_tokens=new).token_ids
    return torch.stack([token_ids[f"Q{i}"] for i in range(len(token_ids))])


def batched(model: LlamaForCausalLM, rows: torch.Tensor, new: int, cache: DynamicCache | None = None) -> torch.Tensor:
    """transformers' own generate over whole texts, one per row; what ``cache`` holds is not computed."""
    ids = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=new, past_key_values=cache)
    return ids[:, rows.shape[1] :]


def one_by_one(model: LlamaForCausalLM, rows: torch.Tensor, new: int) -> torch.Tensor:
    return torch.cat([batched(model, row[None], new) for row in rows])


def prefilled(model: LlamaForCausalLM, context: torch.Tensor) -> DynamicCache:
    """The context computed once, ``[1, context]``."""
    cache = DynamicCache()
    model(context, past_key_values=cache, logits_to_keep=1)
    return cache


def from_repeated_cache(model: LlamaForCausalLM, rows: torch.Tensor, new: int) -> torch.Tensor:
    """The context computed once and its cache repeated for every row."""
    cache = prefilled(model, rows[:1, :-QUESTION])
    cache.batch_repeat_interleave(len(rows))
    return batched(model, rows, new, cache)


def reference(model: LlamaForCausalLM, rows: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Branch by branch by transformers alone: the new ids, and how far apart the best two logits were, ``[branches, new]``."""
    ids, gaps = [], []
    for row in rows:
        output: Any = model.generate(
            row[None],
            attention_mask=torch.ones_like(row[None]),
            max_new_tokens=new,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids.append(output.sequences[0, len(row) :])
        best = torch.cat(output.logits).topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
    return torch.stack(ids), torch.stack(gaps)


def check_tokens(what: str, found: torch.Tensor, expected: torch.Tensor, gaps: torch.Tensor) -> None:
    """Equal token by token, up to a tie if there is one: from there on the two write different texts.

    Raises
    ------
    Disagreement
        Another number of tokens, or another token where the reference was sure.
    """
    if found.shape != expected.shape:
        raise Disagreement(f"{what} wrote {list(found.shape)} tokens, the reference {list(expected.shape)}; nothing was timed")
    for branch, different in enumerate(found != expected):
        if different.any():
            at = int(different.nonzero()[0])
            if gaps[branch, at] >= TIE:
                raise Disagreement(
                    f"{what}: token {at} of branch {branch} is {int(found[branch, at])}, the reference has "
                    f"{int(expected[branch, at])}, surer than its second choice by {float(gaps[branch, at]):.2g}; "
                    "nothing was timed"
                )


@torch.no_grad()
def measure(context: int, effort: Effort) -> Measured:
    """All ways to the same 16 × 32 tokens; ``decode`` is what 31 of them cost after the first, prefill taken off."""
    model, new = small_llama(), effort.length(NEW)
    rows = texts(effort.length(context))
    prompt = branching_prompt(rows)
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "leattn": partial(together, model, prompt),
        "HF batch": partial(batched, model, rows),
        "HF repeated cache": partial(from_repeated_cache, model, rows),
        "HF one by one": partial(one_by_one, model, rows),
    }
    expected, gaps = reference(model, rows, new)
    for name, way in ways.items():
        check_tokens(name, way(new), expected, gaps)
    rivals: dict[str, Callable[[], Any]] = {name: partial(way, new) for name, way in ways.items()}
    for name in ("leattn", "HF repeated cache"):
        rivals[f"{name}, first token"] = partial(ways[name], 1)
    rivals["HF again for every token, one of them"] = rerun(model, rows[0], new)
    times = interleaved(rivals, effort.rounds)

    seconds = times.medians()
    decode = {name: times.without(name, f"{name}, first token") for name in ("leattn", "HF repeated cache")}
    seconds |= {f"{name}, decode": statistics.median(rounds) for name, rounds in decode.items()}
    again = seconds.pop("HF again for every token, one of them") * new * BRANCHES
    seconds["HF again for every token"] = again
    figures = {f"{name} / leattn": times.ratio(name, "leattn") for name in ways if name != "leattn"}
    figures["HF again for every token / leattn"] = again / seconds["leattn"]
    if new > 1:
        figures["HF repeated cache / leattn, decode"] = statistics.median(
            theirs / ours for theirs, ours in zip(decode["HF repeated cache"], decode["leattn"], strict=True)
        )
    figures |= {f"{name}, tokens per second": BRANCHES * new / seconds[name] for name in ways}
    return Measured(
        seconds, figures, (f"HF again for every token: one forward half-way, times the {new * BRANCHES} that it takes",)
    )


def rerun(model: LlamaForCausalLM, row: torch.Tensor, new: int) -> Callable[[], Any]:
    """One forward of the recipe without a cache, half-way through the answer: dense 4D mask, the whole prompt again."""
    ids = torch.cat([row, row[: new // 2]])[None]
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    return lambda: model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


# What one more branch costs in memory.


def together_memory(context: int, branches: int, new: int) -> Callable[[], torch.Tensor]:
    model, prompt = small_llama(), branching_prompt(texts(context, branches))
    together(model, branching_prompt(texts(QUESTION, 2)), 2)
    return lambda: together(model, prompt, new)


def repeated_memory(context: int, branches: int, new: int) -> Callable[[], torch.Tensor]:
    model, rows = small_llama(), texts(context, branches)
    from_repeated_cache(model, texts(QUESTION, 2), 2)
    return torch.no_grad()(lambda: from_repeated_cache(model, rows, new))


def batch_memory(context: int, branches: int, new: int) -> Callable[[], torch.Tensor]:
    model, rows = small_llama(), texts(context, branches)
    batched(model, texts(QUESTION, 2), 2)
    return lambda: batched(model, rows, new)


def measure_memory(context: int, effort: Effort) -> Measured:
    """Peak memory of 16 branches, and of one more branch in units of the context's keys and values."""
    setups = {"leattn": together_memory, "HF repeated cache": repeated_memory, "HF batch": batch_memory}
    length, new = effort.length(context), effort.length(NEW)
    config = small_llama().config
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    shared = length * per_token / 1e6
    figures = {"keys and values of the context, MB": shared}
    for name, setup in setups.items():
        half, whole = (peak_megabytes(setup, length, branches, new) for branches in (BRANCHES // 2, BRANCHES))
        figures[f"{name}, MB"] = whole
        figures[f"{name}, contexts per branch"] = (whole - half) / (BRANCHES // 2) / shared
    return Measured(figures=figures)


def _rows(contexts: Sequence[int]) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"branches-{context}",
            f"16 branches of 32 tokens over a context of {context}",
            partial(measure, context),
            (Goal("HF batch / leattn", "≥", 3.5), Goal("HF repeated cache / leattn, decode", "≥", 1.5)),
            frozenset({"model", "branches", "quick"} if context < 1000 else {"model", "branches"}),
        )
        for context in contexts
    )


ROWS = (
    *_rows((256, 1024)),
    Row(
        "memory-branches",
        "peak memory of 16 branches over a context of 1024: what one more branch adds",
        partial(measure_memory, 1024),
        (Goal("leattn, contexts per branch", "≤", ONCE, "contexts"),),
        frozenset({"model", "branches", "memory"}),
    ),
)
