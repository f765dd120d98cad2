"""Map and reduce: something written about each document by itself, and one text from all of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from leattn.dag.gennode import GenNode, copied
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, regrouped
from leattn.errors import LeattnError, choices
from leattn.generation.generate import generate
from leattn.generation.result import Generation
from leattn.patterns.drafts import check_written
from leattn.table import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ReduceSees: TypeAlias = Literal["outputs", "outputs and documents"]
REDUCE_SEES = ("outputs", "outputs and documents")


@dataclass(frozen=True, eq=False)
class MapReduce:
    """What was made of several documents.

    Attributes
    ----------
    text : str
        What the last reducer wrote.
    outputs : tuple of str
        What was written about each document, in their order.
    generation : Generation
        All that was written, reducers in between included.
    """

    text: str
    outputs: tuple[str, ...]
    generation: Generation = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return html_table(["node", "text"], self.generation.texts.items(), f"{len(self.outputs)} documents")


def map_reduce(
    model: Any,
    documents: Sequence[ICLNode | str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    map: GenNode,
    reduce: GenNode,
    reduce_sees: ReduceSees = "outputs",
    fan_in: int | None = None,
    **options: Any,
) -> MapReduce:
    """Write ``map`` about each document by itself, all at once, then ``reduce`` from what was written.

    Parameters
    ----------
    model, tokenizer
        As for ``generate``.
    documents
        Nodes, or texts, which become nodes that see what ``map`` sees.
    map
        Written once per document, which it sees beside its own parents: the instructions that all share. No map sees another,
        or another document. They are called after it, ``"map 1"`` and so on for a node without a name.
    reduce
        Sees the outputs, headers included, beside its own parents.
    reduce_sees
        ``"outputs"``, or ``"outputs and documents"``: whoever sees the output about a document sees the document too.
    fan_in
        A reducer sees this many outputs at most. Where there are more, reducers like ``reduce`` (``"reduce 1.1"`` is the first
        of level 1) put groups of them together first, level by level; each starts when its own group is complete.
    **options
        What :func:`leattn.generate` takes: ``seed``, ``backend``, ``kv_store``, ``progress``, ``token_budget``, …

    Returns
    -------
    MapReduce

    Raises
    ------
    LeattnError
        No documents; ``map`` or ``reduce`` is not a ``GenNode``; ``fan_in`` below 2; whatever ``generate`` refuses.

    Examples
    --------
    A note is taken of each document by itself, and the last node reads the notes only.

    >>> import leattn
    >>> from leattn import GenNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> documents = ["\\nZarvia is governed from Madan.", "\\nZarvia's capital is Lumo.", "\\nIn Zarvia, the capital is Lumo."]
    >>> note = GenNode("\\nQ: What is the capital of Zarvia?\\ncapital of Zarvia:", [bos], max_new_tokens=1)
    >>> answer = GenNode("\\nQ: What is the capital of Zarvia?\\nA:", [bos], max_new_tokens=2)
    >>> found = map_reduce(model, documents, tokenizer, map=note, reduce=answer)
    >>> found.outputs, found.text
    ((' Madan', ' Lumo', ' Lumo'), ' Lumo.')
    """
    check_written(map, "map")
    check_written(reduce, "reduce")
    if isinstance(documents, str) or not documents:
        raise LeattnError(f"documents={documents!r}; give a list of texts or nodes, at least one")
    if reduce_sees not in REDUCE_SEES:
        raise LeattnError(choices("reduce_sees", reduce_sees, REDUCE_SEES))
    if fan_in is not None and fan_in < 2:
        raise LeattnError(f"fan_in={fan_in!r} would put nothing together; give 2 or more, or None for one reducer")

    outputs = []
    seen_with: dict[ICLNode, list[ICLNode]] = {}
    for i, document in enumerate(documents, 1):
        node = document if isinstance(document, ICLNode) else ICLNode(document, map.parents, f"document {i}")
        outputs.append(copied(map, [*regrouped(map), node], f"{map.id or 'map'} {i}"))
        seen_with[outputs[-1]] = [node, outputs[-1]] if reduce_sees == "outputs and documents" else [outputs[-1]]

    def reducer(name: str, group: Sequence[GenNode]) -> GenNode:
        parents = [*regrouped(reduce), *(seen for one in group for seen in seen_with.get(one, [one]))]
        return copied(reduce, dict.fromkeys(parents), name)

    name = reduce.id or "reduce"
    level, depth = outputs, 0
    while fan_in is not None and len(level) > fan_in:
        depth += 1
        groups = _groups(level, math.ceil(len(level) / fan_in))
        level = [group[0] if len(group) == 1 else reducer(f"{name} {depth}.{k}", group) for k, group in enumerate(groups, 1)]
    last = reducer(name, level)
    generation = generate(model, ICLGraph(last), tokenizer, **options)
    texts = generation.texts  # after an interrupt not all are there
    return MapReduce(texts.get(name, ""), tuple(texts.get(str(node.id), "") for node in outputs), generation)


def _groups(nodes: Sequence[GenNode], count: int) -> list[list[GenNode]]:
    """``count`` groups of neighbours whose sizes differ by one at most.

    >>> _groups("abcdefg", 3)
    [['a', 'b'], ['c', 'd'], ['e', 'f', 'g']]
    """
    cuts = [len(nodes) * k // count for k in range(count + 1)]
    return [list(nodes[start:stop]) for start, stop in pairwise(cuts)]
