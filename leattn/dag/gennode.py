"""A chunk that the model writes: a header, and what follows it when the graph runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

import torch

from leattn.dag.node import ICLNode, Position
from leattn.dag.reading import Read
from leattn.errors import CompileError

NodeT = TypeVar("NodeT", bound=ICLNode)

_ELSEWHERE = {
    "end_pos_id": "how long the node becomes is not known before the model has written it; pin its start with start_pos_id",
    "max_length": "the limit of a node counts what the model writes; use max_new_tokens",
    "min_length": "the limit of a node counts what the model writes; use min_new_tokens",
    "stop_strings": "a node has its own field for them; use stop",
    "seed": "seeds belong to a run; give leattn.generate the seed, from which each node has draws of its own",
    "num_beams": "a node is one sequence; search with beams is for graphs of ICLNodes with one sink",
    "num_return_sequences": "a node is one sequence; make one GenNode per sequence, with the same parents",
}
"""Options of transformers' ``generate`` that a node does not take, and what to do instead."""


@dataclass(frozen=True, eq=False, repr=False, init=False)
class GenNode(ICLNode):
    """A chunk that the model continues: whoever sees it sees its header and what was generated after it.

    :func:`leattn.generate` runs a graph with such nodes as a program: a node is written as soon as everything it sees is
    complete, and what sees it starts when it is finished.

    Parameters
    ----------
    content
        The header, text or token ids, at least one token: what the model goes on from.
    parents, id, start_pos_id, special_tokens
        As for :class:`ICLNode`. There is no ``end_pos_id``.
    max_new_tokens
        How many tokens the model writes at most, the header not counted.
    stop
        A string, or several: the node ends before the first of them that the model writes.
    **sampling
        Names of transformers' ``GenerationConfig`` with plain values, for this node alone: ``do_sample``, ``temperature``,
        ``top_p``, ``top_k``, ``repetition_penalty``, ``min_new_tokens``, … ``generate`` checks them before anything runs.

    Attributes
    ----------
    stop : tuple of str
    sampling : Mapping
        Read-only.

    Raises
    ------
    GraphError
        A parent that is not a node, or is given twice.
    CompileError
        No content; a limit below 1; an empty stop string; an option that no single node has, such as ``num_beams``.

    Examples
    --------
    >>> from leattn import ICLGraph
    >>> q = ICLNode("Q: Why is the sky blue?", id="question")
    >>> drafts = [GenNode("\\nA:", [q], f"draft {i}", max_new_tokens=32, stop="\\n", do_sample=True) for i in (1, 2)]
    >>> print(ICLGraph(GenNode("\\nIn short:", [q, *drafts], "answer", max_new_tokens=8)))
    └── answer ✎ ≤ 8 tokens
        ├── question
        ├── draft 1 ✎ ≤ 32 tokens
        │   └── question
        └── draft 2 ✎ ≤ 32 tokens
            └── question
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Mapping[str, Any]

    def __init__(
        self,
        content: str | Iterable[int] | torch.Tensor,
        parents: Iterable[ICLNode | Read] | None = (),
        id: str | None = None,
        *,
        max_new_tokens: int,
        stop: str | Iterable[str] | None = None,
        start_pos_id: Position | None = None,
        special_tokens: Literal["parse", "text"] = "parse",
        **sampling: Any,
    ) -> None:
        put = object.__setattr__
        put(self, "max_new_tokens", max_new_tokens)
        put(self, "stop", _texts(stop))
        put(self, "sampling", MappingProxyType({name: _plain(name, value) for name, value in sampling.items()}))
        super().__init__(content, parents, id, start_pos_id=start_pos_id, special_tokens=special_tokens)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: a mapping proxy is neither."""
        return {**self.__dict__, "sampling": dict(self.sampling)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "sampling": MappingProxyType(state["sampling"])})

    def _check(self) -> None:
        super()._check()
        limit = self.max_new_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise CompileError(f"node {str(self)!r} has max_new_tokens={limit!r}; give a whole number from 1 up")
        for text in self.stop:
            if not isinstance(text, str):
                raise CompileError(f"node {str(self)!r} has the stop string {text!r}; give text, or a list of texts")
            if not text:
                raise CompileError(f"node {str(self)!r} has an empty stop string, which would end it at once; leave it out")
        for name in self.sampling:
            if name in _ELSEWHERE:
                raise CompileError(f"node {str(self)!r} has {name}={self.sampling[name]!r}, but {_ELSEWHERE[name]}")

    def __repr__(self) -> str:
        options = {"max_new_tokens": self.max_new_tokens, **({"stop": self.stop} if self.stop else {}), **self.sampling}
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"GenNode({self._described()}, {shown})"


def copied(node: NodeT, parents: Iterable[ICLNode | Read], id: str, **sampling: Any) -> NodeT:
    """A chunk under another name, seeing other nodes; what the model writes may get further options of sampling."""
    options: dict[str, Any] = {"start_pos_id": node.start_pos_id, "special_tokens": node.special_tokens}
    copy: ICLNode
    if isinstance(node, GenNode):
        written = {"max_new_tokens": node.max_new_tokens, "stop": node.stop, **node.sampling, **sampling}
        copy = GenNode(node.content, parents, id, **options, **written)
    else:
        copy = ICLNode(node.content, parents, id, end_pos_id=node.end_pos_id, **options)
    return cast(NodeT, copy)


def mark(node: ICLNode) -> str:
    """What stands behind the name of a node in a drawing of its graph: nothing, unless the model writes the node."""
    if not isinstance(node, GenNode):
        return ""
    return f" ✎ ≤ {node.max_new_tokens} token{'s' * (node.max_new_tokens != 1)}"


def _texts(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)


def _plain(name: str, value: Any) -> Any:
    """A copy of a value made of what JSON knows, tuples as lists: a node can be written to a file, and does not change."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # not a subclass of it, such as numpy's float64, which YAML does not know
    if value is None:
        return None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(name, one) for one in value]
    raise CompileError(
        f"the option {name} of a GenNode is {value!r}, a {type(value).__name__}; give numbers, text, or lists of them, "
        "so that the graph can be written to a file"
    )
