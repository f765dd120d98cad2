"""Turns of a chat that the model writes: their headers, what closes them, and what the rest of the conversation sees."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, CONTROL, FAMILIES, Family, make_tokenizer, tokenizer_of

from leattn import CompileError, GenNode, GraphError, ICLGraph, compile_prompt, from_chat

MAIN = ["llama3", "qwen", "mistral", "llama2", "gemma", "chatml", "thinking"]
FOLLOWED = [name for name in MAIN if name != "thinking"]
"""Whose templates show an answer to later messages after the text that asked for it."""


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def written(**options) -> dict:
    return {"role": "assistant", "generate": {"max_new_tokens": 8, **options}}


def for_family(name: str, messages: list[dict]) -> list[dict]:
    return [one for one in messages if FAMILIES[name].system or one["role"] != "system"]


def template_ids(tokenizer, messages) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)


def ids_of(nodes) -> list[int]:
    return [token for node in nodes if not (node.id or "").startswith("document ") for token in node.content]


def text_of(tokenizer, node) -> str:
    return tokenizer.decode(node.content, clean_up_tokenization_spaces=False)


def up_to(graph: ICLGraph, node) -> list:
    return [*graph.ancestors(node), node]


@pytest.mark.parametrize("documents", [[], ["Lumo.", "The river."]])
@pytest.mark.parametrize("name", MAIN)
def test_the_last_turn_is_written_after_what_the_template_asks_with(name, documents):
    tokenizer = tokenizer_of(name)
    messages = for_family(name, [system("Be kind."), user("Hello"), assistant("Yes."), user("Fine.")])
    graph = from_chat(tokenizer, [*messages, written(temperature=0.5)], documents)
    (answer,) = graph.sinks
    assert isinstance(answer, GenNode)
    assert answer is graph["assistant 2"]
    assert (answer.max_new_tokens, answer.sampling) == (8, {"temperature": 0.5})
    assert ids_of(graph) == template_ids(tokenizer, messages)
    assert graph.ancestors(answer) == graph.nodes[:-1] == graph.parents(answer)


HEADERS = {
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>assistant\n",
    "mistral": "[/INST]",
    "llama2": " [/INST]",
    "gemma": "<start_of_turn>model\n",
    "chatml": "<|im_start|>assistant\n",
    "thinking": "<|im_start|>assistant\n<think>\n",
}
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "llama2": "</s>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("name", MAIN)
def test_headers_and_ends(name):
    tokenizer = tokenizer_of(name)
    graph = from_chat(tokenizer, [user("Hello"), written(stop="\n")])
    assert list(graph.names.values()) == ["user", "assistant"]
    assert text_of(tokenizer, graph["assistant"]) == HEADERS[name]
    assert graph["assistant"].stop == ("\n", ENDS.get(name, "<|im_end|>"))
    assert from_chat(tokenizer, [user("Hello"), written()])["assistant"].stop == (ENDS.get(name, "<|im_end|>"),)


def test_an_end_that_is_no_control_token_is_not_a_stop_string():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = make_tokenizer(Family(template + "{% if add_generation_prompt %}assistant:{% endif %}", ("<s>",)))
    graph = from_chat(tokenizer, [user("Hello"), written(), user("Yes.")], add_generation_prompt=False)
    assert text_of(tokenizer, graph["assistant"]) == "assistant:"
    assert text_of(tokenizer, graph["assistant footer"]) == "\n"
    assert graph["assistant"].stop == ()


CUTS = {
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    "chatml": [
        "<|im_start|>user\nHello<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
        "<|im_start|>user\nWhy?<|im_end|>\n",
        "<|im_start|>assistant\n",
    ],
    "mistral": ["<s>[INST] Hello", "[/INST]", "</s>", "[INST] Why?", "[/INST]"],
    "llama2": ["<s>[INST] Hello", " [/INST]", " </s>", "<s>[INST] Why?", " [/INST]"],
}


@pytest.mark.parametrize("name", CUTS)
def test_a_turn_in_the_middle_is_closed_after_it_is_written(name):
    tokenizer = tokenizer_of(name)
    graph = from_chat(tokenizer, [user("Hello"), written(), user("Why?"), written(max_new_tokens=3)])
    assert [text_of(tokenizer, node) for node in graph] == CUTS[name]
    assert list(graph.names.values()) == ["user 1", "assistant 1", "assistant 1 footer", "user 2", "assistant 2"]
    assert [isinstance(node, GenNode) for node in graph] == [False, True, False, False, True]
    assert [len(graph.ancestors(node)) for node in graph] == [0, 1, 2, 3, 4]
    assert [graph[f"assistant {i}"].max_new_tokens for i in (1, 2)] == [8, 3]


def test_the_last_message_may_be_a_question_that_nobody_answers():
    tokenizer = tokenizer_of("chatml")
    graph = from_chat(tokenizer, [user("Hello"), written(), user("Why?")])
    assert text_of(tokenizer, graph["user 2"]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert graph.name(graph.sinks[0]) == "user 2"


def test_documents_stand_before_the_last_question():
    tokenizer = tokenizer_of("chatml")
    graph = from_chat(tokenizer, [user("Hello"), written(), user("Why?"), written()], ["Lumo.", "The river."])
    order = [
        "user 1",
        "assistant 1",
        "assistant 1 footer",
        "user 2 header",
        "document 1",
        "document 2",
        "user 2",
        "assistant 2",
    ]
    assert list(graph.names.values()) == order
    assert [graph.name(node) for node in graph.parents("document 2")] == order[:4]
    early = from_chat(tokenizer, [user("Hello"), written(), assistant("Yes.")], ["Lumo."])
    assert list(early.names.values()) == [
        "user header",
        "document 1",
        "user",
        "assistant 1",
        "assistant 1 footer",
        "assistant 2",
    ]


PIECES = st.lists(st.sampled_from(["a", " ", "\n", "é", "🙂", "Yes.", "\n\n", *CONTROL, "written", "leattn"]), max_size=4).map(
    "".join
)


@pytest.mark.parametrize("name", FOLLOWED)
@given(texts=st.lists(PIECES | st.none(), min_size=1, max_size=6), documents=st.lists(st.just("Lumo."), max_size=2))
@settings(deadline=None, max_examples=40)
def test_random_conversations(name, texts, documents):
    """Each header ends what the template asks with; with an answer in every gap, the text is the template's."""
    tokenizer = tokenizer_of(name)
    asked = [text if text is not None else "Yes." for text in texts]
    messages = [
        user(asked[i]) if i % 2 == 0 else written() if text is None else assistant(text) for i, text in enumerate(texts)
    ]
    answered = [one if "content" in one else assistant("Yes.") for one in messages]
    documents = documents if asked[(len(texts) - 1) // 2 * 2].strip() else []
    graph = from_chat(tokenizer, messages, documents)
    written_nodes = [node for node in graph if isinstance(node, GenNode)]
    assert len(written_nodes) == len([one for one in messages if "generate" in one])

    space = " " if name in ("mistral", "llama2") else ""
    pieces, done = [], []
    for node in graph:
        if (node.id or "").startswith("document "):
            continue
        pieces += node.content
        if isinstance(node, GenNode):
            number = next(i for i, one in enumerate(messages) if "generate" in one and i not in done)
            done.append(number)
            before = tokenizer.apply_chat_template(answered[:number], tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(pieces, clean_up_tokenization_spaces=False) == before
            if len(done) == 1:
                assert pieces == template_ids(tokenizer, answered[:number])
            pieces += tokenizer(space + "Yes.", add_special_tokens=False)["input_ids"]
    whole = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user")
    whole = whole if "content" in messages[-1] else before + space + "Yes."
    assert tokenizer.decode(pieces, clean_up_tokenization_spaces=False) == whole


def test_messages_that_look_like_stand_ins():
    tokenizer = tokenizer_of("chatml")
    graph = from_chat(tokenizer, [user("written0z leattn0z"), written(), user("written1z writtenx1z"), written()])
    assert [text_of(tokenizer, graph[name]) for name in ("user 1", "user 2")] == [
        "<|im_start|>user\nwritten0z leattn0z<|im_end|>\n",
        "<|im_start|>user\nwritten1z writtenx1z<|im_end|>\n",
    ]


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        (
            "thinking",
            [user("a"), written(), user("b")],
            "the model would write message 1 (assistant) after another text than the one after which the chat template shows "
            "it to later messages; end the conversation there, and go on in a second one that holds what was written",
        ),
        (
            "mistral",
            [system("a"), user("b"), written(), user("c")],
            "the model would write message 2 (assistant) after another text",
        ),
        (
            "mistral",
            [user("b"), written(), assistant("c")],
            "the chat template refuses this conversation: roles must alternate",
        ),
        ("qwen", [written()], "the chat template refuses this conversation"),
        (
            "chatml",
            [user("a"), {"role": "assistant", "generate": {}}],
            "'generate' of message 1 (assistant) is {}; give a mapping",
        ),
        (
            "chatml",
            [user("a"), {"role": "assistant", "generate": 8}],
            "is 8; give a mapping with max_new_tokens, and what else",
        ),
        ("chatml", [written() | {"content": "a"}], "message 0 (assistant) has both 'content' and 'generate'; leave one"),
        (
            "chatml",
            [written() | {"role": "user"}],
            "message 0 (user) has 'generate', but the model writes only turns of the role",
        ),
        ("chatml", [user("a"), written(start_pos_id=3)], "has 'start_pos_id', which the conversation decides; leave it out"),
    ],
)
def test_errors(name, messages, words):
    with pytest.raises(GraphError, match=re.escape(words)):
        from_chat(tokenizer_of(name), messages)


