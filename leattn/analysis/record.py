"""The file of a sweep: a header with its settings, then one line per batch, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeAlias

from leattn.errors import LeattnError, LeattnWarning
from leattn.prompt.compiled import CompiledPrompt

Key: TypeAlias = tuple[str, int | None, int | None, int | None, int]
_KEY = ("operation", "layer", "source_layer", "seed", "first_prompt")


class Record:
    """Values kept in a file of JSON lines as they come; in memory only, where ``path`` is None.

    Raises
    ------
    LeattnError
        On opening: a file that is no sweep's, another sweep's, or damaged before its last line.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.header = (json.dumps({"leattn": "sweep", **settings}) + "\n").encode()
        self.values: dict[Key, dict[str, list[float]]] = {}
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Record:
        if self.path is None:
            return self
        raw = self.path.read_bytes() if self.path.exists() else b""
        kept, newline, torn = raw.rpartition(b"\n")
        if torn:
            if not newline and not self.header.startswith(torn):
                raise LeattnError(f"{self.path} is no file of a sweep; choose another name, or remove it")
            warnings.warn(f"the last line of {self.path} is torn; its batch is run again", LeattnWarning, stacklevel=3)
        if newline:
            self._read(kept.split(b"\n"))
        self.file = self.path.open("r+b" if self.path.exists() else "wb")
        self.file.truncate(len(raw) - len(torn))
        self.file.seek(0, os.SEEK_END)
        if not newline:
            self._append(self.header)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()

    def get(self, key: Key) -> dict[str, list[float]] | None:
        return self.values.get(key)

    def put(self, key: Key, values: dict[str, list[float]]) -> None:
        self.values[key] = values
        if self.file is not None:
            self._append((json.dumps({**dict(zip(_KEY, key, strict=True)), "values": values}) + "\n").encode())

    def _append(self, line: bytes) -> None:
        """On disk before the next batch runs: what tears a line is noticed, as it then has no end."""
        assert self.file is not None
        self.file.write(line)
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if number == 0:
                    self._check(entry)
                    continue
                self.values[tuple(entry[name] for name in _KEY)] = entry["values"]
            except LeattnError:
                raise
            except (ValueError, TypeError, KeyError) as error:
                what = "is no file of a sweep" if number == 0 else f"is damaged in line {number + 1}"
                raise LeattnError(f"{self.path} {what}; choose another name, or remove it") from error

    def _check(self, found: Any) -> None:
        wanted = json.loads(self.header)
        if not isinstance(found, dict) or found.get("leattn") != "sweep":
            raise LeattnError(f"{self.path} is no file of a sweep; choose another name, or remove it")
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            raise LeattnError(
                f"{self.path} is of another sweep: {', '.join(other)} differ; choose another file, or give the same again"
            )


def digest(parts: Iterable[object]) -> str:
    """Sixteen hex digits for the representations of some values."""
    made = hashlib.sha256()
    for part in parts:
        made.update(repr(part).encode() + b"\n")
    return made.hexdigest()[:16]


def spelled(what: object) -> str:
    """A value in words that are the same in every process: functions by name, no addresses."""
    if callable(what) and hasattr(what, "__qualname__"):
        return f"{what.__module__}.{what.__qualname__}"
    return what if isinstance(what, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(what))


def prompt_digest(prompt: CompiledPrompt) -> str:
    """Tokens, positions and who sees whom."""
    return digest([prompt.input_ids[0].tolist(), prompt.position_ids[0].tolist(), prompt.offsets, prompt.visible])


def model_digest(model: Any) -> str:
    """Names, shapes, dtypes and a few values of every parameter."""

    def parts() -> Iterable[object]:
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            picked = flat[:: max(1, len(flat) // 16)][:17]
            yield name, tuple(parameter.shape), str(parameter.dtype), picked.double().tolist()

    return digest([type(model).__name__, *parts()])
