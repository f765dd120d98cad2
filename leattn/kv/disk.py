"""Entries of a store as files: written whole or not at all, and believed only after a check."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from leattn.dag.node import Position
from leattn.errors import LeattnError
from leattn.kv.entry import NodeKV
from leattn.kv.fingerprint import FORMAT

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.\d+\.unfinished")
_OLD = 24 * 3600.0
"""Seconds after which an unfinished file is nobody's, whoever wrote it."""


class Directory:
    """One safetensors file per entry, named by its key. Any number of processes may share it; none waits for another."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LeattnError(f"directory {str(path)!r} cannot be made ({error}); give one that can be written to") from error
        self._host = re.sub(r"[^\w-]", "-", socket.gethostname())
        self._count = itertools.count()
        self._remove_unfinished()

    def file(self, key: bytes) -> Path:
        return self.path / f"{key.hex()}.safetensors"

    def keys(self) -> Iterator[bytes]:
        """Keys of all files, unread and unchecked."""
        for name in os.listdir(self.path):
            if _ENTRY.fullmatch(name):
                yield bytes.fromhex(name.partition(".")[0])

    def write(self, key: bytes, kv: NodeKV) -> None:
        """Write one entry beside the others and move it in place; a kill leaves the old file or none.

        Raises
        ------
        OSError
            The disk is full, the folder is gone, and the like.
        """
        tensors = _apart({name: tensor.contiguous().cpu() for name, tensor in _named(kv)})
        metadata = {"format": FORMAT.decode(), "key": key.hex(), "start": str(kv.start)}
        metadata["checksum"] = _checksum(metadata, tensors)
        target = self.file(key)
        unfinished = self.path / f"{key.hex()}.{self._host}.{os.getpid()}.{next(self._count)}.unfinished"
        try:
            # Not by save_file, which begins another file beside it, under a name that nobody could clear away.
            with open(unfinished, "wb") as file:
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)

    def read(self, key: bytes) -> NodeKV | str | None:
        """The entry on the CPU, None if there is no such file, or what is wrong with it: truncated, altered, not ours."""
        try:
            # Read, not mapped: a mapped file that somebody truncates ends the process.
            data = self.file(key).read_bytes()
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            tensors = load(data)
            found = metadata.pop("checksum")
            if metadata != {"format": FORMAT.decode(), "key": key.hex(), "start": metadata["start"]}:
                return "it was not written by this version of leattn for this key"
            if found != _checksum(metadata, tensors):
                return "its checksum is wrong"
            keys, values = (
                tuple(tensors[f"{part}.{i}"].clone() for i in range(len(tensors) // 2)) for part in ("keys", "values")
            )
            return NodeKV(keys, values, _number(metadata["start"]))
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"it cannot be read: {error}"
        # Whatever can be wrong with a file: a header that is no JSON, missing fields, impossible shapes.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def set_aside(self, key: bytes) -> None:
        """Rename a damaged file to ``….damaged``, where nobody looks for it."""
        file = self.file(key)
        try:
            os.replace(file, file.with_suffix(".damaged"))
        except OSError:
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all entries."""
        for key in list(self.keys()):
            self.file(key).unlink(missing_ok=True)

    def _remove_unfinished(self) -> None:
        """Delete what killed processes left behind, and nothing that a live one is writing."""
        for file in self.path.iterdir():
            match = _UNFINISHED.fullmatch(file.name)
            if match is None:
                continue
            try:
                old = time.time() - file.stat().st_mtime > _OLD
                if old or (match["host"] == self._host and not _alive(int(match["pid"]))):
                    file.unlink(missing_ok=True)
            except FileNotFoundError:
                continue


def _named(kv: NodeKV) -> Iterator[tuple[str, Tensor]]:
    for part, tensors in (("keys", kv.keys), ("values", kv.values)):
        for i, tensor in enumerate(tensors):
            yield f"{part}.{i}", tensor


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors wants them; a model may use one tensor as keys and values."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Over names, shapes, dtypes, contents and what the file says about itself."""
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # There, signal 0 is a real one.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _number(text: str) -> Position:
    number = float(text)
    return int(number) if number.is_integer() else number
