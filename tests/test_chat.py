"""from_chat: the ids of the template, cut into messages, and documents that cannot break out of their node."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, CONTROL, FAMILIES, FORGETFUL, SHOUTING, STUTTERING, Family, make_tokenizer, tokenizer_of

from leattn import CompiledPrompt, GraphError, ICLGraph, ICLNode, bos, compile_prompt, from_chat

MAIN = ["llama3", "qwen", "mistral", "llama2", "gemma", "chatml", "thinking"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


CONVERSATIONS = {
    "question": [user("What is the capital of Zarvia?")],
    "system": [system("Answer briefly."), user("Hello")],
    "turns": [system("Be kind."), user("Hello"), assistant("Hello, how are you?"), user("Fine.")],
    "ends with an answer": [user("Hello"), assistant("Yes.")],
    "unicode": [user("東京は日本の首都です。 🙂"), assistant("Straße"), user("👩‍👩‍👧 é e\u0301")],
    "space around": [system("  Be kind.\n"), user("\n\n Hello \t\n"), assistant("  Yes.  "), user(" ? ")],
    "repeated": [user("Yes."), assistant("Yes."), user("Yes."), assistant("Yes."), user("Yes.")],
    "part of the template": [user("user"), assistant("assistant"), user("system\n"), assistant("model"), user("INST")],
    "part of another": [user("a b c"), assistant("b"), user("a"), assistant("a b c a"), user("c a")],
    "control strings": [user("<|eot_id|>"), assistant("x<|im_end|>\n<|im_start|>user\n"), user("[/INST] <end_of_turn>\n")],
    "empty question": [user("")],
    "empty": [system(""), user(""), assistant(""), user("Hello")],
    "blank": [user(" \n"), assistant("\n"), user("\t")],
    "newlines": [user("\n"), assistant("\n\nYes.\n\n"), user("Hello\n\n\n")],
}


def template_ids(tokenizer, messages, **options) -> list[int]:
    options = {"add_generation_prompt": messages[-1]["role"] == "user", **options}
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def ids_of(graph: ICLGraph) -> list[int]:
    return [token for node in graph for token in node.content]


def text_of(tokenizer, node) -> str:
    return tokenizer.decode(node.content, clean_up_tokenization_spaces=False)


def for_family(name: str, messages: list[dict]) -> list[dict]:
    return [one for one in messages if FAMILIES[name].system or one["role"] != "system"]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", MAIN)
def test_joined_ids_are_those_of_the_template(name, messages):
    tokenizer, messages = tokenizer_of(name), for_family(name, messages)
    graph = from_chat(tokenizer, messages)
    prompt = compile_prompt(graph, tokenizer)
    assert prompt.input_ids[0].tolist() == template_ids(tokenizer, messages)
    size = len(prompt)
    assert torch.equal(prompt.dense_mask(), torch.ones(size, size, dtype=torch.bool).tril())
    assert prompt.position_ids[0].tolist() == list(range(size))
    for message, node_name in zip(messages, names_of(messages), strict=True):
        if message["content"].strip():
            assert message["content"].strip() in text_of(tokenizer, graph[node_name])


def names_of(messages) -> list[str]:
    roles = [message["role"] for message in messages]
    return [role if roles.count(role) == 1 else f"{role} {roles[: i + 1].count(role)}" for i, role in enumerate(roles)]


PIECES = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "user", "é", "🙂", "Yes.", "\n\n", *CONTROL, "assistant\n", "/INST]", "</think>"]),
    max_size=5,
).map("".join)


@pytest.mark.parametrize("name", MAIN)
@given(
    texts=st.lists(PIECES, min_size=1, max_size=5),
    opening=st.none() | PIECES,
    documents=st.lists(PIECES.filter(bool), max_size=2),
)
@settings(deadline=None, max_examples=60)
def test_random_conversations(name, texts, opening, documents):
    """The ids are those of the template, whatever the texts hold; what is refused is known."""
    tokenizer = tokenizer_of(name)
    messages = [user(text) if i % 2 == 0 else assistant(text) for i, text in enumerate(texts)]
    messages = for_family(name, messages if opening is None else [system(opening), *messages])
    wanted = template_ids(tokenizer, messages)
    asked = texts[(len(texts) - 1) // 2 * 2]
    if name == "mistral" and messages[0]["role"] == "system" and opening.strip() and len(texts) % 2 == 0:
        refusal = r"does not show the text of message 0 \(system\)"
    elif name == "llama2" and messages[0]["role"] == "system" and documents and not asked.strip() and not texts[0].strip():
        # Its trimming takes the end of the system block along, so that blank messages have no place of their own.
        refusal = r"shows no text of message \d \(user\), so documents have no place; give it some"
    else:
        refusal = None
    if refusal is not None:
        with pytest.raises(GraphError, match=refusal):
            from_chat(tokenizer, messages, documents)
        return
    graph = from_chat(tokenizer, messages, documents)
    mine = [node for node in graph if not (node.id or "").startswith("document ")]
    assert [token for node in mine for token in node.content] == wanted
    control = set(tokenizer.get_added_vocab().values()) - {tokenizer.get_added_vocab().get("\n\n")}
    for i, text in enumerate(documents, 1):
        ids = graph[f"document {i}"].tokenize(tokenizer).tolist()
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert control.isdisjoint(ids)


TURNS = CONVERSATIONS["turns"]
CUTS = {
    "llama3": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello, how are you?<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nFine.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    "chatml": [
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>user\nHello<|im_end|>\n",
        "<|im_start|>assistant\nHello, how are you?<|im_end|>\n",
        "<|im_start|>user\nFine.<|im_end|>\n<|im_start|>assistant\n",
    ],
    "mistral": ["<s>[INST] Hello[/INST]", " Hello, how are you?</s>", "[INST] Be kind.\n\n", "Fine.[/INST]"],
    "llama2": [
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n",
        "Hello [/INST]",
        " Hello, how are you? </s>",
        "<s>[INST] Fine. [/INST]",
    ],
}
CUTS["qwen"] = CUTS["chatml"]


@pytest.mark.parametrize("name", CUTS)
def test_each_node_is_a_message_with_what_wraps_it(name):
    tokenizer = tokenizer_of(name)
    graph = from_chat(tokenizer, TURNS)
    assert [text_of(tokenizer, node) for node in graph] == CUTS[name]
    order = ["user 1", "assistant", "system", "user 2"] if name == "mistral" else ["system", "user 1", "assistant", "user 2"]
    assert list(graph.names.values()) == order


def test_gemma_and_a_default_system_prompt():
    gemma = from_chat(tokenizer_of("gemma"), [user(" Hello "), assistant("Yes."), user("?")])
    assert [text_of(tokenizer_of("gemma"), node) for node in gemma] == [
        "<bos><start_of_turn>user\nHello<end_of_turn>\n",
        "<start_of_turn>model\nYes.<end_of_turn>\n",
        "<start_of_turn>user\n?<end_of_turn>\n<start_of_turn>model\n",
    ]
    qwen = from_chat(tokenizer_of("qwen"), [user("Hello"), assistant("Yes.")])
    assert [text_of(tokenizer_of("qwen"), node) for node in qwen] == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n",
        "<|im_start|>assistant\nYes.<|im_end|>\n",
    ]


def test_tool_calls_and_dropped_thoughts():
    tokenizer = tokenizer_of("qwen")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    messages = [system("Be kind."), user("Look."), call, {"role": "tool", "content": "Lumo"}]
    graph = from_chat(tokenizer, messages)
    assert ids_of(graph) == template_ids(tokenizer, messages, add_generation_prompt=True)
    assert text_of(tokenizer, graph["assistant"]) == "<|im_start|>assistant\n<tool_call>\nlook\n</tool_call><|im_end|>\n"

    tokenizer = tokenizer_of("thinking")
    messages = [user("Hello"), assistant("<think>\nuser Hello\n</think>\n\nYes."), user("Hello")]
    graph = from_chat(tokenizer, messages)
    assert ids_of(graph) == template_ids(tokenizer, messages)
    assert text_of(tokenizer, graph["assistant"]) == "<|im_start|>assistant\nYes.<|im_end|>\n"


JSON_RESULTS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'tool' %}
        {{- message.content | tojson if wrap is not defined else {'output': message.content, 'id': 7} | tojson }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""As Llama 3.1's: results of tools are written as JSON."""
