"""Results of patterns as a small table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A table of texts and numbers, and a sentence under it. Numbers are shown with three digits after the point."""
    style = "style='text-align:left;white-space:pre-wrap'"
    top = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td {style}>{escape(_shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table><p>{escape(note)}</p>"


def _shown(cell: object) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
