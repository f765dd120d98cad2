"""The sparse backend: attention against a dense mask, on every kind of group its plan makes, and nothing of size S × S."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import VISIBILITIES, graphs

import leattn
from leattn import ICLNode, causal, chain, compile_prompt, parallel
from leattn.attention.group import Group
from leattn.attention.plan import Mixed, plan
from leattn.attention.request import Request
from leattn.attention.sparse import SparseAttention
from leattn.prompt.columns import columns_of
from leattn.prompt.stretch import Stretch
from leattn.prompt.visible import merge


def request(columns, rows, first, stop, window=None):
    return Request(columns, rows, range(first, stop), stop, window, torch.float32, torch.device("cpu"))


def dense(query, key, value, mask):
    """Softmax attention by hand, ``[B, Q, H, D]``; mask ``[B, Q, K]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ value).transpose(1, 2)


def tensors(rows, length, keys, *, heads=4, groups=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, length, size), (rows, groups, keys, size), (rows, groups, keys, size))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check(prompts, first=0, beyond=0, repeats=1, window=None):
    """Compare the columns from ``first`` on, with ``beyond`` generated ones, against dense rows."""
    columns = columns_of(prompts, torch.device("cpu"))
    stop = columns.width + beyond
    rows = len(prompts) * repeats
    query, key, value = tensors(rows, stop - first, stop)
    mask = columns.dense(range(first, stop), stop, window).repeat_interleave(repeats, 0)
    attention = SparseAttention(request(columns, rows, first, stop, window))
    real = torch.arange(first, stop) >= torch.tensor(columns.padding).repeat_interleave(repeats)[:, None]
    for grad in (False, True):  # with gradients the kernels without log-sum-exp run
        with torch.set_grad_enabled(grad):
            output = attention(None, query.requires_grad_(grad), key, value)[0]
        torch.testing.assert_close(output[real], dense(query, key, value, mask)[real], rtol=1e-4, atol=1e-5)
    return attention


@settings(max_examples=60)
@given(graph=graphs(max_nodes=9, max_tokens=9), visibility=VISIBILITIES)
def test_random_graphs(graph, visibility):
    check([compile_prompt(graph, visibility=visibility)])


@settings(max_examples=25)
@given(one=graphs(max_nodes=6), two=graphs(max_nodes=6))
def test_batches_beams_continuations_and_decoding(one, two):
    # A continuation needs one sink; the last node of the layout is what it continues.
    prompts = [compile_prompt(ICLNode([1, 2], graph.sinks)) for graph in (one, two)]
    check(prompts, beyond=3, repeats=2)
    columns = max(len(prompt) for prompt in prompts)
    check(prompts, first=columns, beyond=1, repeats=2)
    check(prompts, first=columns + 1, beyond=4)


