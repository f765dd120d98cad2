"""One cache in one preallocated stretch of memory: appending writes, and never copies what is there already.

Shapes: B rows, G key/value heads, K columns filled so far, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from leattn.errors import BackendError


class ArenaLayer(DynamicLayer):
    """A layer whose ``keys`` and ``values`` ``[B, G, K, D]`` are views of larger buffers.

    Transformers' own layer concatenates, which copies the whole cache for every token. What was cut off by ``crop`` is
    overwritten by what comes next; a cache that was reordered or repeated along the batch moves to buffers of its own.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, n, D]`` keys and values; everything so far, as views."""
        self.extend([key_states], [value_states])
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def extend(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Append several pieces ``[B, G, n, D]`` one after another.

        Raises
        ------
        BackendError
            Keys or values that are no ordinary tensors.
        """
        if not self.is_initialized:
            packed = next((type(one).__name__ for one in (keys[0], values[0]) if type(one) is not Tensor), None)
            if packed is not None:
                raise BackendError(
                    f"this model keeps keys or values as {packed}, and a program or a store needs ordinary tensors; "
                    "quantise weights alone, or generate from one sink without kv_store"
                )
            self.lazy_initialization(keys[0], values[0])
        held = self.get_seq_length()
        stop = held + sum(piece.shape[-2] for piece in keys)
        buffers = self._room(held, stop, keys[0], values[0])
        for buffer, pieces in zip(buffers, (keys, values), strict=True):
            column = held
            for piece in pieces:
                buffer[:, :, column : column + piece.shape[-2]] = piece
                column += piece.shape[-2]
        self.keys, self.values = (buffer[:, :, :stop] for buffer in buffers)

    def keep(self, columns: Tensor) -> None:
        """Drop all columns but these, ``[n]`` ascending. A layer without attention never wrote any."""
        if self.keys is None or self.values is None:
            return
        keys, values = self.keys[:, :, columns], self.values[:, :, columns]
        self.keys = self.values = self.buffers = None
        self.is_initialized = False
        self.extend([keys], [values])

    def _room(self, held: int, stop: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers for ``stop`` columns that hold the first ``held``: those at hand, if they are still ours and large enough."""
        ours = self.buffers
        if ours is not None and len(ours[0]) == len(key) and stop <= ours[0].shape[2] and (not held or self._is_ours()):
            return ours
        capacity = max(self.capacity, stop) if self.buffers is None else max(stop, held + held // 2)
        rows, heads, _, _ = key.shape
        keys = key.new_empty(rows, heads, capacity, key.shape[-1])
        values = value.new_empty(rows, value.shape[1], capacity, value.shape[-1])
        if held:
            assert self.keys is not None
            assert self.values is not None
            keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        self.buffers = (keys, values)
        return self.buffers

    def _is_ours(self) -> bool:
        assert self.buffers is not None
        assert self.keys is not None
        return self.keys.data_ptr() == self.buffers[0].data_ptr() and self.keys.shape[0] == self.buffers[0].shape[0]


class Arena(DynamicCache):
    """A cache of :class:`ArenaLayer`; ``capacity`` columns are set aside at once, and more when they run out."""

    layers: list[Any]

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.layer_class_to_replicate = partial(ArenaLayer, capacity)  # type: ignore[assignment]

    def load(self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Append nodes' keys and values ``[G, n, D]`` to one layer, copying them."""
        while len(self.layers) <= layer:
            self.layers.append(self.layer_class_to_replicate())  # type: ignore[misc]
        self.layers[layer].extend([key[None] for key in keys], [value[None] for value in values])

    def keep(self, columns: Tensor) -> None:
        """Drop all columns but these, ``[n]`` ascending, in every layer."""
        for layer in self.layers:
            layer.keep(columns)


def full_length_cache(cache: Any, config: Any = None) -> Any:
    """A cache that keeps every key, which windows measured in positions need; made as the config says where there is none.

    The default cache of a sliding-window model drops keys by index. An empty ``DynamicCache`` is changed in place (``generate``
    made it and holds on to it); one that dropped keys already, or cannot grow, is refused.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if not any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", [])):
        return cache
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0:
        raise BackendError(
            f"a {type(cache).__name__} with sliding-window layers drops keys by index, but windows on a graph are measured in "
            "positions; pass past_key_values=DynamicCache() (built without the config) or leave the cache to the model"
        )
    layers: list[Any] = cache.layers
    sliding = [getattr(layer, "is_sliding", False) for layer in layers]  # layers that borrow keys do not say
    cache.layers = [DynamicLayer() if drops else layer for drops, layer in zip(sliding, layers, strict=True)]  # type: ignore[no-untyped-call]
    return cache


def cached_tokens(cache: Any) -> int:
    """Columns that a cache holds already."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
