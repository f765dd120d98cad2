"""``KVStore``: keys and values by name, bounded in memory, optionally on disk, safe for threads."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leattn.errors import LeattnError, LeattnWarning
from leattn.kv.disk import Directory
from leattn.kv.entry import NodeKV
from leattn.kv.keys import KEY_BYTES
from leattn.table import html_table


@dataclass(frozen=True)
class KVStats:
    """What a store did so far; ``entries`` and ``nbytes`` are what it holds in memory now.

    ``hits`` and ``misses`` count questions, ``tokens_reused`` the tokens of all hits, ``tokens_computed`` those of all entries
    that were put in. ``damaged`` counts files that did not pass their check.
    """

    hits: int = 0
    misses: int = 0
    tokens_reused: int = 0
    tokens_computed: int = 0
    stored: int = 0
    evicted: int = 0
    damaged: int = 0
    entries: int = 0
    nbytes: int = 0


class KVStore:
    """Keys and values of nodes, found again by what they depend on.

    Pass one as ``kv_store=`` to ``forward`` and ``generate``: a node whose tokens, visible nodes and relative positions were
    seen before, in any prompt, order or offset, is not computed again.

    Parameters
    ----------
    max_bytes
        What the entries in memory may take together. The least recently used go first; an entry larger than this is not kept.
    device
        Where entries are kept: ``"cpu"`` offloads them. None: where they were computed; entries read from disk stay on the CPU.
    directory
        Keeps a file per entry as well, which outlives the process and may be shared by several. What leaves memory stays on
        disk. Nothing there is ever deleted to save space: delete files, or the folder, when you like. A damaged file is a miss
        and a :class:`LeattnWarning`, and is renamed to ``….damaged``.

    Raises
    ------
    LeattnError
        No bytes, an unknown device, a folder that cannot be made.

    Examples
    --------
    >>> store = KVStore(max_bytes=10_000, device="cpu")
    >>> kv = NodeKV((torch.zeros(2, 3, 4),), (torch.zeros(2, 3, 4),), start=0)
    >>> store.put(bytes(32), kv)
    >>> store.get(bytes(32))
    NodeKV(3 tokens from position 0, 1 layers, 192 bytes)
    >>> store.get(bytes([1] * 32)) is None, store.stats.hits, store.stats.misses
    (True, 1, 1)
    """

    def __init__(
        self,
        *,
        max_bytes: int = 2**30,
        device: torch.device | str | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise LeattnError(f"max_bytes is a whole number of bytes above 0, not {max_bytes!r}; 2**30 is a gibibyte")
        self.max_bytes = max_bytes
        self.device = None if device is None else _checked_device(device)
        self._directory = None if directory is None else Directory(directory)
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, NodeKV] = OrderedDict()
        self._held = 0  # bytes of the entries
        self._coming = 0  # bytes of those that are being copied in at this moment
        self._stats = KVStats()

    def get(self, key: bytes) -> NodeKV | None:
        """The entry of this name, from memory or from disk, or None."""
        _check_key(key)
        with self._lock:
            kv = self._entries.get(key)
            if kv is not None:
                self._entries.move_to_end(key)
        if kv is None:
            kv = self._read(key)
            if kv is not None:
                kv = self._keep(key, kv)
        if kv is None:
            self._count(misses=1)
        else:
            self._count(hits=1, tokens_reused=len(kv))
        return kv

    def put(self, key: bytes, kv: NodeKV) -> None:
        """Keep an entry, in memory and in the directory. A name that is taken keeps what it has: both are the same.

        A tensor that is a part of a larger one, such as a cache, is copied; apart from that nobody may write to it any more.
        """
        _check_key(key)
        self._count(stored=1, tokens_computed=len(kv))
        kv = self._keep(key, kv)
        if self._directory is not None and not self._directory.file(key).exists():
            try:
                self._directory.write(key, kv)
            except OSError as error:
                warnings.warn(
                    f"an entry could not be written to {str(self._directory.path)!r} ({error}); it is kept in memory only",
                    LeattnWarning,
                    stacklevel=2,
                )

    def clear(self) -> None:
        """Forget all entries, and delete their files."""
        with self._lock:
            self._entries.clear()
            self._held = 0
        if self._directory is not None:
            self._directory.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in memory, never above ``max_bytes``."""
        with self._lock:
            return self._held

    @property
    def stats(self) -> KVStats:
        """What happened so far, as of now."""
        with self._lock:
            return replace(self._stats, entries=len(self._entries), nbytes=self._held)

    def reset_stats(self) -> None:
        """Count from 0 again; entries stay."""
        with self._lock:
            self._stats = KVStats()

    def __contains__(self, key: object) -> bool:
        """Whether there is an entry, in memory or as a file (which is checked only when read). Not counted as a question."""
        if not isinstance(key, bytes):
            return False
        with self._lock:
            if key in self._entries:
                return True
        return self._directory is not None and len(key) == KEY_BYTES and self._directory.file(key).exists()

    def __len__(self) -> int:
        """Entries in memory and on disk, each counted once."""
        with self._lock:
            keys = set(self._entries)
        return len(keys if self._directory is None else keys.union(self._directory.keys()))

    def __repr__(self) -> str:
        stats = self.stats
        where = "" if self._directory is None else f", directory {str(self._directory.path)!r}"
        return (
            f"KVStore({stats.entries} entries in memory, {_size(stats.nbytes)} of {_size(self.max_bytes)}{where}; "
            f"{stats.hits} hits, {stats.misses} misses, {stats.tokens_reused} tokens reused, {stats.tokens_computed} computed)"
        )

    def _repr_html_(self) -> str:
        stats = self.stats
        rows = {
            "in memory": f"{stats.entries} entries, {_size(stats.nbytes)} of {_size(self.max_bytes)}",
            "directory": "none" if self._directory is None else f"{self._directory.path}",
            "hits / misses": f"{stats.hits} / {stats.misses}",
            "tokens reused / computed": f"{stats.tokens_reused} / {stats.tokens_computed}",
            "evicted / damaged": f"{stats.evicted} / {stats.damaged}",
        }
        return html_table([], list(rows.items()), caption="KVStore")

    def _read(self, key: bytes) -> NodeKV | None:
        """From disk; a damaged file is a warning, and out of the way afterwards."""
        if self._directory is None:
            return None
        entry = self._directory.read(key)
        if not isinstance(entry, str):
            return entry
        self._directory.set_aside(key)
        self._count(damaged=1)
        name = self._directory.file(key).name
        warnings.warn(
            f"stored keys and values are damaged and have to be computed again: {name}: {entry}", LeattnWarning, stacklevel=3
        )
        return None

    def _keep(self, key: bytes, kv: NodeKV) -> NodeKV:
        """Take an entry into memory if it fits; the copy to the store's device happens outside of the lock."""
        size = kv.nbytes
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            fits = self._coming + size <= self.max_bytes
            if fits:
                # Room is made before the copy, so that at no moment there is more than max_bytes.
                while self._held + self._coming + size > self.max_bytes:
                    _, evicted = self._entries.popitem(last=False)
                    self._held -= evicted.nbytes
                    self._stats = replace(self._stats, evicted=self._stats.evicted + 1)
                self._coming += size
        if not fits:
            return _own(kv, self.device)
        own = None
        try:
            own = _own(kv, self.device)
        finally:
            with self._lock:
                self._coming -= size
                if own is not None and self._entries.setdefault(key, own) is own:
                    self._held += size
        return own

    def _count(self, **more: int) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})


def _own(kv: NodeKV, device: torch.device | None) -> NodeKV:
    """On ``device``, and without a tensor that holds on to more memory than its own."""

    def own(tensor: Tensor) -> Tensor:
        moved = tensor.detach() if device is None else tensor.detach().to(device)
        return moved if moved.untyped_storage().nbytes() == moved.nbytes else moved.clone(memory_format=torch.contiguous_format)

    return NodeKV(tuple(own(tensor) for tensor in kv.keys), tuple(own(tensor) for tensor in kv.values), kv.start)


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        # "cuda" and "cuda:0" are one device, but do not compare equal: ask a tensor.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise LeattnError(
            f"device {device!r} cannot be used ({reason}); give None, 'cpu' or a device of this machine"
        ) from error


def _check_key(key: bytes) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise LeattnError(f"a key is {KEY_BYTES} bytes from node_key or prompt_keys, not {key!r}")


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