def test_errors_of_options():
    tokenizer = tokenizer_of("chatml")
    with pytest.raises(
        GraphError, match=r"message 1 \(assistant\) is written after its header; leave out add_generation_prompt"
    ):
        from_chat(tokenizer, [user("a"), written()], add_generation_prompt=False)
    with pytest.raises(GraphError, match="the chat template refuses this conversation"):
        from_chat(tokenizer, [user("a"), written()], continue_final_message=True)
    with pytest.raises(CompileError, match="node 'assistant' has num_beams=2, but a node is one sequence"):
        from_chat(tokenizer, [user("a"), written(num_beams=2)])
    with pytest.raises(CompileError, match="node 'assistant' is written by the model"):
        compile_prompt(from_chat(tokenizer, [user("a"), written()]), tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "the chat template writes nothing between message 1 (assistant)",
        ),
        (
            "{% for m in messages %}{{ '<s>' + (m.content if m.role == 'user' else '') }}{% endfor %}",
            "the chat template does not show the text of message 1 (assistant)",
        ),
        (
            "{% if messages | length < 2 %}{{ raise_exception('short') }}{% endif %}" + CHATML,
            "the chat template cannot be split at message 1 (assistant), which the model is to write; end the",
        ),
    ],
)
def test_templates_that_cannot_be_split(template, words):
    tokenizer = make_tokenizer(Family(template, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"), bos="<s>", eos="</s>"))
    with pytest.raises(GraphError, match=re.escape(words)):
        from_chat(tokenizer, [user("a"), written(), user("b")])


def test_messages_are_left_as_they_were():
    messages = [user("a"), written(stop="x"), user("b")]
    from_chat(tokenizer_of("chatml"), messages)
    assert messages == [user("a"), written(stop="x"), user("b")]
