"""Pictures: what is drawn is what the prompt says, in few artists, and nothing is written or left open unasked."""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from leattn import ICLGraph, ICLNode, compile_prompt
from leattn.errors import LeattnError, LeattnWarning
from leattn.viz import fold_attention, plot_attention, plot_dag, plot_mask
from leattn.viz.layers import depths, lay_out
from leattn.viz.spread import spread, spread_within
from leattn.viz.style import drawable, lighten, node_colours

WEIRD = ["a $x_1^2$ {%} \\frac{", "line\nbreak\ttab", "漢字 🦊 é #&~", "100% _of_ ^it", "$", "x" * 300]


def node(tokens, parents=(), id=None):
    return ICLNode([1] * tokens, parents=parents, id=id)


def retrieval(documents, tokens, question):
    head = node(1, id="<s>")
    docs = [node(tokens, [head], f"doc{i}") for i in range(documents)]
    return compile_prompt(node(question, [head, *docs], "Q"))


def random_prompt(seed, count, most=6):
    generator = np.random.default_rng(seed)
    nodes = []
    for i in range(count):
        chosen = generator.choice(i, size=min(i, int(generator.integers(0, 4))), replace=False) if i else []
        nodes.append(node(int(generator.integers(1, most)), [nodes[int(j)] for j in chosen], f"n{i}"))
    return compile_prompt(ICLGraph(*nodes))


def artists(ax):
    return len(ax.get_children())


def rasterised(ax, size):
    """Which token cells the filled outlines on ``ax`` cover, ``[size, size]``, and how often."""
    query, key = np.mgrid[:size, :size]
    # Just below the middle: on the diagonal the middle of a cell is the very edge of a triangle.
    points = np.stack([key.ravel() + 0.45, query.ravel() + 0.55], axis=1)
    times = np.zeros(size * size, int)
    for collection in ax.collections:
        if isinstance(collection, PathCollection):
            for path in collection.get_paths():
                for polygon in path.to_polygons():
                    inside = np.zeros(len(points), bool)
                    x, y = points.T
                    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                        crosses = (y0 > y) != (y1 > y)
                        with np.errstate(divide="ignore", invalid="ignore"):
                            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
                    times += inside
    return times.reshape(size, size)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [4, 12])
def test_the_union_of_what_is_drawn_is_the_mask(seed, most):
    prompt = random_prompt(seed, 14, most)
    drawn = rasterised(plot_mask(prompt), len(prompt))
    assert (drawn == prompt.dense_mask().int().numpy()).all()


def test_a_mask_in_nodes_is_the_relation():
    prompt = random_prompt(3, 20)
    drawn = rasterised(plot_mask(prompt, scale="nodes"), 20)
    expected = np.eye(20, dtype=int)
    for i in range(20):
        expected[i, prompt.visible.nodes_seen(i)] = 1
    assert (drawn == expected).all()


def test_an_edit_shows_in_the_mask_and_in_the_graph():
    prompt = retrieval(4, 3, 2)
    edited = prompt.without_edge("Q", "doc1").without_node("doc3")
    assert (rasterised(plot_mask(edited), len(prompt)) == edited.dense_mask().int().numpy()).all()
    assert "(2 cut)" in plot_dag(edited).get_title(loc="left")
    assert "cut" not in plot_dag(prompt).get_title(loc="left")


