"""The README is run: every Python block in order, and what it prints is what the text block after it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks():
    """``(language, text, line)`` of every fenced block."""
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2], text[: match.start()].count("\n") + 1


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    """Compiling needs a C++ compiler, which a machine may not have."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_every_python_block_runs_and_prints_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    printed, line_of = None, 0
    seen = 0
    for language, text, line in blocks():
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, f"README.md:{line}", "exec"), namespace)
            printed, line_of = output.getvalue(), line
            seen += 1
        elif language == "text":
            assert printed is not None, f"README.md:{line} shows output of nothing"
            assert text.split("\n") == printed.split("\n"), f"README.md:{line_of} prints something else than line {line} shows"
    assert seen >= 5
    for picture in ("mask.png", "attention.png", "figures/mask.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_links_and_pictures_exist():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
