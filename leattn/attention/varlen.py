"""The sparse backend on CUDA: a whole forward in a few calls of torch's variable-length FlashAttention.

Rows lie side by side, and every stretch is a sequence. One causal call computes what stretches see of themselves; one unmasked
call what they see whole, with neighbours that see the same as one sequence; the two are merged by log-sum-exp. What the kernel
does not serve (fp32, gradients, odd head sizes, old GPUs) runs stretch by stretch as on a CPU.

This has run only on an emulation of the kernel so far, never on a GPU. The rest leaves no room for doubt: there are no empty
sequences, and causal sequences have as many keys as queries.

Shapes: B rows, H query heads, G key heads, Q queries of a row, K keys, T tokens side by side, N sequences, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leattn.attention.group import select
from leattn.attention.kernels import needs_gradient
from leattn.errors import BackendError
from leattn.prompt.stretch import Stretch, columns_in
from leattn.prompt.visible import Run

GATHERED = 1 << 16
"""Keys that one call may gather, or one sequence's: what many stretches see adds up to more than there are keys."""

Varlen: TypeAlias = Callable[..., Any]
"""``torch.nn.attention.varlen.varlen_attn``, or what behaves like it."""

Sequences: TypeAlias = tuple[Tensor, int]
"""Where each sequence begins and the last ends, ``[N + 1]`` int32, and the longest one's tokens."""

Sharers: TypeAlias = tuple[int, int, int, tuple[Run, ...]]
"""Queries ``start`` to ``stop`` of ``[T, …]`` in a row, which all see the same intervals."""

LSE = SimpleNamespace(lse=True)
"""As ``torch.nn.attention.varlen.AuxRequest``, whose import loads torch's compiler."""


def kernel_for(query: Tensor, key: Tensor, value: Tensor) -> Varlen | None:
    """The kernel if there is one for query ``[B, H, Q, D]``, key and value ``[B, G, K, D]``, else None."""
    head = query.shape[-1]
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if head % 8 or head > 256 or value.shape[-1] != head:
        return None
    if needs_gradient(query, key, value):  # its backward leaves out what the log-sum-exp passes on
        return None
    return _installed(query.device)


@cache
def _installed(device: torch.device) -> Varlen | None:
    """torch's own kernel, if this torch and this GPU have it."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn  # only here: it loads torch's compiler
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"return_aux", "scale", "window_size", "enable_gqa"} <= known.keys() else None


class Packed:
    """The stretches of one forward as sequences side by side, made once for all layers.

    Parameters
    ----------
    stretches
        Those of each prompt, in order of columns. Queries in none of them (padding) see their like, and nobody sees them.
    repeats
        How many rows each prompt has.
    queries
        Columns of the queries, the same in all rows; the keys' columns count from 0.
    """

    def __init__(self, stretches: Sequence[Sequence[Stretch]], repeats: int, queries: range, device: torch.device) -> None:
        self.columns = slice(queries.start, queries.stop)
        length, edges = len(queries), [0, repeats * len(stretches) * len(queries)]
        sharers: list[Sharers] = []
        for row, those in enumerate(those for those in stretches for _ in range(repeats)):
            shift = row * length - queries.start
            edges.append(row * length)
            for stretch in those:
                start, stop = shift + stretch.start, shift + stretch.stop
                edges += [start, stop]
                if sharers and sharers[-1][1:] == (start, row, stretch.seen):
                    sharers[-1] = (sharers[-1][0], stop, row, stretch.seen)
                elif stretch.seen:
                    sharers.append((start, stop, row, stretch.seen))
        self.own = sequences(np.diff(np.unique(edges)), device)
        self.seen = [_call_of(part, device) for part in _portions(sharers)]

    def attention(self, kernel: Varlen, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` → ``[B, Q, H, D]``.

        Raises
        ------
        BackendError
            The kernel's log-sum-exp has another shape than expected.
        """
        rows, heads, length, head = query.shape
        queries = query.transpose(1, 2).reshape(-1, heads, head)  # [T, H, D]
        keys, values = key.transpose(1, 2), value.transpose(1, 2)  # [B, K, G, D]
        own_keys, own_values = (x[:, self.columns].flatten(0, 1) for x in (keys, values))  # [T, G, D]
        output, lse = call(kernel, queries, own_keys, own_values, self.own, self.own, scaling, causal=True)
        for those, columns, query_cuts, key_cuts in self.seen:
            theirs, theirs_lse = call(kernel, queries[those], keys[columns], values[columns], query_cuts, key_cuts, scaling)
            share = torch.sigmoid(theirs_lse - lse[those]).to(output.dtype)
            output[those] = torch.lerp(output[those], theirs, share)
        return output.view(rows, length, heads, head)


def call(
    kernel: Varlen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_cuts: Sequences,
    key_cuts: Sequences,
    scaling: float,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Query ``[T, H, D]`` over key and value ``[·, G, D]`` → output ``[T, H, D]`` and log-sum-exp ``[T, H, 1]`` in fp32."""
    (query_offsets, most_queries), (key_offsets, most_keys) = query_cuts, key_cuts
    windows = (-1, 0) if causal else (-1, -1)
    lengths = (query_offsets, key_offsets, most_queries, most_keys)
    options = {"return_aux": LSE, "scale": scaling, "window_size": windows, "enable_gqa": True}
    output, lse = kernel(query, key, value, *lengths, **options)
    # torch documents [T, H], but its kernel and what it registers for tracing give [H, T].
    expected = [query.shape[1], query.shape[0]]
    if list(lse.shape) != expected:
        raise BackendError(
            f"varlen_attn of torch {torch.__version__} returns a log-sum-exp of shape {list(lse.shape)} where sparse knows "
            f"[heads, tokens] = {expected}; use backend='flex' or 'sdpa' on this GPU"
        )
    return output, lse.float().transpose(0, 1)[..., None]


def sequences(lengths: Sequence[int] | npt.NDArray[Any], device: torch.device) -> Sequences:
    """Sequences of these lengths side by side."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.from_numpy(offsets).to(device), int(max(lengths))


def _portions(sharers: Sequence[Sharers]) -> list[list[Sharers]]:
    """In order, and in as few parts as gather ``GATHERED`` keys each."""
    parts: list[list[Sharers]] = []
    keys = GATHERED
    for one in sharers:
        size = _size(one)
        if keys + size > GATHERED:
            parts.append([])
            keys = 0
        parts[-1].append(one)
        keys += size
    return parts


def _call_of(sharers: Sequence[Sharers], device: torch.device) -> tuple[Any, Any, Sequences, Sequences]:
    """Indices of queries ``[T, …]`` and keys ``[B, K, …]``, and how both are cut; slices where possible."""
    queries = select(columns_in([(start, stop) for start, stop, _, _ in sharers]), device)
    columns = np.concatenate([columns_in(runs) for _, _, _, runs in sharers])  # not ascending: several may see the same
    lengths = [_size(one) for one in sharers]
    keys: tuple[Any, Any] = (sharers[0][2], select(columns, device))
    if len({row for _, _, row, _ in sharers}) > 1:
        rows = np.repeat([row for _, _, row, _ in sharers], lengths)
        keys = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
    return queries, keys, sequences([stop - start for start, stop, _, _ in sharers], device), sequences(lengths, device)


def _size(sharers: Sharers) -> int:
    return sum(stop - start for start, stop in sharers[3])
