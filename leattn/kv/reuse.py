"""A store as one run on one model uses it: keys made with the model's fingerprint, entries moved to where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from leattn.errors import BackendError, LeattnError
from leattn.kv.certify import reuse_refusal, shift_refusal
from leattn.kv.fingerprint import fingerprint
from leattn.kv.keys import node_key
from leattn.kv.node import NodeKV, node_kv
from leattn.kv.rotary import shifted
from leattn.kv.store import KVStore
from leattn.model import hf


class Reuse:
    """The entries of ``store`` that belong to ``model``.

    Raises
    ------
    LeattnError
        ``store`` is something else.
    BackendError
        Measured on this model, keys and values of a node computed in another prompt are not what they would be in this one.
    """

    def __init__(self, model: Any, store: KVStore) -> None:
        if not isinstance(store, KVStore):
            raise LeattnError(f"kv_store is a leattn.KVStore, not {store!r}; make one with leattn.KVStore(max_bytes=...)")
        reason = reuse_refusal(model)
        if reason is not None:
            raise BackendError(f"kv_store cannot serve {type(model).__name__}: {reason}")
        self.model, self.store = model, store
        self.device = hf.read_facts(model).device
        self.shifts = shift_refusal(model) is None
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
