"""With which tokenizer ``generate`` reads what it writes. The oracle is transformers' ``decode`` of the ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import GenerationConfig

import leattn
from leattn import GenNode, ICLGraph, ICLNode, KVStore, LeattnError, compile_prompt, generate
from leattn.patterns import paraphrase_ensemble

NEW = 6


@pytest.fixture(scope="module")
def tiny():
    return leattn.tiny.load()


@pytest.fixture(scope="module")
def other():
    """Another tokenizer of the same vocabulary, whose texts are told apart: it decodes into capitals."""

    class Loud(type(leattn.tiny.load()[1])):
        def decode(self, *args, **options):
            return super().decode(*args, **options).upper()

    _, tokenizer = leattn.tiny.load()
    return Loud(tokenizer_object=tokenizer.backend_tokenizer)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def nodes(tokenizer, *, ids):
    """A fact and two questions, as ids or as text."""
    make = (lambda text: ids_of(tokenizer, text)) if ids else str
    fact = ICLNode(make("\nThe capital of Zarvia is Lumo."), id="fact")
    asks = ("What is the capital of Zarvia?", "Name the capital of Zarvia.")
    return [ICLNode(make(f"\nQ: {ask}\nA:"), [fact], id=f"Q{i}") for i, ask in enumerate(asks)]


def prompts(tokenizer, *, ids):
    """One sink, several, and a batch of one-sink prompts."""
    first, second = nodes(tokenizer, ids=ids)
    given = None if ids else tokenizer
    return [
        compile_prompt(first, given),
        compile_prompt([first, second], given),
        [compile_prompt(q, given) for q in (first, second)],
    ]


def results(found):
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kv_store": True}, {"num_return_sequences": 2, "num_beams": 2}], ids=["", "store", "beams"]
)
def test_what_is_written_is_read_with_the_tokenizer_that_is_given(tiny, other, ids, options):
    model, tokenizer = tiny
    options = {**options, **({"kv_store": KVStore()} if "kv_store" in options else {})}
    for target in prompts(tokenizer, ids=ids):
        if "num_beams" in options and not isinstance(target, list) and len(target.graph.sinks) > 1:
            continue
        for given in (tokenizer, other):
            for result in results(generate(model, target, given, max_new_tokens=NEW, **options)):
                for sequence in (one for several in result.branches.values() for one in several):
                    assert sequence.text == given.decode(sequence.token_ids)
                    assert " Lumo" in sequence.text or " LUMO" in sequence.text
                assert result.prompt.decode(result.prompt.input_ids[0]) == given.decode(result.prompt.input_ids[0])


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("by", ["argument", "config", "model"])
def test_stop_strings_stop(tiny, ids, by):
    model, tokenizer = tiny
    free = generate(model, prompts(tokenizer, ids=True)[0], tokenizer, max_new_tokens=NEW)
    assert "." in free.text
    config = GenerationConfig(stop_strings=["."], max_new_tokens=NEW)
    options = {"argument": {"stop_strings": ["."], "max_new_tokens": NEW}, "config": {"generation_config": config}}
    before = model.generation_config.stop_strings
    try:
        if by == "model":
            model.generation_config.stop_strings = ["."]
        for target in prompts(tokenizer, ids=ids):
            for result in results(generate(model, target, tokenizer, **options.get(by, {"max_new_tokens": NEW}))):
                assert set(result.texts.values()) == {" Lumo"}
    finally:
        model.generation_config.stop_strings = before


def test_a_program_and_its_streamer_read_with_it(tiny, other):
    model, tokenizer = tiny
    first, second = nodes(tokenizer, ids=True)
    graph = ICLGraph(GenNode(first.content, first.parents, "a", max_new_tokens=NEW, stop="."), second)
    for given, text in ((tokenizer, " Lumo"), (other, " LUMO")):
        pieces = []
        result = generate(model, graph, given, streamer=lambda node, piece: pieces.append(piece))  # noqa: B023
        assert result.text == text == "".join(pieces)
    pieces = []
    found = generate(
        model,
        prompts(tokenizer, ids=True)[1],
        other,
        max_new_tokens=1,
        streamer=lambda node, piece: pieces.append((node, piece)),
    )
    assert found.texts == dict(pieces) == {"Q0": " LUMO", "Q1": " LUMO"}


def test_without_one_given_each_prompt_has_its_own_and_lends_it_to_those_that_have_none(tiny, other):
    model, tokenizer = tiny
    first, second = nodes(tokenizer, ids=True)
    batch = [
        compile_prompt(first),
        replace(compile_prompt(second), tokenizer=other),
        replace(compile_prompt(first), tokenizer=tokenizer),
    ]
    written = ICLGraph(GenNode(first.content, first.parents, "a", max_new_tokens=1))
    for targets in (batch, [*batch, compile_prompt([first, second])], [*batch, written]):
        texts = [next(iter(one.texts.values())) for one in generate(model, targets, max_new_tokens=1)]
        assert texts == [" LUMO", " LUMO", " Lumo", " LUMO"][: len(targets)]
    alone = generate(model, batch[0], max_new_tokens=1)
    assert alone.text == str(ids_of(tokenizer, " Lumo"))
    assert alone.prompt is batch[0]


def test_stop_strings_without_any_tokenizer_are_refused(tiny):
    model, tokenizer = tiny
    first, second = nodes(tokenizer, ids=True)
    for target in (
        compile_prompt([first, second]),
        ICLGraph(GenNode(first.content, first.parents, max_new_tokens=2, stop=".")),
    ):
        with pytest.raises(LeattnError, match="stop strings are text, and there is no tokenizer to decode with; give one"):
            generate(model, target, stop_strings=["."])


def test_an_ensemble_reads_with_it(tiny, other):
    model, tokenizer = tiny
    prompt = compile_prompt(nodes(tokenizer, ids=True))
    for given, text in ((tokenizer, " Lumo"), (other, " LUMO")):
        assert paraphrase_ensemble(model, prompt, given, max_new_tokens=NEW, stop_strings=".").text == text
