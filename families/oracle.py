"""What a model computes for a node of a graph, found out without leattn.

The mask is written by loops over tokens and handed to the plain model, loaded with eager. How a family wants it differs: one
4-D mask, a dict with one per layer type, or not at all, and then it is put in front of the softmax (see
:mod:`families.softmax`). None of them is believed: a way counts only if, on graphs with siblings, every node whose ancestors
are plain text gets what ``model(input_ids)`` gives for that text alone, and if two orders of the siblings give the same. Where
no way does, only nodes that are plain text have an oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from families.build import Builder, run
from families.prompts import Graph, alone, fan, graph_tokens, is_plain, long_fan, reordered, start_of
from families.softmax import masked_softmax

LONG = 100
"""Tokens from which on a graph counts as long."""


def difference(found: Tensor, right: Tensor) -> float:
    """The largest error, relative to the largest value; not a number where a value is not."""
    return float((found.float() - right.float()).abs().max() / right.float().abs().max())


def mask_of(graph: Graph) -> list[list[bool]]:
    """``mask[q][k]``: a token sees its own node up to itself, and the whole of the nodes that its node names."""
    places = [(chunk, i) for chunk in graph for i in range(len(chunk.tokens))]
    return [[(j <= i) if query is key else key.name in query.parents for key, j in places] for query, i in places]


def positions_of(graph: Graph) -> list[int]:
    """The position of every token."""
    starts = start_of(graph)
    return [starts[chunk.name] + i for chunk in graph for i in range(len(chunk.tokens))]


def within(mask: list[list[bool]], positions: list[int], window: int | None) -> Tensor:
    """The mask ``[S, S]`` of layers with a sliding window, which is measured in positions."""
    allowed = torch.tensor(mask)
    if window is None:
        return allowed
    at = torch.tensor(positions)
    return allowed & (at[:, None] - at[None] < window)


def additive(allowed: Tensor) -> Tensor:
    """``[1, 1, S, S]``: 0 where a token may attend, the lowest number elsewhere."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


def windows_of(config: Any) -> list[int | None]:
    """The sliding window of every layer, as the config says it."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types:
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window] * int(getattr(text, "num_hidden_layers", 1))


class Way:
    """One way to hand a mask to a plain model; it is believed for sequences of up to ``longest`` tokens."""

    name = ""
    longest: int | None = None

    def __init__(self, builder: Builder, offset: int) -> None:
        self.builder, self.offset = builder, offset
        self.windows = windows_of(builder.config)

    def logits(self, graph: Graph) -> Tensor:
        """``[S, V]``, in the order of the graph."""
        ids = torch.tensor([token for chunk in graph for token in chunk.tokens])
        positions = positions_of(graph)
        return self.run(ids, mask_of(graph), positions, torch.tensor([[at + self.offset for at in positions]]))

    def run(self, ids: Tensor, mask: list[list[bool]], at: list[int], position_ids: Tensor) -> Tensor:
        raise NotImplementedError


class OneMask(Way):
    """The same 4-D mask for all layers; of use where they all have the same window."""

    name = "one 4-D mask"

    def run(self, ids: Tensor, mask: list[list[bool]], at: list[int], position_ids: Tensor) -> Tensor:
        if len(set(self.windows)) > 1:
            raise ValueError("layers have different windows")
        given = additive(within(mask, at, self.windows[0]))
        return run(self.model(), ids, attention_mask=given, position_ids=position_ids, use_cache=False)

    def model(self) -> Any:
        return self.builder.fresh("eager")


class PlainMask(OneMask):
    """One 4-D mask without windows, whatever the config says of them."""

    name = "one 4-D mask, no window"

    def __init__(self, builder: Builder, offset: int) -> None:
        super().__init__(builder, offset)
        self.windows = [None]


class MaskPerType(Way):
    """A dict of 4-D masks, one per layer type."""

    name = "a 4-D mask per layer type"

    def run(self, ids: Tensor, mask: list[list[bool]], at: list[int], position_ids: Tensor) -> Tensor:
        types = self.builder.config.get_text_config(decoder=True).layer_types
        given = {kind: additive(within(mask, at, window)) for kind, window in zip(types, self.windows, strict=True)}
        model = self.builder.fresh("eager")
        return run(model, ids, attention_mask=given, position_ids=position_ids, use_cache=False)


class MaskedSoftmax(Way):
    """Scores are masked where the model calls softmax; the model's own windows are made too wide to bite."""

    name = "masked softmax"

    def run(self, ids: Tensor, mask: list[list[bool]], at: list[int], position_ids: Tensor) -> Tensor:
        allowed = {window: within(mask, at, window) for window in set(self.windows)}
        model = self.builder.fresh("eager", windows=False)
        with masked_softmax([allowed[window] for window in self.windows]):
            return run(model, ids, attention_mask=torch.ones_like(ids[None]), position_ids=position_ids, use_cache=False)


