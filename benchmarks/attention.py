"""One attention layer (H 32, G 8, D 128, fp32) on each workload: ours and its rivals, none of which runs a model.

``limit`` is an unmasked flash call over the same queries with the same number of (query, key) pairs. ``dense`` is SDPA with
the boolean mask, ``loop`` the simplest structure-aware way, ``flex`` compiled flex_attention with our ``BlockMask``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.measure import check_close, interleaved, peak_megabytes
from benchmarks.row import Effort, Goal, Measured, Row
from benchmarks.workloads import WORKLOADS, many_documents
from leattn import CompiledPrompt
from leattn.attention.request import Request
from leattn.attention.sparse import SparseAttention

HEADS, GROUPS, SIZE = 32, 8, 128
MEMORY_HEADS, MEMORY_GROUPS = 4, 1
"""With 32 heads, the dense rival of 32 832 tokens alone would take minutes."""
LINEAR = 2.5
"""Twice the tokens: linear memory grows by 2, quadratic by 4."""
MAX_DENSE = 6000
TOLERANCE = 1e-4
GOALS = {
    "a": (Goal("dense / sparse", "≥", 25), Goal("limit / sparse", "≥", 0.75)),
    "b": (Goal("dense / sparse", "≥", 14), Goal("limit / sparse", "≥", 0.75)),
    "c": (Goal("dense / sparse", "≥", 1.7),),
    "d": (Goal("dense / sparse", "≥", 22), Goal("limit / sparse", "≥", 0.75)),
    "e": (Goal("sparse / plain", "≤", 1.02),),
    "f": (Goal("limit / sparse", "≥", 0.75),),
    "g": (Goal("loop / sparse", "≥", 1),),
}
QUICK = frozenset("abcdg")


def _describe(make: Callable[..., CompiledPrompt]) -> str:
    text = str(make.__doc__).rstrip(".")
    return text[0].lower() + text[1:]


@torch.no_grad()
def measure(name: str, effort: Effort) -> Measured:
    """One workload through one layer, against everything that can compute it."""
    torch.manual_seed(0)
    prompt = WORKLOADS[name](effort.shrink)
    query, key, value = inputs(len(prompt), HEADS, GROUPS)
    keys = max(1, round(prompt.pairs / len(prompt)))
    rivals: dict[str, Callable[[], torch.Tensor]] = {
        "sparse": sparse(prompt, query, key, value),
        "loop": lambda: loop(prompt, query, key, value),
    }
    if len(prompt) <= MAX_DENSE:
        rivals["dense"] = dense(prompt, query, key, value)
    if prompt.visible.is_causal:
        rivals["plain"] = lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)
    flex, note = compiled_flex(prompt, query, key, value)
    if flex is not None:
        rivals["flex"] = flex
    reference = rivals["loop"]()
    for rival, run in rivals.items():
        check_close(rival, run(), reference, TOLERANCE)
    rivals["limit"] = lambda: sdpa(query, key[:, :, :keys], value[:, :, :keys], enable_gqa=True)
    times = interleaved(rivals, effort.rounds)
    figures = {f"{rival} / sparse": times.ratio(rival, "sparse") for rival in rivals if rival != "sparse"}
    if "plain" in rivals:
        figures["sparse / plain"] = times.ratio("sparse", "plain")
    return Measured(times.medians(), figures, () if note is None else (note,))


def inputs(tokens: int, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query ``[1, heads, S, D]``, key and value ``[1, groups, S, D]``."""
    query, key, value = (torch.randn(1, count, tokens, SIZE) for count in (heads, groups, groups))
    return query, key, value


def sparse(prompt: CompiledPrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Our backend; its plan is made once per forward, not per layer, and so beforehand."""
    size, cpu = len(prompt), torch.device("cpu")
    attention = SparseAttention(Request(prompt.columns, 1, range(size), size, None, torch.float32, cpu))
    return lambda: attention(None, query, key, value)[0].transpose(1, 2)


def dense(prompt: CompiledPrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
    mask = prompt.dense_mask()
    return lambda: sdpa(query, key, value, mask, enable_gqa=True)


def loop(prompt: CompiledPrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Node by node, keys gathered, one small mask."""
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


def compiled_flex(
    prompt: CompiledPrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[Callable[[], torch.Tensor] | None, str | None]:
    """Compiled flex_attention after its first call, or None and why it does not compile here."""
    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    block_mask = prompt.block_mask()

    def run() -> torch.Tensor:
        output: torch.Tensor = compiled(query, key, value, block_mask=block_mask, enable_gqa=True)
        return output

    try:
        run()
    except Exception as error:  # no compiler, or code that the compiler refuses: whatever it is, the rest is measured
        return None, f"flex does not compile here: {str(error).strip().splitlines()[0]}"
    return run, None


# Workload f again, in memory: what grows with S and what with S².


def sparse_memory(documents: int, shrink: int) -> Callable[[], torch.Tensor]:
    """Sets up the sparse call, plan included in what is measured."""
    prompt = many_documents(shrink, documents)
    tensors = inputs(len(prompt), MEMORY_HEADS, MEMORY_GROUPS)
    _warm(sparse)
    return torch.no_grad()(lambda: sparse(prompt, *tensors)())


def dense_memory(documents: int, shrink: int) -> Callable[[], torch.Tensor]:
    """Sets up SDPA with a dense mask, the mask included in what is measured."""
    prompt = many_documents(shrink, documents)
    tensors = inputs(len(prompt), MEMORY_HEADS, MEMORY_GROUPS)
    _warm(dense)
    return torch.no_grad()(lambda: dense(prompt, *tensors)())


@torch.no_grad()
def _warm(call: Callable[..., Callable[[], torch.Tensor]]) -> None:
    """What the first call of all loads is not the workload's."""
    prompt = many_documents(16, 2)
    call(prompt, *inputs(len(prompt), MEMORY_HEADS, MEMORY_GROUPS))()


def measure_memory(effort: Effort) -> Measured:
    """Peak memory of one call, output included, on 32 and on 64 documents."""
    setups = {"sparse": sparse_memory, "dense": dense_memory}
    half, whole = (
        {name: peak_megabytes(setup, documents, effort.shrink) for name, setup in setups.items()} for documents in (32, 64)
    )
    figures = {f"{name}, MB": megabytes for name, megabytes in whole.items()}
    figures |= {f"{name}, growth when S doubles": whole[name] / half[name] for name in setups}
    figures["dense / sparse"] = whole["dense"] / whole["sparse"]
    return Measured(figures=figures)


ROWS = (
    *(
        Row(
            f"attention-{name}",
            f"attention, workload {name}: {_describe(make)}",
            partial(measure, name),
            GOALS[name],
            frozenset({"attention", "quick"} if name in QUICK else {"attention"}),
        )
        for name, make in WORKLOADS.items()
    ),
    Row(
        "memory-f",
        f"peak memory of attention, workload f (H {MEMORY_HEADS}, G {MEMORY_GROUPS})",
        measure_memory,
        (Goal("sparse, growth when S doubles", "≤", LINEAR),),
        frozenset({"attention", "memory"}),
    ),
)
