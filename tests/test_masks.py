"""Every form of a mask against a loop over pairs of tokens."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import VISIBILITIES, graphs
from torch.nn.attention.flex_attention import create_block_mask

import leattn
from leattn import ICLGraph, ICLNode, compile_prompt
from leattn.prompt import masks
from leattn.prompt.columns import Row, columns_of

LISTS = [
    (f"{part}{side}_num_blocks", f"{part}{side}_indices")
    for part in ("", "full_")
    for side in ("kv", "q")  # by query, and by key for the backward pass
]


def evaluate(mask_mod, rows, queries, keys):
    """``[rows, queries, keys]`` of a mask_mod, one scalar call per cell as its contract says."""
    index = [torch.tensor(i) for i in range(max(rows, queries, keys))]
    return [
        [[bool(mask_mod(index[b], index[0], index[q], index[k])) for k in range(keys)] for q in range(queries)]
        for b in range(rows)
    ]


@given(graphs(), VISIBILITIES)
def test_dense_mask_is_the_definition(graph, visibility):
    prompt = compile_prompt(graph, visibility=visibility)
    assert prompt.dense_mask().tolist() == oracles.dense(graph.nodes, oracles.relation(graph.nodes, visibility))


@given(graphs(max_nodes=5, max_tokens=3), VISIBILITIES)
def test_mask_mod_is_the_definition(graph, visibility):
    prompt = compile_prompt(graph, visibility=visibility)
    expected = oracles.dense(graph.nodes, oracles.relation(graph.nodes, visibility))
    # The same for every batch row and head.
    assert evaluate(prompt.mask_mod, 2, len(prompt), len(prompt)) == [expected, expected]


@given(graphs(), VISIBILITIES)
def test_additive_mask(graph, visibility):
    prompt = compile_prompt(graph, visibility=visibility)
    expected = oracles.dense(graph.nodes, oracles.relation(graph.nodes, visibility))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = prompt.additive_mask(dtype)
        assert mask.shape == (1, 1, len(prompt), len(prompt))
        assert mask.dtype == dtype
        assert mask.max() == 0
        assert (mask[0, 0] == 0).tolist() == expected
        assert set(mask[mask != 0].tolist()) <= {torch.finfo(dtype).min}


@given(graphs(), VISIBILITIES)
def test_pairs_and_density_count_the_cells(graph, visibility):
    prompt = compile_prompt(graph, visibility=visibility)
    cells = sum(map(sum, oracles.dense(graph.nodes, oracles.relation(graph.nodes, visibility))))
    assert prompt.pairs == cells
    assert prompt.density == cells / sum(range(len(prompt) + 1))


@given(st.lists(graphs(max_nodes=5, max_tokens=4), min_size=1, max_size=3), VISIBILITIES, st.integers(0, 3), st.data())
def test_rows_of_a_padded_batch(batch, visibility, beyond, data):
    """Padding sees itself, the prompt follows the graph, what is generated is a new node after the last one."""
    prompts = [compile_prompt(graph, visibility=visibility) for graph in batch]
    columns = columns_of(prompts, torch.device("cpu"))
    width = max(map(len, prompts))
    total = width + beyond
    window = data.draw(st.sampled_from([None, 1, 2, 5]))
    positions = [oracles.row_positions(prompt.position_ids[0].tolist(), width, beyond) for prompt in prompts]
    expected = [
        oracles.row_mask(graph.nodes, oracles.relation(graph.nodes, visibility), width, beyond, position, window)
        for graph, position in zip(batch, positions, strict=True)
    ]
    assert columns.width == width
    assert columns.padding == tuple(width - len(prompt) for prompt in prompts)
    assert columns.positions(range(total)).tolist() == positions
    assert columns.dense(range(total), total, window).tolist() == expected

    # Any stretch of queries, over all keys or some that nobody wrote yet: what generation, or a static cache, asks for.
    first = data.draw(st.integers(0, total - 1))
    queries = range(first, data.draw(st.integers(first + 1, total)))
    keys = data.draw(st.integers(queries.stop, total + 3))
    selected = [[row[q][:keys] + [False] * (keys - total) for q in queries] for row in expected]
    assert columns.dense(queries, keys, window).tolist() == selected


@given(st.lists(graphs(max_nodes=3, max_tokens=3), min_size=1, max_size=2), st.integers(0, 2), st.data())
def test_mask_mod_of_a_padded_batch(batch, beyond, data):
    prompts = [compile_prompt(graph) for graph in batch]
    columns = columns_of(prompts, torch.device("cpu"))
    width = max(map(len, prompts))
    total = width + beyond
    window = data.draw(st.sampled_from([None, 1, 3]))
    rows_per_prompt = data.draw(st.integers(1, 2))
    offset = data.draw(st.integers(0, total - 1))
    expected = []
    for graph, prompt in zip(batch, prompts, strict=True):
        positions = oracles.row_positions(prompt.position_ids[0].tolist(), width, beyond)
        mask = oracles.row_mask(graph.nodes, oracles.relation(graph.nodes), width, beyond, positions, window)
        expected += [mask[offset:]] * rows_per_prompt
    mask_mod = masks.column_mask_mod(columns, range(offset, total), total, repeats=rows_per_prompt, window=window)
    assert evaluate(mask_mod, len(expected), total - offset, total) == expected


def assert_same_block_mask(made, prompt, block_size):
    size = len(prompt)
    expected = create_block_mask(prompt.mask_mod, 1, 1, size, size, device="cpu", BLOCK_SIZE=block_size)
    assert made.shape == expected.shape
    assert made.seq_lengths == expected.seq_lengths
    assert made.BLOCK_SIZE == expected.BLOCK_SIZE
    for count_name, name in LISTS:
        counts, got, wanted = (getattr(made, count_name), *(getattr(mask, name) for mask in (made, expected)))
        assert counts.dtype == torch.int32
        assert counts.tolist() == getattr(expected, count_name).tolist(), count_name
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        # What stands behind the listed blocks of a row is never read.
        listed = torch.arange(got.shape[-1]) < counts[..., None]
        assert got[listed].tolist() == wanted[listed].tolist(), name


@given(graphs(max_nodes=8, max_tokens=9), VISIBILITIES, st.sampled_from([1, 2, 3, 4, 8, 16, 128]))
def test_block_mask_is_what_torch_makes_of_the_mask_mod(graph, visibility, block_size):
    prompt = compile_prompt(graph, visibility=visibility)
    assert_same_block_mask(prompt.block_mask(block_size), prompt, block_size)


@pytest.mark.parametrize("length", [127, 128, 129, 256, 300])
@pytest.mark.parametrize("visibility", ["parents", "ancestors"])
def test_block_mask_at_the_usual_block_size(length, visibility):
    root = ICLNode(range(length), id="root")
    middle = [ICLNode([7] * n, [root]) for n in (1, 128, 40)]
    leaf = ICLNode([1] * 130, [middle[1]])
    prompt = compile_prompt([leaf, *middle], visibility=visibility)
    assert_same_block_mask(prompt.block_mask(), prompt, 128)


@given(graphs(max_nodes=6, max_tokens=6), st.integers(1, 8), st.data())
def test_block_counts_of_a_stretch_of_queries(graph, block, data):
    prompt = compile_prompt(graph)
    size = len(prompt)
    low = data.draw(st.integers(0, size - 1))
    high = data.draw(st.integers(low + 1, size))
    stretches = Row(prompt.visible, prompt.offsets).stretches(range(low, high))
    counts = masks.block_counts(stretches, range(low, high), size, block)
    dense = oracles.dense(graph.nodes, oracles.relation(graph.nodes))
    rows = [dense[q] for q in range(low, high)]
    expected = [
        [sum(sum(row[k : k + block]) for row in rows[q : q + block]) for k in range(0, size, block)]
        for q in range(0, len(rows), block)
    ]
    assert counts.tolist() == expected


@given(graphs(), st.integers(1, 100))
def test_packed_rows(graph, extra):
    visible = compile_prompt(graph).visible
    width = len(visible) + extra
    packed = visible.packed(width)
    assert packed.dtype == np.int32
    assert packed.shape == (len(visible), -(-width // 32))
    for i, node in enumerate(graph.nodes):
        bits = {j for j in range(packed.shape[1] * 32) if packed[i, j // 32].item() >> (j % 32) & 1}
        assert bits == {graph.index[other] for other in node.parents}


def test_nodes_share_their_words_of_bits_at_the_32nd_node():
    """Bit 31 is the sign of an int32: a node seen there must stay seen, and no other become so."""
    roots = [ICLNode([i]) for i in range(70)]
    leaf = ICLNode([99], [roots[i] for i in (0, 31, 32, 63, 64)])
    prompt = compile_prompt([leaf, *roots])
    last = torch.tensor(70)
    row = [bool(prompt.mask_mod(torch.tensor(0), torch.tensor(0), last, torch.tensor(k))) for k in range(71)]
    assert [k for k in range(71) if row[k]] == [0, 31, 32, 63, 64, 70]
    assert prompt.columns.dense(range(70, 71), 71)[0, 0].tolist() == row


def test_mask_follows_the_device_of_the_prompt():
    prompt = compile_prompt(ICLNode([1, 2, 3]))
    assert prompt.block_mask(device="cpu").kv_indices.device == torch.device("cpu")
    meta = prompt.to("meta")
    assert meta.input_ids.device == meta.position_ids.device == meta.dense_mask().device == torch.device("meta")
    assert prompt.to("cpu") is prompt


def test_a_causal_graph_has_a_causal_mask():
    prompt = compile_prompt(leattn.causal([[1, 2], [3], [4, 5, 6]]))
    assert prompt.visible.is_causal
    assert torch.equal(prompt.dense_mask(), torch.ones(6, 6, dtype=torch.bool).tril())
    assert prompt.density == 1.0
    assert not compile_prompt(ICLGraph(ICLNode([1]), ICLNode([2]))).visible.is_causal
