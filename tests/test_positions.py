"""Where nodes start counting: schemes, pins, callables, and what is refused."""

from __future__ import annotations

import re
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SCHEMES, VISIBILITIES, graphs

import leattn
from leattn import CompileError, GenNode, ICLGraph, ICLNode, LeattnError, LeattnWarning, compile_prompt
from leattn.generation.program import build
from leattn.prompt.positions import Scheme


@given(graphs(max_nodes=8), VISIBILITIES, SCHEMES)
def test_schemes_are_their_definition(graph, visibility, scheme):
    prompt = compile_prompt(graph, visibility=visibility, positions=scheme)
    sees = oracles.relation(graph.nodes, visibility)
    assert prompt.position_ids.shape == prompt.input_ids.shape == (1, len(prompt))
    assert prompt.position_ids.dtype == prompt.input_ids.dtype == torch.long
    assert prompt.position_ids[0].tolist() == oracles.positions(graph.nodes, sees, scheme)


def test_a_chain_is_numbered_as_plain_text():
    nodes = leattn.chain([[1, 2], [3], [4, 5, 6]])
    assert compile_prompt(nodes[-1]).position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_parallel_siblings_share_positions_and_their_child_starts_after_the_longest():
    root = ICLNode([1, 2], id="root")
    short, long = ICLNode([3], [root], id="short"), ICLNode([4, 5, 6], [root], id="long")
    prompt = compile_prompt(ICLNode([7], [root, short, long], id="Q"))
    assert {name: prompt[name].positions.tolist() for name in ("root", "short", "long", "Q")} == {
        "root": [0, 1],
        "short": [2],
        "long": [2, 3, 4],
        "Q": [5],
    }


def test_the_furthest_end_is_that_of_nodes_seen_and_not_of_all_ancestors():
    root = ICLNode([1], id="root", start_pos_id=50)
    middle = ICLNode([2], id="middle", start_pos_id=60)
    leaf = ICLNode([3], [ICLNode([4], [root, middle], id="low", start_pos_id=70)], id="leaf")
    pinned = ICLNode([5], [ICLNode([6], [middle], id="under", end_pos_id=62)], id="pinned")
    prompt = compile_prompt([leaf, pinned])
    assert prompt["leaf"].positions.tolist() == [71]
    assert prompt["under"].positions.tolist() == [61]
    assert prompt["pinned"].positions.tolist() == [62]


@pytest.mark.parametrize("scheme", ["after_parents", "sequential", "restart"])
def test_pins_win_over_every_scheme(scheme):
    first = ICLNode([1, 2, 3], id="first", start_pos_id=10)
    last = ICLNode([4, 5], [first], id="last", end_pos_id=40)
    prompt = compile_prompt(last, positions=scheme)
    assert prompt["first"].positions.tolist() == [10, 11, 12]
    assert prompt["last"].positions.tolist() == [38, 39]


def test_pins_win_over_a_callable():
    first = ICLNode([1, 2, 3], id="first", start_pos_id=10)
    prompt = compile_prompt(ICLNode([4], [first], id="last"), positions=lambda graph, lengths: [99, 20])
    assert prompt.position_ids.tolist() == [[10, 11, 12, 20]]


def test_nodes_after_a_pinned_one_count_from_its_end():
    first = ICLNode([1, 2], start_pos_id=100)
    assert compile_prompt(ICLNode([3, 4], [first])).position_ids.tolist() == [[100, 101, 102, 103]]


@given(graphs(), st.data())
def test_a_callable_gives_the_starts(graph, data):
    starts = data.draw(st.lists(st.integers(0, 1000), min_size=len(graph), max_size=len(graph)))
    called = []

    def as_list(given, lengths):
        called.append(given)
        assert lengths == {node: len(node.content) for node in graph}
        return starts

    expected = [start + i for node, start in zip(graph, starts, strict=True) for i in range(len(node.content))]
    assert compile_prompt(graph, positions=as_list).position_ids[0].tolist() == expected
    assert called == [graph]
    by_node = dict(zip(graph, starts, strict=True))
    assert compile_prompt(graph, positions=lambda g, n: by_node).position_ids[0].tolist() == expected
    for kind in (np.array, torch.tensor, tuple):
        assert compile_prompt(graph, positions=lambda g, n: kind(starts)).position_ids[0].tolist() == expected  # noqa: B023


def test_a_callable_that_gives_too_little():
    graph = ICLGraph(ICLNode([1], [ICLNode([2], id="a")], id="b"))
    with pytest.raises(CompileError, match="gave 1 starts for 2 nodes; give one per node"):
        compile_prompt(graph, positions=lambda g, n: [0])
    with pytest.raises(CompileError, match="gave no start for node 'b'"):
        compile_prompt(graph, positions=lambda g, n: {g["a"]: 0})


