"""``split_text``: one tokenization, cut into segments; pieces written out by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shared_model
from templates import tokenizer_of

import leattn
from leattn import CompileError, LeattnError, compile_prompt, from_segments, split_text

TEXT = 'The sky is blue. "Is it?" she asked.  It is!\n\nA new day… Yes.\n \nEnd'
PIECES = {
    "words": [
        *("The", " sky", " is", " blue.", ' "Is', ' it?"', " she", " asked.", "  It", " is!"),
        *("\n\nA", " new", " day…", " Yes.", "\n \nEnd"),
    ],
    "sentences": ["The sky is blue.", ' "Is it?"', " she asked.", "  It is!", "\n\nA new day…", " Yes.", "\n \nEnd"],
    "paragraphs": ['The sky is blue. "Is it?" she asked.  It is!', "\n\nA new day… Yes.", "\n \nEnd"],
}


def pieces(segments):
    return [segment.metadata["text"] for segment in segments]


@pytest.mark.parametrize("at", PIECES)
def test_where_it_cuts(at):
    tokenizer = tokenizer_of("qwen")
    ids, segments = split_text(tokenizer, TEXT, at=at)
    assert ids == tokenizer(TEXT)["input_ids"]
    assert pieces(segments) == PIECES[at]
    assert split_text(tokenizer, TEXT)[1] == split_text(tokenizer, TEXT, at="sentences")[1]


def test_a_pattern_of_ones_own():
    tokenizer, text = tokenizer_of("qwen"), "Q: one\nA: two\nQ: three\nA:"
    _, segments = split_text(tokenizer, text, at=re.compile(r"\n(?=[QA]:)"))
    assert pieces(segments) == ["Q: one", "\nA: two", "\nQ: three", "\nA:"]
    assert [segment.id for segment in segments] == ["Q: one", "A: two", "Q: three", "A:"]
    assert pieces(split_text(tokenizer, text, at=re.compile("nowhere"))[1]) == [text]
    chinese = split_text(tokenizer, "天是蓝的。海呢？也是。", at="sentences")[1]
    assert pieces(chinese) == ["天是蓝的。", "海呢？", "也是。"]


@pytest.mark.parametrize("family", ["llama3", "qwen"])
@pytest.mark.parametrize("at", [*PIECES, re.compile("e")])
def test_ids_and_positions_are_those_of_the_text(family, at):
    tokenizer = tokenizer_of(family)
    ids, segments = split_text(tokenizer, TEXT, at=at)
    assert ids == tokenizer(TEXT)["input_ids"]
    prompt = compile_prompt(from_segments(ids, segments), tokenizer)
    assert prompt.input_ids.tolist() == [ids]
    assert prompt.position_ids.tolist() == [list(range(len(ids)))]
    assert prompt.dense_mask().tolist() == torch.ones(len(ids), len(ids)).tril().bool().tolist()
    if family == "llama3":  # which puts a BOS in front
        assert [(segments[0].start, segments[0].end, segments[0].id)] == [(0, 1, tokenizer.bos_token[:10])]
    names = [segment.id for segment in segments]
    assert len(set(names)) == len(names)


@given(text=st.text(alphabet="ab .!\n\"'é語", min_size=1, max_size=60), at=st.sampled_from(sorted(PIECES)))
@settings(deadline=None, max_examples=150)
def test_pieces_of_any_text_cover_it_once(text, at):
    tokenizer = tokenizer_of("qwen")
    ids, segments = split_text(tokenizer, text, at=at)
    assert [one.start for one in segments] == [0, *(one.end for one in segments[:-1])]
    assert segments[-1].end == len(ids)
    for piece in pieces(segments):
        assert piece in text
        assert piece.strip() or len(segments) == 1, "white space goes with what comes after it"


def test_a_token_belongs_to_the_piece_in_which_it_starts():
    tokenizer = tokenizer_of("qwen")
    text = "blue sky blue"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    ids, segments = split_text(tokenizer, text, at=re.compile("k"))  # through the middle of a word
    bound = text.index("k")
    for segment, inside in zip(segments, (lambda start: start < bound, lambda start: start >= bound), strict=True):
        assert all(inside(offsets[token][0]) for token in range(segment.start, segment.end))
    assert segments[-1].end == len(ids)


def test_edges_are_the_users():
    tokenizer = tokenizer_of("llama3")
    ids, segments = split_text(tokenizer, "One. Two. Three.", at="sentences")
    apart = [replace(segment, parents=[0] if i else []) for i, segment in enumerate(segments)]
    prompt = compile_prompt(from_segments(ids, apart), tokenizer)
    assert [prompt.visible.nodes_seen(i) for i in range(4)] == [[], [0], [0], [0]]
    assert prompt.position_ids.tolist() == [list(range(len(ids)))]
    assert [segment.id for segment in split_text(tokenizer, "a. a. a.")[1][1:]] == ["a.", "a. #2", "a. #3"]


def test_a_model_reads_it_as_the_plain_text():
    model = shared_model("llama")
    text = "a b. c"
    tokenizer = tokenizer_of("qwen")
    ids, segments = split_text(tokenizer, text, at="words")
    small = [token % 90 + 2 for token in ids]
    with torch.no_grad():
        found = leattn.forward(model, compile_prompt(from_segments(small, segments)), use_cache=False).logits
        torch.testing.assert_close(found, model(torch.tensor([small]), use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_split():
    tokenizer = tokenizer_of("qwen")
    with pytest.raises(LeattnError, match="unknown at 'lines'; choose one of 'words', 'sentences', 'paragraphs', or"):
        split_text(tokenizer, TEXT, at="lines")
    with pytest.raises(CompileError, match="the text '' tokenizes to 0 tokens"):
        split_text(tokenizer, "")

    class Slow:
        is_fast = False

    with pytest.raises(CompileError, match="Slow does not say where in a text its tokens are; use a fast tokenizer"):
        split_text(Slow(), TEXT)
