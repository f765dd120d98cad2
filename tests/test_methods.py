"""Published methods, against masks by hand, the plain model, and the published procedures step by step."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from random import Random

import pytest
import reading_by_hand as by_hand
import torch
from models import make_model, shared_model
from transformers import DynamicCache

import leattn
from leattn import CompileError, GraphError, ICLNode, LeattnError, forward, generate, methods, read
from leattn.tiny.words import ENTITIES, RELATION

HEADER = [5, 6]
DOCUMENTS = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
QUESTION = [7, 8, 9]


@pytest.fixture(autouse=True)
def _no_grad(request):
    if "prefer" in request.node.name:
        yield
        return
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama():
    return shared_model("llama")


@pytest.fixture(scope="module")
def tiny():
    return leattn.tiny.load()


def written(prompt_like):
    """``[(ids, first position or all positions, seen rows), …]`` as ids, positions and a mask, by loops over tokens."""
    ids, at, mask, of = [], [], [], []
    for row, (tokens, where, _) in enumerate(prompt_like):
        ids += tokens
        at += where if isinstance(where, list) else range(where, where + len(tokens))
        of += [(row, i) for i in range(len(tokens))]
    for row, i in of:
        mask.append([j <= i if other == row else other in prompt_like[row][2] for other, j in of])
    return ids, at, mask


def last_logits(model, prompt_like, count=1):
    """The plain model under that mask: the logits of the last tokens, ``[count, V]``."""
    ids, at, mask = written(prompt_like)
    additive = torch.zeros(len(ids), len(ids)).masked_fill(~torch.tensor(mask), torch.finfo(torch.float32).min)
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([at]), "attention_mask": additive[None, None]}
    return model(**inputs, use_cache=False).logits[0, -count:]


BY_HAND = {
    "plain": [
        (HEADER, 0, []),
        ([10, 11, 12], 2, [0]),
        ([20, 21], 5, [0, 1]),
        ([30, 31, 32, 33], 7, [0, 1, 2]),
        (QUESTION, 11, [0, 1, 2, 3]),
    ],
    "pcw": [
        (HEADER, 0, []),
        ([10, 11, 12], 2, [0]),
        ([20, 21], 2, [0]),
        ([30, 31, 32, 33], 2, [0]),
        (QUESTION, 6, [0, 1, 2, 3]),
    ],
    "numbered": [
        (HEADER, 0, []),
        ([10, 11, 12], 2, [0]),
        ([20, 21], 5, [0]),
        ([30, 31, 32, 33], 7, [0]),
        (QUESTION, 11, [0, 1, 2, 3]),
    ],
    "block": [
        (HEADER, 0, []),
        ([10, 11, 12], 2, []),
        ([20, 21], 5, []),
        ([30, 31, 32, 33], 7, []),
        (QUESTION, 11, [0, 1, 2, 3]),
    ],
    "structured": [
        (HEADER, 0, []),
        ([10, 11, 12], 3, [0]),
        ([20, 21], 4, [0]),
        ([30, 31, 32, 33], 2, [0]),
        (QUESTION, 6, [0, 1, 2, 3]),
    ],
}
BY_HAND["ape"] = BY_HAND["pcw"]
BY_HAND["prompt_cache"] = BY_HAND["block"]
BY_HAND["recompute"] = [  # 15 % of two tokens is one, of four is one
    (HEADER, 0, []),
    ([10, 11, 12], 2, [0]),
    ([20], 5, [0]),
    ([20], 5, [0, 1]),
    ([21], 6, [0, 2]),
    ([30], 7, [0]),
    ([30], 7, [0, 1, 3, 4]),
    ([31, 32, 33], 8, [0, 5]),
    (QUESTION, 11, [0, 1, 3, 4, 6, 7]),
]
# Harmonic mean of 3, 2 and 4 tokens: 36/13. Tokens stand 12/13, 18/13 and 9/13 apart; the question is two tokens on the paths.
END = 2 + 36 / 13
BY_HAND["superposition"] = [
    (HEADER, 0, []),
    ([10, 11, 12], [2 + i * 12 / 13 for i in range(3)], [0]),
    ([20, 21], [2 + i * 18 / 13 for i in range(2)], [0]),
    ([30, 31, 32, 33], [2 + i * 9 / 13 for i in range(4)], [0]),
    *((QUESTION[:2], [END, END + 1], [0, i]) for i in (1, 2, 3)),
    (QUESTION[2:], [END + 2], [0, 1, 2, 3, 4, 5, 6]),
]
ALL = {"superposition": {"keep": None}}


@pytest.mark.parametrize("name", methods.METHODS)
def test_masks_and_positions(name):
    prompt = methods.METHODS[name](HEADER, DOCUMENTS, QUESTION, **ALL.get(name, {}))
    ids, at, mask = written(BY_HAND[name])
    assert prompt.input_ids[0].tolist() == ids
    assert prompt.position_ids[0].tolist() == pytest.approx(at, abs=1e-5)
    assert prompt.dense_mask().tolist() == mask


@pytest.mark.parametrize("name", sorted(set(BY_HAND) - {"ape", "structured"}))
def test_logits_are_the_plain_models_under_that_mask(llama, name):
    prompt = methods.METHODS[name](HEADER, DOCUMENTS, QUESTION, **ALL.get(name, {}))
    found = forward(llama, prompt).logits[0, -1]
    assert (found - last_logits(llama, BY_HAND[name])[0]).abs().max() < 1e-4


def test_plain_is_plain_text(llama):
    text = torch.tensor([[*HEADER, *itertools.chain(*DOCUMENTS), *QUESTION]])
    found = forward(llama, methods.plain(HEADER, DOCUMENTS, QUESTION)).logits
    assert (found - llama(text).logits).abs().max() < 1e-4
    assert methods.plain([], [], QUESTION).input_ids.tolist() == [QUESTION]


@pytest.mark.parametrize("given", [{}, {"temperature": 0.7, "scale": 1.2}])
def test_ape_reads_by_its_rule(llama, given):
    header = ICLNode(HEADER)
    docs = [ICLNode(ids, [header]) for ids in DOCUMENTS]
    reading = given or {"temperature": 0.9, "scale": 0.9}
    expected = by_hand.logits(llama, [header, *docs, ICLNode(QUESTION, [header, read(docs, **reading)])])
    found = forward(llama, methods.ape(HEADER, DOCUMENTS, QUESTION, **given)).logits[0]
    assert (found - expected).abs().max() < 1e-4


def test_structured_counts_the_questions_own_keys_m_times(llama):
    """The paper's rule on the weights of the first layer, whose scores no reading changes: own keys and the header times M."""
    ids, at, mask = written(BY_HAND["structured"])
    additive = torch.zeros(len(ids), len(ids)).masked_fill(~torch.tensor(mask), torch.finfo(torch.float32).min)
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([at])}
    plain = llama(**inputs, attention_mask=additive[None, None], output_attentions=True).attentions[0][0, :, -3:]
    times = torch.tensor([3.0, 3.0, *[1.0] * 9, 3.0, 3.0, 3.0])
    expected = plain * times / (plain * times).sum(-1, keepdim=True)
    prompt = methods.structured(HEADER, DOCUMENTS, QUESTION)
    found = forward(llama, prompt, backend="eager", output_attentions=True).attentions[0][0, :, -3:]
    assert (found - expected).abs().max() < 1e-5
    header = ICLNode(HEADER)
    docs = [ICLNode(ids, [header]) for ids in DOCUMENTS]
    last = ICLNode(QUESTION, [header, *(read(doc, log_weight=math.log(1 / 3)) for doc in docs)])
    logits = by_hand.logits(llama, [header, *docs, last], where=at)
    assert (forward(llama, prompt).logits[0] - logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", methods.METHODS)
def test_order(llama, name):
    given = {"superposition": {"model": llama, "keep": 2}}.get(name, {})
    logits = [
        forward(llama, methods.METHODS[name](HEADER, list(order), QUESTION, **given)).logits[0, -1]
        for order in itertools.permutations(DOCUMENTS)
    ]
    spread = max(float((one - logits[0]).abs().max()) for one in logits)
    assert spread < 1e-4 if name in methods.ORDER_FREE else spread > 1e-2


class TestSuperposition:
    def path_logs(self, model, i, positions):
        """The log-likelihoods of the tokens of one path, run alone as plain text at the path's positions."""
        ids = [*HEADER, *DOCUMENTS[i], *QUESTION[:2]]
        n = len(DOCUMENTS[i])
        step = 36 / 13 / n if positions == "equilibrium" else 1
        start = 2 + n * step
        at = [0, 1, *(2 + j * step for j in range(n)), start, start + 1]
        logits = model(torch.tensor([ids]), position_ids=torch.tensor([at])).logits[0].log_softmax(-1)
        logs = [float(logits[j - 1, ids[j]]) for j in range(1, len(ids))]
        return logs[2 : 2 + n - 1], logs[2 + n :]  # from the second token of the document, and of the question

    @pytest.mark.parametrize("prior", [0, 1.0, 0.3])
    @pytest.mark.parametrize("positions", ["equilibrium", "after_parents"])
    def test_scores(self, llama, positions, prior):
        expected = []
        for i in range(3):
            document, question = self.path_logs(llama, i, positions)
            expected.append(sum(question) / len(question) + prior * sum(document) / len(document))
        found = methods.path_scores(HEADER, DOCUMENTS, QUESTION, model=llama, prior=prior, positions=positions)
        assert found == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("keep", [1, 2])
    def test_only_the_best_paths_are_left_where_they_stood(self, llama, keep):
        scores = methods.path_scores(HEADER, DOCUMENTS, QUESTION, model=llama)
        best = sorted(sorted(range(3), key=lambda i: scores[i])[-keep:])
        whole = BY_HAND["superposition"]
        rows = [0, *(1 + i for i in best), *(4 + i for i in best), 7]
        left = [(whole[r][0], whole[r][1], [rows.index(s) for s in whole[r][2] if s in rows]) for r in rows]
        prompt = methods.superposition(HEADER, DOCUMENTS, QUESTION, model=llama, keep=keep)
        ids, at, mask = written(left)
        assert (prompt.input_ids[0].tolist(), prompt.dense_mask().tolist()) == (ids, mask)
        assert prompt.position_ids[0].tolist() == pytest.approx(at, abs=1e-5)
        assert (forward(llama, prompt).logits[0, -1] - last_logits(llama, left)[0]).abs().max() < 1e-4
        # as if the answer had not seen the others in the first place
        uncut = [*whole[:-1], (whole[-1][0], whole[-1][1], rows[:-1])]
        assert (forward(llama, prompt).logits[0, -1] - last_logits(llama, uncut)[0]).abs().max() < 1e-4

    def test_one_forward(self, llama, monkeypatch):
        methods.superposition(HEADER, DOCUMENTS, QUESTION, model=llama)  # what has to be found out about the model
        calls = []
        handle = llama.register_forward_pre_hook(lambda *_: calls.append(1))
        methods.superposition(HEADER, DOCUMENTS, QUESTION, model=llama)
        handle.remove()
        assert len(calls) == 1

    @pytest.mark.parametrize("gold", [0, 1, 2])
    def test_the_path_that_a_model_was_made_to_prefer_is_kept(self, gold):
        model = make_model("llama", num_hidden_layers=1)
        text = torch.tensor([[*HEADER, *DOCUMENTS[gold], *QUESTION]])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(25):
            optimizer.zero_grad()
            model(text, labels=text).loss.backward()
            optimizer.step()
        for given in ({}, {"positions": "after_parents"}, {"answer": [9]}):
            prompt = methods.superposition(HEADER, DOCUMENTS, QUESTION, model=model, **given)
            assert f"document {gold + 1}" in prompt.graph, given
            assert len(prompt.graph) == 4

    def test_the_gold_document_of_an_answer_is_kept(self, tiny):
        """The bundled model learned answers alone, so a path ends in one; chance would be 2 of 8."""
        model, tokenizer = tiny
        draw, capital, kept = Random(0), RELATION["capital"], 0
        for _ in range(8):
            places, values = draw.sample(ENTITIES, 4), draw.sample(capital.values, 4)
            gold = draw.randrange(4)
            ask = f"\nQ: What is the capital of {places[gold]}?\nA"
            texts = [f"\nThe capital of {place} is {value}.{ask}" for place, value in zip(places, values, strict=True)]
            given = {"model": model, "answer": "\n", "prior": 0}
            prompt = methods.superposition(None, texts, f": {values[gold]}.", tokenizer, **given)
            kept += f"document {gold + 1}" in prompt.graph
        assert kept == 8

    def test_what_is_refused(self, llama):
        with pytest.raises(LeattnError, match=r"which 1 of 3 paths are kept, a model says; give model="):
            methods.superposition(HEADER, DOCUMENTS, QUESTION)
        with pytest.raises(LeattnError, match=r"keep=0 paths; give a whole number"):
            methods.superposition(HEADER, DOCUMENTS, QUESTION, model=llama, keep=0)
        with pytest.raises(LeattnError, match=r"the question has one token.*give answer="):
            methods.superposition(HEADER, DOCUMENTS, [7], model=llama)
        with pytest.raises(LeattnError, match=r"'document 2' has one token.*give prior=0"):
            methods.superposition(HEADER, [[1, 2], [3]], QUESTION, model=llama)
        with pytest.raises(LeattnError, match=r"'question 1' has one token.*give answer="):
            methods.superposition(HEADER, [[1, 2], [3]], QUESTION[:2], model=llama, prior=0)


def alone_and_plain(model, layer):
    """Keys and values of all documents' tokens in one layer, each document behind the header alone, and in plain text."""
    place, pieces = len(HEADER), []
    for ids in DOCUMENTS:
        at = torch.tensor([[*range(len(HEADER)), *range(place, place + len(ids))]])
        cache = model(torch.tensor([[*HEADER, *ids]]), position_ids=at, past_key_values=DynamicCache()).past_key_values
        pieces.append([(held.keys[:, :, 2:], held.values[:, :, 2:]) for held in cache.layers])
        place += len(ids)
    whole = model(torch.tensor([[*HEADER, *itertools.chain(*DOCUMENTS)]]), past_key_values=DynamicCache()).past_key_values
    return pieces, (whole.layers[layer].keys[:, :, 2:], whole.layers[layer].values[:, :, 2:])


def blended(model, chosen):
    """CacheBlend and EPIC as they go: keys and values from runs of their own, chosen tokens computed behind all before."""
    pieces, _ = alone_and_plain(model, 1)
    final = model(torch.tensor([HEADER]), past_key_values=DynamicCache()).past_key_values
    place = len(HEADER)
    for ids, piece, again in zip(DOCUMENTS, pieces, chosen, strict=True):
        for j, token in enumerate(ids):
            if again[j]:
                model(torch.tensor([[token]]), position_ids=torch.tensor([[place]]), past_key_values=final)
            else:
                for layer, (keys, values) in enumerate(piece):
                    final.update(keys[:, :, j : j + 1], values[:, :, j : j + 1], layer)
            place += 1
    at = torch.arange(place, place + len(QUESTION))[None]
    return model(torch.tensor([QUESTION]), position_ids=at, past_key_values=final).logits[0]


class TestRecompute:
    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
    def test_the_ends_of_the_dial(self, family):
        model = shared_model(family)
        nothing, all_ = (
            forward(model, methods.recompute(HEADER, DOCUMENTS, QUESTION, share=share)).logits[0, -1] for share in (0, 1)
        )
        text = torch.tensor([[*HEADER, *itertools.chain(*DOCUMENTS), *QUESTION]])
        assert (all_ - model(text).logits[0, -1]).abs().max() < 1e-4
        if family != "gemma3_text":  # whose window is not in a mask by hand
            assert (nothing - last_logits(model, BY_HAND["numbered"])[0]).abs().max() < 1e-4
        assert (nothing - all_).abs().max() > 1e-2
        prompt = methods.recompute(HEADER, DOCUMENTS, QUESTION, share=0)
        assert prompt.dense_mask().tolist() == written(BY_HAND["numbered"])[2]
        assert methods.recompute(HEADER, DOCUMENTS, QUESTION, share=1).dense_mask().tolist() == written(BY_HAND["plain"])[2]

    @pytest.mark.parametrize("share", [0, 0.15, 0.5, 0.75, 1])
    def test_the_first_tokens_as_published(self, llama, share):
        chosen = [[i < math.ceil(share * len(ids)) and bool(d) for i in range(len(ids))] for d, ids in enumerate(DOCUMENTS)]
        prompt = methods.recompute(HEADER, DOCUMENTS, QUESTION, share=share)
        assert (forward(llama, prompt).logits[0, -3:] - blended(llama, chosen)).abs().max() < 1e-4

    @pytest.mark.parametrize("share", [0.15, 0.4, 0.7])
    def test_the_tokens_whose_keys_differ_most_as_published(self, llama, share):
        pieces, whole = alone_and_plain(llama, 1)
        alone = [torch.cat([piece[1][which] for piece in pieces], 2) for which in (0, 1)]
        far = sum((a - b).square().sum((0, 1, 3)) for a, b in zip(alone, whole, strict=True))
        assert far[:3].max() < 1e-6, "the first document is what it is in plain text"
        best = set(far.argsort(descending=True)[: math.ceil(share * 6)].tolist())
        chosen = [[i in best for i in range(*ends)] for ends in ((0, 3), (3, 5), (5, 9))]
        prompt = methods.recompute(HEADER, DOCUMENTS, QUESTION, share=share, choose="keys", model=llama)
        assert (forward(llama, prompt).logits[0, -3:] - blended(llama, chosen)).abs().max() < 1e-4

    def test_what_is_generated_is_what_is_seen(self, llama):
        prompt, store = methods.recompute(HEADER, DOCUMENTS, QUESTION, share=0.5), leattn.KVStore()
        expected = []
        texts = [  # half of two, half of four
            (HEADER, 0, []),
            ([10, 11, 12], 2, [0]),
            ([20], 5, [0]),
            ([20], 5, [0, 1]),
            ([21], 6, [0, 2]),
            ([30, 31], 7, [0]),
            ([30, 31], 7, [0, 1, 3, 4]),
            ([32, 33], 9, [0, 5]),
        ]
        for _ in range(3):
            grown = [*texts, ([*QUESTION, *expected], 11, [0, 1, 3, 4, 6, 7])]
            expected.append(int(last_logits(llama, grown)[0].argmax()))
        for given in ({}, {"kv_store": store}, {"kv_store": store}):
            assert generate(llama, prompt, max_new_tokens=3, **given).token_ids.tolist() == expected
        assert store.stats.hits > 0

    def test_dial(self, llama):
        measured = methods.dial(llama, HEADER, DOCUMENTS, QUESTION, shares=[0, 0.5, 1])
        assert [(row.share, row.again, row.documents) for row in measured.rows] == [(0, 0, 9), (0.5, 3, 9), (1, 6, 9)]
        plain, numbered = (last_logits(llama, BY_HAND[name])[0].double() for name in ("plain", "numbered"))
        p, q = plain.softmax(-1), numbered.softmax(-1)
        assert measured.rows[0].logits == pytest.approx(float((plain - numbered).abs().max()), abs=1e-4)
        assert measured.rows[0].kl == pytest.approx(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)), abs=1e-4)
        assert measured.rows[-1].logits < 1e-4
        assert abs(measured.rows[-1].kl) < 1e-6
        assert str(measured).splitlines()[0].split() == ["share", "tokens", "again", "logits", "KL"]
        assert "3 of 9" in measured._repr_html_()
        keys = methods.dial(llama, HEADER, DOCUMENTS, QUESTION, shares=[0.5, 1], choose="keys")
        assert [row.again for row in keys.rows] == [3, 6]

    def test_what_is_refused(self, llama):
        for share in (-0.1, 1.5, "half", True):
            with pytest.raises(LeattnError, match=r"share=.* of the tokens; give a number from 0 to 1"):
                methods.recompute(HEADER, DOCUMENTS, QUESTION, share=share)
        with pytest.raises(LeattnError, match=r"unknown choose 'values'; choose one of 'first', 'keys'"):
            methods.recompute(HEADER, DOCUMENTS, QUESTION, choose="values")
        with pytest.raises(LeattnError, match=r"choose='keys' compares .* give model="):
            methods.recompute(HEADER, DOCUMENTS, QUESTION, choose="keys")
        with pytest.raises(LeattnError, match=r"layer=9 has no keys to compare; .* layers 0 to 2"):
            methods.recompute(HEADER, DOCUMENTS, QUESTION, choose="keys", model=llama, layer=9)


