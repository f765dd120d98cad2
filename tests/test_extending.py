"""One backend, one position scheme, one operation of each kind and one plot, as a user would write them (docs/extending.md),
against the plain model, a list written by hand, a Llama run by hand and plain hooks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from llama_by_hand import run
from matplotlib.figure import Figure
from models import make_model, shared_model
from test_attend import fan, traces

import leattn
from leattn import Backend, BackendError, GenNode, ICLGraph, ICLNode, LeattnError, attend, causal, compile_prompt
from leattn.attention.request import UnderMask
from leattn.interventions import Suppress, intervene
from leattn.interventions.operation import Selection
from leattn.prompt.positions import Scheme

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
NEW = 6


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# A backend


def textbook(request):
    allowed = request.allowed()

    def attention(module, query, key, value, scaling, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    return attention


MINE = Backend("textbook", attention=textbook)


def plain_text():
    """A prompt in which everyone sees everything, and its tokens."""
    ids = torch.randint(2, 100, (17,), generator=torch.Generator().manual_seed(2))
    return compile_prompt(causal(ids.split([4, 7, 6]))), ids[None]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "qwen3_moe"])
def test_a_backend_of_ones_own_computes_what_eager_and_the_plain_model_do(family):
    model = shared_model(family)
    state = traces(model)
    for prompts in (fan(), [fan(seed=1), fan(length=5, seed=2)]):
        ours, theirs = (leattn.forward(model, prompts, backend=backend).logits for backend in (MINE, "eager"))
        if isinstance(prompts, list):
            ours, theirs = ours[0, -len(prompts[0]) :], theirs[0, -len(prompts[0]) :]  # not the padding
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    prompt, ids = plain_text()
    torch.testing.assert_close(leattn.forward(model, prompt, backend=MINE).logits, model(ids).logits, **TOLERANCE)
    assert traces(model) == state


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_it_is_told_of_sliding_windows(family):
    model, (prompt, ids) = shared_model(family), plain_text()
    torch.testing.assert_close(leattn.forward(model, prompt, backend=MINE).logits, model(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_it_decodes_what_the_plain_model_does(options):
    model, (prompt, ids) = shared_model("llama"), plain_text()
    result = leattn.generate(model, prompt, backend=MINE, max_new_tokens=NEW, **options)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)
    assert result.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()
    assert result.backend == "textbook"
    ours, theirs = (
        leattn.generate(model, fan(), backend=backend, max_new_tokens=NEW, **options) for backend in (MINE, "eager")
    )
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()


def test_it_writes_several_branches_of_a_program():
    model = shared_model("llama")
    root = ICLNode([1, 5, 6], id="root")
    headers = ([11, 12], [13, 14, 15], [16])
    readers = [GenNode(ids, [root], id=f"reader {i}", max_new_tokens=3 + i) for i, ids in enumerate(headers)]
    judge = GenNode([7, 8], [root, *readers], id="judge", max_new_tokens=4)
    ours, theirs = (leattn.generate(model, ICLGraph(judge), backend=backend) for backend in (MINE, "eager"))
    assert ours.texts == theirs.texts
    assert ours.backend == "textbook"
    for i, ids in enumerate(headers):  # a reader sees what plain text would
        plain = torch.tensor([[1, 5, 6, *ids]])
        written = model.generate(plain, attention_mask=torch.ones_like(plain), max_new_tokens=3 + i, do_sample=False)
        assert ours.texts[f"reader {i}"] == str(written[0, plain.shape[1] :].tolist())


def test_what_it_does_not_carry_is_refused_by_name():
    model, prompt = make_model("llama", attention_dropout=0.1), fan()
    for options, words in (
        ({"output_attentions": True}, "textbook has no attention weights to return"),
        ({"mask": torch.ones(1, 1, 17, 17, dtype=torch.bool)}, "textbook takes no mask of your own"),
        ({"mask": torch.zeros(1, 1, 17, 17)}, "textbook takes no mask of your own"),
    ):
        with pytest.raises(BackendError, match=words):
            leattn.forward(model, prompt, backend=MINE, **options)
    hidden = torch.arange(17)[None] != 3
    with attend(model, prompt, backend=MINE), pytest.raises(BackendError, match="textbook takes no attention_mask that hides"):
        model(prompt.input_ids, attention_mask=hidden)
    with (
        pytest.raises(BackendError, match="changes attention scores, which backend 'textbook' cannot carry"),
        intervene(model, prompt, [Suppress("doc1", 0.5)], backend=MINE),
    ):
        raise AssertionError("not entered")
    model.train()
    with pytest.raises(BackendError, match="textbook has no attention dropout"):
        leattn.forward(model, prompt, backend=MINE)


def test_a_backend_that_cannot_is_not_believed():
    """What it says itself, and what the tiny forwards find out: one that shows everything to everybody."""

    def blind(request):
        attention = textbook(SimpleNamespace(allowed=lambda: torch.tensor(True)))
        return lambda *args, **kwargs: attention(*args, **kwargs)

    def honest(record):
        return f"it was not made for {record.facts.family}"

    for backend, words in (
        (Backend("blind", attention=blind), r"backend 'blind' cannot run this model: swapping two siblings|.* does not see it"),
        (Backend("shy", attention=textbook, refusal=honest), "'shy' cannot run this model: it was not made for llama"),
        (Backend("far", attention=textbook, device="cuda"), "'far' cannot run this model: it runs on cuda only"),
    ):
        with pytest.raises(BackendError, match=words):
            leattn.forward(shared_model("llama"), fan(), backend=backend)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_mask_of_ones_own_under_transformers_own_kernel(family):
    """It carries scores, and serves a family whose implementation is fixed when it is loaded."""

    def nearest(request):
        within = request.columns.within(request.queries, request.keys, 4).repeat_interleave(request.repeats, 0)[:, None]
        return UnderMask(
            "eager", torch.zeros_like(within, dtype=request.dtype).masked_fill(~(request.allowed() & within), -1e9)
        )

    backend = Backend("nearest", attention=nearest, implementation="eager", carries=("scores", "weights"))
    model, prompt = shared_model(family), fan()
    output = leattn.forward(model, prompt, backend=backend, output_attentions=True)
    position = prompt.position_ids[0]
    allowed = prompt.dense_mask() & (position[:, None] - position < 4)
    for weights in output.attentions:
        assert ((weights[0] > 1e-6) == allowed).all()
    if family == "llama":
        with intervene(model, prompt, [Suppress("doc1", 0, mode="weight")], backend=backend) as attention:
            cut = model(**attention.inputs).logits[0, -1]
        torch.testing.assert_close(
            cut, leattn.forward(model, prompt.without_node("doc1"), backend=backend).logits[0, -1], **TOLERANCE
        )


# A position scheme


def by_depth(graph, lengths):
    depth = {}
    for node in graph.nodes:
        depth[node] = 1 + max((depth[parent] for parent in node.parents), default=-1)
    return {node: 10 * steps for node, steps in depth.items()}


def family_tree(kind=ICLNode, **options):
    root = ICLNode([1, 2], id="root")
    left = ICLNode([3, 4, 5], [root], id="left")
    right = ICLNode([6], [root], id="right")
    pinned = ICLNode([7, 8], [root], id="pinned", start_pos_id=3)
    return ICLGraph(kind([9, 10], [root, left, right, pinned], id="end", **options))


@pytest.mark.parametrize("scheme", [by_depth, Scheme(starts=by_depth), Scheme(by_depth, known_before_writing=True)])
def test_positions_of_a_scheme_of_ones_own(scheme):
    prompt = compile_prompt(family_tree(), positions=scheme)
    assert prompt.position_ids[0].tolist() == [0, 1, 10, 11, 12, 10, 3, 4, 20, 21]


def test_a_scheme_known_before_writing_holds_for_programs():
    model, seen = shared_model("llama"), []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])[0].tolist()), with_kwargs=True
    )
    graph = family_tree(GenNode, max_new_tokens=3)
    leattn.generate(model, compile_prompt(ICLNode([2])), max_new_tokens=1)  # the probe runs before
    seen.clear()
    try:
        result = leattn.generate(model, graph, positions=Scheme(by_depth, known_before_writing=True), backend="eager")
    finally:
        handle.remove()
    assert sorted(seen[0]) == sorted([0, 1, 10, 11, 12, 10, 3, 4, 20, 21])
    assert seen[1:] == [[22], [23]]
    plain = compile_prompt(family_tree(), positions=by_depth)
    assert result.text == leattn.generate(model, plain, max_new_tokens=3, backend="eager").text
    with pytest.raises(LeattnError, match="needs the length of every node"):
        leattn.generate(model, graph, positions=by_depth)


def test_a_scheme_whose_branches_collide_is_refused_for_several_sinks():
    model, root = shared_model("llama"), ICLNode([1, 2], id="root")
    graph = ICLGraph(ICLNode([3], [root], id="a"), ICLNode([4], [root], id="b"))
    apart = Scheme(by_depth)
    assert len(leattn.generate(model, graph, positions=apart, max_new_tokens=2).texts) == 2
    with pytest.raises(LeattnError, match="the 2 sinks of a graph would go on at each other's positions"):
        leattn.generate(model, graph, positions=Scheme(by_depth, branches_collide=True), max_new_tokens=2)


# Operations


@dataclass(frozen=True)
class Scale:
    layer: int
    tokens: str
    factor: float

    def bind(self, subject):
        selection = Selection.build(subject, self.tokens, rows=None)

        def edit(state, hidden):
            chosen = selection.at(state.queries)[..., None]
            return torch.where(chosen, hidden * self.factor, hidden) if state.layer == self.layer else hidden

        return SimpleNamespace(edit=edit)


@dataclass(frozen=True)
class Temperature:
    temperature: float
    layer: int | None = None

    def bind(self, subject):
        def scores(state, scores, visible):
            assert scores.shape == (*state.call.query.shape[:3], state.call.key.shape[2])
            return scores / self.temperature

        return SimpleNamespace(scores=scores, touches=lambda layer: self.layer in (None, layer))


@dataclass(frozen=True)
class Damp:
    share: float

    def bind(self, subject):
        return SimpleNamespace(attended=lambda state, output: output * (self.share if state.layer < subject.layers - 1 else 1))


def logits(model, prompt, operations, backend):
    with intervene(model, prompt, operations, backend=backend) as attention:
        return model(**attention.inputs, use_cache=False).logits[0]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sparse", MINE], ids=lambda backend: getattr(backend, "name", backend))
def test_an_operation_that_edits_states_equals_a_forward_by_hand(backend):
    model, prompt = shared_model("llama"), fan()
    first, last = prompt["doc1"].span

    def states(layer, h):
        return torch.cat([h[:first], -2 * h[first:last], h[last:]]) if layer == 1 else h

    expected = run(model, prompt, states=states)
    torch.testing.assert_close(logits(model, prompt, [Scale(1, "doc1", -2)], backend), expected, **TOLERANCE)
    assert not torch.allclose(expected, run(model, prompt), atol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_an_operation_on_scores_equals_a_forward_by_hand(backend):
    model, prompt = shared_model("llama"), fan()
    everywhere = run(model, prompt, scores=lambda layer, head, q, row, visible: row / 3)
    there = run(model, prompt, scores=lambda layer, head, q, row, visible: row / 3 if layer == 2 else row)
    torch.testing.assert_close(logits(model, prompt, [Temperature(3)], backend), everywhere, **TOLERANCE)
    torch.testing.assert_close(logits(model, prompt, [Temperature(3, layer=2)], backend), there, **TOLERANCE)
    assert not torch.allclose(everywhere, there, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_an_operation_on_what_attention_adds_equals_plain_hooks(family, backend):
    model, (prompt, ids) = make_model(family), plain_text()
    ours = logits(model, prompt, [Damp(0.25)], backend)
    modules = [module for name, module in model.named_modules() if name.endswith((".self_attn", ".attention"))]
    assert len(modules) == 3
    handles = [
        module.register_forward_hook(lambda _m, _args, output: (0.25 * output[0], *output[1:])) for module in modules[:-1]
    ]
    hooked = model(ids).logits[0]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, hooked, **TOLERANCE)
    assert not torch.allclose(hooked, model(ids).logits[0], atol=1e-2)


def test_a_backend_on_an_implementation_that_nobody_has_leaves_the_model_clean():
    model = make_model("llama")
    state, ids = traces(model), torch.arange(2, 12)[None]
    before = model(ids).logits

    def broken(request):
        raise TypeError("nothing to give")

    with pytest.raises(BackendError, match="transformers has no masks for the implementation 'nowhere'; it has them for "):
        leattn.forward(model, fan(), backend=Backend("broken", attention=broken, implementation="nowhere"))
    assert traces(model) == state
    assert torch.equal(model(ids).logits, before)


def test_a_backend_whose_attention_has_no_mask_cannot_carry_changed_scores():
    claims = Backend("claims", attention=textbook, carries=("scores",))
    with (
        intervene(shared_model("llama"), fan(), [Suppress("doc0", 0.5)], backend=claims) as attention,
        pytest.raises(BackendError, match="has none; answer with a dataclass that has a field 'mask'"),
    ):
        shared_model("llama")(**attention.inputs)


def test_attribution_runs_on_a_backend_of_ones_own():
    model, prompt = shared_model("llama"), fan()
    ours, theirs = (
        leattn.analysis.attribute(model, prompt, [5, 6], methods="cut_nodes", backend=backend, progress=False)
        for backend in (MINE, "eager")
    )
    assert [row.node for row in ours.rows] == [row.node for row in theirs.rows]
    torch.testing.assert_close([row.importance for row in ours.rows], [row.importance for row in theirs.rows], **TOLERANCE)


def test_a_sweep_does_not_take_an_operation_without_a_repr_for_another(tmp_path):
    class Silent:
        def bind(self, subject):
            return self

        def edit(self, state, hidden):
            return hidden

    options = {"layers": [0], "targets": [[5]], "progress": False}
    with pytest.raises(LeattnError, match="a file cannot tell it from one with other settings; give its class a __repr__"):
        leattn.analysis.sweep(
            shared_model("llama"), [fan()], {"silent": lambda layer, seed: [Silent()]}, file=tmp_path / "s.jsonl", **options
        )


def test_operations_of_ones_own_stand_beside_built_in_ones_and_hold_under_a_cache():
    model, prompt = shared_model("llama"), fan()
    state = traces(model)
    operations = [Scale(1, "doc1", -2), Suppress("doc0", 0.3), Temperature(2), Damp(0.5)]
    generated = []
    for use_cache in (True, False):
        with intervene(model, prompt, operations, backend="eager"):
            output = model.generate(
                prompt.input_ids,
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        generated.append(torch.cat(output.logits))
    torch.testing.assert_close(*generated, **TOLERANCE)
    assert traces(model) == state


def test_names_are_resolved_before_anything_runs():
    model, prompt = shared_model("llama"), fan()
    with pytest.raises(LeattnError, match="nobody"), intervene(model, prompt, [Scale(1, "nobody", 0)]):
        raise AssertionError("not entered")
    with pytest.raises(LeattnError, match=r"one of your own with a method bind\(subject\)"), intervene(model, prompt, ["doc1"]):
        raise AssertionError("not entered")


# A plot


def test_a_plot_of_ones_own_is_in_the_report(tmp_path):
    trace = leattn.analysis.trace(shared_model("llama"), fan(), backend="eager")
    drawn = []

    def entropy(trace, *, layer):
        shares = trace.mass[trace.layers.index(layer)].mean(0)
        drawn.append((layer, torch.special.entr(shares).sum(-1)))
        ax = Figure().add_subplot()
        ax.bar(list(trace.prompt.graph.names.values()), drawn[-1][1].tolist())
        return ax

    plots = {**leattn.viz.PLOTS, "entropy_{layer}.png": entropy}
    paths = leattn.viz.save_report(trace, tmp_path, layers=[0, 2], plots=plots)
    names = {path.name for path in paths}
    assert {"entropy_0.png", "entropy_2.png"} <= names
    assert names >= {path.name for path in leattn.viz.save_report(trace, tmp_path / "plain", layers=[0, 2])}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    # What it was given is the model's attention: how much the tokens of a node give, on average, to each node.
    weights = leattn.forward(shared_model("llama"), fan(), backend="eager", output_attentions=True).attentions
    bounds = [0, *(last for _, last in fan().spans.values())]
    for layer, entropies in drawn:
        given = [[weights[layer][0, :, a:b, c:d].sum(-1).mean() for c, d in pairwise(bounds)] for a, b in pairwise(bounds)]
        shares = torch.tensor(given)
        torch.testing.assert_close(entropies, torch.special.entr(shares).sum(-1), rtol=1e-3, atol=1e-4)
