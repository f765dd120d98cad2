"""Pictures of a trace, the folder of them, and ``leattn report``."""

from __future__ import annotations

import json
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from models import shared_model
from test_attend import fan
from test_cli import fails, succeeds

import leattn
from leattn import ICLGraph, ICLNode, LeattnError, compile_prompt, viz
from leattn.analysis import trace


@pytest.fixture(scope="module")
def found():
    return trace(shared_model("llama"), fan(length=4), tokens=[("Q", "doc1"), ("doc2", "doc2")])


@pytest.fixture(scope="module")
def weights():
    with torch.no_grad():
        return leattn.forward(shared_model("llama"), fan(length=4), backend="eager", output_attentions=True).attentions


def image(ax):
    return ax.images[0].get_array()


def test_attention_of_a_trace_is_that_of_its_weights(found, weights):
    for options in ({}, {"layer": 1}, {"layer": -1, "head": 2}, {"layer": [0, 2], "head": [1, 3]}):
        ours = image(viz.plot_attention(found, **options))
        theirs = image(viz.plot_attention(weights, fan(length=4), **options))
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        np.testing.assert_allclose(ours.filled(0), theirs.filled(0), atol=1e-5)
    title = viz.plot_attention(found, layer=1, head=2).get_title(loc="left")
    assert title == "attention from node to node\nlayer 1, head 2, float32, LlamaForCausalLM"


def test_layers_of_a_trace_keep_their_numbers(found):
    some = trace(shared_model("llama"), fan(length=4), layers=[0, 2])
    for layer in (0, 2, -1):
        np.testing.assert_array_equal(
            image(viz.plot_attention(some, layer=layer)), image(viz.plot_attention(found, layer=layer))
        )
    assert "mean of layers 0, 2" in viz.plot_attention(some).get_title(loc="left")
    assert "mean of all 3 layers" in viz.plot_attention(found).get_title(loc="left")
    with pytest.raises(LeattnError, match="there is no layer 1 in this trace; it has 0, 2"):
        viz.plot_attention(some, layer=1)
    with pytest.raises(LeattnError, match="give the prompt, too"):
        viz.plot_attention(torch.eye(3))


def test_tokens_of_a_trace_and_of_weights(found, weights):
    prompt = fan(length=4)
    query, key = prompt["Q"].span, prompt["doc1"].span
    expected = weights[1][0].mean(0)[slice(*query), slice(*key)]
    for ax in (
        viz.plot_tokens(found, ("Q", "doc1"), layer=1),
        viz.plot_tokens(weights, ("Q", "doc1"), prompt, layer=1),
        viz.plot_tokens(weights[1], ("Q", "doc1"), prompt),
    ):
        np.testing.assert_allclose(image(ax).filled(-1), expected, atol=1e-5)
        assert len(ax.get_xticklabels()) == len(prompt["doc1"].input_ids)
        assert ax.get_title(loc="left").startswith("attention from tokens of 'Q' to tokens of 'doc1'\n")
    own = image(viz.plot_tokens(found, ("doc2", "doc2")))
    np.testing.assert_array_equal(own.mask, ~np.tri(len(own), dtype=bool))


def test_pairs_that_are_not_there(found, weights):
    with pytest.raises(LeattnError, match=r"which pair of nodes\? The trace has \('Q', 'doc1'\), \('doc2', 'doc2'\)"):
        viz.plot_tokens(found)
    with pytest.raises(
        LeattnError, match=r"did not keep the pair \('Q', 'doc0'\); call trace\(\.\.\., tokens=\('Q', 'doc0'\)\)"
    ):
        viz.plot_tokens(found, ("Q", "doc0"))
    with pytest.raises(LeattnError, match="give the pair and the prompt"):
        viz.plot_tokens(weights, ("Q", "doc0"))
    with pytest.raises(LeattnError, match="'doc0' does not see 'Q'"):
        viz.plot_tokens(weights, ("doc0", "Q"), fan(length=4))
    alone = trace(shared_model("llama"), fan(), tokens=("Q", "root"))
    assert viz.plot_tokens(alone).get_ylabel() == "query token of Q"


