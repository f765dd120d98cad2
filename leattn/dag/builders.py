"""Nodes by the dozen: a chain, parallel siblings, a causal sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch

from leattn.dag.node import ICLNode, Prefix, as_parents
from leattn.dag.reading import Read
from leattn.errors import GraphError

Content: TypeAlias = str | Sequence[int] | torch.Tensor
"""What a node holds: text, or token ids (a sequence or a 1-D tensor)."""
SpecialTokens: TypeAlias = Literal["parse", "text"]


def chain(
    contents: Iterable[Content],
    *,
    parents: Iterable[ICLNode | Read] = (),
    ids: Sequence[str | None] | None = None,
    special_tokens: SpecialTokens = "parse",
) -> list[ICLNode]:
    """Nodes of which each sees the one before; the first sees ``parents``.

    Parameters
    ----------
    contents
        One text, or sequence of token ids, per node. None give an empty list.
    parents
        What the first node sees.
    ids
        One name per node (None: the graph names it).
    special_tokens
        As for :class:`ICLNode`, for all nodes.

    Returns
    -------
    list of ICLNode
        In the order of ``contents``.

    Raises
    ------
    GraphError
        A single text for ``contents``, or another number of ids than of contents.

    Examples
    --------
    >>> from leattn import ICLGraph
    >>> print(ICLGraph(*chain(["first", "then", "last"])))
    └── last
        └── then
            └── first
    """
    nodes: list[ICLNode] = []
    for content, name in _named(contents, ids):
        nodes.append(ICLNode(content, nodes[-1:] or parents, name, special_tokens=special_tokens))
    return nodes


def parallel(
    contents: Iterable[Content],
    parents: Iterable[ICLNode | Read] = (),
    *,
    ids: Sequence[str | None] | None = None,
    special_tokens: SpecialTokens = "parse",
) -> list[ICLNode]:
    """Siblings: each sees ``parents`` and none of the others.

    Takes, returns and raises what :func:`chain` does.

    Examples
    --------
    >>> from leattn import ICLGraph, ICLNode
    >>> docs = parallel(["one", "two"], [ICLNode("start")])
    >>> print(ICLGraph(ICLNode("Q", docs)))
    └── Q
        ├── one
        │   └── start
        └── two
            └── start
    """
    shared = as_parents(parents)
    return [ICLNode(content, shared, name, special_tokens=special_tokens) for content, name in _named(contents, ids)]


def causal(
    contents: Iterable[Content],
    parents: Iterable[ICLNode | Read] = (),
    *,
    ids: Sequence[str | None] | None = None,
    special_tokens: SpecialTokens = "parse",
) -> list[ICLNode]:
    """Nodes of which each sees ``parents`` and all nodes before it: a plain prompt, cut into chunks.

    Takes, returns and raises what :func:`chain` does. The nodes share one list of parents, so N of them take memory
    linear in N although they have N²/2 edges.

    Examples
    --------
    >>> from leattn import compile_prompt
    >>> print(compile_prompt(causal([[1, 2], [3], [4]], ids=["a", "b", "c"])))
    3 nodes, 4 tokens, density 1.00
      0  a  tokens 0:2  positions 0:2  ■⬚⬚
      1  b  tokens 2:3  positions 2:3  ■■⬚
      2  c  tokens 3:4  positions 3:4  ■■■
    """
    given = as_parents(parents)
    before, readings = list(given), getattr(given, "readings", ())
    first = len(before)
    for content, name in _named(contents, ids):
        before.append(ICLNode(content, Prefix(before, len(before), readings), name, special_tokens=special_tokens))
    return before[first:]


def _named(contents: Iterable[Content], ids: Sequence[str | None] | None) -> Iterator[tuple[Content, str | None]]:
    if isinstance(contents, str):
        raise GraphError(f"contents is a list with one text per node, not the single text {contents[:40]!r}; put it in a list")
    listed = list(contents)
    if isinstance(ids, str):
        raise GraphError(f"ids is a list with one name per node, not the single text {ids!r}; put it in a list")
    if ids is not None and len(ids) != len(listed):
        raise GraphError(f"{len(ids)} ids are given for {len(listed)} contents; give one per node, or None in its place")
    return zip(listed, ids or [None] * len(listed), strict=True)
