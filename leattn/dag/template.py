"""Where the messages of a conversation stand in what its chat template renders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from leattn.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
Span: TypeAlias = tuple[int, int]


class Template:
    """The tokenizer's template with this conversation's options: messages → text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation: bool, options: Mapping[str, Any]) -> None:
        self.tokenizer, self.generation, self.options = tokenizer, generation, options

    def __call__(self, messages: Sequence[Message]) -> str:
        try:
            return self._apply(messages, add_generation_prompt=self.generation, **self.options)
        except ImportError:
            raise
        except Exception as error:  # a template raises what it likes
            raise GraphError(f"the chat template refuses this conversation: {error}") from error

    def beginning(self, messages: Sequence[Message]) -> str | None:
        """The first messages alone, nothing after them; None if the template refuses those."""
        return self._part(messages, add_generation_prompt=False)

    def asking(self, messages: Sequence[Message]) -> str | None:
        """The first messages and the header of an answer; None if the template refuses those."""
        return self._part(messages, add_generation_prompt=True)

    def _part(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
        options = {**self.options, "continue_final_message": False, "add_generation_prompt": add_generation_prompt}
        try:
            return self._apply(messages, **options)
        except Exception:
            return None

    def _apply(self, messages: Sequence[Message], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options))


def locate(render: Template, messages: Sequence[Message], text: str) -> tuple[dict[int, Span], list[Message]]:
    """Where the text of each message stands in the rendered conversation: message index → span in characters.

    A second rendering with marks in place of the texts shows what the template itself writes. Also returns the messages with
    the marks. Templates may treat an empty message in a way of its own, so a second try leaves blank ones as they are.
    """
    salt = unused("leattn", [text, *(content_of(message) for message in messages)])
    problem = ""
    for keep_blank in (False, True):
        marked: list[Message] = [
            message if keep_blank and not content_of(message).strip() else {**message, "content": _mark(salt, i)}
            for i, message in enumerate(messages)
        ]
        try:
            rendered = render(marked)
        except GraphError as error:
            problem = str(error)
            continue
        counts = [rendered.count(_mark(salt, i)) for i in range(len(messages))]
        odd = [i for i, message in enumerate(messages) if counts[i] > 1 or (counts[i] == 0 and content_of(message).strip())]
        if odd:
            shown = "does not show" if counts[odd[0]] == 0 else f"shows {counts[odd[0]]} times"
            problem = f"the chat template {shown} the text of {which(messages, odd[0])}"
            continue
        order = sorted((i for i in range(len(messages)) if counts[i]), key=lambda i: rendered.index(_mark(salt, i)))
        pieces, rest = [], rendered
        for i in order:
            piece, _, rest = rest.partition(_mark(salt, i))
            pieces.append(piece)
        pieces.append(rest)
        spans = _align(pieces, [_written(content_of(messages[i]), pieces[k : k + 2]) for k, i in enumerate(order)], text)
        if not isinstance(spans, int):
            return dict(zip(order, spans, strict=True)), marked
        problem = (
            f"the chat template changes the texts of messages: that of {which(messages, order[spans])} is not found in what it "
            "renders, neither as it is nor as JSON, so give it one that the template leaves as it is"
            if order
            else "the chat template writes another text around messages that it does not show"
        )
    raise GraphError(f"{problem}; change the conversation, or build the graph from ICLNodes")


def _written(content: str, around: Sequence[str]) -> list[str]:
    """How a text may stand between two pieces of a template: as it is, or, in quotes, as JSON (Llama 3.1's tool results)."""
    before, after = around
    if not (before.endswith('"') and after.startswith('"')):
        return [content]
    return [content, *(json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))]


def _align(pieces: Sequence[str], contents: Sequence[Sequence[str]], text: str) -> list[Span] | int:
    """Spans of the contents, such that ``text`` is ``pieces[0]``, a part of one of ``contents[0]``, ``pieces[1]``, …

    Templates trim messages, or drop what was thought before an answer. The longest part goes first. Where it cannot be done,
    the first content for which there is no place.
    """
    if not text.startswith(pieces[0]):
        return 0

    def spans_of(k: int, start: int) -> Iterator[Span]:
        # Each (k, start) is tried once: a second visit would fail as the first did.
        if (k, start) in visited:
            return
        visited.add((k, start))
        piece = pieces[k + 1]
        longest = max(map(len, contents[k]))
        for stop in range(min(start + longest, len(text) - len(piece)), start - 1, -1):
            ends = k + 1 < len(contents) or stop + len(piece) == len(text)
            if ends and text.startswith(piece, stop) and any(text[start:stop] in content for content in contents[k]):
                yield start, stop

    visited: set[tuple[int, int]] = set()
    found: list[Span] = []
    if not contents:
        return found if text == pieces[0] else 0
    tries = [spans_of(0, len(pieces[0]))]
    furthest = 0
    while tries:
        furthest = max(furthest, len(tries) - 1)
        span = next(tries[-1], None)
        if span is None:
            tries.pop()
            if found:
                found.pop()
        elif len(tries) == len(contents):
            return [*found, span]
        else:
            found.append(span)
            tries.append(spans_of(len(tries), span[1] + len(pieces[len(tries)])))
    return furthest


def turns_of(render: Template, marked: Sequence[Message], places: Mapping[int, Span], text: str) -> list[tuple[int, int]]:
    """``(message, first character)`` of each turn, along the text.

    Where a turn ends shows in a rendering that ends with it: what stands there behind the last text is its footer.
    """
    order = sorted(places, key=lambda i: places[i])
    turns: list[tuple[int, int]] = []
    # A text that is not there stands at the front, for blank messages without a place before the first one with.
    for a, b in zip([-1, *order], [*order, None], strict=True):
        mark = "" if a < 0 else str(marked[a]["content"])
        cut = end = 0 if a < 0 else places[a][1]
        stop = len(text) if b is None else places[b][0]
        if a >= 0:
            footer = footer_of(render, marked[: a + 1], mark)
            cut = end + len(footer) if footer is not None and text[end:stop].startswith(footer) else stop
        i = a + 1
        while i < len(marked) and i not in places:
            footer = footer_of(render, marked[: i + 1], mark)
            if footer is not None and end + len(footer) > cut and text[end:stop].startswith(footer):
                turns.append((i, cut))
                cut = end + len(footer)
            i += 1
        if b is not None:
            turns.append((b, cut))
    return turns


def footer_of(render: Template, messages: Sequence[Message], mark: str) -> str | None:
    """What follows ``mark`` if the conversation ends after these messages; None if that cannot be known."""
    rendered = render.beginning(messages)
    if rendered is None or (mark and rendered.count(mark) != 1):
        return None
    return rendered.partition(mark)[2] if mark else rendered


def content_of(message: Message) -> str:
    """The text of a message, empty if it has none."""
    return message.get("content") or ""


def unused(salt: str, texts: Sequence[str]) -> str:
    """``salt``, lengthened until none of the texts holds it."""
    while any(salt in text for text in texts):
        salt += "x"
    return salt


def _mark(salt: str, i: int) -> str:
    # Letters and digits, so that no template trims, splits or escapes it; the end keeps 1 from matching 11.
    return f"{salt}{i}z"


def which(messages: Sequence[Message], i: int) -> str:
    """How errors call a message."""
    return f"message {i} ({messages[i]['role']})"
