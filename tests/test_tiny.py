"""The bundled model: it loads offline, its corpus is reproducible, and an edge decides what it says."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leattn import ICLNode, LeattnError, bos, compile_prompt
from leattn.tiny import corpus, load, words
from leattn.tiny.examples import PATTERNS, make
from leattn.tiny.load import WEIGHTS
from leattn.tiny.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load()


# --- what is shipped


def test_it_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, tokenizer = load()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.max_position_embeddings == 4096


def test_the_package_stays_small() -> None:
    files = {file.name: file.stat().st_size for file in WEIGHTS.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 6e6


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LeattnError, match=r"no weights in .*; reinstall leattn, or run `python -m bundled_model --out"):
        load(tmp_path)


# --- the tokenizer


def test_the_shipped_tokenizer_is_the_one_of_the_code(tiny: tuple[Any, Any]) -> None:
    assert tiny[1].get_vocab() == build_tokenizer().get_vocab()
    assert tiny[1].chat_template == build_tokenizer().chat_template


@given(st.text(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_tokenizer(text: str, after_a_fact: bool) -> None:
    tokenizer = _TOKENIZER
    text = "\nZarvia's capital is Lumo." * after_a_fact + text
    assert tokenizer.decode(tokenizer.encode(text)) == text


_TOKENIZER = build_tokenizer()


def test_whole_words_are_single_tokens(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    names = [*words.ENTITIES, *(value for values in words.VALUES.values() for value in values)]
    assert len(set(names)) == len(names) == words.N_ENTITIES + len(words.RELATIONS) * words.N_VALUES
    for name in names:
        assert len(tokenizer.encode(name)) == len(tokenizer.encode(" " + name)) == 1
    sentence = corpus.Fact("dish", "Zarvia", words.VALUES["dish"][0]).sentence()
    assert len(tokenizer.encode("\n" + sentence)) == 1 + len(re.findall(r"\w+|\.", sentence))


def test_nothing_is_added_and_offsets_are_exact(tiny: tuple[Any, Any]) -> None:
    text = "The capital of Zarvia is Lumo."
    encoded = tiny[1](text, return_offsets_mapping=True)
    assert tiny[1].decode(encoded.input_ids) == text
    assert [text[a:b] for a, b in encoded.offset_mapping] == ["The", " capital", " of", " Zarvia", " is", " Lumo", "."]


def test_the_chat_template_speaks_chatml(tiny: tuple[Any, Any]) -> None:
    text = tiny[1].apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# --- the corpus


@pytest.mark.parametrize("distractors", corpus.DISTRACTORS)
@pytest.mark.parametrize("held_out", [True, False])
def test_a_seed_decides_the_facts(distractors: corpus.Distractors, held_out: bool) -> None:
    one, again, other = (corpus.sample_facts(Random(s), 8, distractors, held_out=held_out) for s in (1, 1, 2))
    assert one == again != other
    assert len({(fact.entity, fact.relation) for fact in one}) == 8
    assert len({fact.value for fact in one}) == 8
    assert {fact.held_out for fact in one} == {held_out}


def test_distractors_share_what_they_should() -> None:
    rng = Random(0)
    for _ in range(50):
        assert len({fact.relation for fact in corpus.sample_facts(rng, 8, "relation")}) == 1
        assert len({fact.entity for fact in corpus.sample_facts(rng, 8, "entity")}) == 1
        mixed = corpus.sample_facts(rng, 8, "mixed")
        for fact in mixed:
            assert sum(fact.entity == other.entity for other in mixed) > 1
            assert sum(fact.relation == other.relation for other in mixed) > 1


def test_an_eighth_is_held_out_and_everyone_is_seen() -> None:
    pairs = [(e, v) for e in words.ENTITIES for values in words.VALUES.values() for v in values]
    held = {pair for pair in pairs if corpus.is_held_out(*pair)}
    assert 0.115 < len(held) / len(pairs) < 0.135
    seen = set(pairs) - held
    assert {e for e, _ in seen} == set(words.ENTITIES)
    assert {v for _, v in seen} == {v for values in words.VALUES.values() for v in values}


def test_wrong_names_are_told_the_right_ones() -> None:
    with pytest.raises(LeattnError, match="'causal', 'parallel', 'contradiction', 'paraphrase', 'hidden'"):
        make("chain", Random(0))  # type: ignore[arg-type]
    with pytest.raises(LeattnError, match="'relation', 'entity', 'mixed', 'random'"):
        corpus.sample_facts(Random(0), 2, "none")  # type: ignore[arg-type]
    with pytest.raises(LeattnError, match="11 facts asked for, but only 10 can differ here"):
        corpus.sample_facts(Random(0), 11, "entity")
    with pytest.raises(LeattnError, match="give n >= 2"):
        make("contradiction", Random(0), n=1)


# --- the graphs


def test_a_hidden_document_is_in_the_prompt_and_out_of_sight(tiny: tuple[Any, Any]) -> None:
    for kind in ("hidden", "contradiction"):
        example = make(kind, Random(5))
        prompt = example.compile(tiny[1])
        assert len(prompt.graph) == 10  # bos, eight documents, question
        assert set(prompt.sees(example.question)) == {prompt.graph["bos"], *example.documents} - set(example.unread)
        assert len(example.unread) == 1
        assert (example.source in example.unread) == (kind == "hidden")


def test_paraphrases_see_what_their_pattern_says(tiny: tuple[Any, Any]) -> None:
    for pattern in PATTERNS:
        example = make("paraphrase", Random(1), pattern=pattern)
        prompt = example.compile(tiny[1])
        context = ["bos", *(f"doc{i}" for i in range(8))]
        want = {
            "anchor": [[], ["Q1"], ["Q1"]],
            "shared": [context] * 3,
            "isolated": [[], [], []],
            "causal": [context, [*context, "Q1"], [*context, "Q1", "Q2"]],
        }[pattern]
        names = prompt.graph.names
        assert [[names[node] for node in prompt.sees(prompt.graph[f"Q{i}"])] for i in (1, 2, 3)] == want
        assert [names[node] for node in prompt.sees(example.question)] == [*context, "Q1", "Q2", "Q3"]


@torch.no_grad()
def test_the_first_example_of_the_manual(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    root = bos(tokenizer)
    texts = ["\nThe capital of Zarvia is Lumo.", "\nThe capital of Genia is Madan.", "\nThe capital of Cetria is Bromo."]
    docs = [ICLNode(text, parents=[root], id=f"doc{i}") for i, text in enumerate(texts)]
    question = ICLNode("\nQ: What is the capital of Zarvia?\nA:", parents=[root, *docs], id="Q")
    prompt = compile_prompt(question, tokenizer)
    ids, positions, allowed = prompt.input_ids, prompt.position_ids, prompt.dense_mask()
    said = []
    for _ in range(3):  # greedy and without a cache: what is said sees what the question sees
        logits = model(input_ids=ids, position_ids=positions, attention_mask=allowed[None, None]).logits
        said.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
        size = len(allowed)
        grown = torch.zeros(size + 1, size + 1, dtype=torch.bool)
        grown[:size, :size] = allowed
        grown[size, :size] = allowed[-1]
        grown[size, size] = True
        allowed = grown
    assert tokenizer.decode(said) == " Lumo.</s>"
    assert said[-1] in model.generation_config.eos_token_id
