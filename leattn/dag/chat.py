"""A conversation as a graph: the model's own chat template, rendered and tokenized once, cut into messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from leattn.dag.builders import Content, Root, as_root
from leattn.dag.documents import DocumentTemplate, documents_of, ungrouped
from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, Prefix
from leattn.dag.reading import Read
from leattn.dag.template import Message, Span, Template, content_of, locate, turns_of, which
from leattn.dag.written import check_written, gap_of, options_of, with_headers, with_stand_ins
from leattn.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_FOR_TEMPLATES = (
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
)


def from_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    documents: Sequence[Content | Read] | Read = (),
    *,
    document_template: DocumentTemplate | None = None,
    document_separator: Content = "",
    document_ids: Sequence[str | None] | None = None,
    root: Root | None = None,
    add_generation_prompt: bool | None = None,
    **template_options: Any,
) -> ICLGraph:
    """A graph whose nodes are the messages of a conversation, with documents as parallel nodes before the last question.

    The chat template is rendered over the whole conversation and tokenized once; the message nodes hold slices of those
    ids. Joined, they are what ``tokenizer.apply_chat_template`` returns. Each message sees all before it, so that without
    documents the graph is the plain prompt.

    Parameters
    ----------
    tokenizer
        A fast one, which knows where in the text its tokens stand, with a chat template.
    messages
        Mappings with ``role`` and ``content`` (text; None or left out where a template allows it, as beside tool calls).
        ``{"role": "assistant", "generate": {"max_new_tokens": 64, …}}`` is a turn that the model writes: a :class:`GenNode`
        with those options, whose header is the one of an answer. It may be the last message, or be followed by others.
    documents
        Texts or token ids. They stand in the last user turn, right before the user's text, and are tokenized each by itself.
        Each sees what stands before it, its turn's header included, and no other document; the user's text, and all that
        follows, sees every one, in groups of :func:`leattn.read` as those say. Nothing in the text of a document becomes a
        control token.
    document_template
        How each is written: a format string with ``{text}`` and, if wanted, its number ``{i}``, from 1; or a function of number
        and document, which returns text or token ids. Text around text is tokenized with it, as text too; text around token
        ids by itself. A number makes a document another one in another place, for what is stored of it too.
    document_separator
        Text or token ids that end every document, the last one too, so that no place among them is special.
    document_ids
        Their names in the graph; without one, ``"document 1"``, ….
    root
        A node in front of the conversation, which every node sees: text, token ids, a node, or ``"bos"``. For templates that
        write nothing before the documents; most write a BOS or a header there, which is a root already.
    add_generation_prompt
        Whether the header of an answer ends the prompt. By default, if the last message is from the user or a tool, or is
        to be written.
    **template_options
        For the template, such as ``tools``, ``enable_thinking``, ``continue_final_message``, ``chat_template``.

    Returns
    -------
    ICLGraph
        With a role as id (``"system"``), numbered if several messages have it (``"user 1"``, ``"user 2"``), and
        ``"document 1"``, …, and ``"root"``. With documents, the header of the last user turn is a node of its own
        (``"user header"``).

    Raises
    ------
    GraphError
        A slow tokenizer, no chat template, a conversation that the template refuses, a message whose text it drops, repeats
        or changes by more than leaving out a part or writing it as JSON, documents without a user message. A turn to be
        written that others follow, if the template does not show it after the very text that asks for it. A template of
        documents that does not hold ``{text}`` once, or another number of their ids than of documents.

    Examples
    --------
    >>> from leattn import compile_prompt
    >>> from leattn.tiny.tokenizer import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> graph = from_chat(tokenizer, [{"role": "user", "content": "Which city?"}], ["Lumo.", "Vex."])
    >>> [graph.name(node) for node in graph.parents("user")]
    ['user header', 'document 1', 'document 2']
    >>> compile_prompt(graph, tokenizer)["document 2"].text
    'Vex.'

    Documents in a frame of one's own:

    >>> cities = {"document_template": "[{i}] {text}", "document_separator": "\\n"}
    >>> graph = from_chat(tokenizer, [{"role": "user", "content": "Which city?"}], ["Lumo.", "Vex."], **cities)
    >>> graph["document 2"].content
    '[2] Vex.\\n'

    An answer that the model writes, and a question about it:

    >>> answer = {"role": "assistant", "generate": {"max_new_tokens": 8}}
    >>> graph = from_chat(tokenizer, [{"role": "user", "content": "Which city?"}, answer, {"role": "user", "content": "Why?"}])
    >>> print(graph)
    └── user 2
        ├── user 1
        ├── assistant ✎ ≤ 8 tokens
        │   └── user 1
        └── assistant footer
            ├── user 1
            └── assistant ✎ ≤ 8 tokens ↑

    Notes
    -----
    Control text belongs to the message it wraps: a header to the message after it, a footer to the one before. What stands
    before the first message (BOS, a default system prompt) belongs to that one, the generation prompt to the last one. Text
    between two messages that is neither goes to the earlier one. A token that straddles a boundary belongs to the side of
    its first character that is no whitespace: the space of ``" What"`` follows its word. Nodes are in the order of the
    text: some templates move the system message to the last user turn.
    A blank message that the template does not show has no node.

    What closes a turn that the model writes is a node after it (``"assistant footer"``), and the control token that this
    begins with is one of the turn's stop strings. Where a template writes no header of an answer, it is what closes the turn
    before (``[/INST]``). What the model writes stands as it is: no template trims it.

    A control string in the text of a message, unlike in a document, is parsed as ``apply_chat_template`` parses it.
    """
    contents, groups = ungrouped(documents)
    checked = _checked(tokenizer, messages, template_options)
    last, written_last = len(checked) - 1, "generate" in checked[-1]
    if written_last and add_generation_prompt is False:
        raise GraphError(f"{which(checked, last)} is written after its header; leave out add_generation_prompt=False")
    if add_generation_prompt is None:
        add_generation_prompt = written_last or checked[-1]["role"] in ("user", "tool", "ipython", "function")
    render = Template(tokenizer, add_generation_prompt, template_options)
    told = with_stand_ins(checked)
    shown = told[:last] if written_last else told
    text = render(shown)
    places, marked = locate(render, shown, text)
    if written_last:
        places[last] = (len(text), len(text))
        marked.append(told[last])
    gaps = {i: gap_of(render, told, i, places[i], text) for i, message in enumerate(checked) if "generate" in message}
    turns = with_headers(turns_of(render, marked, places, text), gaps, places)
    ids, token_starts = _tokenized(tokenizer, text, sorted(gaps.values()))
    bounds = [0, *(int(np.searchsorted(token_starts, start)) for _, start in turns[1:]), len(ids)]
    asker = max((i for i, message in enumerate(checked) if message["role"] == "user"), default=None)
    if contents and asker is None:
        raise GraphError("documents stand before the text of the last user message, but no message is from a user; add one")
    if contents and asker is not None and asker not in places:
        raise GraphError(f"the template shows no text of {which(checked, asker)}, so documents have no place; give it some")
    names = _names(checked)
    framed = documents_of(tokenizer, contents, document_template, document_separator, document_ids)
    nodes: list[ICLNode] = list(as_root(root, tokenizer))
    readings: list[Read] = []  # of what follows the documents

    def add(token_ids: Sequence[int], name: str) -> None:
        nodes.append(ICLNode(token_ids, Prefix(nodes, len(nodes), tuple(readings)), name))

    for (i, _), start, stop in zip(turns, bounds, bounds[1:], strict=False):
        if contents and i == asker:
            text_start = min(max(int(np.searchsorted(token_starts, places[i][0])), start), stop)
            if start < text_start:
                add(ids[start:text_start], f"{names[i]} header")
            before = Prefix(nodes, len(nodes))
            for document, name in framed:
                nodes.append(ICLNode(document, before, name, special_tokens="text"))
            shown_documents = nodes[len(before) :]
            readings += [Read(tuple(shown_documents[k] for k in members), reading) for members, reading in groups]
            start = text_start
        if i in gaps:
            written = int(np.searchsorted(token_starts, gaps[i][0]))
            if start >= written:
                raise GraphError(
                    f"the chat template writes nothing between {which(checked, i)}, which the model is to write, and the text "
                    "before it, so its node would have no header; build the graph from ICLNodes"
                )
            options = options_of(tokenizer, render, checked, marked, i)
            nodes.append(GenNode(ids[start:written], Prefix(nodes, len(nodes), tuple(readings)), names[i], **options))
            if written < stop:
                add(ids[written:stop], f"{names[i]} footer")
        elif start < stop:
            add(ids[start:stop], names[i])
        elif content_of(checked[i]).strip() or (contents and i == asker):
            raise GraphError(f"{which(checked, i)} has no token of its own in the rendered conversation; give it more text")
    return ICLGraph(*nodes)


def _tokenized(tokenizer: PreTrainedTokenizerBase, text: str, gaps: Sequence[Span]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Token ids of the text, and the character that each begins with.

    What stands before a gap and what stands behind it are tokenized apart: other tokens will be in between.
    """
    ids: list[int] = []
    starts: list[int] = []
    begin = 0
    for stop, resume in [*gaps, (len(text), len(text))]:
        piece = text[begin:stop]
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        starts += [begin + _place(piece, start, end) for start, end in encoded["offset_mapping"]]
        begin = resume
    # A token without width, such as a prefix space, stays with the one before.
    return ids, np.maximum.accumulate(np.asarray(starts, np.int64))