class Oracle:
    """The answers for one family. ``how`` says how they are found, ``why`` why no better way was."""

    def __init__(self, builder: Builder) -> None:
        self.builder, self.tolerance = builder, builder.tolerance
        self._plain: dict[tuple[int, ...], Tensor] = {}
        self._logits: dict[Graph, Mapping[str, Tensor]] = {}
        self.tried: dict[str, str] = {}
        self.way = next(self._ways(), None)
        self.how = "plain text only" if self.way is None else self.way.name

    def _ways(self) -> Iterator[Way]:
        kinds: tuple[type[Way], ...] = (OneMask, MaskPerType, PlainMask, MaskedSoftmax)
        yield from self._believed(kinds, 0)
        # BERT's relatives count from the position after padding's; whether this one does shows in plain text.
        if any("plain model" in reason for reason in self.tried.values()):
            yield from self._believed(kinds, (getattr(self.builder.config, "pad_token_id", None) or 0) + 1)

    def _believed(self, kinds: Sequence[type[Way]], offset: int) -> Iterator[Way]:
        for kind in kinds:
            way = kind(self.builder, offset)
            reason = self._objection(way)
            if reason is None:
                yield way
            else:
                self.tried[f"{kind.name}{f', positions from {offset}' if offset else ''}"] = reason

    def _objection(self, way: Way) -> str | None:
        """Why a way is not to be believed."""
        reason = self._objection_on(way, fan())
        if reason is None and self._objection_on(way, long_fan()) is not None:
            way.longest = LONG  # what depends on the length of the input may do so from some length on
        return reason

    def _objection_on(self, way: Way, graph: Graph) -> str | None:
        try:
            found = split(graph, way.logits(graph))
            other = reordered(graph, ["root", "c", "b", "a", "question", "tail"])
            again = split(other, way.logits(other))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        for chunk in graph:
            if is_plain(graph, chunk.name):
                off = difference(found[chunk.name], self.plain_node(graph, chunk.name))
                if not off < self.tolerance:
                    return f"{chunk.name} differs by {off:.1e} from the plain model on its text alone"
            off = difference(found[chunk.name], again[chunk.name])
            if not off < self.tolerance:
                return f"{chunk.name} changes by {off:.1e} when the documents are laid out in another order"
        return None

    def plain(self, ids: tuple[int, ...]) -> Tensor:
        """What the model computes by itself, ``model(input_ids)`` and nothing else, ``[S, V]``."""
        if ids not in self._plain:
            self._plain[ids] = run(self.builder.fresh("eager"), torch.tensor(ids))
        return self._plain[ids]

    def plain_node(self, graph: Graph, name: str) -> Tensor:
        """The rows of a node whose ancestors are plain text, from the plain model on that text."""
        text = tuple(token for chunk in alone(graph, name) for token in chunk.tokens)
        return self.plain(text)[len(text) - len(graph_tokens(graph, name)) :]

    def knows(self, graph: Graph, name: str) -> bool:
        """Whether there is an answer for a node."""
        return is_plain(graph, name) or self.follows(graph)

    def follows(self, graph: Graph) -> bool:
        """Whether there is an answer for every node of a graph."""
        longest = None if self.way is None else self.way.longest
        return self.way is not None and (longest is None or sum(len(chunk.tokens) for chunk in graph) < longest)

    def node(self, graph: Graph, name: str) -> Tensor:
        """The logits of a node, computed from it and its ancestors alone, ``[n, V]``."""
        if is_plain(graph, name):
            return self.plain_node(graph, name)
        assert self.way is not None
        own = alone(graph, name)
        if own not in self._logits:
            self._logits[own] = split(own, self.way.logits(own))
        return self._logits[own][name]

    def power(self) -> float:
        """How much the question's logits change when the document that it must not see is opened to it."""
        if self.way is None:
            return float("nan")
        graph = fan()
        question = next(chunk for chunk in graph if chunk.name == "question")
        opened = tuple(
            type(question)(chunk.name, chunk.tokens, (*chunk.parents, "c"), start_of(graph)["question"])
            if chunk is question
            else chunk
            for chunk in graph
        )
        return difference(self.node(opened, "question"), self.node(graph, "question"))


def split(graph: Graph, logits: Tensor) -> Mapping[str, Tensor]:
    """Rows by node."""
    parts = torch.split(logits, [len(chunk.tokens) for chunk in graph])
    return {chunk.name: part for chunk, part in zip(graph, parts, strict=True)}