def test_sinks_are_layers_by_heads(found):
    ax = viz.plot_sinks(found)
    np.testing.assert_allclose(image(ax), found.sinks[..., 0])
    assert ax.get_title(loc="left").startswith("attention to the first token of 'root'\n")
    assert len(ax.texts) == 3 * 4
    assert image(viz.plot_sinks(found, node="doc1")).shape == (3, 4)
    several = trace(
        shared_model("llama"), compile_prompt([ICLNode([5], id="a"), ICLNode([6, 7], id="b"), ICLNode([8, 9], id="c")])
    )
    ax = viz.plot_sinks(several)
    np.testing.assert_allclose(image(ax), several.sinks[..., 1:].mean(-1))  # nobody else sees the token of a
    assert "first tokens of 3 roots" in ax.get_title(loc="left")
    assert image(viz.plot_sinks(several, node="a")).mask.all()


@pytest.mark.parametrize("kind", ["hidden", "keys", "values"])
def test_norms_of_a_layer_and_over_layers(found, kind):
    norms = {"hidden": found.hidden_norms[:, None], "keys": found.key_norms, "values": found.value_norms}[kind]
    ax = viz.plot_norms(found, kind=kind, layer=1)
    drawn = np.stack([line.get_ydata() for line in ax.lines if len(line.get_ydata()) == len(found.prompt)])
    np.testing.assert_allclose(drawn, norms[1], rtol=1e-6)
    assert "layer 1" in ax.get_title(loc="left")
    *top, median = (np.asarray(line.get_ydata()) for line in viz.plot_norms(found, kind=kind).lines)
    by_token = norms.mean(1).numpy()
    np.testing.assert_allclose(np.stack(top, 1), -np.sort(-by_token, 1)[:, :3], rtol=1e-5)
    np.testing.assert_allclose(median, np.median(by_token, 1), rtol=1e-5)


def test_norms_of_one_token_and_with_a_massive_one(found):
    one = trace(shared_model("llama"), compile_prompt(ICLNode([5], id="only")))
    assert len(viz.plot_norms(one).lines) == 2
    viz.plot_norms(one, layer=0)
    assert viz.plot_norms(found, layer=1).get_yscale() == "linear"
    found.hidden_norms[1, 0] *= 1000
    try:
        assert viz.plot_norms(found, layer=1).get_yscale() == "log"
    finally:
        found.hidden_norms[1, 0] /= 1000
    with pytest.raises(LeattnError, match="unknown kind 'queries'; choose one of 'hidden', 'keys', 'values'"):
        viz.plot_norms(found, kind="queries")
    with pytest.raises(LeattnError, match=r"one layer, or None for a summary of all of them, not layer=\[0, 1\]"):
        viz.plot_norms(found, layer=[0, 1])