RESULTS = [
    "Lumo",
    '{"city": "Lumo", "of": ["Zarvia"]}',
    'a "b" \\ c\n\td',
    '"',
    '\\"',
    "東京 🙂 é",
    "</s> & 'x'",
    "  \n x \n",
    '""',
    "\u2028\x00",
]


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


def check_results(texts: list[str], **options) -> None:
    tokenizer = make_tokenizer(Family(JSON_RESULTS, FAMILIES["llama3"].special, bos="<|begin_of_text|>", eos="<|eot_id|>"))
    messages = [system("Be kind."), user('Look: "x".'), *map(tool, texts)]
    graph = from_chat(tokenizer, messages, **options)
    assert ids_of(graph) == template_ids(tokenizer, messages, add_generation_prompt=True, **options)
    for text, node in zip(texts, [node for node in graph if str(node.id).startswith("tool")], strict=True):
        written = json.dumps(text if not options else {"output": text, "id": 7}, ensure_ascii=False)
        assert f"<|start_header_id|>ipython<|end_header_id|>\n\n{written}<|eot_id|>" in text_of(tokenizer, node)


@pytest.mark.parametrize("options", [{}, {"wrap": True}], ids=["", "wrapped"])
@pytest.mark.parametrize("text", RESULTS)
def test_results_that_a_template_writes_as_json(text, options):
    check_results([text], **options)
    check_results([text, "Lumo", text], **options)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(min_size=1) | st.text('"\\\n ,:a{}', min_size=1), min_size=1, max_size=3))
