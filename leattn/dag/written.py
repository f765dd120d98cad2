"""Turns of a conversation that the model is to write: where each begins in the rendered text, and what ends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leattn.dag.template import Message, Span, Template, content_of, footer_of, unused, which
from leattn.dag.tokens import control_tokens
from leattn.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIXED = ("content", "parents", "id", "start_pos_id", "special_tokens")


def check_written(messages: Sequence[Message]) -> None:
    """Raise GraphError for a message with ``generate`` that no node can be made of."""
    for i, message in enumerate(messages):
        if "generate" not in message:
            continue
        options = message["generate"]
        if message["role"] != "assistant":
            raise GraphError(f"{which(messages, i)} has 'generate', but the model writes only turns of the role 'assistant'")
        if message.get("content") is not None:
            raise GraphError(f"{which(messages, i)} has both 'content' and 'generate'; leave one of them out")
        if not isinstance(options, Mapping) or "max_new_tokens" not in options:
            raise GraphError(
                f"'generate' of {which(messages, i)} is {options!r}; give a mapping with max_new_tokens, and what else a "
                "GenNode takes, such as stop and temperature"
            )
        fixed = next((name for name in _FIXED if name in options), None)
        if fixed is not None:
            raise GraphError(f"'generate' of {which(messages, i)} has {fixed!r}, which the conversation decides; leave it out")


def with_stand_ins(messages: Sequence[Message]) -> list[Message]:
    """The messages, with a text of letters and digits in place of what the model is to write."""
    salt = unused("written", [content_of(message) for message in messages])
    told: list[Message] = []
    for i, message in enumerate(messages):
        if "generate" in message:
            rest = {name: value for name, value in message.items() if name != "generate"}
            message = {**rest, "content": f"{salt}{i}z"}
        told.append(message)
    return told


def gap_of(render: Template, told: Sequence[Message], i: int, place: Span, text: str) -> Span:
    """The characters of ``text`` that what the model writes stands for: its stand-in, and whitespace before it.

    The stand-in must come right after what the template renders when message ``i`` is to be answered, or the model would go
    on from a conversation that later messages do not see. Whitespace in between the model writes by itself.
    """
    if place == (len(text), len(text)):
        return place
    start, stop = place
    opening = render.asking(told[:i])
    if opening is None or text[start:stop] != told[i]["content"]:
        raise GraphError(f"the chat template cannot be split at {which(told, i)}, which the model is to write; {_OTHERWISE}")
    if not text[:start].startswith(opening) or text[len(opening) : start].strip():
        raise GraphError(
            f"the model would write {which(told, i)} after another text than the one after which the chat template shows it to "
            f"later messages; {_OTHERWISE}"
        )
    return len(opening), stop


_OTHERWISE = "end the conversation there, and go on in a second one that holds what was written"


def with_headers(
    turns: Sequence[tuple[int, int]], gaps: Mapping[int, Span], places: Mapping[int, Span]
) -> list[tuple[int, int]]:
    """The turns, with a header for each that the model writes.

    Where the template writes none (Mistral, Llama 2), it is what closes the turn before: ``[/INST]``.
    """
    moved = list(turns)
    for k, (i, start) in enumerate(turns):
        if k and i in gaps and start >= gaps[i][0]:
            before, begin = moved[k - 1]
            moved[k] = (i, places[before][1] if before in places else begin)
    return moved


def options_of(
    tokenizer: PreTrainedTokenizerBase, render: Template, messages: Sequence[Message], marked: Sequence[Message], i: int
) -> dict[str, Any]:
    """What message ``i`` gives to its GenNode, with the control token that ends its turn among the stop strings.

    It is most often the model's EOS too; where the model's configuration does not say so, it ends the turn all the same.
    """
    options = dict(messages[i]["generate"])
    footer = (footer_of(render, marked[: i + 1], marked[i]["content"]) or "").lstrip()
    ends = [name for name in control_tokens(tokenizer).values() if footer.startswith(name)]
    if ends:
        given = options.get("stop") or ()
        options["stop"] = [*([given] if isinstance(given, str) else given), max(ends, key=len)]
    return options