def test_a_negative_position_names_the_node():
    node = ICLNode([1, 2, 3], id="Q")
    with pytest.raises(CompileError, match="node 'Q' would start at position -2; positions start at 0"):
        compile_prompt(node, positions=lambda graph, lengths: [-2])


def test_a_pinned_end_before_the_tokens_fit():
    with pytest.raises(
        CompileError, match="node 'Q' has 3 tokens and end_pos_id=2, so it would start at position -1; give end_"
    ):
        compile_prompt(ICLNode([1, 2, 3], id="Q", end_pos_id=2))
    assert compile_prompt(ICLNode([1, 2, 3], end_pos_id=3)).position_ids.tolist() == [[0, 1, 2]]


def test_an_unknown_scheme_lists_the_known():
    words = "unknown positions 'relative'; choose one of 'after_parents', 'sequential', 'restart', 'equilibrium', or give a "
    with pytest.raises(LeattnError, match=words):
        compile_prompt(ICLNode([1]), positions="relative")


def test_a_node_pinned_before_what_it_sees_is_a_warning_that_names_both():
    far = ICLNode([1, 2, 3], id="far")
    near = ICLNode([4], id="near")
    node = ICLNode([5], [near, far], id="Q", start_pos_id=2)
    with pytest.warns(
        LeattnWarning, match="node 'Q' is pinned to position 2, before the end 3 of 'far', which it sees"
    ) as caught:
        prompt = compile_prompt(node)
    assert prompt["Q"].positions.tolist() == [2]
    assert caught[0].filename == __file__, "the warning points to the user's line"


def test_a_node_pinned_at_the_end_of_what_it_sees_or_beside_it_is_no_warning():
    root = ICLNode([1, 2, 3], id="root")
    other = ICLNode([9] * 50, id="other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_prompt([ICLNode([5], [root], start_pos_id=3), other])


@given(graphs(), VISIBILITIES, SCHEMES, st.data())
def test_edits_keep_positions(graph, visibility, scheme, data):
    prompt = compile_prompt(graph, visibility=visibility, positions=scheme)
    node = data.draw(st.sampled_from(graph.nodes))
    assert torch.equal(prompt.without_node(node).position_ids, prompt.position_ids)


NO_NUMBERS = [True, np.True_, torch.tensor(True), None, "3", 1j, [None], float("nan"), float("inf"), np.nan, Decimal("0.5")]


@pytest.mark.parametrize("start", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("writes", [False, True])
def test_a_callable_that_gives_no_number(start, writes):
    graph = ICLGraph(chain_of(writes))
    for starts in ([0, start], {graph["a"]: 0, graph["b"]: start}):
        scheme = Scheme(lambda g, n: starts, known_before_writing=True)  # noqa: B023
        words = re.escape(f"the positions callable gave {start!r} for node 'b'; give a number, its first position, or one per")
        with pytest.raises(CompileError, match=words):
            run(graph, scheme, writes)


@pytest.mark.parametrize("writes", [False, True])
def test_a_callable_that_gives_a_negative_number_or_none_at_all(writes):
    graph = ICLGraph(chain_of(writes))
    for starts, words in (
        ([0, -3], "node 'b' would start at position -3; positions start at 0"),
        ([0, np.int64(-1)], "node 'b' would start at position -1"),
        ([0, -0.5], "node 'b' would start at position -0.5"),
        ([[3, -1], 7], "node 'a' would reach position -1"),
        ([[0, 1, 2], 7], "the positions callable gave 3 positions for node 'a' of 2 tokens; give one per token"),
        ([0, []], "the positions callable gave 0 positions for node 'b' of 1 tokens"),
        (7, "the positions callable gave 7; give one start per node"),
        (torch.tensor(7), "give one start per node"),
    ):
        with pytest.raises(CompileError, match=re.escape(words)):
            run(graph, Scheme(lambda g, n: starts, known_before_writing=True), writes)  # noqa: B023


@pytest.mark.parametrize(
    "kind", [int, np.int8, np.uint64, np.array, torch.tensor, float, np.float64, Fraction], ids=lambda kind: kind.__name__
)
def test_whole_numbers_of_any_kind_are_positions(kind):
    graph = ICLGraph(chain_of(False))
    found = compile_prompt(graph, positions=lambda g, n: [kind(3), kind(9)])
    assert found.position_ids.tolist() == [[3, 4, 9]]
    node = ICLNode([5, 6], start_pos_id=kind(7))
    assert type(node.start_pos_id) is int
    assert compile_prompt(node).position_ids.tolist() == [[7, 8]]
    assert compile_prompt(ICLNode([5, 6], end_pos_id=kind(7))).position_ids.tolist() == [[5, 6]]


@pytest.mark.parametrize("value", [*(one for one in NO_NUMBERS if one is not None), [2], torch.tensor([1, 2])], ids=repr)
def test_pins_are_numbers(value):
    for pin in ("start_pos_id", "end_pos_id"):
        with pytest.raises(CompileError, match=re.escape(f"{pin}={value!r}; give a number")):
            ICLNode([1], id="a", **{pin: value})


def test_what_is_said_of_a_pinned_node_is_unused():
    first = ICLNode([1, 2], id="a", start_pos_id=4)
    prompt = compile_prompt(ICLNode([3], [first]), positions=lambda graph, lengths: [None, 9])
    assert prompt.position_ids.tolist() == [[4, 5, 9]]


def chain_of(writes):
    first = ICLNode([1, 2], id="a")
    return GenNode([3], [first], "b", max_new_tokens=1) if writes else ICLNode([3], [first], "b")


def run(graph, scheme, writes):
    return build([graph], None, positions=scheme) if writes else compile_prompt(graph, positions=scheme)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, Fraction], ids=lambda kind: kind.__name__)
