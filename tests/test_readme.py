"""The README and the pages are run: every Python block in order, and what it prints is what the text block after it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import leattn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """``(language, text, line)`` of every fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2], text[: match.start()].count("\n") + 1


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    """Compiling needs a C++ compiler, which a machine may not have."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "families.md"], ids=lambda page: page.name)
def test_every_python_block_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leattn.methods, "METHODS", dict(leattn.methods.METHODS))  # a page adds one of its own
    namespace: dict = {}
    printed, line_of = None, 0
    seen = 0
    for language, text, line in blocks(page):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, f"{page.name}:{line}", "exec"), namespace)
            printed, line_of = output.getvalue(), line
            seen += 1
        elif language == "text":
            assert printed is not None, f"{page.name}:{line} shows output of nothing"
            shows = f"{page.name}:{line_of} prints something else than line {line} shows"
            assert text.split("\n") == printed.split("\n"), shows
    assert seen >= 1
    for picture in re.findall(r'(?:path|save_dir)="([^"]+\.png)"', page.read_text(encoding="utf-8")):
        assert (tmp_path / picture).stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