class TestPromptCache:
    def test_alternatives_share_a_place_and_the_longest_decides_the_room(self, llama):
        given = {"unions": [(1, 3)]}
        documents = [*DOCUMENTS, [40, 41, 42, 43, 44]]
        for used, rows in (
            ([0, 1, 2], [([10, 11, 12], 2, []), ([20, 21], 5, []), ([30, 31, 32, 33], 10, [])]),
            ([2, 3], [([30, 31, 32, 33], 10, []), ([40, 41, 42, 43, 44], 5, [])]),
            ([3], [([40, 41, 42, 43, 44], 5, [])]),
        ):
            expected = [(HEADER, 0, []), *rows, (QUESTION, 14, list(range(len(rows) + 1)))]
            prompt = methods.prompt_cache(HEADER, documents, QUESTION, use=used, **given)
            ids, at, mask = written(expected)
            assert prompt.input_ids[0].tolist() == ids
            assert prompt.position_ids[0].tolist() == at
            assert prompt.dense_mask().tolist() == mask
            assert (forward(llama, prompt).logits[0, -1] - last_logits(llama, expected)[0]).abs().max() < 1e-4

    def test_modules_are_computed_once_for_a_schema(self, llama):
        store = leattn.KVStore()
        for used, computed in (([0, 1, 2], 14), ([0, 2], 3), ([1], 3)):
            prompt = methods.prompt_cache(HEADER, DOCUMENTS, QUESTION, use=used)
            assert generate(llama, prompt, max_new_tokens=1, kv_store=store).stats.computed == computed

    def test_arguments_stand_where_slots_were(self, llama, words):
        texts = ["one {a} two three {b}", "four five", "{c} six"]
        parameters = {"a": (3, "seven eight"), "b": (2, "fox"), "c": (1, "")}
        one, two, three, four, five, six, seven, eight, fox = (
            words.encode(word)[0] for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "fox"]
        )
        expected = [
            (HEADER, 0, []),
            ([one], 2, []),
            ([0, 0, 0], 3, [1]),  # the module's own later text was computed with the empty slot
            ([two, three], 6, [1, 2]),
            ([four, five], 10, []),
            ([0], 12, []),
            ([six], 13, [5]),
            ([seven, eight], 3, [0, 1, 3, 4, 6]),
            ([fox], 8, [0, 1, 3, 4, 6, 7]),
            (QUESTION, 14, [0, 1, 3, 4, 6, 7, 8]),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that an argument stands before what it sees is meant
            prompt = methods.prompt_cache(HEADER, texts, QUESTION, words, parameters=parameters)
        ids, at, mask = written(expected)
        assert prompt.input_ids[0].tolist() == ids
        assert prompt.position_ids[0].tolist() == at
        assert prompt.dense_mask().tolist() == mask
        assert (forward(llama, prompt).logits[0, -1] - last_logits(llama, expected)[0]).abs().max() < 1e-4
        filled = methods.prompt_cache(HEADER, texts, QUESTION, words, parameters=parameters, slot_token=9)
        assert filled.input_ids[0, 3:6].tolist() == [9, 9, 9]

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"unions": [(0, 1)]}, "modules 0 and 1 share a place, and both are used"),
            ({"unions": [(0, 1), (1, 2)], "use": [0]}, "module 1 is in two unions"),
            ({"unions": [(0, 7)]}, "unions names module 7; give indices from 0 to 2"),
            ({"use": [0, 0]}, "use names a module twice"),
            ({"parameters": {"x": (2, [1])}}, r"hold \{x\} 0 times"),
            ({"parameters": {"x": (0, [1])}}, "has 0 tokens; give a whole number from 1 up"),
            ({"parameters": {"x": 3}}, r"parameter 'x' is 3; give \(tokens of the slot, argument\)"),
            ({"parameters": {"x": (1, [1, 2])}}, "the argument of 'x' has 2 tokens and its slot 1"),
        ],
    )
    def test_what_is_refused(self, given, said):
        with pytest.raises((GraphError, CompileError), match=said):
            methods.prompt_cache(HEADER, DOCUMENTS, QUESTION, **given)

    def test_a_slot_needs_a_token(self, tiny):
        with pytest.raises(CompileError, match="no unknown token to fill the slot 'x' with; give slot_token="):
            methods.prompt_cache(None, ["a {x} b"], "c", tiny[1], parameters={"x": (2, " d")})


