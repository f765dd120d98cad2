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
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from leattn.attention.kernels import needs_gradient
from leattn.errors import BackendError
from leattn.prompt.columns import Stretch
from leattn.prompt.visible import Run

GATHERED = 1 << 16
"""Keys that one call may gather, or one sequence's: what many stretches see adds up to more than there are keys."""

Kernel: TypeAlias = Callable[..., Any]
"""``torch.nn.attention.varlen.varlen_attn``, or what behaves like it."""


def kernel_for(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
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
def _installed(device: torch.device) -> Kernel | None:
    """torch's own kernel, if this torch and this GPU have it."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn  # only here: it loads torch's compiler
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"return_aux", "scale", "window_size", "enable_gqa"} <= known.keys() else None


class Sequences(NamedTuple):
    """Sequences side by side: ``offsets`` ``[N + 1]`` int32, where each begins and the last ends, and the longest's tokens."""

    offsets: torch.Tensor
    longest: int


class Seen(NamedTuple):
    """What some queries see whole: indices into queries ``[T, …]`` and into keys ``[B, K, …]``, and how both are cut."""

    queries: slice | torch.Tensor
    keys: tuple[int | torch.Tensor, slice | torch.Tensor]
    query_cuts: Sequences
    key_cuts: Sequences


class _Sharers(NamedTuple):
    """Queries ``start`` to ``stop`` of ``[T, …]``, which all see ``runs`` of one row."""

    start: int
    stop: int
    row: int
    runs: tuple[Run, ...]


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
        edges: list[int] = []
        sharers: list[_Sharers] = []
        for row, those in enumerate(those for those in stretches for _ in range(repeats)):
            shift = row * len(queries) - queries.start
            edges.append(shift + queries.start)
            for stretch in those:
                start, stop = shift + stretch.start, shift + stretch.stop
                edges += [start, stop]
                if sharers and sharers[-1][1:] == (start, row, stretch.seen):
                    sharers[-1] = sharers[-1]._replace(stop=stop)
                elif stretch.seen:
                    sharers.append(_Sharers(start, stop, row, stretch.seen))
        edges.append(repeats * len(stretches) * len(queries))
        self.own = _sequences(np.diff(np.unique(edges)), device)
        self.seen = [_seen(part, device) for part in _portions(sharers)]

    def attention(
        self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Query ``[B, H, Q, D]`` over key and value ``[B, G, K, D]`` → ``[B, Q, H, D]``.

        Raises
        ------
        BackendError
            The kernel's log-sum-exp has another shape than expected.
        """
        rows, heads, length, head = query.shape
        queries = query.transpose(1, 2).reshape(-1, heads, head)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)  # [B, K, G, D]
        own_keys, own_values = (x[:, self.columns].flatten(0, 1) for x in (keys, values))
        output, lse = _call(kernel, queries, own_keys, own_values, self.own, self.own, scaling, causal=True)
        for seen in self.seen:
            theirs, theirs_lse = _call(
                kernel, queries[seen.queries], keys[seen.keys], values[seen.keys], seen.query_cuts, seen.key_cuts, scaling
            )
            share = torch.sigmoid(theirs_lse - lse[seen.queries]).to(output.dtype)
            output[seen.queries] = torch.lerp(output[seen.queries], theirs, share)
        return output.view(rows, length, heads, head)


class _Aux(NamedTuple):
    """As ``torch.nn.attention.varlen.AuxRequest``, whose import loads torch's compiler."""

    lse: bool


def _call(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_cuts: Sequences,
    key_cuts: Sequences,
    scaling: float,
    *,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query ``[T, H, D]`` over key and value ``[·, G, D]`` → output ``[T, H, D]`` and log-sum-exp ``[T, H, 1]`` in fp32."""
    output, lse = kernel(
        query,
        key,
        value,
        query_cuts.offsets,
        key_cuts.offsets,
        query_cuts.longest,
        key_cuts.longest,
        return_aux=_Aux(lse=True),
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
    )
    # torch documents [T, H], but its kernel and what it registers for tracing give [H, T].
    expected = [query.shape[1], query.shape[0]]
    if list(lse.shape) != expected:
        raise BackendError(
            f"varlen_attn of torch {torch.__version__} returns a log-sum-exp of shape {list(lse.shape)} where sparse knows "
            f"[heads, tokens] = {expected}; use backend='flex' or 'sdpa' on this GPU"
        )
    return output, lse.float().transpose(0, 1)[..., None]


def _size(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def _portions(sharers: Iterable[_Sharers]) -> list[list[_Sharers]]:
    """In order, and in as few parts as gather ``GATHERED`` keys each."""
    parts: list[list[_Sharers]] = []
    keys = GATHERED
    for one in sharers:
        keys += _size(one.runs)
        if keys > GATHERED:
            parts.append([])
            keys = _size(one.runs)
        parts[-1].append(one)
    return parts


def _seen(sharers: Sequence[_Sharers], device: torch.device) -> Seen:
    """One call's worth; indices are slices, which copy nothing, where tokens lie side by side."""
    queries = np.concatenate([np.arange(one.start, one.stop) for one in sharers])
    columns = np.concatenate([np.arange(start, stop) for one in sharers for start, stop in one.runs])
    lengths = [_size(one.runs) for one in sharers]
    rows = {one.row for one in sharers}
    row: int | torch.Tensor = sharers[0].row
    if len(rows) > 1:
        row = torch.from_numpy(np.repeat([one.row for one in sharers], lengths)).to(device)
    return Seen(
        _index(queries, device),
        (row, _index(columns, device) if len(rows) == 1 else torch.from_numpy(columns).to(device)),
        _sequences([one.stop - one.start for one in sharers], device),
        _sequences(lengths, device),
    )


def _index(tokens: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> slice | torch.Tensor:
    first, last = int(tokens[0]), int(tokens[-1]) + 1
    if (np.diff(tokens) == 1).all():
        return slice(first, last)
    return torch.from_numpy(tokens).to(device)


def _sequences(lengths: Sequence[int] | np.ndarray[Any, Any], device: torch.device) -> Sequences:
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return Sequences(offsets.to(device), int(max(lengths)))
