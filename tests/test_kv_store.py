"""``KVStore`` in memory: what is put in is found, least recently used goes first, and there is never too much of it."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest
import torch

import leattn
from leattn import KVStore, LeattnError
from leattn.kv.entry import NodeKV, node_kv


def key(i):
    return i.to_bytes(32, "big")


def entry(i=0, tokens=4, layers=2):
    """512 bytes by default; the contents say which entry it is."""
    tensors = tuple(torch.full((2, tokens, 8), float(i)) for _ in range(layers))
    return NodeKV(tensors[: layers // 2 * 2], tuple(t + 0.5 for t in tensors), start=i)


SIZE = entry().nbytes


def test_what_is_put_in_is_found():
    store = KVStore()
    store.put(key(1), entry(1))
    found = store.get(key(1))
    assert found.start == 1
    assert len(found) == 4
    assert torch.equal(found.values[1], torch.full((2, 4, 8), 1.5))
    assert key(1) in store
    assert key(2) not in store
    assert store.get(key(2)) is None
    assert len(store) == 1


def test_the_least_recently_used_goes_first():
    store = KVStore(max_bytes=3 * SIZE)
    for i in range(3):
        store.put(key(i), entry(i))
    store.get(key(0))
    store.put(key(3), entry(3))
    assert [key(i) in store for i in range(4)] == [True, False, True, True]
    store.put(key(2), entry(2))  # there already: used, not stored twice
    store.put(key(4), entry(4))
    assert [key(i) in store for i in range(5)] == [False, False, True, True, True]
    assert store.nbytes == store.stats.nbytes == 3 * SIZE
    assert store.stats.evicted == 2


def test_an_entry_larger_than_the_store_is_not_kept_and_drives_nobody_out():
    store = KVStore(max_bytes=2 * SIZE)
    store.put(key(0), entry(0))
    store.put(key(1), entry(1, tokens=4 * 3))
    assert key(0) in store
    assert key(1) not in store


def test_the_store_keeps_nothing_of_the_cache_an_entry_came_from():
    from transformers import DynamicCache

    cache = DynamicCache()
    big = torch.arange(2.0 * 100 * 8).reshape(1, 2, 100, 8)
    cache.update(big, big, 0)
    for slots in (slice(10, 14), torch.tensor([10, 11, 12, 13])):
        kv = node_kv(cache, slots, 3)
        expected = big[0, :, 10:14].clone()
        cache.layers[0].keys.zero_()
        assert torch.equal(kv.keys[0], expected)
        assert kv.keys[0].untyped_storage().nbytes() == kv.keys[0].nbytes
        cache.layers[0].keys.copy_(big)
    view = NodeKV((big[0, :, 10:14],), (big[0, :, 10:14],), 3)
    store = KVStore(max_bytes=2 * view.nbytes)
    store.put(key(0), view)
    kept = store.get(key(0)).keys[0].clone()
    big.zero_()
    assert torch.equal(store.get(key(0)).keys[0], kept)


def test_statistics():
    store = KVStore()
    store.put(key(0), entry(tokens=4))
    store.get(key(0))
    store.get(key(0))
    store.get(key(9))
    stats = store.stats
    assert (stats.hits, stats.misses, stats.tokens_reused, stats.tokens_computed, stats.stored) == (2, 1, 8, 4, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.hits = 7
    store.reset_stats()
    assert store.stats == dataclasses.replace(type(stats)(), entries=1, nbytes=SIZE)
    assert stats.hits == 2
    assert "1 entries in memory, 1.0 KiB of 1024.0 MiB" in repr(store) or "entries in memory" in repr(store)
    assert "<table>" in store._repr_html_()


def test_clear():
    store = KVStore()
    store.put(key(0), entry())
    store.clear()
    assert len(store) == store.nbytes == 0
    assert store.get(key(0)) is None


def test_the_device():
    store = KVStore(device="cpu")
    store.put(key(0), entry())
    assert store.get(key(0)).keys[0].device.type == "cpu"
    store = KVStore(device="meta")
    store.put(key(0), entry())
    assert store.get(key(0)).keys[0].device.type == "meta"
    assert entry().to("meta").values[0].is_meta
    same = entry()
    assert same.to("cpu") is same


def test_eight_threads():
    """Contents stay those of the key, memory stays bounded at every moment, and the counts add up."""
    limit = 10 * SIZE
    store = KVStore(max_bytes=limit)
    wrong, asked = [], []
    done = threading.Event()

    def watch():
        while not done.is_set():
            with store._lock:
                held = sum(kv.nbytes for kv in store._entries.values())
                if held + store._coming > limit or held != store._held:
                    wrong.append(held)

    def work(seed):
        own = random.Random(seed)
        for _ in range(300):
            i = own.randrange(40)
            kv = store.get(key(i))
            asked.append(kv is not None)
            if kv is None:
                store.put(key(i), entry(i, tokens=own.choice([4, 4, 8])))
            elif kv.start != i or any(not bool((tensor == i).all()) for tensor in kv.keys):
                wrong.append(i)
            if own.randrange(50) == 0:
                store.clear()

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert wrong == []
    stats = store.stats
    assert (stats.hits, stats.misses) == (sum(asked), len(asked) - sum(asked))
    assert stats.nbytes <= limit
    assert store._coming == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_bytes": 0}, "max_bytes is a whole number of bytes above 0, not 0"),
        ({"max_bytes": 1e9}, "not 1000000000.0"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(LeattnError, match=words):
        leattn.KVStore(**arguments)


def test_bad_entries():
    store = KVStore()
    for bad in ("name", b"short", None):
        with pytest.raises(LeattnError, match="a key is 32 bytes"):
            store.get(bad)
        with pytest.raises(LeattnError, match="a key is 32 bytes"):
            store.put(bad, entry())
        assert bad not in store
    with pytest.raises(LeattnError, match="keys of 1 layers and values of 2"):
        NodeKV((torch.zeros(1, 2, 3),), (torch.zeros(1, 2, 3),) * 2, 0)
    with pytest.raises(LeattnError, match=r"one n for all layers, not .*\(1, 2, 3\), \(1, 4, 3\)"):
        NodeKV((torch.zeros(1, 2, 3),), (torch.zeros(1, 4, 3),), 0)


def test_a_cache_without_keys_is_refused():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 1)  # layer 0 stays empty
    with pytest.raises(leattn.BackendError, match="layer 0 of the cache holds no keys"):
        node_kv(cache, slice(0, 2), 0)