def _place(text: str, start: int, end: int) -> int:
    """The character that decides where a token belongs: the first that is no whitespace, or the first."""
    token = text[start:end]
    return start + (len(token) - len(token.lstrip()) if token.strip() else 0)


def _checked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]) -> list[Message]:
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise GraphError(f"{kind} is a slow tokenizer, which does not say where its tokens stand; load the fast one")
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise GraphError(f"{kind} has no chat template; set tokenizer.chat_template, or build the graph from ICLNodes")
    wrong = next((name for name in options if name in NOT_FOR_TEMPLATES), None)
    if wrong is not None:
        raise GraphError(f"{wrong!r} is no option of from_chat, which renders and tokenizes by itself; leave it out")
    if isinstance(messages, str | Mapping) or not messages:
        raise GraphError(f"messages is a list of mappings with 'role' and 'content', not {messages!r}; give at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise GraphError(f"message {i} is {message!r}; give a mapping with a 'role' and a 'content'")
        if not isinstance(message.get("content"), str | None):
            raise GraphError(
                f"{which(messages, i)} has content of type {type(message['content']).__name__}; "
                "from_chat takes text, so join its parts into one string"
            )
    check_written(messages)
    return list(messages)


def _names(messages: Sequence[Message]) -> list[str]:
    """Roles, numbered where several messages have the same."""
    roles = [str(message["role"]) for message in messages]
    return [role if roles.count(role) == 1 else f"{role} {roles[: i + 1].count(role)}" for i, role in enumerate(roles)]
