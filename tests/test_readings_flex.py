"""Readings through flex_attention, against a model whose attention is done by hand (reading_by_hand.py).

Uncompiled flex takes some tens of milliseconds a call, so the graphs hold several readings, and most models have one layer.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import reading_by_hand as by_hand
import torch
from models import make_model, shared_model
from torch.nn.attention.flex_attention import create_block_mask

from leattn import GenNode, ICLGraph, ICLNode, attend, compile_prompt, forward, generate, read
from leattn.attention.blocks import BLOCK, Groups, Part, block_mask
from leattn.attention.flex import FLEX
from leattn.attention.request import Request
from leattn.dag.reading import Reading
from leattn.prompt.columns import columns_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _uncompiled_flex_without_gradients():
    """torch 2.13 cannot compile flex for many shapes on a CPU; uncompiled it is the same mathematics."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def graph(*readings, last=(6, 7, 8)):
    """Header, three documents, a question that reads them: ``readings`` are (documents, options)."""
    header = ICLNode([5, 6, 7], id="header")
    docs = [ICLNode(ids, [header], f"doc{i}") for i, ids in enumerate(([10, 11, 12, 13], [20, 21], [30, 31, 32]))]
    alone = [doc for i, doc in enumerate(docs) if all(i not in which for which, _ in readings)]
    groups = [read([docs[i] for i in which], **options) for which, options in readings]
    return [header, *docs, ICLNode(list(last), [header, *alone, *groups], "Q")]


MIXED = [
    ([0], {"temperature": 0.6, "scale": 0.8, "log_weight": 0.5, "heads": [0, 3]}),
    ([1], {"log_weight": -0.9, "layers": [0, 2]}),
    ([2], {"shift": -3, "temperature": 1.3}),
]
"""A group with its sum, one through the score function, one at another place."""
CASES = {
    "mixed": MIXED,
    "one call": [([0, 2], {"temperature": 0.5, "scale": 2.0, "log_weight": -0.4, "heads": [1, 2]}), ([1], {"log_weight": 0.7})],
    "cut": [([0, 2], {"log_weight": -math.inf}), ([1], {"log_weight": -math.inf, "scale": 1.5})],
    "alike": [([0], {"temperature": 0.5}), ([1, 2], {"temperature": 0.5})],
}


IN_ONE_LAYER = [MIXED[0], ([1], {"log_weight": -0.9}), MIXED[2]]


@functools.cache
def model_of(family):
    if family == "gemma2":
        return make_model(family, attn_logit_softcapping=1.5)  # low enough to cap something
    return make_model("llama", num_hidden_layers=1) if family == "llama of one layer" else shared_model(family)


def tiny():
    return model_of("llama of one layer")


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, "mixed") for family in ("llama", "gemma2", "gemma3_text")),
        *(("llama of one layer", case) for case in ("one call", "cut", "alike")),
    ],
)
def test_a_forward(family, case):
    """Grouped heads, chosen layers and heads; a soft-cap (gemma2), and windows that hide some of what is read."""
    model, nodes = model_of(family), graph(*CASES[case])
    expected = by_hand.logits(model, nodes)
    found = forward(model, compile_prompt(nodes[-1]), backend="flex", use_cache=False).logits[0]
    assert (found - expected).abs().max() < 1e-4
    plain = forward(model, compile_prompt(graph()[-1]), backend="eager", use_cache=False).logits[0]
    assert (plain[-1] - expected[-1]).abs().max() > 1e-2, "the reading changes nothing here, so nothing was tested"


