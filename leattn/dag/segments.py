"""A graph from one tokenized text and its segments: nothing is tokenized twice, nothing moves."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, Prefix
from leattn.errors import GraphError

TokenIds: TypeAlias = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``end`` (exclusive) of a text. A mapping with these keys says the same.

    Attributes
    ----------
    start, end
        In tokens.
    id
        Its name, or None.
    parents
        The segments it sees: ids (str), or indices (int) into the list of segments as given. All end before this one starts.
    metadata
        Whatever the tokens are; :func:`from_segments` does not read it.

    Examples
    --------
    >>> from_segments([5, 6, 7], [Segment(0, 2, "a"), Segment(2, 3, "b", parents=["a"])])
    ICLGraph(2 nodes, sinks: 'b')
    """

    start: int
    end: int
    id: str | None = None
    parents: Sequence[str | int] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def from_segments(input_ids: TokenIds, segments: Iterable[Segment | Mapping[str, Any]]) -> ICLGraph:
    """A graph whose nodes are the segments of one tokenized text.

    Nodes hold the text's own token ids and are pinned to their place in it (``start_pos_id`` = ``start``), so the compiled
    prompt has the ids and positions of the plain text and differs from it by its mask alone.

    Parameters
    ----------
    input_ids
        The text: ``[S]`` or ``[1, S]``, a tensor or lists.
    segments
        :class:`Segment` or mappings with the keys ``start``, ``end`` and optionally ``id``, ``parents``, ``metadata``. In
        any order; together they cover the text, each token once.

    Raises
    ------
    GraphError
        Segments that are empty, overlap, leave a gap or leave the text; an id given twice; a parent that is unknown, later
        in the text or the segment itself.

    Examples
    --------
    >>> from leattn import compile_prompt
    >>> segments = [
    ...     {"start": 0, "end": 2, "id": "a"},
    ...     {"start": 2, "end": 3, "id": "b"},
    ...     {"start": 3, "end": 5, "id": "Q", "parents": ["b"]},
    ... ]
    >>> print(compile_prompt(from_segments([5, 6, 7, 8, 9], segments)))
    3 nodes, 5 tokens, density 0.60
      0  a  tokens 0:2  positions 0:2  ■⬚⬚
      1  b  tokens 2:3  positions 2:3  ⬚■⬚
      2  Q  tokens 3:5  positions 3:5  ⬚■■

    Notes
    -----
    Parents written as ``range(i)`` over segments in text order take constant memory, however many they are.
    """
    tokens = as_tokens(input_ids)
    given = as_segments(segments)
    rank = in_text_order(given, len(tokens))
    seen = _parents(given, rank)
    order = sorted(range(len(given)), key=rank.__getitem__)
    return build(tokens, [given[i] for i in order], [seen[i] for i in order])


def build(tokens: list[int], ordered: Sequence[Segment], seen: Sequence[Sequence[int]]) -> ICLGraph:
    """Nodes for segments in text order; ``seen`` holds indices into that order, a ``range`` from 0 at no cost."""
    nodes: list[ICLNode] = []
    shared: dict[int, tuple[ICLNode, ...]] = {}
    for segment, indices in zip(ordered, seen, strict=True):
        parents: Sequence[ICLNode]
        if isinstance(indices, range) and indices == range(len(indices)):
            parents = Prefix(nodes, len(indices))
        else:
            if id(indices) not in shared:
                shared[id(indices)] = tuple(nodes[i] for i in indices)
            parents = shared[id(indices)]
        nodes.append(ICLNode(tokens[segment.start : segment.end], parents, segment.id, start_pos_id=segment.start))
    return ICLGraph(*nodes)


def as_tokens(input_ids: TokenIds) -> list[int]:
    """The ids of one text as a list."""
    try:
        tensor = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError):
        raise GraphError(f"input_ids is a tensor or a list of token ids, not {str(input_ids)[:60]!r}; tokenize first") from None
    if tensor.numel() == 0:
        raise GraphError("input_ids is empty; a graph needs at least one token")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise GraphError(f"input_ids has dtype {tensor.dtype}; give whole numbers")
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 1:
        raise GraphError(f"input_ids has shape {list(tensor.shape)}; give one text, [S] or [1, S], e.g. input_ids[:1]")
    return [int(token) for token in tensor.tolist()]