def test_numbers_that_are_not_whole_are_positions(kind):
    node = ICLNode([5, 6], start_pos_id=kind(7.5))
    assert type(node.start_pos_id) is float
    prompt = compile_prompt(ICLNode([7], [node]))
    assert prompt.position_ids.dtype == torch.float64
    assert prompt.position_ids.tolist() == [[7.5, 8.5, 9.5]]
    assert "positions 7.5:9.5" in str(prompt)
    found = compile_prompt([ICLNode([5, 6]), ICLNode([7])], positions=lambda g, n: [[kind(0.25), kind(4.5)], kind(1.75)])
    assert found.position_ids.tolist() == [[0.25, 4.5, 1.75]]


def test_positions_of_tokens_are_whole_where_they_can_be():
    graph = ICLGraph(chain_of(False))
    found = compile_prompt(graph, positions=lambda g, n: [np.array([3.0, 7.0]), 8.0])
    assert found.position_ids.dtype == torch.long
    assert found.position_ids.tolist() == [[3, 7, 8]]


def test_differences_of_positions_are_exact():
    """A third is the nearest multiple of 2⁻²⁰, so that a node is as far from another wherever the two stand."""
    near, far = (
        compile_prompt([ICLNode([1]), ICLNode([2])], positions=lambda *_: [at, at + Fraction(1, 3)]).position_ids[0]  # noqa: B023
        for at in (0, 100_000)
    )
    assert (near[1] - near[0]) == (far[1] - far[0])
    assert abs(float(near[1]) - 1 / 3) < 2**-20


def test_a_continued_prompt_counts_on_from_where_it_is():
    longer = compile_prompt(ICLNode([1, 2], start_pos_id=0.5)).continued([3, 4])
    assert longer.position_ids.tolist() == [[0.5, 1.5, 2.5, 3.5]]
    assert compile_prompt(longer.graph).position_ids.tolist() == [[0.5, 1.5, 2.5, 3.5]]


