"""Rows in a file as they come, so that a run which was broken off goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leattn.errors import LeattnError


class Journal:
    """JSON lines: first what the run is of, then a row per line. Without a path, rows are kept in memory alone.

    Raises
    ------
    LeattnError
        A file of another run: other settings, or none at all.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is None:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append([dict(settings)])
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # what was being written when it was broken off is written again
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        found = [json.loads(line) for line in whole.splitlines()]
        if not found:
            self._append([dict(settings)])
            return
        ours = json.loads(json.dumps(settings))
        for name in sorted({*found[0], *ours}):
            there, here = found[0].get(name), ours.get(name)
            if there != here:
                raise LeattnError(
                    f"{self.path} is of another run: {name} is {there!r} there and {here!r} here; give another path, or "
                    "remove it"
                )
        self.rows = found[1:]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Some more rows, on disk when this returns."""
        new = list(rows)
        self.rows += new
        if self.path is not None:
            self._append(new)

    def _append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