@settings(max_examples=40)
@given(one=graphs(max_nodes=6, max_tokens=9), two=graphs(max_nodes=6), window=st.integers(1, 12), queries=st.integers(1, 5))
def test_windows(one, two, window, queries):
    prompts = [compile_prompt(ICLNode([1, 2], graph.sinks)) for graph in (one, two)]
    columns = max(len(prompt) for prompt in prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leattn.attention.plan, "WINDOW_QUERIES", queries)  # a mask covers this many queries
        check(prompts, beyond=3, repeats=2, window=window)
        check(prompts, first=columns, beyond=1, repeats=2, window=window)
        check(prompts, first=columns // 2, window=window)


def test_a_window_is_masked_only_where_it_reaches_back_too_far():
    """Documents of 40 tokens at positions 5 to 45, and a question behind them: only the question looks back by more than 41."""
    prompt = compile_prompt(ICLNode(ids(6), [HEAD, *parallel([ids(40)] * 4, [HEAD])]))
    masked = [isinstance(step, Mixed) for step, _ in check([prompt], window=45).steps(frozenset())[0]]
    assert masked[-1]
    assert masked.count(True) == 1
    last, _ = check([prompt], window=10).steps(frozenset())[0][-1]
    assert last.mask.shape[1] == 6 + 4 * 9  # its own, and of each document those less than 10 positions before its first token


@settings(max_examples=25)
@given(graph=graphs(max_nodes=6, max_tokens=6))
def test_chunked_prefill(graph):
    prompt = compile_prompt(graph)
    for first in range(0, len(prompt), 3):
        check([prompt], first=first)


def ids(count):
    return [1] * count


HEAD = ICLNode(ids(5))
SHAPES = {
    "siblings": compile_prompt(ICLNode(ids(6), [HEAD, *parallel([ids(7)] * 30, [HEAD])])),
    "long siblings": compile_prompt(ICLNode(ids(70), parallel([ids(200)] * 3))),
    "longer than a step": compile_prompt(parallel([ids(1100)] * 2)),
    "chain": compile_prompt(chain([ids(30)] * 12)),
    "chain of long nodes": compile_prompt(chain([ids(150)] * 4)),
    "causal": compile_prompt(causal([ids(40)] * 6)),
    "questions on a context": compile_prompt(parallel([ids(32)] * 6, [ICLNode(ids(300))])),
    "single tokens": compile_prompt(ICLNode(ids(3), [HEAD, *parallel([ids(1)] * 40, [HEAD])])),
    "scattered parents": compile_prompt([ICLNode(ids(9), nodes[::2]) for nodes in [parallel([ids(11)] * 6)] for _ in range(3)]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_group(shape):
    check([SHAPES[shape]])


def test_short_stretches_go_side_by_side(monkeypatch):
    """30 siblings of 7 tokens: seven blocks of four under one mask, and one of the two that are left."""
    masks = []
    original = leattn.attention.kernels.scaled_dot_product_attention

    def counted(query, key, value, mask, **kwargs):
        masks.append((len(query), *(() if mask is None else mask.shape)))
        return original(query, key, value, mask, **kwargs)

    monkeypatch.setattr(leattn.attention.kernels, "scaled_dot_product_attention", counted)
    check([SHAPES["siblings"]])
    assert masks.count((7, 28, 33)) == masks.count((1, 14, 19)) == 2  # with gradients and without
    masks.clear()
    check([SHAPES["siblings"]], repeats=2)
    assert masks.count((14, 28, 33)) == masks.count((2, 14, 19)) == 2


def test_plans_are_few_groups():
    def planned(shape):
        prompt = SHAPES[shape]
        size = len(prompt)
        return plan(prompt.columns.stretches(range(size))[0])

    assert planned("causal") == [Group(0, 240, 1, ())]
    assert planned("siblings") == [Group(0, 5, 1, ()), Group(5, 7, 30, ((0, 5),)), Group(215, 6, 1, ((0, 215),))]
    assert planned("chain") == [Group(0, 60, 1, ()), Group(60, 30, 10, (), window=30)]
    assert [group.count for group in planned("questions on a context")] == [1, 6]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_nothing_of_size_s_by_s_is_made():
    prompt = compile_prompt(ICLNode(ids(64), parallel([ids(256)] * 32)))
    size = len(prompt)
    query, key, value = tensors(1, size, size)
    with torch.no_grad(), Largest() as largest:
        SparseAttention(request(prompt.columns, 1, 0, size))(None, query, key, value)
    assert largest.elements <= query.numel()
    assert largest.elements < size * size // 100


def of_stretches(stretches):
    """What a growing sequence would ask for: one row, and any stretches."""
    return SimpleNamespace(
        width=stretches[-1].stop, readings=(), repeats=lambda rows: rows, stretches=lambda queries: [stretches]
    )


def by_hand(stretches, first, stop):
    """The mask of some stretches, token by token."""
    mask = torch.zeros(stop - first, stop, dtype=torch.bool)
    for stretch in stretches:
        for query in range(stretch.start, stretch.stop):
            for a, b in stretch.seen:
                mask[query - first, a:b] = True
            mask[query - first, stretch.start : query + 1] = True
    return mask


def check_stretches(stretches):
    first, stop = stretches[0].start, stretches[-1].stop
    query, key, value = tensors(1, stop - first, stop)
    with torch.no_grad():
        output = SparseAttention(request(of_stretches(stretches), 1, first, stop))(None, query, key, value)[0]
    expected = dense(query, key, value, by_hand(stretches, first, stop)[None])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    return plan(stretches)


def branches(count, shared, steps):
    """One decoding step of branches that share a prompt; each one's tokens lie apart, one in every ``count`` columns."""
    first = shared + count * steps
    own = [[(column, column + 1) for column in range(shared + i, first, count)] for i in range(count)]
    return [Stretch(first + i, first + i + 1, merge([(0, shared), *own[i]])) for i in range(count)]


def test_branches_that_decode_side_by_side_are_one_call():
    steps = check_stretches(branches(16, 400, 30))
    assert [type(step) for step in steps] == [Mixed]
    assert steps[0].columns.tolist() == list(range(896))
    assert check_stretches(branches(5, 20, 0)) == [Group(20, 1, 5, ((0, 20),))]


def test_branches_with_little_in_common_are_not_all_computed_together():
    apart = [Stretch(8000 + i, 8001 + i, ((1000 * i, 1000 * i + 1000),)) for i in range(8)]
    steps = check_stretches(apart)
    assert sum(step.mask.size if isinstance(step, Mixed) else 1001 for step in steps) <= 3 * 8 * 1001


def test_decoding_beside_nodes_that_start():
    decoding = branches(4, 50, 10)
    start = decoding[-1].stop
    starting = [Stretch(start, start + 9, ((0, 50),)), Stretch(start + 9, start + 18, ((0, 50), (60, 61), (64, 65)))]
    more = [Stretch(start + 18, start + 19, ((3, 7), (20, 30), (start, start + 9)))]
    assert [type(step) for step in check_stretches([*decoding, *starting, *more])] == [Mixed, Group, Group, Group]


@settings(max_examples=60)
@given(data=st.data())
def test_any_stretches(data):
    first = data.draw(st.integers(0, 12))
    stretches, start = [], first
    for _ in range(data.draw(st.integers(1, 6))):
        stop = start + data.draw(st.sampled_from([1, 1, 1, 2, 5]))
        seen = data.draw(st.sets(st.integers(0, start - 1))) if start else ()
        stretches.append(Stretch(start, stop, merge([(column, column + 1) for column in seen])))
        start = stop
    check_stretches(stretches)
