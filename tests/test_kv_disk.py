"""``KVStore`` on disk: survives restarts and kills, and believes no file that it has not checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from forks import FORKS

from leattn import KVStore, LeattnError, LeattnWarning
from leattn.kv.entry import NodeKV


def key(i):
    return i.to_bytes(32, "big")


def entry(i, dtype=torch.float32):
    generator = torch.Generator().manual_seed(i)
    keys, values = (tuple(torch.randn(2, 3, 4, generator=generator).to(dtype) for _ in range(2)) for _ in range(2))
    return NodeKV(keys, values, start=i)


def equal(a, b):
    pairs = zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    return a.start == b.start and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def file_of(folder, i):
    return folder / f"{key(i).hex()}.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entries_survive_a_restart(tmp_path, dtype):
    KVStore(directory=tmp_path / "new" / "folder").put(key(7), entry(7, dtype))
    store = KVStore(directory=tmp_path / "new" / "folder")
    assert key(7) in store
    assert len(store) == 1
    assert equal(store.get(key(7)), entry(7, dtype))
    assert (store.stats.hits, store.stats.entries) == (1, 1)


def test_what_leaves_memory_is_found_on_disk(tmp_path):
    store = KVStore(max_bytes=2 * entry(0).nbytes, directory=tmp_path)
    for i in range(5):
        store.put(key(i), entry(i))
    assert len(store) == 5
    assert store.stats.entries == 2
    assert all(equal(store.get(key(i)), entry(i)) for i in range(5))
    assert store.nbytes <= store.max_bytes
    small = KVStore(max_bytes=1, directory=tmp_path)
    assert equal(small.get(key(3)), entry(3))
    assert small.nbytes == 0
    small.put(key(9), entry(9))
    assert equal(small.get(key(9)), entry(9))


def test_parts_of_one_tensor_are_written(tmp_path):
    together = torch.randn(4, 2, 3, 4)
    store = KVStore(max_bytes=1, directory=tmp_path)
    store.put(key(1), NodeKV(tuple(together[:2]), tuple(together[2:]), 0))
    assert torch.equal(store.get(key(1)).values[1], together[3])


def test_clear_deletes_the_files_of_entries_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    store = KVStore(directory=tmp_path)
    store.put(key(1), entry(1))
    store.clear()
    assert store.get(key(1)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def assert_damaged(folder, i=1):
    """A miss, a warning, out of the way; and the place can be taken again."""
    store = KVStore(directory=folder)
    with pytest.warns(LeattnWarning, match="stored keys and values are damaged"):
        assert store.get(key(i)) is None
    assert (store.stats.damaged, store.stats.misses, store.stats.hits) == (1, 1, 0)
    assert not file_of(folder, i).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(key(i)) is None
        store.put(key(i), entry(i))
        assert equal(KVStore(directory=folder).get(key(i)), entry(i))


def test_every_flipped_byte_is_noticed(tmp_path):
    """Header, metadata, padding and contents: one bit of every byte, all eight of some."""
    KVStore(directory=tmp_path).put(key(1), entry(1))
    file = file_of(tmp_path, 1)
    good = file.read_bytes()
    for at in range(len(good)):
        for bit in range(8) if at % 97 == 0 else [at % 8]:
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            file.write_bytes(bad)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = KVStore(directory=tmp_path).get(key(1))
            assert found is None, (at, bit, bytes(good[max(0, at - 20) : at + 20]))
            assert [warning.category for warning in caught] == [LeattnWarning]


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 50, 300, -1])
def test_a_truncated_file_is_a_miss(tmp_path, keep):
    KVStore(directory=tmp_path).put(key(1), entry(1))
    file = file_of(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:keep])
    assert_damaged(tmp_path)


def test_foreign_files_are_misses(tmp_path):
    from safetensors.torch import save_file

    for write in (
        lambda file: file.write_bytes(b"something else"),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"keys.0": torch.zeros(1, 2, 3)}, file),
        lambda file: save_file({"keys.0": torch.zeros(1, 2, 3)}, file, {"format": "leattn-kv-2"}),
    ):
        write(file_of(tmp_path, 1))
        assert_damaged(tmp_path)
        file_of(tmp_path, 1).unlink()


def test_an_entry_under_another_name_is_a_miss(tmp_path):
    KVStore(directory=tmp_path).put(key(2), entry(2))
    os.rename(file_of(tmp_path, 2), file_of(tmp_path, 1))
    assert_damaged(tmp_path)


def test_a_folder_in_the_place_of_an_entry_is_a_miss(tmp_path):
    file_of(tmp_path, 1).mkdir()
    assert_damaged(tmp_path)


def write_for_ever(directory, ready):
    store = KVStore(directory=directory, max_bytes=1)
    ready.set()
    for i in range(1, 10**6):
        big = torch.full((2, 2000, 16), float(i))
        store.put(i.to_bytes(32, "big"), NodeKV((big,) * 2, (big,) * 2, i))


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_a_kill_in_the_middle_of_a_write(tmp_path, seconds):
    ready = FORKS.Event()
    writer = FORKS.Process(target=write_for_ever, args=(tmp_path, ready), daemon=True)
    writer.start()
    assert ready.wait(120)
    time.sleep(seconds)
    # A store that opens meanwhile takes nothing away from a writer that lives.
    KVStore(directory=tmp_path)
    assert writer.is_alive()
    time.sleep(seconds)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    # Whatever moment the kill hit, here is one more file that it could have left.
    (tmp_path / f"{key(0).hex()}.host.1.0.unfinished").write_bytes(b"of another machine, perhaps still alive")
    store = KVStore(directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".unfinished"] == [f"{key(0).hex()}.host.1.0.unfinished"]
    assert len(store) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(1, len(store) + 1):
            kv = store.get(key(i))
            assert kv.start == i
            assert all(bool((tensor == i).all()) for tensor in (*kv.keys, *kv.values))


def test_unfinished_files_go_when_their_writer_is_dead_or_they_are_old(tmp_path):
    import socket

    from leattn.kv.disk import Directory

    host = Directory(tmp_path)._host
    assert host.replace("-", "") in socket.gethostname().replace("-", "").replace(".", "")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    names = {
        "dead": f"{key(0).hex()}.{host}.{process.pid}.0.unfinished",
        "alive": f"{key(0).hex()}.{host}.{os.getpid()}.0.unfinished",
        "elsewhere": f"{key(0).hex()}.other-host.{process.pid}.0.unfinished",
        "old": f"{key(0).hex()}.other-host.{process.pid}.1.unfinished",
        "foreign": "thesis.unfinished",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / names["old"], (0, 0))
    os.utime(tmp_path / names["foreign"], (0, 0))
    KVStore(directory=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names["alive"], names["elsewhere"], names["foreign"]}


def test_a_disk_that_cannot_be_written_to_is_a_warning(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = KVStore(directory=tmp_path)
    monkeypatch.setattr("leattn.kv.disk.os.replace", full)
    with pytest.warns(LeattnWarning, match=r"could not be written to .*No space left on device.*kept in memory only"):
        store.put(key(1), entry(1))
    assert equal(store.get(key(1)), entry(1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_went_away_is_a_warning(tmp_path):
    store = KVStore(directory=tmp_path / "kv")
    (tmp_path / "kv").rmdir()
    with pytest.warns(LeattnWarning, match="could not be written to"):
        store.put(key(1), entry(1))
    assert equal(store.get(key(1)), entry(1))
    assert store.get(key(2)) is None


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LeattnError, match=r"directory .*file.* cannot be made .*; give one that can be written to"):
        KVStore(directory=tmp_path / "file")