def test_the_image_of_a_large_relation_shows_every_pair_that_attends():
    prompt = random_prompt(0, 1200)
    ax = plot_mask(prompt, scale="nodes")
    (image,) = ax.images
    pixels = np.asarray(image.get_array())
    grey = (pixels == pixels[0, -1]).all(-1)
    block = -(-1200 // len(pixels))
    expected = np.eye(1200, dtype=bool)
    for i in range(1200):
        expected[i, prompt.visible.nodes_seen(i)] = True
    assert (~grey == expected.reshape(len(pixels), block, len(pixels), block).any((1, 3))).all()


@pytest.mark.parametrize(("documents", "tokens", "question"), [(16, 254, 31), (50, 1999, 49), (1000, 99, 999)])
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_few_artists_and_small_files_however_long_the_prompt(documents, tokens, question, suffix, tmp_path):
    prompt = retrieval(documents, tokens, question)
    path = tmp_path / f"mask.{suffix}"
    assert artists(plot_mask(prompt, path=path)) < 100
    assert path.stat().st_size <= 200_000


def test_causal_prompts_of_many_nodes_stay_small(tmp_path):
    nodes = []
    for i in range(500):
        nodes.append(node(8, list(nodes), f"turn {i}"))
    path = tmp_path / "mask.svg"
    ax = plot_mask(compile_prompt(nodes[-1]), path=path)
    assert artists(ax) < 100
    assert path.stat().st_size <= 200_000


def test_plots_return_axes_and_write_only_where_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = retrieval(3, 4, 2)
    weights = torch.eye(len(prompt))
    mine = Figure().add_subplot()
    for plot in (plot_mask, plot_dag, lambda p, **options: plot_attention(weights, p, **options)):
        assert plot(prompt).get_title(loc="left")
        assert os.listdir(tmp_path) == []
        assert plot(prompt, ax=mine) is mine
        plot(prompt, path="picture.svg", title="")
        low, high = (plot(prompt, title=title).get_figure().get_size_inches()[1] for title in ("one", "one\ntwo\nthree"))
        assert high > low + 0.3  # room for each line
        assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
        os.unlink("picture.svg")
        with pytest.raises(LeattnError, match="unknown suffix 'txt'"):
            plot(prompt, path="picture.txt")
        assert os.listdir(tmp_path) == []


def test_the_same_picture_is_the_same_file(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", "leattn")
    for name in ("a.svg", "b.svg"):
        plot_mask(retrieval(3, 4, 2), path=tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_no_figure_stays_open_in_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    prompt = retrieval(3, 4, 2)
    plot_mask(prompt)
    plot_dag(prompt)
    plot_attention(torch.eye(len(prompt)), prompt)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("count", [3, 10, 11, 40])
def test_a_node_has_the_same_colour_in_mask_and_graph(count):
    nodes = []
    for i in range(count):
        nodes.append(node(3, nodes[-1:], f"n{i}"))
    prompt = compile_prompt(nodes[-1])
    colours = node_colours(count)
    assert len(np.unique(colours, axis=0)) == min(count, 32)
    in_mask = np.concatenate([c.get_facecolor()[:, :3] for c in plot_mask(prompt).collections if isinstance(c, PathCollection)])
    boxes = [patch for patch in plot_dag(prompt).patches if type(patch).__name__ == "Rectangle"]
    assert len(boxes) == count
    for box, colour in zip(boxes, colours, strict=True):
        np.testing.assert_allclose(box.get_edgecolor()[:3], colour)
        np.testing.assert_allclose(box.get_facecolor()[:3], lighten(colour, 0.72))
        assert np.isclose(in_mask, colour).all(1).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("usetex", [False, True])
def test_names_are_drawn_as_they_are(usetex, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", usetex)
    if usetex:  # titles and tick labels are not names; only these would need a LaTeX installation
        nodes = [node(2, id=name) for name in WEIRD]
        texts = [t for t in plot_dag(ICLGraph(*nodes), title="").texts if t.get_text()]
        assert texts
        assert not any(t.get_usetex() or t.get_parse_math() for t in texts)
        return
    nodes = [node(2, id=name) for name in WEIRD]
    last = node(3, nodes, "all of {them}")
    prompt = compile_prompt(last)
    for suffix in ("png", "svg"):
        plot_mask(prompt, path=tmp_path / f"mask.{suffix}")
        plot_dag(prompt, path=tmp_path / f"dag.{suffix}", title="$ 5 _ 6")
        plot_attention(torch.eye(len(prompt)), prompt, path=tmp_path / f"attention.{suffix}")


def test_names_are_cut_and_on_one_line():
    assert drawable("two\nlines\x00 here") == "two lines here"
    assert len(drawable("x" * 300)) == 24
    assert drawable("x" * 300).endswith("…")
    assert drawable("\n\n") == "·"


def test_the_other_daft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "daft", types.ModuleType("daft"))
    with pytest.raises(LeattnError, match=r"pip uninstall daft.*install --force-reinstall daft-pgm"):
        plot_dag(node(1, id="a"))
    monkeypatch.setitem(sys.modules, "daft", None)
    with pytest.raises(LeattnError, match="pip install daft-pgm"):
        plot_dag(node(1, id="a"))


def test_arrows_run_from_parent_to_child():
    parent = node(1, id="parent")
    ax = plot_dag(node(1, [parent], "child"))
    (arrow,) = [patch for patch in ax.patches if type(patch).__name__ == "FancyArrow"]
    high, low = (patch for patch in ax.patches if type(patch).__name__ == "Rectangle")
    assert high.get_y() > low.get_y() + low.get_height()
    tip = arrow.get_xy()[np.argmin(arrow.get_xy()[:, 1])]
    assert tip[1] == pytest.approx(low.get_y() + low.get_height(), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 15, 60, 300])
def test_boxes_do_not_overlap_and_parents_stand_above(seed, count):
    generator = np.random.default_rng(seed)
    parents = [[int(p) for p in generator.choice(i, size=min(i, 3), replace=False)] if i % 5 else [] for i in range(count)]
    widths = generator.uniform(0.4, 2.0, count)
    centres = lay_out(parents, widths.tolist(), 0.3, gap=0.1).centres
    for child, row in enumerate(parents):
        assert all(centres[p, 1] > centres[child, 1] + 0.3 for p in row)
    apart = np.abs(centres[:, None] - centres)
    overlap = (apart[..., 0] < (widths[:, None] + widths) / 2 - 1e-6) & (apart[..., 1] < 0.3 - 1e-6)
    assert (overlap == np.eye(count, dtype=bool)).all()


def test_graphs_of_many_nodes_or_edges_are_a_handful_of_collections():
    nodes = []
    for i in range(200):
        nodes.append(node(1, list(nodes), f"n{i}"))
    ax = plot_dag(ICLGraph(*nodes))
    assert "shortest of 19,900 edges" in ax.get_title(loc="left")
    assert len(ax.collections) <= 6
    wide = plot_dag(retrieval(500, 1, 1).graph)
    assert len(wide.collections) <= 6
    assert len(wide.texts) <= 502


def test_depths_are_longest_paths():
    assert depths([[], [], [0], [1, 2], [0]]) == [0, 0, 1, 2, 1]


def test_spread_keeps_gaps_and_moves_least():
    wanted = np.array([0.0, 0.1, 0.2, 9.0])
    placed = spread(wanted, [1.0, 1.0, 1.0])
    assert (np.diff(placed) >= 1 - 1e-9).all()
    np.testing.assert_allclose(placed, [-0.9, 0.1, 1.1, 9.0])
    np.testing.assert_allclose(spread_within(wanted, 1.0, 0.0, 9.5), [0, 1, 2, 9])
    np.testing.assert_allclose(spread_within(wanted, 5.0, 0.0, 6.0), [0, 2, 4, 6])


def random_attention(prompt, *shape):
    scores = torch.randn(*shape, len(prompt), len(prompt), generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(~prompt.dense_mask(), -torch.inf).softmax(-1)


def test_folding_equals_plain_loops():
    prompt = random_prompt(1, 7)
    weights = random_attention(prompt, 1, 6)
    folded = fold_attention(weights, prompt)
    spans = list(prompt.spans.values())
    for i, (q0, q1) in enumerate(spans):
        for j, (k0, k1) in enumerate(spans):
            expected = torch.zeros(1, 6)
            for q in range(q0, q1):
                for k in range(k0, k1):
                    expected += weights[:, :, q, k] / (q1 - q0)
            torch.testing.assert_close(folded[..., i, j], expected)
    torch.testing.assert_close(folded.sum(-1), torch.ones(1, 6, 7))
    assert torch.equal(fold_attention([weights, weights], prompt)[1], folded)
    assert fold_attention(weights.bfloat16(), prompt).dtype == torch.float32
    assert fold_attention(weights.double(), prompt).dtype == torch.float64


def test_attention_shows_the_chosen_mean_and_says_so():
    prompt = random_prompt(2, 5)
    layers = tuple(random_attention(prompt, 1, 4) * 1 for _ in range(3))
    ax = plot_attention(layers, prompt)
    assert ax.get_title(loc="left") == "attention from node to node\nmean of all 3 layers, mean of all 4 heads, float32"
    ax = plot_attention(layers, prompt, layer=-1, head=[0, 2])
    assert ax.get_title(loc="left").endswith("layer 2, mean of heads 0, 2, float32")
    expected = fold_attention(layers[2][0, [0, 2]].mean(0), prompt)
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown.data, expected, atol=1e-6)
    allowed = np.eye(5, dtype=bool)
    for i in range(5):
        allowed[i, prompt.visible.nodes_seen(i)] = True
    assert (shown.mask == ~allowed).all()


def test_attention_of_another_mask_is_warned_of():
    prompt = retrieval(2, 3, 2)
    weights = torch.ones(len(prompt), len(prompt)).tril()
    with pytest.warns(LeattnWarning, match=r"% of the attention falls on pairs that this prompt forbids"):
        plot_attention(weights / weights.sum(-1, keepdim=True), prompt)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            lambda w: torch.zeros(1, 2, 12, 12),
            {},
            r"12 queries and 12 keys, but the prompt 9 tokens; slice weights\[..., -9:, -9:\], as the padding",
        ),
        (lambda w: w[..., -1:, :], {}, "1 queries and 9 keys"),
        (lambda w: (None, None), {}, "layer 0: the attention weights are None; only eager"),
        (lambda w: ((w, w), (w, w)), {}, r"layer 0: .*give the first, attentions\[0\]"),
        (lambda w: (), {}, "the sequence is empty"),
        (lambda w: w.expand(2, 4, 9, 9), {}, "more than one prompt's"),
        (lambda w: w.long(), {}, "floating-point tensor"),
        (lambda w: w, {"layer": 0}, "one layer's"),
        (lambda w: (w,), {"layer": 1}, "there is no layer 1: the weights have 1"),
        (lambda w: w, {"head": 4}, "there is no head 4: the weights have 4"),
        (lambda w: w[0, 0], {"head": 0}, "they have no heads"),
        (lambda w: w, {"head": []}, "chooses nothing"),
    ],
)
def test_wrong_weights_are_refused_in_words(make, options, words):
    prompt = retrieval(2, 3, 2)
    with pytest.raises(LeattnError, match=words):
        plot_attention(make(random_attention(prompt, 1, 4)), prompt, **options)


def test_an_unknown_scale_lists_the_known():
    with pytest.raises(LeattnError, match="unknown scale 'words'; choose one of 'tokens', 'nodes'"):
        plot_mask(retrieval(2, 3, 2), scale="words")