def test_any_results_as_json(texts):
    check_results(texts)


def test_documents_before_a_question_that_is_written_as_json():
    tokenizer = make_tokenizer(Family("{{ messages[0].content | tojson }}", ("<s>",)))
    graph = from_chat(tokenizer, [user('a "b"\n')], ["Lumo."])
    assert [text_of(tokenizer, graph[name]) for name in ("user header", "user")] == ['"', 'a \\"b\\"\\n"']


@pytest.mark.parametrize("change", ["replace('c', 'k')", "title", "replace('c', 'k') | tojson", "tojson | tojson", "reverse"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_message_that_a_template_changes_is_named(change, at):
    template = (
        "{% for message in messages %}{{ '<s>' + (message.content | "
        + change
        + " if loop.index0 == at else message.content) + '</s>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer(Family(template, ("<s>", "</s>")))
    messages = [user('c "a" cats'), assistant('c "b"\n'), user('cats c "a"')]
    with pytest.raises(GraphError, match=rf"the text.* of .*message {at} \({messages[at]['role']}\)"):
        from_chat(tokenizer, messages, at=at)


def test_a_token_on_a_boundary_goes_to_one_side():
    """The newline that ends the header and the one that begins the question are one token here."""
    family = Family("{{ messages[0].content + '\n' + messages[1].content }}", ("<s>",), ("\n\n",))
    tokenizer = make_tokenizer(family)
    messages = [system("Hello"), user("\nYes.")]
    graph = from_chat(tokenizer, messages)
    assert [text_of(tokenizer, node) for node in graph] == ["Hello\n\n", "Yes."]
    assert ids_of(graph) == template_ids(tokenizer, messages)


def test_a_space_follows_its_word():
    """Mistral and Llama 2 end the header with a space, which is part of the question's first token."""
    tokenizer = tokenizer_of("llama2")
    graph = from_chat(tokenizer, [user("the capital")], ["Lumo."])
    assert [text_of(tokenizer, graph[name]) for name in ("user header", "user")] == ["<s>[INST]", " the capital [/INST]"]
    assert ids_of(from_chat(tokenizer, [user("the capital")])) == template_ids(tokenizer, [user("the capital")])


@pytest.mark.parametrize("name", MAIN)
def test_documents_stand_side_by_side_before_the_question(name):
    tokenizer, messages = tokenizer_of(name), for_family(name, TURNS)
    graph = from_chat(tokenizer, messages, ["Lumo.", "The river runs past.", [5, 6]])
    prompt = compile_prompt(graph, tokenizer)
    names = list(graph.names.values())
    first = names.index("document 1")
    assert names[first:] == ["document 1", "document 2", "document 3", "user 2"]
    before = list(range(first))
    assert [prompt.visible.nodes_seen(first + i) for i in range(4)] == [before, before, before, list(range(first + 3))]
    starts = [int(prompt[one].positions[0]) for one in names[first:]]
    longest = max(len(prompt[f"document {i}"].positions) for i in (1, 2, 3))
    ends_before = int(prompt[names[first - 1]].positions[-1]) + 1
    assert starts == [ends_before, ends_before, ends_before, ends_before + longest]
    assert text_of(tokenizer, graph["user 2"]).startswith("Fine."), "the role header stands before the documents"
    rest = [token for node in graph if not node.id.startswith("document") for token in node.content]
    assert rest == template_ids(tokenizer, messages)
    if name not in ("mistral", "llama2"):
        assert names[first - 1] == "user 2 header"


def test_a_conversation_goes_on_after_documents():
    tokenizer = tokenizer_of("chatml")
    graph = from_chat(tokenizer, [user("Hello"), assistant("Yes.")], ["Lumo."])
    assert list(graph.names.values()) == ["user header", "document 1", "user", "assistant"]
    assert [graph.name(parent) for parent in graph.parents("assistant")] == ["user header", "document 1", "user"]


@pytest.mark.parametrize("name", MAIN)
def test_documents_never_hold_control_tokens(name):
    tokenizer = tokenizer_of(name)
    document = "a" + "".join(CONTROL) + " " + " b ".join(CONTROL) + "<<s>s><tool_<tool_call>call>"
    graph = from_chat(tokenizer, [user("Hello")], [document])
    ids = graph["document 1"].tokenize(tokenizer).tolist()
    added = {id: token for token, id in tokenizer.get_added_vocab().items()}
    assert [added[one] for one in ids if one in added] == []
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == document
    prompt = compile_prompt(graph, tokenizer)
    assert isinstance(prompt, CompiledPrompt)
    assert prompt["document 1"].input_ids.tolist() == ids


def test_control_strings_in_messages_are_what_the_template_makes_of_them():
    tokenizer = tokenizer_of("llama3")
    graph = from_chat(tokenizer, [user("a<|eot_id|>b")])
    assert graph["user"].content.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("last", [user("Hello"), assistant("Yes.")])
def test_generation_prompt_is_an_option(wanted, last):
    tokenizer = tokenizer_of("chatml")
    graph = from_chat(tokenizer, [user("a"), last], add_generation_prompt=wanted)
    assert ids_of(graph) == template_ids(tokenizer, [user("a"), last], add_generation_prompt=wanted)


def test_options_reach_the_template():
    tokenizer = tokenizer_of("chatml")
    messages = [user("Hello"), assistant("The capital")]
    graph = from_chat(tokenizer, messages, continue_final_message=True)
    assert text_of(tokenizer, graph["assistant"]) == "<|im_start|>assistant\nThe capital"
    assert ids_of(graph) == template_ids(tokenizer, messages, continue_final_message=True)
    graph = from_chat(tokenizer, [user("Hello")], chat_template="{{ word + messages[0].content }}", word="Oh ")
    assert text_of(tokenizer, graph["user"]) == "Oh Hello"


def test_messages_are_left_as_they_were():
    messages = [system("a"), user("b")]
    from_chat(tokenizer_of("mistral"), messages, ["c"])
    assert messages == [system("a"), user("b")]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (FORGETFUL, [user("a"), assistant("b")], "does not show the text of message 0 (user); change the conversation"),
        (SHOUTING, [user("a")], "does not show the text of message 0 (user)"),
        (STUTTERING, [user("a")], "shows 2 times the text of message 0 (user)"),
        ("{{ messages[0].content | replace('c', 'k') }}", [user("cats")], "message 0 (user) is not found in what it renders"),
        ("{{ raise_exception('no way') }}", [user("a")], "the chat template refuses this conversation: no way"),
        (None, [user("a")], "has no chat template; set tokenizer.chat_template"),
        (CHATML, [], "messages is a list of mappings with 'role' and 'content', not []; give at least one"),
        (CHATML, "Hello", "messages is a list of mappings"),
        (CHATML, user("Hello"), "messages is a list of mappings"),
        (CHATML, ["Hello"], "message 0 is 'Hello'; give a mapping with a 'role' and a 'content'"),
        (CHATML, [{"content": "a"}], "give a mapping with a 'role'"),
        (CHATML, [user([{"type": "text", "text": "a"}])], "message 0 (user) has content of type list; from_chat takes text"),
    ],
)
def test_errors(template, messages, words):
    tokenizer = make_tokenizer(Family(template, ("<s>", "</s>"), bos="<s>", eos="</s>"))
    with pytest.raises(GraphError) as error:
        from_chat(tokenizer, messages)
    assert words in str(error.value)


def test_errors_of_options_and_tokenizers():
    tokenizer = tokenizer_of("chatml")
    with pytest.raises(GraphError, match="'padding' is no option of from_chat"):
        from_chat(tokenizer, [user("a")], padding=True)
    with pytest.raises(GraphError, match="documents is a list of texts, not the single text 'abc'; put it in a list"):
        from_chat(tokenizer, [user("a")], "abc")
    with pytest.raises(GraphError, match="before the text of the last user message, but no message is from a user; add one"):
        from_chat(tokenizer, [assistant("a")], ["abc"])

    class Slow:
        is_fast = False
        chat_template = CHATML

    with pytest.raises(GraphError, match="Slow is a slow tokenizer, which does not say where its tokens stand; load the fast"):
        from_chat(Slow(), [user("a")])


class TestDocuments:
    MESSAGES = (user("Which city?"),)

    @pytest.mark.parametrize("name", MAIN)
    @pytest.mark.parametrize("text", ["Lumo.", " river </s>", "<|im_start|>x", "a"])
    def test_text_in_a_template_is_one_text(self, name, text):
        """As the document that somebody framed by hand."""
        tokenizer = tokenizer_of(name)
        framed = from_chat(tokenizer, self.MESSAGES, [text, text], document_template="Document [{i}] {text}\n")
        by_hand = from_chat(tokenizer, self.MESSAGES, [f"Document [1] {text}\n", f"Document [2] {text}\n"])
        assert framed.to_dict() == by_hand.to_dict()
        assert compile_prompt(framed, tokenizer).input_ids.tolist() == compile_prompt(by_hand, tokenizer).input_ids.tolist()

    def test_a_function_and_a_separator(self):
        tokenizer = tokenizer_of("llama3")
        by_hand = from_chat(tokenizer, self.MESSAGES, ["1: Lumo.\n\n", "2: Vex.\n\n"])
        for template in (lambda i, text: f"{i}: {text}", "{i}: {text}"):
            found = from_chat(
                tokenizer, self.MESSAGES, ["Lumo.", "Vex."], document_template=template, document_separator="\n\n"
            )
            assert found.to_dict() == by_hand.to_dict()
        assert (
            from_chat(tokenizer, self.MESSAGES, document_separator="\n").to_dict()
            == from_chat(tokenizer, self.MESSAGES).to_dict()
        )

    def test_token_ids_stand_in_a_template_as_they_are(self):
        tokenizer = tokenizer_of("llama3")

        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        given = [ids("Lumo."), torch.tensor(ids("Vex."))]
        graph = from_chat(tokenizer, self.MESSAGES, given, document_template="[{i:02}] {text}!", document_separator="\n")
        assert graph["document 1"].content == (*ids("[01] "), *ids("Lumo."), *ids("!\n"))
        assert graph["document 2"].content == (*ids("[02] "), *ids("Vex."), *ids("!\n"))
        graph = from_chat(tokenizer, self.MESSAGES, ["Lumo.", [5, 6]], document_separator=[7])
        assert [graph[f"document {i}"].content for i in (1, 2)] == [(*ids("Lumo."), 7), (5, 6, 7)]
        graph = from_chat(tokenizer, self.MESSAGES, [[5, 6]], document_template=lambda i, found: [i, *found])
        assert graph["document 1"].content == (1, 5, 6)

    def test_control_tokens_of_a_frame_stay_text(self):
        tokenizer = tokenizer_of("llama3")
        graph = from_chat(tokenizer, self.MESSAGES, [[5], "x"], document_template="<|eot_id|>{text}")
        for name in ("document 1", "document 2"):
            assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in graph[name].tokenize(tokenizer).tolist()

    def test_names(self):
        tokenizer = tokenizer_of("llama3")
        graph = from_chat(tokenizer, self.MESSAGES, ["Lumo.", "Vex."], document_ids=["atlas", None])
        assert list(graph.names.values()) == ["user header", "atlas", "document 2", "user"]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"document_template": "Document"}, r"'Document' lacks {text}, or has it twice; it holds {text} once, and {i}"),
            ({"document_template": "{text} {text}"}, r"lacks {text}, or has it twice"),
            ({"document_template": "{text} {title}"}, r"has the field {title}; it holds {text} once"),
            ({"document_template": "{} {text}"}, r"has the field {}; it holds"),
            ({"document_template": "{text} }"}, r"is no format string: .*; write {{ for a brace"),
            ({"document_ids": ["a"]}, "1 document_ids are given for 2 documents; give one per document, or None"),
            ({"document_ids": "ab"}, "document_ids is a list with one name per document, not the single text 'ab'"),
            ({"document_ids": ["a", "a"]}, "id 'a' is given to two nodes"),
        ],
    )
    def test_what_is_refused(self, options, words):
        with pytest.raises(GraphError, match=words):
            from_chat(tokenizer_of("llama3"), self.MESSAGES, ["Lumo.", "Vex."], **options)