NEED_A_HEADER = ["pcw", "numbered", "ape", "structured", "superposition", "recompute"]


@pytest.mark.parametrize("name", methods.METHODS)
def test_headers(name, tiny):
    method, given = methods.METHODS[name], ALL.get(name, {})
    prompt = method(None, ["\nThe sky is blue."], "\nQ: What is blue?\nA:", tiny[1], **given)
    assert prompt.graph.name(prompt.graph.nodes[0]) == "<s>"
    with pytest.raises(GraphError, match=r"header=None .* no tokenizer to take a BOS from"):
        method(None, DOCUMENTS, QUESTION, **given)
    if name in NEED_A_HEADER:
        with pytest.raises(GraphError, match=rf"'{name}' has an empty header"):
            method([], DOCUMENTS, QUESTION, **given)
    else:
        assert method([], DOCUMENTS, QUESTION, **given).input_ids[0, 0] == 10


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_answers_and_takes_documents_as_text(name, tiny):
    model, tokenizer = tiny
    method = methods.METHODS[name]
    given = {"model": model} if "model" in inspect.signature(method).parameters else {}
    texts = ["\nThe capital of Zarvia is Lumo.", "\nThe capital of Zarvia is Lumo.", "\nSays <s>."]
    prompt = method(None, texts, "\nQ: What is the capital of Zarvia?\nA:", tokenizer, **given)
    assert (prompt.input_ids == tokenizer.bos_token_id).sum() == 1, "documents hold no control tokens"
    assert generate(model, prompt, max_new_tokens=1).text.strip()
    assert method.__name__ == name
    assert getattr(methods, name) is method
    assert list(inspect.signature(method).parameters)[:4] == ["header", "documents", "question", "tokenizer"]
    with pytest.raises(GraphError, match="documents is a list of texts, not the single text 'one'"):
        method(None, "one", "two", tokenizer, **given)
    if name != "plain":
        with pytest.raises(GraphError, match="there is no document"):
            method(None, [], "two", tokenizer, **given)