class TestEquilibrium:
    def published(self, lengths, before, question, after):
        """Positions of contexts, questions and task in Superposition's own code, from its formulas in plain numbers."""
        mean = len(lengths) / sum(1 / n for n in lengths)
        contexts = [[before + mean / n * t for t in range(n)] for n in lengths]
        start = before + mean
        return contexts, [start + t for t in range(question)], [start + question + t for t in range(after)]

    @pytest.mark.parametrize("lengths", [[5, 9], [3, 3, 12], [1, 2, 3, 40]])
    def test_it_is_the_published_one(self, lengths):
        preamble = ICLNode([1, 2, 3], id="preamble")
        contexts = [ICLNode([10 + i] * n, [preamble], f"c{i}") for i, n in enumerate(lengths)]
        questions = [ICLNode([7, 8], [preamble, context], f"q{i}") for i, context in enumerate(contexts)]
        task = ICLNode([4, 5, 6], [preamble, *contexts, *questions], "task")
        prompt = compile_prompt(task, positions="equilibrium")
        where, asked, answered = self.published(lengths, 3, 2, 3)
        for i, expected in enumerate(where):
            assert prompt[f"c{i}"].positions.tolist() == pytest.approx(expected, abs=2**-19)
            assert prompt[f"q{i}"].positions.tolist() == pytest.approx(asked, abs=2**-19)
        assert prompt["task"].positions.tolist() == pytest.approx(answered, abs=2**-19)

    def test_equal_paths_and_chains_are_left_as_they_are(self):
        root = ICLNode([1, 2])
        ends = [ICLNode([3 + i] * 4, [ICLNode([9] * 3, [root])]) for i in range(3)]
        last = ICLNode([7], [root, *ends])
        found, usual = (compile_prompt(last, positions=scheme) for scheme in ("equilibrium", "after_parents"))
        assert found.position_ids.dtype == torch.long
        assert torch.equal(found.position_ids, usual.position_ids)

    def test_what_paths_begin_and_end_with_alike_counts_by_one(self):
        root = ICLNode([1], id="root")
        paths = []
        for i, n in enumerate((2, 6)):
            head = ICLNode([5, 6], [root], f"head{i}")
            body = ICLNode([7] * n, [head], f"body{i}")
            paths.append(ICLNode([8, 9], [body], f"tail{i}"))
        prompt = compile_prompt(ICLNode([2], paths, "last"), positions="equilibrium")
        assert prompt["head0"].positions.tolist() == prompt["head1"].positions.tolist() == [1, 2]
        assert prompt["body0"].positions.tolist() == [3, 4.5]  # the harmonic mean of 2 and 6 is 3
        assert prompt["body1"].positions.tolist() == [3, 3.5, 4, 4.5, 5, 5.5]
        assert prompt["tail0"].positions.tolist() == prompt["tail1"].positions.tolist() == [6, 7]
        assert prompt["last"].positions.tolist() == [8]

    def test_a_path_may_fork_again(self):
        root = ICLNode([1], id="root")
        inner = ICLNode([2, 3], [root], id="inner")
        twigs = [ICLNode([4] * n, [inner], f"twig{n}") for n in (1, 3)]  # 1.5 in the mean: this path has 2 + 1.5 + 1
        join = ICLNode([5], [inner, *twigs], "join")
        other = ICLNode([6] * 9, [root], "other")  # the mean of 4.5 and 9 is 6
        prompt = compile_prompt(ICLNode([7], [root, join, other], "last"), positions="equilibrium")
        assert prompt["last"].positions.tolist() == pytest.approx([7])
        assert prompt["inner"].positions.tolist() == pytest.approx([1, 1 + 4 / 3], abs=2**-19)
        assert prompt["twig1"].positions.tolist() == pytest.approx([1 + 8 / 3], abs=2**-19)
        assert prompt["twig3"].positions.tolist() == pytest.approx([1 + 8 / 3 + 2 / 3 * i for i in range(3)], abs=2**-19)
        assert prompt["join"].positions.tolist() == pytest.approx([1 + 14 / 3], abs=2**-19)
        assert prompt["other"].positions.tolist() == pytest.approx([1 + 2 / 3 * i for i in range(9)], abs=2**-19)

    def test_what_does_not_come_apart_starts_after_its_parents(self):
        root = ICLNode([1], id="root")
        a, b = ICLNode([2] * 2, [root], "a"), ICLNode([3] * 5, [root], "b")
        c, d = ICLNode([4], [a], "c"), ICLNode([5], [a, b], "d")
        prompt = compile_prompt(ICLNode([6], [c, d], "last"), positions="equilibrium")
        starts = [int(prompt[name].positions[0]) for name in ("a", "b", "c", "d", "last")]
        assert starts == [1, 1, 3, 6, 7]

    @given(st.data())
    def test_every_path_of_a_fork_ends_where_the_others_do(self, data):
        """Graphs made of series and forks: whatever joins starts where each of the paths it joins ends."""
        root = ICLNode([1])
        joins = []

        def grow(start, depth):
            for _ in range(data.draw(st.integers(1, 2))):
                if depth and data.draw(st.booleans()):
                    ends = [grow(start, depth - 1) for _ in range(data.draw(st.integers(2, 3)))]
                    start = ICLNode([9] * data.draw(st.integers(1, 6)), ends)
                    joins.append((start, ends))
                else:
                    start = ICLNode([8] * data.draw(st.integers(1, 9)), [start])
            return start

        prompt = compile_prompt(grow(root, 2), positions="equilibrium")
        for join, ends in joins:
            at = float(prompt[join].positions[0])
            for end in ends:
                places = prompt[end].positions
                # Of a single token nobody sees how far the next would be: the paths' own starts say that.
                if len(places) > 1:
                    assert float(places[-1] + places[1] - places[0]) == pytest.approx(at, abs=1e-4)
        for node in prompt.graph.nodes:
            for parent in node.parents:
                assert float(prompt[node].positions[0]) > float(prompt[parent].positions[-1])