NO_HEADER = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_documents_behind_a_root_where_a_template_writes_nothing_before_them():
    tokenizer = make_tokenizer(Family(NO_HEADER, ("<s>",), bos="<s>"))
    bare = from_chat(tokenizer, [user("Which city?")], ["Lumo.", "Vex."])
    assert [len(bare.parents(f"document {i}")) for i in (1, 2)] == [0, 0]
    for root in ("bos", "<s>", [tokenizer.bos_token_id], bos(tokenizer)):
        prompt = compile_prompt(from_chat(tokenizer, [user("Which city?")], ["Lumo.", "Vex."], root=root), tokenizer)
        first = ICLNode([tokenizer.bos_token_id])
        documents = [ICLNode(text, [first]) for text in ("Lumo.", "Vex.")]
        by_hand = compile_prompt(ICLNode("Which city?", [first, *documents]), tokenizer)
        assert prompt.input_ids.tolist() == by_hand.input_ids.tolist()
        assert prompt.position_ids.tolist() == by_hand.position_ids.tolist()
        assert prompt.dense_mask().tolist() == by_hand.dense_mask().tolist()


def test_a_root_in_front_of_a_whole_conversation():
    tokenizer = tokenizer_of("chatml")
    prompt = compile_prompt(from_chat(tokenizer, TURNS, root="Hello"), tokenizer)
    ids = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert prompt.input_ids[0].tolist() == ids + template_ids(tokenizer, TURNS)
    assert prompt.visible.is_causal
