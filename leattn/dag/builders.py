"""Nodes by the dozen: a chain, parallel siblings, a causal sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from leattn.dag.bos import bos
from leattn.dag.node import ICLNode, Prefix, as_parents
from leattn.dag.reading import Read
from leattn.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content: TypeAlias = str | Sequence[int] | torch.Tensor
"""What a node holds: text, or token ids (a sequence or a 1-D tensor)."""
Root: TypeAlias = Content | ICLNode
"""A first node: text, token ids, or a node that sees nothing, as :func:`leattn.bos` makes it."""
SpecialTokens: TypeAlias = Literal["parse", "text"]


def chain(
    contents: Iterable[Content],
    *,
    parents: Iterable[ICLNode | Read] = (),
    ids: Sequence[str | None] | None = None,
    special_tokens: SpecialTokens = "parse",
    root: Root | None = None,
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
    root
        For nodes that would see nothing, as there are no ``parents``: a node in front of all, which every node sees. Text (with
        the id ``"root"``), token ids, or a node; the BOS is ``leattn.bos(tokenizer)``. Not used where there are parents.

    Returns
    -------
    list of ICLNode
        In the order of ``contents``, without the root.

    Raises
    ------
    GraphError
        A single text for ``contents``, another number of ids than of contents, or a root that sees something.

    Examples
    --------
    >>> from leattn import ICLGraph
    >>> print(ICLGraph(*chain(["first", "then", "last"])))
    └── last
        └── then
            └── first

    Notes
    -----
    Many models put most of their attention on the first token of a text, and need it in sight: see docs/roots.md.
    """
    nodes: list[ICLNode] = []
    given, first = as_parents(parents), as_root(root)
    kept = () if given else first
    for content, name in _named(contents, ids):
        seen = [*kept, nodes[-1]] if nodes else given or first
        nodes.append(ICLNode(content, seen, name, special_tokens=special_tokens))
    return nodes


def parallel(
    contents: Iterable[Content],
    parents: Iterable[ICLNode | Read] = (),
    *,
    ids: Sequence[str | None] | None = None,
    special_tokens: SpecialTokens = "parse",
    root: Root | None = None,
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

    The question sees the root too; without it, it would lose sight of the first token:

    >>> root = ICLNode([1], id="BOS")
    >>> docs = parallel(["one", "two"], root=root)
    >>> print(ICLGraph(ICLNode("Q", [root, *docs])))
    └── Q
        ├── BOS
        ├── one
        │   └── BOS
        └── two
            └── BOS
    """
    shared = _seen(parents, root)
    return [ICLNode(content, shared, name, special_tokens=special_tokens) for content, name in _named(contents, ids)]


def causal(
    contents: Iterable[Content],
    parents: Iterable[ICLNode | Read] = (),
    *,
    ids: Sequence[str | None] | None = None,
    special_tokens: SpecialTokens = "parse",
    root: Root | None = None,
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
    given = _seen(parents, root)
    before, readings = list(given), getattr(given, "readings", ())
    first = len(before)
    for content, name in _named(contents, ids):
        before.append(ICLNode(content, Prefix(before, len(before), readings), name, special_tokens=special_tokens))
    return before[first:]


def as_root(root: Root | None, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[ICLNode, ...]:
    """A root as a node, with the id ``"root"`` if it is text or token ids; nothing for None.

    Raises
    ------
    GraphError
        A node that sees something: whoever sees it would not see its parents. ``"bos"`` without a tokenizer that has it.
    """
    if root is None:
        return ()
    if isinstance(root, str) and root == "bos":
        if tokenizer is None:
            raise GraphError(
                "root='bos' needs a tokenizer, which is not at hand here; give leattn.bos(tokenizer), or what the token is "
                "written as, such as '<s>'"
            )
        return (bos(tokenizer),)
    if not isinstance(root, ICLNode):
        return (ICLNode(root, id="root"),)
    if root.parents:
        raise GraphError(
            f"the root {str(root)!r} sees {str(root.parents[0])!r}, and a root sees nothing; give the first node itself"
        )
    return (root,)


def _seen(parents: Iterable[ICLNode | Read], root: Root | None) -> Sequence[ICLNode]:
    first = as_root(root)
    return as_parents(parents) or first


def _named(contents: Iterable[Content], ids: Sequence[str | None] | None) -> Iterator[tuple[Content, str | None]]:
    if isinstance(contents, str):
        raise GraphError(f"contents is a list with one text per node, not the single text {contents[:40]!r}; put it in a list")
    listed = list(contents)
    if isinstance(ids, str):
        raise GraphError(f"ids is a list with one name per node, not the single text {ids!r}; put it in a list")
    if ids is not None and len(ids) != len(listed):
        raise GraphError(f"{len(ids)} ids are given for {len(listed)} contents; give one per node, or None in its place")
    return zip(listed, ids or [None] * len(listed), strict=True)