def test_the_rows_of_others_are_the_same_to_the_last_bit():
    model = shared_model("llama")
    plain, found = (
        forward(model, compile_prompt(nodes[-1]), backend="flex", use_cache=False).logits[0]
        for nodes in (graph(), graph(([0], {"temperature": 0.5, "layers": 2}), ([1], {"log_weight": 1.0, "layers": 2})))
    )
    assert torch.equal(plain[:-3], found[:-3])
    assert (plain[-3:] - found[-3:]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_what_is_generated_reads_as_the_sink_does(options):
    nodes, model = graph(*IN_ONE_LAYER), tiny()
    result = generate(model, compile_prompt(nodes[-1]), max_new_tokens=2, backend="flex", **options)
    assert result.token_ids.tolist() == by_hand.greedy(model, nodes, 2)


def test_batches_and_beams():
    several, model = [graph(*IN_ONE_LAYER), graph(*CASES["alike"], last=(40, 41, 42, 43))], tiny()
    prompts = [compile_prompt(nodes[-1]) for nodes in several]
    found = forward(model, prompts, backend="flex", use_cache=False).logits
    for row, nodes in zip(found, several, strict=True):
        expected = by_hand.logits(model, nodes)
        assert (row[-len(expected) :] - expected).abs().max() < 1e-4
    results = generate(model, prompts, backend="flex", max_new_tokens=2, num_beams=2, num_return_sequences=2)
    for nodes, result in zip(several, results, strict=True):
        ids = [int(token) for token in result.sequences[0].token_ids]
        rows = by_hand.logits(model, [*nodes[:-1], grown(nodes[-1], ids)]).log_softmax(-1)
        greedy = by_hand.greedy(model, nodes, 2)
        best = by_hand.logits(model, [*nodes[:-1], grown(nodes[-1], greedy)]).log_softmax(-1)
        score, least = (
            sum(float(each[token]) for each, token in zip(scores[-3:-1], tokens, strict=True))
            for scores, tokens in ((rows, ids), (best, greedy))
        )
        assert score >= least - 1e-4


def grown(sink, ids):
    grouped = {one for group in sink.readings for one in group.nodes}
    return ICLNode([*sink.content, *ids], [*(one for one in sink.parents if one not in grouped), *sink.readings], "grown")


def test_programs():
    model = tiny()
    header, *docs, _ = graph()
    first = GenNode([40, 41], [header, read(docs, temperature=0.6, log_weight=-0.5)], "first", max_new_tokens=2)
    second = GenNode([50], [header, read(first, shift=2, scale=1.5)], "second", max_new_tokens=2)
    written = by_hand.greedy(model, [header, *docs, ICLNode([40, 41], first_parents(header, docs), "first")], 2)
    done = ICLNode([40, 41, *written], first_parents(header, docs), "first")
    then = by_hand.greedy(model, [header, *docs, done, ICLNode([50], [header, read(done, shift=2, scale=1.5)], "second")], 2)
    result = generate(model, ICLGraph(second), backend="flex")
    assert [result.token_ids[name].tolist() for name in ("first", "second")] == [written, then]


def first_parents(header, docs):
    return [header, read(docs, temperature=0.6, log_weight=-0.5)]


@pytest.mark.parametrize("by", ["mask", "padding"])
def test_what_a_mask_hides_is_in_no_group(by):
    """As a prompt without what is hidden, every token where it was; a window goes with it."""
    model = make_model("gemma3_text", num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=9)
    header, *docs, sink = graph(([0, 1], {"temperature": 0.5, "scale": 1.1}), ([2], {"shift": -3}))
    prompt = compile_prompt(sink)
    hidden = slice(*prompt.spans[docs[0]])
    reader = ICLNode(list(sink.content), [header, read(docs[1], temperature=0.5, scale=1.1), read(docs[2], shift=-3)], "Q")
    at = prompt.position_ids[0].tolist()
    nodes = [header, docs[1], docs[2], reader]
    expected = by_hand.logits(model, nodes, where=at[: hidden.start] + at[hidden.stop :])
    allowed = torch.ones(1, 1, len(prompt), len(prompt), dtype=torch.bool)
    allowed[..., -len(sink.content) :, hidden] = False
    with attend(model, prompt, backend="flex", mask=allowed if by == "mask" else None) as attention:
        inputs = attention.inputs
        if by == "padding":
            inputs["attention_mask"] = inputs["attention_mask"].clone()
            inputs["attention_mask"][:, hidden] = 0
        found = model(**inputs, use_cache=False).logits[0]
    assert (found[-3:] - expected[-3:]).abs().max() < 1e-4


def test_sinks_take_weight_from_what_is_read():
    """On a CPU transformers has no sinks under flex, so no model gets here; the attention itself does."""
    nodes = graph(([0, 1], {"temperature": 0.6, "scale": 0.8}), ([2], {"log_weight": -0.7}))
    prompt = compile_prompt(nodes[-1])
    size, generator = len(prompt), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, size, 8, generator=generator) for heads in (6, 2, 2))
    sinks = torch.randn(6, generator=generator)
    request = Request(columns_of([prompt], CPU), 1, range(size), size, None, torch.float32, CPU)
    module = SimpleNamespace(layer_idx=0, training=False)
    output, _ = FLEX.attention(request)(module, query, key, value, scaling=0.5, softcap=2.0, s_aux=sinks)
    seen = prompt.dense_mask()[-1].nonzero().flatten().tolist()
    named = [(list(range(3, 9)), Reading(temperature=0.6, scale=0.8)), (list(range(9, 12)), Reading(log_weight=-0.7))]
    for head in range(6):
        k, v = key[0, head // 3], value[0, head // 3]
        row, _ = by_hand.row_of(query[0, head, -1], k, v, seen, named, 0.5, 1.0, 0, head, 2.0, float(sinks[head]))
        assert (output[0, -1, head] - row).abs().max() < 1e-5


@pytest.mark.parametrize(("window", "first"), [(None, 0), (150, 130)])
def test_blocks_of_parts_are_what_torch_makes_of_their_mask_mods(window, first):
    """Which blocks are skipped and which are full, compiled kernels go by; and every seen pair is in one part."""
    header = ICLNode(range(130), id="header")
    docs = [ICLNode(range(length), [header], f"doc{i}") for i, length in enumerate((300, 40, 129))]
    reader = ICLNode(range(140), [header, docs[1], read(docs[0], temperature=0.5), read(docs[2], shift=7)], "Q")
    other = ICLNode(range(60), [header, read(docs[:2], temperature=0.5), docs[2]], "other")
    prompts = [compile_prompt([reader, other]), compile_prompt(reader)]
    columns = columns_of(prompts, CPU)
    queries = range(first, columns.width)
    request = Request(columns, 4, queries, columns.width, window, torch.float32, CPU)
    groups = Groups(request)
    parts = [Part(groups, frozenset(groups.numbers), rest=True), *(Part(groups, frozenset({one})) for one in groups.numbers)]
    sizes = (4, 1, len(queries), columns.width)
    total = torch.zeros(4, 1, len(queries), columns.width)
    for part in parts:
        made = block_mask(request, part)
        expected = create_block_mask(made.mask_mod, *sizes, device="cpu", BLOCK_SIZE=BLOCK)
        lists = [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")]
        listed = [{name: blocks_of(mask, *name) for name in lists} for mask in (made, expected)]
        if window is None:
            assert listed[0] == listed[1]
        for row in zip(*(each[lists[0]] for each in listed), *(each[lists[1]] for each in listed), strict=True):
            held, seen, full, whole = row
            assert full <= whole  # called full only where all of it is seen
            assert seen | whole <= held | full  # nothing that is seen is skipped
        b, q, k = torch.arange(4)[:, None, None], torch.arange(len(queries))[:, None], torch.arange(columns.width)
        total += made.mask_mod(b, torch.tensor(0), q, k)[:, None]
    assert torch.equal(total, columns.dense(queries, columns.width, window).repeat_interleave(2, 0)[:, None].float())


def blocks_of(mask, count, index):
    counts, indices = getattr(mask, count).flatten().tolist(), getattr(mask, index).flatten(0, 2).tolist()
    return [set(row[:n]) for n, row in zip(counts, indices, strict=True)]