def test_pictures_draw_on_axes_given_and_write_only_where_told(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draws = [viz.plot_sinks, viz.plot_norms, lambda data, **options: viz.plot_tokens(data, ("Q", "doc1"), **options)]
    for i, draw in enumerate(draws):
        given = Figure().add_subplot()
        assert draw(found, ax=given, title="mine") is given
        assert given.get_title(loc="left") == "mine"
        assert not list(tmp_path.glob("*.png"))
        draw(found, path=tmp_path / f"{i}.png")
        draw(found, title="", path=tmp_path / f"{i}.svg")
        assert sane(tmp_path / f"{i}.png")
        for file in tmp_path.iterdir():
            file.unlink()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def sane(path):
    """A picture of some size, with something on it."""
    pixels = matplotlib.image.imread(path)
    height, width, channels = pixels.shape
    return 150 < height < 3000 and 150 < width < 3000 and channels in (3, 4) and pixels[..., :3].std() > 0.02


def names(layers):
    each = [(f"layer_{i}_attention.png", f"hidden_states_{i}_norm.png", f"kv_{i}_norm.png") for i in layers]
    return [*sum(each, ()), "sinks.png", "hidden_norms.png"]


def test_a_report_is_a_folder_of_pictures(found, tmp_path):
    paths = viz.save_report(found, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == names([0, 1, 2])
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    assert all(sane(path) for path in paths)
    assert [path.name for path in viz.save_report(found, tmp_path / "some", layers=[2])] == names([2])
    with pytest.raises(LeattnError, match="there is no layer 7 in this trace; it has 0, 1, 2"):
        viz.save_report(found, tmp_path / "none", layers=[7])
    assert not (tmp_path / "none").exists()


def test_a_report_takes_plots_of_ones_own(found, tmp_path):
    asked = []

    def entropy(data, *, layer):
        asked.append((data, layer))
        ax = Figure().add_subplot()
        ax.bar(range(len(data.prompt.graph)), torch.special.entr(data.mass[layer].mean(0)).sum(-1).tolist())
        return ax

    def by_pyplot(data):
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots()
        ax.plot(data.hidden_norms.mean(-1))
        return figure

    own = {"entropy_{layer}.png": entropy, "means.png": by_pyplot}
    paths = viz.save_report(found, tmp_path / "all", layers=[0, 2], plots={**viz.PLOTS, **own})
    assert asked == [(found, 0), (found, 2)]
    ours = names([0, 2])
    assert [path.name for path in paths] == [*ours[:3], "entropy_0.png", *ours[3:6], "entropy_2.png", *ours[6:], "means.png"]
    assert all(sane(path) for path in paths)
    assert not sys.modules["matplotlib.pyplot"].get_fignums()
    (path,) = viz.save_report(found, tmp_path / "one", plots={"sinks.svg": viz.plot_sinks})
    assert list((tmp_path / "one").iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine", "cannot write 'mine': unknown suffix ''"),
        ("mine.docx", "cannot write 'mine.docx': unknown suffix 'docx'"),
        ("sub/mine.png", "'sub/mine.png' is a path"),
    ],
)
def test_names_that_no_picture_can_have(found, tmp_path, name, words):
    with pytest.raises(LeattnError, match=words):
        viz.save_report(found, tmp_path / "none", plots={"sinks.png": viz.plot_sinks, name: viz.plot_norms})
    assert not (tmp_path / "none").exists()


def test_a_plot_that_returns_no_picture(found, tmp_path):
    with pytest.raises(LeattnError, match=r"the plot for mine\.png returned None; return the axes or the figure"):
        viz.save_report(found, tmp_path, plots={"mine.png": lambda data: None})
    assert not list(tmp_path.iterdir())


def test_a_report_that_fails_leaves_no_half_of_a_file(found, tmp_path, monkeypatch):
    (tmp_path / "layer_0_attention.png").write_bytes(b"old")

    def half(figure, path, **_):
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        viz.save_report(found, tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("layer_0_attention.png", b"old")]


CHAT = [
    {"role": "system", "content": "The capital of Zarvia is Moville."},
    {"role": "user", "content": "What is the capital of Zarvia?"},
]


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_command_draws_a_chat(tmp_path, suffix):
    file = tmp_path / f"chat.{suffix}"
    file.write_text(json.dumps(CHAT))
    printed = succeeds("report", file, "--model", "tiny", "-o", tmp_path / "out", "--layers", "1")
    assert printed.split() == [str(tmp_path / "out" / name) for name in names([1])]
    assert all(sane(tmp_path / "out" / name) for name in names([1]))


def test_the_command_draws_a_prompt_file(tmp_path):
    fact = ICLNode("\nThe capital of Zarvia is Lumo.", id="fact")
    ICLGraph(ICLNode("\nQ: What is the capital of Zarvia?\nA:", [fact], id="Q")).to_file(tmp_path / "prompt.yaml")
    out = tmp_path / "out"
    printed = succeeds("report", tmp_path / "prompt.yaml", "--model", "tiny", "-o", out, "--backend", "eager")
    assert printed.split() == [str(out / name) for name in names(range(leattn.tiny.load()[0].config.num_hidden_layers))]


def test_what_the_command_cannot_draw(tmp_path):
    chat, prompt, bad = (tmp_path / name for name in ("chat.json", "prompt.json", "bad.json"))
    chat.write_text(json.dumps(CHAT))
    prompt.write_text(json.dumps([{"content": "no role"}]))
    bad.write_text("{")
    out = tmp_path / "out"
    assert "takes numbers with commas" in fails("report", chat, "--model", "tiny", "-o", out, "--layers", "first")
    assert "layer 9; this model has layers 0 to" in fails("report", chat, "--model", "tiny", "-o", out, "--layers", "9")
    assert "give a mapping with a 'role'" in fails("report", prompt, "--model", "tiny", "-o", out)
    assert "bad.json is not a prompt file" in fails("report", bad, "--model", "tiny", "-o", out)
    assert "No such file" in fails("report", tmp_path / "none.yaml", "--model", "tiny", "-o", out)
    assert not out.exists()
