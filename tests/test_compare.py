"""Comparisons: the numbers of each method, intervals, files that a run goes on from; and the studies on a few made-up rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import leattn
from leattn import Example, ICLNode, LeattnError, compile_prompt
from leattn.comparison.compare import build
from leattn.comparison.metrics import Metric, normalised
from leattn.intervals import difference, summary

LANDS = [("Zarvia", "Lumo"), ("Genia", "Pardan"), ("Aldia", "Vex")]


@pytest.fixture(scope="module")
def tiny():
    return leattn.tiny.load()


@pytest.fixture
def examples():
    facts = [f"\nThe capital of {land} is {city}." for land, city in LANDS]
    return [
        Example(
            f"\nQ: What is the capital of {land}?\nA:",
            facts,
            answers=[f" {city}"],
            choices=[f" {each}" for _, each in LANDS],
            right=i,
            gold=i,
            id=land,
        )
        for i, (land, city) in enumerate(LANDS)
    ]


def by_hand(model, tokenizer, example, ids):
    """Log-probabilities of tokens behind plain text, from one forward of the plain model."""
    texts = [*example.documents, example.question]
    before = [
        tokenizer.bos_token_id,
        *(token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids),
    ]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]]), use_cache=False).logits[0].double().log_softmax(-1)
    return logits[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_plain_text_against_the_plain_model(tiny, examples):
    model, tokenizer = tiny
    found = leattn.compare(model, examples, ["plain"], ["loss", "accuracy", "right"], tokenizer, progress=False)
    for example in examples:
        tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in example.choices]
        scores = [float(by_hand(model, tokenizer, example, ids).sum()) for ids in tokens]
        right = tokens[example.right]
        assert found.values("plain", "loss")[example.id] == pytest.approx(-scores[example.right] / len(right), abs=1e-4)
        assert found.values("plain", "accuracy")[example.id] == (int(np.argmax(scores)) == example.right)
        text = leattn.generate(model, build(leattn.methods.plain, example, model, tokenizer), max_new_tokens=16).text
        assert found.values("plain", "right")[example.id] == (example.answers[0].strip() in text.split("\n")[0])


def test_methods_differ_and_each_is_what_it_is_alone(tiny, examples):
    model, tokenizer = tiny
    ways = {"ape 0.7": partial(leattn.methods.ape, temperature=0.7, scale=1.0), "superposition": leattn.methods.superposition}
    found = leattn.compare(model, examples, ["plain", "pcw"], ["loss"], tokenizer, progress=False)
    other = leattn.compare(model, examples, ways, ["loss"], tokenizer, progress=False)
    for method, values in (("pcw", found), *((name, other) for name in ways)):
        function = leattn.methods.METHODS.get(method) or ways[method]
        for example in examples:
            prompt = build(function, example, model, tokenizer)
            alone = leattn.score(model, prompt, example.answers).normalised("tokens")[0]
            assert values.values(method, "loss")[example.id] == pytest.approx(-alone, abs=1e-4)
    both = found.joined(other)
    assert both.methods == ["plain", "pcw", "ape 0.7", "superposition"]
    apart = [found.values("pcw", "loss")[e.id] - found.values("plain", "loss")[e.id] for e in examples]
    assert both.difference("pcw", "plain", "loss").mean == pytest.approx(np.mean(apart))


def test_a_run_goes_on_where_it_was_broken_off(tiny, examples, tmp_path):
    model, tokenizer = tiny
    path, calls = tmp_path / "rows.jsonl", []

    def counted(header, documents, question, tokenizer=None):
        calls.append(question)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return leattn.methods.pcw(header, documents, question, tokenizer)

    run = partial(leattn.compare, model, examples, {"mine": counted}, ["loss"], tokenizer, chunk=1, path=path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run()
    with path.open("a") as file:
        file.write('{"method": "mine", "exam')  # and a line that was being written
    found = run()
    assert len(calls) == 4
    assert len(found) == 3
    assert len(path.read_text().splitlines()) == 4
    again = run()
    assert len(calls) == 4
    assert again.values("mine", "loss") == found.values("mine", "loss")
    with pytest.raises(LeattnError, match=r"rows\.jsonl is of another run: max_new_tokens is 16 there and 3 here"):
        run(max_new_tokens=3)
    path.write_text(json.dumps({"model": "other"}) + "\n")
    with pytest.raises(LeattnError, match="is of another run: dtype is None there"):
        run()


def test_costs(tiny, examples):
    model, tokenizer = tiny
    found = leattn.compare(model, examples, ["pcw"], ["loss"], tokenizer, timed=2, progress=False)
    prompt = build(leattn.methods.pcw, examples[0], model, tokenizer)
    assert next(iter(found.values("pcw", "tokens_cold").values())) == len(prompt)
    assert next(iter(found.values("pcw", "tokens_warm").values())) == len(prompt["question"].input_ids)
    assert found.summary("pcw", "seconds_cold").mean > 0
    assert len(found.values("pcw", "seconds_warm")) == 2


def test_tables_and_places(tiny, examples):
    model, tokenizer = tiny
    found = leattn.compare(model, examples, ["plain", "pcw"], ["loss", "right"], tokenizer, progress=False)
    head, *lines = [line.split("|")[1:-1] for line in found.markdown("plain").splitlines()]
    assert [cell.strip() for cell in head] == ["method", "loss", "− plain", "right", "− plain"]
    assert [line[0].strip() for line in lines] == ["---", "plain", "pcw"]
    places = found.by_place("pcw", "right")
    assert list(places) == [0, 1, 2]
    assert all(places[e.gold].mean == found.values("pcw", "right")[e.id] for e in examples)
    assert "3 examples; means and 95 % intervals" in str(found)
    assert found._repr_html_().count("<tr>") == 3
    for words, call in (
        ("unknown method 'other'", lambda: found.summary("other", "loss")),
        ("unknown metric 'speed'", lambda: found.summary("pcw", "speed")),
    ):
        with pytest.raises(LeattnError, match=words):
            call()


def test_a_metric_of_ones_own(tiny, examples):
    model, tokenizer = tiny
    length = Metric("length", "text", lambda example, scores, text: float(len(text)), is_share=False)
    found = leattn.compare(model, examples[:1], ["plain"], [length], tokenizer, max_new_tokens=3, progress=False)
    prompt = build(leattn.methods.plain, examples[0], model, tokenizer)
    assert found.values("plain", "length") == {"Zarvia": len(leattn.generate(model, prompt, max_new_tokens=3).text)}


def test_what_is_refused(tiny, examples):
    model, tokenizer = tiny
    for given, methods, metrics, words in (
        ([], ["plain"], ["loss"], "the list of examples is empty"),
        (examples, ["best"], ["loss"], "unknown method 'best'; choose one of 'plain'"),
        (examples, ["plain"], ["speed"], "unknown metric 'speed'; choose one of 'loss'"),
        ([examples[0], examples[0]], ["plain"], ["loss"], "two examples have the id 'Zarvia'"),
        ([replace(examples[0], answers=())], ["plain"], ["loss"], "example 'Zarvia' has no answers, which metric 'loss' needs"),
        (
            [replace(examples[0], right=None)],
            ["plain"],
            ["accuracy"],
            "has no choices and right, which metric 'accuracy' needs",
        ),
    ):
        with pytest.raises(LeattnError, match=words):
            leattn.compare(model, given, methods, metrics, tokenizer)
    with pytest.raises(LeattnError, match="right=3 is no index into 3 choices"):
        replace(examples[0], right=3)
    with pytest.raises(LeattnError, match="gold=-1 is no index into 3 documents"):
        replace(examples[0], gold=-1)


def test_intervals_by_their_own_equations():
    share = summary([1, 1, 1, 0], is_share=True)
    z, p, n = 1.959963984540054, 0.75, 4
    for end in (share.low, share.high):  # Wilson's ends are where the test statistic is z
        assert abs(p - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(z)
    draws = np.random.default_rng(1).normal(3, 2, 400)
    found = summary(list(draws), is_share=False)
    half = z * draws.std() / math.sqrt(len(draws))
    assert (found.low, found.high) == pytest.approx((draws.mean() - half, draws.mean() + half), abs=0.03)
    paired = difference(list(draws + 0.5), list(draws))
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.5, 0.5, 0.5))


def test_answers_are_compared_as_squad_does():
    assert normalised("  The Eiffel-Tower, in a\nword!") == "eiffeltower in word"


class TestStudies:
    def test_documents(self, tiny, tmp_path):
        from studies import documents

        model, tokenizer = tiny
        given = documents.examples(None, tokenizer, 4, 3, 0)
        assert sorted(example.gold for example in given) == [0, 0, 1, 2]
        for example in given:
            answer = example.answers[0].strip()
            assert [answer in text for text in example.documents] == [place == example.gold for place in range(3)]
            assert example.header.startswith(tokenizer.bos_token)
        found = documents.run(model, tokenizer, None, tmp_path, n=2, documents=3, timed=0)
        assert found.methods[0] == "plain"
        assert found.methods[-2:] == ["gold alone", "no document"]
        gold = replace(given[0], documents=[given[0].documents[given[0].gold]])
        (ids,) = [tokenizer(gold.answers[0], add_special_tokens=False).input_ids]
        prompt = compile_prompt(
            ICLNode(gold.question, [(h := ICLNode(gold.header)), ICLNode(gold.documents[0], [h])]), tokenizer
        )
        with torch.no_grad():
            logits = model(torch.cat([prompt.input_ids, torch.tensor([ids])], 1), use_cache=False).logits[0].log_softmax(-1)
        expected = -float(logits[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).mean())
        assert found.values("gold alone", "loss")[gold.id] == pytest.approx(expected, abs=1e-4)

    def test_demonstrations(self, tiny, tmp_path):
        from studies import demonstrations

        model, tokenizer = tiny
        options = {"n": 2, "shots": 4, "draws": 1, "orders": 2}
        given = demonstrations.examples(None, tokenizer, "sst2", 2, 4, 1, 2, 0)
        assert len(given) == 4
        assert sorted(given[0].documents) == sorted(given[2].documents)
        assert given[0].documents != given[2].documents
        labels = [text.split()[-1] for text in given[0].documents]
        assert labels.count("positive") == labels.count("negative") == 2
        found = demonstrations.run(model, tokenizer, None, tmp_path, task="sst2", **options)
        for method in ("pcw", "ape 0.8, 1", "structured", "weighted 1/K"):  # the order of demonstrations changes nothing
            values = list(found.values(method, "accuracy").values())
            assert values[:2] == values[2:]

    def test_the_command_writes_a_page(self, tmp_path):
        from typer.testing import CliRunner

        from studies.__main__ import app

        arguments = ["demonstrations", "--model", "tiny", "--n", "1", "--shots", "2", "--draws", "1", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        page = (tmp_path / "tiny" / "demonstrations_sst2_2_1.md").read_text()
        assert "| plain |" in page
        assert str(tmp_path) not in page


class TestPictures:
    @pytest.fixture
    def found(self):
        from leattn.comparison.comparison import Comparison, Row

        rows = [
            Row(method, f"{place}.{i}", metric, value, place)
            for method, right in (("plain", 3), ("a method with a long name", 1))
            for place in range(3)
            for i in range(4)
            for metric, value in (("right", float(i < right)), ("seconds_warm", 0.1 * right + 0.01 * i))
        ]
        return Comparison(tuple(rows), {"model": "m", "versions": {}}, frozenset(["right"]))

    def test_means_and_intervals(self, found):
        ax = leattn.viz.plot_comparison(found, "right")
        assert [tick.get_text() for tick in ax.get_yticklabels()] == found.methods
        bars = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
        for bar, method in zip(bars, found.methods, strict=True):
            point = found.summary(method, "right")
            assert list(bar.get_xdata()) == [point.low, point.high]
        (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert set(dashed.get_xdata()) == {0.75}

    def test_against_a_cost_and_by_place(self, found, tmp_path):
        ax = leattn.viz.plot_comparison(found, "right", against="seconds_warm", path=tmp_path / "a.png")
        assert ax.get_xlabel() == "seconds to the first token, documents known"
        dots = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
        expected = [[found.summary(name, metric).mean for metric in ("seconds_warm", "right")] for name in found.methods]
        assert dots == expected
        ax = leattn.viz.plot_places(found, "right", path=tmp_path / "b.png")
        curves = [line for line in ax.lines if len(line.get_xdata()) == 3]
        assert [list(curve.get_ydata()) for curve in curves] == [[0.75] * 3, [0.25] * 3]
        assert list(curves[0].get_xdata()) == [1, 2, 3]
        assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))

    def test_what_was_not_measured(self, found):
        with pytest.raises(LeattnError, match="no method has 'loss'; there are right, seconds_warm"):
            leattn.viz.plot_comparison(found, "loss")
        alone = replace(found, rows=tuple(replace(row, gold=None) for row in found.rows))
        with pytest.raises(LeattnError, match="nothing was measured of 'right' by place"):
            leattn.viz.plot_places(alone, "right")
