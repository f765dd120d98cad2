"""The keys and values of one node, and how they are taken out of a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from leattn.dag.node import Position
from leattn.errors import BackendError, LeattnError


@dataclass(frozen=True, eq=False, repr=False)
class NodeKV:
    """Keys and values of one node, in memory of their own. Never written to once made.

    Attributes
    ----------
    keys, values : tuple of Tensor
        One ``[G, n, D]`` per layer, keys after rotary embedding. Models with latent attention keep their latents here, as
        transformers' cache does: ``[1, n, rank]`` and ``[1, n, D]``.
    start : int or float
        The node's first position, the one that the keys are rotated for.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    start: Position

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise LeattnError(
                f"keys of {len(self.keys)} layers and values of {len(self.values)}; give one of each for every layer"
            )
        if any(tensor.dim() != 3 or tensor.shape[1] != len(self) for tensor in (*self.keys, *self.values)):
            shapes = sorted({tuple(tensor.shape) for tensor in (*self.keys, *self.values)})
            raise LeattnError(f"keys and values are [G, n, D] with one n for all layers, not {shapes}")

    def __len__(self) -> int:
        """Tokens."""
        return int(self.keys[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def to(self, device: torch.device | str) -> NodeKV:
        """A copy on ``device``; itself if it is there already."""
        if all(tensor.device == torch.device(device) for tensor in (*self.keys, *self.values)):
            return self
        return replace(
            self,
            keys=tuple(tensor.to(device) for tensor in self.keys),
            values=tuple(tensor.to(device) for tensor in self.values),
        )

    def __repr__(self) -> str:
        return f"NodeKV({len(self)} tokens from position {self.start}, {len(self.keys)} layers, {self.nbytes} bytes)"


def node_kv(cache: Any, slots: slice | Tensor, start: Position, *, row: int = 0) -> NodeKV:
    """Copy the keys and values of one node out of a transformers cache.

    Parameters
    ----------
    cache
        A cache that holds every key (``DynamicCache()``), ``[B, G, S, D]`` per layer.
    slots
        Where the node's tokens stand in it: a slice or a LongTensor ``[n]``.
    start
        The node's first position.
    row
        Which row of the batch.

    Raises
    ------
    BackendError
        A layer that wrote no keys, or keeps something else than keys and values as ordinary tensors.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), 0)
    >>> node_kv(cache, slice(1, 4), start=7)
    NodeKV(3 tokens from position 7, 1 layers, 192 bytes)
    """
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, layer in enumerate(cache.layers):
        for name, tensors in zip(("keys", "values"), kept, strict=True):
            tensor = getattr(layer, name, None)
            if not isinstance(tensor, Tensor) or tensor.dim() != 4:
                raise BackendError(f"layer {index} of the cache holds no {name} of the form [B, G, S, D], so none can be kept")
            if type(tensor) is not Tensor:
                raise BackendError(
                    f"the {name} of layer {index} are a {type(tensor).__name__}, which cannot be kept apart from the others; "
                    "quantise weights alone, not what is computed with them"
                )
            tensors.append(_copy(tensor[row], slots))
    keys, values = kept
    return NodeKV(tuple(keys), tuple(values), start)


def _copy(tensor: Tensor, slots: slice | Tensor) -> Tensor:
    """``[G, n, D]`` in memory of its own."""
    tensor = tensor.detach()
    if isinstance(slots, slice):
        return tensor[:, slots].clone(memory_format=torch.contiguous_format)
    return tensor.index_select(1, slots.to(tensor.device))
