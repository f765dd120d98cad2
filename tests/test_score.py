"""Scores of continuations, against the plain model: one forward for each, under a mask written by hand."""

from __future__ import annotations

import math

import oracles
import pytest
import reading_by_hand as by_hand
import torch
from models import make_model, shared_model

import leattn
from leattn import BackendError, GenNode, ICLGraph, ICLNode, KVStore, LeattnError, compile_prompt, generate, read, score

CHOICES = [[40, 41, 42], [43], [40, 44], [7]]


def items(count=3, demonstrations=3):
    """Questions behind the same demonstrations, made anew for each, as they come from a data set."""
    found = []
    for i in range(count):
        header = ICLNode([5, 6, 7], id="header")
        demos = [ICLNode([10 + j, 11 + j, 12, 13], [header], f"demo{j}") for j in range(demonstrations)]
        found.append([header, *demos, ICLNode([20 + i, 21, 22], [header, *demos], "Q")])
    return found


def plain(model, nodes, ids):
    """Log-probabilities of a continuation's tokens, from one forward of the plain model under a mask by hand."""
    grown = ICLNode([*nodes[-1].content, *ids], nodes[-1].parents, "grown")
    nodes = [*nodes[:-1], grown]
    sees = oracles.relation(nodes)
    mask = torch.tensor(oracles.dense(nodes, sees))
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    tokens = torch.tensor([[node.content[i] for node, i in oracles.tokens_of(nodes)]])
    positions = torch.tensor([oracles.positions(nodes, sees)])
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=additive, use_cache=False).logits[0]
    return logits.double().log_softmax(-1)[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "sparse"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_every_continuation_of_every_prompt(family, backend):
    model, several = shared_model(family), items()
    for budget in (2048, 8):
        scores = score(model, [nodes[-1] for nodes in several], CHOICES, backend=backend, token_budget=budget, progress=False)
        for nodes, by_prompt, totals in zip(several, scores.token_logprobs, scores.logprobs, strict=True):
            for ids, found, total in zip(CHOICES, by_prompt, totals, strict=True):
                expected = plain(model, nodes, ids)
                assert (found - expected).abs().max() < 1e-4
                assert total == pytest.approx(float(expected.sum()), abs=1e-4)


def test_what_is_equal_is_computed_once():
    model, several = shared_model("llama"), items(count=5)
    scores = score(model, [nodes[-1] for nodes in several], CHOICES, progress=False)
    shared, own = 3 + 3 * 4, 3  # and of the continuations all tokens but the last
    assert scores.stats.computed == shared + 5 * (own + 2 + 1)
    assert scores.stats.steps == 1
    one = score(model, several[0][-1], CHOICES)
    assert one.stats.computed == shared + own + 3
    assert one.logprobs == pytest.approx(scores.logprobs[0], abs=1e-5)
    twins = [ICLNode([8, 9], [ICLNode([1, 2]), ICLNode([1, 2])]) for _ in range(2)]  # two equal documents are two, in each
    assert score(model, twins, [[4]], progress=False).stats.computed == 2 + 2 + 2
    alone = ICLNode([8, 9], [ICLNode([1, 2])])
    assert score(model, twins, [[4]]).logprobs[0] != pytest.approx(score(model, alone, [[4]]).logprobs, abs=1e-6)


def test_a_store():
    model, several = shared_model("llama"), items()
    targets = [nodes[-1] for nodes in several]
    expected, store = score(model, targets, CHOICES).logprobs, KVStore()
    for reused in (0, 15):
        scores = score(model, targets, CHOICES, kv_store=store, progress=False)
        assert scores.stats.reused == reused
        for found, right in zip(scores.logprobs, expected, strict=True):
            assert found == pytest.approx(right, abs=1e-4)
    assert len(store) == 4 + 3, "continuations are not stored"


def test_a_sink_that_is_another_prompts_document():
    model, (nodes, *_) = shared_model("llama"), items()
    longer, shorter = compile_prompt(nodes[-1]), compile_prompt(nodes[1])
    store = KVStore()
    leattn.warm(model, longer, kv_store=store, progress=False)
    for options in ({}, {"kv_store": store}, {"token_budget": 4}):
        found = score(model, [longer, shorter], CHOICES, progress=False, **options).logprobs
        for prompt, each in zip(([*nodes], nodes[:2]), found, strict=True):
            assert each == pytest.approx([float(plain(model, prompt, ids).sum()) for ids in CHOICES], abs=1e-4), options


def test_long_lists_forget_what_is_behind_them():
    model = shared_model("llama")
    header = ICLNode([5, 6, 7])
    targets = [ICLNode([i % 90 + 3, i // 90 + 3, *range(2, 90)], [header]) for i in range(100)]
    found = score(model, targets, [[40, 41], [43]], token_budget=400, progress=False)
    assert found.stats.computed == 3 + 100 * 91
    for i in (0, 57, 99):
        expected = [float(plain(model, [header, targets[i]], ids).sum()) for ids in ([40, 41], [43])]
        assert found.logprobs[i] == pytest.approx(expected, abs=1e-4)


def test_it_reads_as_its_sink_does():
    header, *_ = nodes = items()[0]
    reader = ICLNode([20, 21, 22], [header, read(nodes[1:-1], temperature=0.6, scale=0.8, log_weight=-0.7)], "Q")
    model, ids = shared_model("qwen3"), [40, 41, 42]
    grown = ICLNode([*reader.content, *ids], [header, read(nodes[1:-1], temperature=0.6, scale=0.8, log_weight=-0.7)], "Q")
    logits = by_hand.logits(model, [*nodes[:-1], grown]).double().log_softmax(-1)
    expected = float(logits[-4:-1].gather(1, torch.tensor(ids)[:, None]).sum())
    assert score(model, reader, [ids]).logprobs == pytest.approx([expected], abs=1e-4)


def test_sinks_of_a_group_have_a_list_each():
    model, (nodes, *_) = shared_model("llama"), items()
    phrasings = [ICLNode(ids, nodes[:-1], f"p{i}") for i, ids in enumerate(([50, 51], [52, 53, 54]))]
    found = score(model, ICLGraph(*phrasings), CHOICES)
    expected = [[float(plain(model, [*nodes[:-1], each], ids).sum()) for ids in CHOICES] for each in phrasings]
    assert [pytest.approx(each, abs=1e-4) for each in expected] == found.logprobs
    assert found.best() == [max(range(4), key=each.__getitem__) for each in expected]
    both = score(model, [ICLGraph(*phrasings), nodes[-1]], CHOICES, progress=False)
    assert [pytest.approx(each, abs=1e-4) for each in expected] == both.logprobs[0]
    assert both.logprobs[1] == pytest.approx([float(plain(model, nodes, ids).sum()) for ids in CHOICES], abs=1e-4)


def test_continuations_of_each_prompt_and_texts():
    model, tokenizer = leattn.tiny.load()
    bos = leattn.bos(tokenizer)
    facts = [ICLNode(f"\nThe capital of {land} is {city}.", [bos]) for land, city in (("Zarvia", "Lumo"), ("Genia", "Pardan"))]
    asks = [ICLNode(f"\nQ: What is the capital of {land}?\nA:", [bos, *facts]) for land in ("Zarvia", "Genia")]
    scores = score(model, asks, [[" Lumo", " Pardan"], [" Lumo", " Pardan", " Ulder"]], tokenizer, progress=False)
    assert scores.best() == [0, 1]
    assert [len(each) for each in scores.logprobs] == [2, 3]
    assert score(model, asks[0], " Lumo", tokenizer).logprobs == pytest.approx(scores.logprobs[0][:1], abs=1e-5)
    assert score(model, asks[0], torch.tensor([9, 8]), tokenizer).rows[0].text == tokenizer.decode([9, 8])
    chat = leattn.from_chat(tokenizer, [{"role": "user", "content": "What is the capital of Zarvia?"}], ["It is Lumo."])
    prompt = compile_prompt(chat, tokenizer)
    ids = tokenizer(" Lumo", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = leattn.forward(model, prompt.continued(ids)).logits[0].double().log_softmax(-1)
    expected = float(logits[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum())
    assert score(model, chat, [" Lumo"], tokenizer).logprobs == pytest.approx([expected], abs=1e-4)


def test_what_totals_are_divided_by():
    model, tokenizer = leattn.tiny.load()
    ask = ICLNode("\nQ: What is the capital of Zarvia?\nA:", [leattn.bos(tokenizer)], "Q")
    texts = [" Lumo", " Pardan.", " the river of Ulder"]
    scores = score(model, ask, texts, tokenizer, unconditional="\nA:")
    alone = score(model, ICLNode("\nA:"), texts, tokenizer)
    totals, tokens = scores.logprobs, [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert scores.normalised("total") == totals
    assert scores.normalised("tokens") == pytest.approx([x / n for x, n in zip(totals, tokens, strict=True)])
    assert scores.normalised("characters") == pytest.approx([x / len(text) for x, text in zip(totals, texts, strict=True)])
    assert scores.normalised("unconditional") == pytest.approx(
        [x - y for x, y in zip(totals, alone.logprobs, strict=True)], abs=1e-4
    )
    shares = [math.exp(x) for x in totals]
    assert scores.probabilities() == pytest.approx([share / sum(shares) for share in shares])
    assert scores.best("tokens") == max(range(3), key=scores.normalised("tokens").__getitem__)
    assert len(scores) == 3
    assert [line.split()[0] for line in str(scores).splitlines()] == ["prompt", "0", "0", "0"]
    assert "3 of 1 prompts" in repr(scores)
    assert scores._repr_html_().count("<tr>") == 4
    for by, words in (
        ("words", "unknown by 'words'; choose one of 'total'"),
        ("unconditional", "there was no unconditional prompt"),
    ):
        with pytest.raises(LeattnError, match=words):
            alone.normalised(by)
    frame = pytest.importorskip("pandas") and scores.to_pandas()
    assert frame["tokens"].tolist() == tokens
    assert frame["text"].tolist() == texts


def test_what_is_refused():
    model, (nodes, *_) = shared_model("llama"), items()
    written = GenNode([3], [nodes[-1]], "w", max_new_tokens=1)
    for arguments, words in (
        (([], CHOICES), "the list of prompts is empty"),
        (("A text", CHOICES), r"make one of the text: ICLNode\('A text'\)"),
        (
            (nodes[-1], []),
            "continuations are one list for all prompts, or a list that is not empty for each of the 1; there are 0",
        ),
        (([nodes[-1]], [CHOICES, CHOICES]), "for each of the 1; there are 2, of 4, 4"),
        (([nodes[-1], nodes[0]], [CHOICES, []]), "there are 2, of 4, 0"),
        ((nodes[-1], [[1], ""]), "'a continuation' has no content"),
        ((nodes[-1], ["text"]), "needs a tokenizer|no tokenizer|tokenizer"),
        ((ICLGraph(written), CHOICES), "a graph with a GenNode has no text to score yet"),
        ((nodes[-1], [[10**6]]), "holds token id 1000000"),
    ):
        with pytest.raises((LeattnError, BackendError), match=words):
            score(model, *arguments)
    training = make_model("llama").train()
    with pytest.raises(LeattnError, match=r"call model\.eval\(\) first"):
        score(training, nodes[-1], CHOICES)


def test_lists_of_prompts_share_what_is_equal_when_they_are_generated():
    model, several = shared_model("llama"), items()
    targets = [nodes[-1] for nodes in several]
    alone = [generate(model, target, max_new_tokens=4).token_ids.tolist() for target in targets]
    together = generate(model, targets, max_new_tokens=4)
    assert [each.token_ids.tolist() for each in together] == alone
    assert together[0].stats.computed == 15 + 3 * (3 + 3)
    for options in ({"num_beams": 2}, {"do_sample": True, "seed": 1}, {"backend": "sdpa"}, {"max_time": 100.0}):
        assert generate(model, targets, max_new_tokens=2, **options)[0].stats.computed > 3 * 15, options
    apart = [ICLNode([30 + i] * 12, id="Q") for i in range(3)]
    assert generate(model, apart, max_new_tokens=2)[0].stats.computed == 3 * 12 + 3  # nothing to share: a batch
    store = KVStore()
    assert generate(model, targets, max_new_tokens=4, kv_store=store)[0].stats.computed == 15 + 3 * (3 + 3)


def test_operations_hold():
    """A document that weighs nothing is one that nobody sees."""
    model, several = shared_model("llama"), items()
    cut = []
    for header, first, *demos, ask in several:
        cut.append(ICLNode(ask.content, [header, *demos], "Q"))
        assert first.id == "demo0"
    expected = score(model, cut, CHOICES, progress=False).logprobs
    operation = leattn.interventions.Suppress("demo0", 0.0, mode="weight", queries=["Q", "Q (continued)"])
    with leattn.interventions.intervene(model, None, [operation]):
        found = score(model, [nodes[-1] for nodes in several], CHOICES, progress=False).logprobs
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "seed": 3, "temperature": 2.0}, {"num_beams": 3, "num_return_sequences": 2}, {"kv_store": None}],
    ids=["greedy", "sampled", "beams", "store"],
)
def test_generations_carry_log_probabilities_on_request(options):
    model, (nodes, *_) = shared_model("llama"), items()
    options = {name: KVStore() if name == "kv_store" else value for name, value in options.items()}
    result = generate(model, nodes[-1], max_new_tokens=4, logprobs=True, **options)
    assert len(result.sequences) == options.get("num_return_sequences", 1)
    for sequence in result.sequences:
        assert (sequence.logprobs - plain(model, nodes, sequence.token_ids.tolist())).abs().max() < 1e-4
    assert generate(model, nodes[-1], max_new_tokens=4).sequences[0].logprobs is None


def test_programs_carry_them_too():
    model, (header, *demos, ask) = shared_model("llama"), items()[0]
    other = ICLNode([60, 61], [header], "other")
    for options in ({}, {"do_sample": True, "seed": 3}):
        result = generate(model, ICLGraph(ask, other), max_new_tokens=4, logprobs=True, **options)
        for nodes in ([header, *demos, ask], [header, other]):
            (sequence,) = result.branches[nodes[-1].id]
            assert (sequence.logprobs - plain(model, nodes, sequence.token_ids.tolist())).abs().max() < 1e-4
    ends = result.branches["other"][0].token_ids.tolist()[1]
    cut = generate(model, ICLGraph(ask, other), max_new_tokens=4, logprobs=True, eos_token_id=ends, **options)
    assert len(cut.branches["other"][0].logprobs) == len(cut.branches["other"][0].token_ids) == 1
