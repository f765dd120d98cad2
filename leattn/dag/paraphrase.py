"""Several phrasings of one question in one prompt, and what each of them sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, cast

import torch

from leattn.dag.builders import Content, Root, as_root, causal, parallel
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, Prefix
from leattn.dag.segments import Segment, TokenIds, as_segments, as_tokens, build, in_text_order
from leattn.errors import GraphError, LeattnError, choices

Pattern: TypeAlias = Literal["anchor", "shared", "isolated", "causal"]
Segments: TypeAlias = Iterable[Segment | Mapping[str, Any]]
PositionsAndMetadata: TypeAlias = tuple[Sequence[Sequence[int]], Sequence[Mapping[str, Any]]]
PATTERNS = ("anchor", "shared", "isolated", "causal")


def paraphrase_group(
    context: Content | ICLNode | Sequence[Content | ICLNode],
    questions: Iterable[Content],
    *,
    pattern: Pattern,
    answer: Content = "\nAnswer:",
    root: Root | None = None,
) -> ICLGraph:
    """A context, several phrasings of one question, and an answer that sees them all.

    Parameters
    ----------
    context
        A text, token ids, a node, or a list of texts and nodes. Each text sees everything before it. A node keeps the
        parents it has, and its ancestors belong to the context; nodes come before texts, as they exist already. An empty
        list: no context.
    questions
        The phrasings, in order, any number of them. Spaces and newlines between them are theirs to hold.
    pattern
        What a question sees besides itself. ``"anchor"``: the first nothing, the others the first. ``"shared"``: the
        context. ``"isolated"``: nothing. ``"causal"``: everything before it.
    answer
        What follows the questions. It sees everything.
    root
        A node in front of all, which every node sees, whatever the pattern: text, token ids, or a node; the BOS is
        ``leattn.bos(tokenizer)``. Without it, questions of ``"anchor"`` and ``"isolated"`` see nothing, which many models take
        badly (docs/roots.md).

    Returns
    -------
    ICLGraph
        With the ids ``"root"`` (of text or token ids), ``"context"`` (``"context 1"``, … for several texts), ``"Q1"``,
        ``"Q2"``, …, ``"answer"``.

    Raises
    ------
    LeattnError
        An unknown pattern.
    GraphError
        A single text for ``questions``, a node after a text in ``context``, or a node there that sees nothing and is not the
        root.

    Examples
    --------
    >>> from leattn import compile_prompt
    >>> print(compile_prompt(paraphrase_group([1, 2], [[3], [4], [5]], pattern="anchor", answer=[6])))
    5 nodes, 6 tokens, density 0.67
      0  context  tokens 0:2  positions 0:2  ■⬚⬚⬚⬚
      1  Q1       tokens 2:3  positions 0:1  ⬚■⬚⬚⬚
      2  Q2       tokens 3:4  positions 1:2  ⬚■■⬚⬚
      3  Q3       tokens 4:5  positions 1:2  ⬚■⬚■⬚
      4  answer   tokens 5:6  positions 2:3  ■■■■■

    Notes
    -----
    The edges are complete for ``visibility="parents"``. With ``"ancestors"`` the mask is the same, except that a node given
    as context then sees its own ancestors. ``"causal"`` is the plain causal mask if the context is.

    By default questions share positions, and the answer starts at the end of the longer of context and questions;
    ``positions="sequential"`` counts as the published recipe does.
    """
    _check(pattern)
    first = as_root(root)
    nodes = _context(context, first)
    if isinstance(questions, str):
        raise GraphError(f"questions is a list of texts, not the single text {questions[:40]!r}; put it in a list")
    listed = list(questions)
    ids = [f"Q{i}" for i in range(1, len(listed) + 1)]
    if pattern == "causal":
        asked = causal(listed, nodes, ids=ids)
    elif pattern == "anchor":
        asked = parallel(listed[:1], first, ids=ids[:1])
        asked += parallel(listed[1:], [*first, *asked[:1]], ids=ids[1:])
    else:
        asked = parallel(listed, nodes if pattern == "shared" else first, ids=ids)
    return ICLGraph(ICLNode(answer, [*nodes, *asked], "answer"))


def paraphrase_segments(input_ids: TokenIds, segments: Segments | PositionsAndMetadata, *, pattern: Pattern) -> ICLGraph:
    """Paraphrase groups within one tokenized text. Ids and positions stay those of the text.

    Parameters
    ----------
    input_ids, segments
        As for :func:`leattn.from_segments`, but without ``parents``, which follow from the pattern. A question has the
        metadata ``{"type": "question", "paraphrase_idx": i}`` and, if the text holds several groups, ``"group"`` (default
        0). Index 0 comes first in the text of its group. Segments with one index are pieces of one question, which see those
        before them whatever stands between. Every other segment is context.

        Or the two lists of the published recipe, ``(positions, metadata)``: a pair ``(start, end)`` and a mapping for each
        segment. There only a question's ``paraphrase_idx`` counts, and what no segment covers (separators, BOS) is context.
    pattern
        As for :func:`paraphrase_group`, for each group. In all patterns a context segment sees everything before it, also
        the questions: so does the answer, and whatever stands between or after groups. In all but ``"causal"``, groups never
        see each other's questions. ``"shared"``: the context that all questions of a group have in common, which is what
        stands before the first of them; a separator between two questions is not part of it, as it has seen a question.

    Raises
    ------
    LeattnError
        An unknown pattern.
    GraphError
        What :func:`leattn.from_segments` raises; an index that is missing, or not on a question; a group whose first question
        in the text has not index 0; ``parents``; two lists of different lengths.

    Examples
    --------
    >>> from leattn import compile_prompt
    >>> def question(i):
    ...     return {"start": 2 + i, "end": 3 + i, "id": f"Q{i + 1}", "metadata": {"type": "question", "paraphrase_idx": i}}
    >>> segments = [{"start": 0, "end": 2, "id": "context"}, question(0), question(1), {"start": 4, "end": 5, "id": "answer"}]
    >>> print(compile_prompt(paraphrase_segments([1, 2, 3, 4, 5], segments, pattern="shared")))
    4 nodes, 5 tokens, density 0.93
      0  context  tokens 0:2  positions 0:2  ■⬚⬚⬚
      1  Q1       tokens 2:3  positions 2:3  ■■⬚⬚
      2  Q2       tokens 3:4  positions 3:4  ■⬚■⬚
      3  answer   tokens 4:5  positions 4:5  ■■■■

    Notes
    -----
    A context segment between two groups has seen the first one's questions, and ``"shared"`` questions of the second see
    that segment: what it took from them can reach them through it. With ``visibility="ancestors"`` they would even see those
    questions themselves, so compile with the default.
    """
    _check(pattern)
    tokens = as_tokens(input_ids)
    given = as_segments(_of_the_recipe(*segments, len(tokens)) if _is_recipe(segments) else cast("Segments", segments))
    rank = in_text_order(given, len(tokens))
    ordered = [given[i] for i in sorted(range(len(given)), key=rank.__getitem__)]
    groups = [_group(segment) for segment in ordered]
    seen: list[Sequence[int]] = []
    pieces: dict[int | str, dict[int, list[int]]] = {}
    shared: dict[int | str, list[int]] = {}
    for i, (segment, group) in enumerate(zip(ordered, groups, strict=True)):
        if group is None:
            seen.append(range(i))
            continue
        index = segment.metadata["paraphrase_idx"]
        if group not in pieces and index != 0:
            raise GraphError(
                f"the first question of group {group!r} in the text, {_where(segment)}, has paraphrase_idx {index}; "
                "index 0 comes first"
            )
        if group not in pieces:
            shared[group] = [j for j in range(i) if groups[j] is None]
        questions = pieces.setdefault(group, {})
        own = questions.setdefault(index, [])
        if pattern == "causal":
            seen.append(range(i))
        elif pattern == "anchor":
            seen.append(sorted({*questions[0], *own}))
        else:
            seen_by_all = shared[group] if pattern == "shared" else []
            seen.append([*seen_by_all, *own] if own else seen_by_all)
        own.append(i)
    return build(tokens, ordered, seen)


def _is_recipe(segments: Any) -> TypeGuard[PositionsAndMetadata]:
    """A pair of lists, of which the first holds pairs: no segments, which are mappings."""
    if not isinstance(segments, tuple) or len(segments) != 2:
        return False
    return not any(isinstance(part, (Segment, Mapping)) for part in segments)


def _of_the_recipe(positions: Sequence[Any], metadata: Sequence[Any], size: int) -> list[Segment]:
    """Its segments, and the gaps between them as context."""
    if len(positions) != len(metadata):
        raise GraphError(
            f"there are {len(positions)} positions and {len(metadata)} metadata; give a pair (start, end) and a mapping each"
        )
    found = []
    for place, about in zip(positions, metadata, strict=True):
        if isinstance(place, (str, Mapping)) or len(place) != 2 or not isinstance(about, Mapping):
            raise GraphError(f"positions has {place!r} and metadata {about!r}; give a pair (start, end) and a mapping")
        kind, (start, end) = about.get("type"), place
        found.append(Segment(start, end, metadata=about if kind == "question" else {"type": kind}))
    bounds = [0, *(bound for one in sorted(found, key=lambda one: one.start) for bound in (one.start, one.end)), size]
    gaps = [Segment(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if start < end]
    return [*found, *gaps]


def _check(pattern: str) -> None:
    if pattern not in PATTERNS:
        raise LeattnError(choices("pattern", pattern, PATTERNS))


def _context(context: Any, root: Sequence[ICLNode]) -> Sequence[ICLNode]:
    """The root, if there is one, and the context's nodes, ancestors included, in layout order."""
    items = [context] if isinstance(context, str | ICLNode | torch.Tensor) else list(context)
    if items and not isinstance(items[0], str | ICLNode | torch.Tensor | Sequence):
        items = [items]  # the token ids of one chunk
    given = [item for item in items if isinstance(item, ICLNode)]
    texts: list[Any] = items[len(given) :]
    late = next((item for item in texts if isinstance(item, ICLNode)), None)
    if late is not None:
        raise GraphError(
            f"node {str(late)!r} stands after a text in the context; nodes exist already, so put them before the texts"
        )
    nodes = list(ICLGraph(*root, *given).nodes) if root or given else []
    other = next((node for node in nodes if root and not node.parents and node is not root[0]), None)
    if other is not None:
        raise GraphError(
            f"node {str(other)!r} of the context sees nothing, and nodes keep the parents they have; build it with "
            "parents=[root], and give that same node as root"
        )
    ids = ["context"] if len(texts) == 1 else [f"context {i}" for i in range(1, len(texts) + 1)]
    before = [*nodes, *causal(texts, nodes, ids=ids)]
    return Prefix(before, len(before))


def _group(segment: Segment) -> int | str | None:
    """The group of a question, None for context."""
    if segment.parents:
        raise GraphError(
            f"{_where(segment)} has parents={list(segment.parents)!r}; the pattern says who sees whom, so leave them out, or "
            "use from_segments"
        )
    metadata = segment.metadata
    index = metadata.get("paraphrase_idx")
    if metadata.get("type") != "question":
        if index is not None:
            raise GraphError(
                f"{_where(segment)} has paraphrase_idx {index!r} and the type {metadata.get('type')!r}; "
                "a question has the type 'question', all else no index"
            )
        return None
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise GraphError(f"{_where(segment)} is a question with paraphrase_idx {index!r}; give 0, 1, 2, …")
    group = metadata.get("group")
    if group is not None and not isinstance(group, str | int):
        raise GraphError(f"{_where(segment)} has the group {group!r}; a group is a number or a text")
    return 0 if group is None else group


def _where(segment: Segment) -> str:
    name = "" if segment.id is None else f"{segment.id!r}, "
    return f"segment {name}tokens {segment.start}:{segment.end}"