def as_segments(segments: Iterable[Segment | Mapping[str, Any]]) -> list[Segment]:
    """Mappings become segments; types and ids are checked, places are not."""
    known = tuple(one.name for one in fields(Segment))
    found: list[Segment] = []
    indices: dict[str, int] = {}
    for i, given in enumerate(segments):
        if isinstance(given, Segment):
            given = {name: getattr(given, name) for name in known}
        if not isinstance(given, Mapping) or not {"start", "end"} <= set(given):
            raise GraphError(f"segment {i} is {given!r}; give a Segment or a mapping with 'start' and 'end'")
        unknown = [key for key in given if key not in known]
        if unknown:
            raise GraphError(f"segment {i} has an unknown key {unknown[0]!r}; known are {', '.join(known)}")
        name, metadata = given.get("id"), given.get("metadata")
        if name is not None and not isinstance(name, str):
            raise GraphError(f"segment {i} has the id {name!r}; an id is a string")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise GraphError(f"segment {i} has the metadata {metadata!r}; metadata is a mapping")
        if name is not None and name in indices:
            raise GraphError(f"id {name!r} is given to segments {indices[name]} and {i}; ids are unique, change one of them")
        if name is not None:
            indices[name] = i
        start, end = _whole(given["start"], i, "start"), _whole(given["end"], i, "end")
        found.append(Segment(start, end, name, _parent_list(given.get("parents"), i), metadata or {}))
    if not found:
        raise GraphError("there are no segments; give at least one, which covers the text")
    return found


def in_text_order(segments: Sequence[Segment], size: int) -> list[int]:
    """The place of each segment along the text, after checking that they cover its ``size`` tokens once."""
    for i, segment in enumerate(segments):
        if not 0 <= segment.start <= segment.end <= size:
            raise GraphError(
                f"{_name(segments, i)} is tokens {segment.start}:{segment.end}, but the text has {size} tokens; "
                f"keep 0 <= start < end <= {size}"
            )
        if segment.start == segment.end:
            raise GraphError(f"{_name(segments, i)} is empty, tokens {segment.start}:{segment.end}; remove or extend it")
    order = sorted(range(len(segments)), key=lambda i: segments[i].start)
    for a, b in pairwise(order):
        if segments[b].start < segments[a].end:
            raise GraphError(
                f"{_name(segments, a)}, tokens {segments[a].start}:{segments[a].end}, and {_name(segments, b)}, tokens "
                f"{segments[b].start}:{segments[b].end}, overlap; a token belongs to one segment"
            )
    ends = [0, *(segments[i].end for i in order)]
    for end, start in zip(ends, [*(segments[i].start for i in order), size], strict=True):
        if end < start:
            raise GraphError(f"tokens {end}:{start} of the text belong to no segment; add one for them, or cut them out first")
    rank = [0] * len(segments)
    for place, i in enumerate(order):
        rank[i] = place
    return rank


def _parents(segments: Sequence[Segment], rank: Sequence[int]) -> list[Sequence[int]]:
    """What each segment sees, as places along the text."""
    by_id = {segment.id: i for i, segment in enumerate(segments) if segment.id is not None}
    sorted_as_given = list(rank) == list(range(len(rank)))
    seen: list[Sequence[int]] = []
    for i, segment in enumerate(segments):
        if sorted_as_given and isinstance(segment.parents, range) and segment.parents == range(min(len(segment.parents), i)):
            seen.append(segment.parents)
            continue
        places: list[int] = []
        for parent in segment.parents:
            index = by_id.get(parent) if isinstance(parent, str) else parent
            if index is None or not 0 <= index < len(segments):
                names = ", ".join(map(repr, list(by_id)[:8])) or "none"
                raise GraphError(
                    f"{_name(segments, i)} names the parent {parent!r}, which does not exist; there are indices 0 to "
                    f"{len(segments) - 1} and the ids {names}"
                )
            if rank[index] >= rank[i]:
                later = f"the later {_name(segments, index)}, which starts at {segments[index].start}"
                where = "itself" if index == i else later
                raise GraphError(
                    f"{_name(segments, i)}, which starts at token {segment.start}, names as parent {where}; "
                    "a segment sees only what ends before it starts"
                )
            places.append(rank[index])
        if len(set(places)) < len(places):
            raise GraphError(f"{_name(segments, i)} names a parent twice in {list(segment.parents)!r}; name each once")
        seen.append(places)
    return seen


def _parent_list(parents: Any, i: int) -> Sequence[str | int]:
    if parents is None:
        return ()
    if isinstance(parents, range):
        return parents
    if isinstance(parents, str) or not isinstance(parents, Iterable):
        raise GraphError(f"segment {i} has parents={parents!r}; give a list of ids and indices")
    return tuple(parent if isinstance(parent, str) else _whole(parent, i, "parent") for parent in parents)


def _whole(value: Any, i: int, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        wanted = "an id (text) or an index (a whole number)" if what == "parent" else "a whole number"
        raise GraphError(f"segment {i} has {what} {value!r}; give {wanted}") from None


def _name(segments: Sequence[Segment], i: int) -> str:
    return f"segment {i}" if segments[i].id is None else f"segment {segments[i].id!r}"
