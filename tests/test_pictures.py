"""The important pictures, compared with ones that somebody has looked at. ``python tests/test_pictures.py`` draws them anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.testing.compare import compare_images

import leattn
from leattn import ICLNode, compile_prompt, viz

BASELINE = Path(__file__).parent / "pictures"
"""Drawn with the matplotlib of constraints.txt."""
TOLERANCE = 4  # root mean square of 255: less than one block of a mask makes, more than a release of matplotlib does to text


def prompt():
    root = ICLNode([1, 2], id="root")
    documents = [ICLNode([3] * (4 + i), [root], id=f"document {i}") for i in range(3)]
    return compile_prompt(ICLNode([4] * 5, [root, *documents], id="question")).without_edge("question", "document 1")


def weights():
    """Attention that depends on nothing but the mask: every visible token the same."""
    mask = prompt().dense_mask()
    return (mask / mask.sum(-1, keepdim=True))[None, None]


def tiny_trace():
    model, tokenizer = leattn.tiny.load()
    bos = leattn.bos(tokenizer)
    document = ICLNode("\nThe capital of Zarvia is Lumo.", [bos], id="doc")
    question = ICLNode("\nQ: What is the capital of Zarvia?\nA:", [bos, document], id="Q")
    return leattn.analysis.trace(model, compile_prompt(question, tokenizer))


PICTURES = {
    "mask": lambda path: viz.plot_mask(prompt(), path=path),
    "mask_nodes": lambda path: viz.plot_mask(prompt(), scale="nodes", path=path),
    "dag": lambda path: viz.plot_dag(prompt(), path=path),
    "attention": lambda path: viz.plot_attention(weights(), prompt(), path=path),
    "sinks": lambda path: viz.plot_sinks(tiny_trace(), path=path),
    "norms": lambda path: viz.plot_norms(tiny_trace(), layer=1, path=path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_the_one_that_was_looked_at(name, tmp_path):
    drawn = tmp_path / f"{name}.png"
    with torch.no_grad():
        PICTURES[name](drawn)
    assert compare_images(str(BASELINE / f"{name}.png"), str(drawn), tol=TOLERANCE) is None


def test_another_picture_is_told_apart(tmp_path):
    drawn = tmp_path / "mask.png"
    viz.plot_mask(prompt().without_edge("question", "document 2"), path=drawn)
    assert compare_images(str(BASELINE / "mask.png"), str(drawn), tol=TOLERANCE) is not None


if __name__ == "__main__":
    BASELINE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name](BASELINE / f"{name}.png")
