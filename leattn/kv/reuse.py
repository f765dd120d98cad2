"""A store as one run on one model uses it: keys made with the model's fingerprint, entries moved to where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from leattn.errors import BackendError, LeattnError
from leattn.kv.certify import certificate
from leattn.kv.fingerprint import fingerprint
from leattn.kv.keys import node_key
from leattn.kv.node import NodeKV, node_kv
from leattn.kv.rotary import shifted
from leattn.kv.store import KVStore
from leattn.model.record import Model


class Reuse:
    """The entries of ``store`` that belong to ``model``.

    Raises
    ------
    LeattnError
        ``store`` is something else.
    BackendError
        Measured on this model, keys and values of a node computed in another prompt are not what they would be in this one.
    """

    def __init__(self, model: Any, record: Model, store: KVStore) -> None:
        if not isinstance(store, KVStore):
            raise LeattnError(f"kv_store is a leattn.KVStore, not {store!r}; make one with leattn.KVStore(max_bytes=...)")
        certified = certificate(model)
        if certified.reuse is not None:
            raise BackendError(f"kv_store cannot serve {type(model).__name__}: {certified.reuse}")
        self.model, self.store, self.device = model, store, record.device
        self.shifts = certified.shift is None
        self.fingerprint = fingerprint(model)

    def key(self, ids: Sequence[int], seen: Sequence[tuple[bytes, int]], start: int) -> bytes:
        """The key of a node at position ``start``; ``seen`` are the keys and first positions of the nodes it sees."""
        relative = [(key, position - start) for key, position in seen]
        return node_key(self.fingerprint, ids, relative, None if self.shifts else start)

    def take(self, key: bytes, start: int) -> NodeKV | None:
        """The entry as it is at position ``start``, or None."""
        entry = self.store.get(key)
        return None if entry is None else shifted(self.model, entry.to(self.device), start)

    def give(self, key: bytes, cache: Any, columns: torch.Tensor | slice, start: int) -> None:
        """Keep a node that stands in some columns of a cache."""
        if key not in self.store:
            self.store.put(key, node_kv(cache, columns, start))
