"""A store under load: threads that evict, clear and delete while others read, and processes that are killed while they write.

``LEATTN_SOAK=200`` makes it two hundred kills, and as many times the rounds of the threads.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from forks import FORKS
from safetensors.torch import load_file

from leattn import KVStore
from leattn.kv.entry import NodeKV

TIMES = int(os.environ.get("LEATTN_SOAK", "5"))
NAMES = 40


def key(i):
    return hashlib.sha256(str(i).encode()).digest()


def contents(i, part, layer):
    """What stands under a name, and under no other; between 1 and 24 KiB each."""
    generator = torch.Generator().manual_seed(1000 * i + 10 * layer + part)
    return torch.randn(2, 1 + 16 * (i % 12), 16, generator=generator)


def entry(i):
    keys, values = (tuple(contents(i, part, layer) for layer in range(3)) for part in (0, 1))
    return NodeKV(keys, values, start=i)


def is_right(i, kv):
    pairs = [(kv.keys[layer], contents(i, 0, layer)) for layer in range(3)]
    pairs += [(kv.values[layer], contents(i, 1, layer)) for layer in range(3)]
    return kv.start == i and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:an entry could not be written")
def test_threads_that_evict_clear_and_delete_while_others_read(tmp_path):
    size = sum(entry(i).nbytes for i in range(NAMES))
    store = KVStore(max_bytes=size // 6, directory=tmp_path)  # most of it is evicted most of the time
    wrong, failed, right = [], [], []

    def user(seed):
        draw = random.Random(seed)
        for _ in range(60 * TIMES):
            i = draw.randrange(NAMES)
            kv = store.get(key(i))
            if kv is None:
                store.put(key(i), entry(i))
            elif is_right(i, kv):
                right.append(i)
            else:
                wrong.append(i)
            if store.nbytes > store.max_bytes:
                wrong.append("too large")

    def vandal(seed):
        draw = random.Random(seed)
        for _ in range(20 * TIMES):
            time.sleep(0.002)
            if draw.random() < 0.1:
                store.clear()
            for name in os.listdir(tmp_path)[: draw.randrange(4)]:
                try:
                    os.unlink(tmp_path / name)
                except FileNotFoundError:
                    continue

    def guarded(work, seed):
        try:
            work(seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(user if seed < 6 else vandal, seed)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert wrong == []
    assert right
    stats = store.stats
    assert stats.damaged == 0
    assert stats.evicted > 0
    assert stats.nbytes <= store.max_bytes
    print(f"{len(right)} reads, all right; {stats.evicted} evicted, {stats.misses} misses")


def write_for_ever(directory, seed, ready):
    """What the processes do that are killed: write, and delete, so that there is always something to write."""
    torch.set_num_threads(1)
    store, draw, entries = KVStore(max_bytes=1, directory=directory), random.Random(seed), [entry(i) for i in range(NAMES)]
    ready.set()
    while True:
        store.put(key(i := draw.randrange(NAMES)), entries[i])
        (directory / f"{key(draw.randrange(NAMES)).hex()}.safetensors").unlink(missing_ok=True)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_processes_that_are_killed_while_they_write(tmp_path):
    draw, names = random.Random(0), {key(i).hex(): i for i in range(NAMES)}
    read = unfinished = 0
    for kill in range(TIMES):
        ready = FORKS.Event()
        process = FORKS.Process(target=write_for_ever, args=(tmp_path, kill, ready), daemon=True)
        process.start()
        assert ready.wait(120)
        time.sleep(draw.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        unfinished += sum(file.suffix == ".unfinished" for file in tmp_path.iterdir())
        store = KVStore(max_bytes=2**26, directory=tmp_path)  # which takes away what the dead left behind
        files = list(tmp_path.iterdir())
        assert {file.suffix for file in files} <= {".safetensors"}
        for file in files:
            i = names[file.stem]
            tensors = load_file(file)  # by safetensors' own reader
            for layer in range(3):
                assert torch.equal(tensors[f"keys.{layer}"], contents(i, 0, layer))
                assert torch.equal(tensors[f"values.{layer}"], contents(i, 1, layer))
            kv = store.get(key(i))
            assert kv is not None
            assert is_right(i, kv)
            read += 1
        assert store.stats.damaged == 0
    assert read
    print(f"{TIMES} kills: {read} files read, all right; {unfinished} unfinished ones taken away")
