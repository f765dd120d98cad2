"""One chunk of a prompt and the chunks it sees."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import torch

from leattn.dag.reading import Read
from leattn.dag.tokens import tokenize_all, tokenized_with
from leattn.errors import CompileError, GraphError, LeattnError, choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Position: TypeAlias = int | float
"""A whole number, or a multiple of 2⁻²⁰, so that distances between positions are exact."""

_created = itertools.count()
_created_lock = threading.Lock()


class Prefix(Sequence["ICLNode"]):
    """The first ``length`` nodes of a list that only ever grows: parents in constant memory.

    A causal prompt of N nodes has N²/2 edges. Sharing one list keeps building and compiling it linear in N.
    """

    __slots__ = ("base", "length", "readings")

    def __init__(self, base: list[ICLNode], length: int, readings: tuple[Read, ...] = ()) -> None:
        self.base = base
        self.length = length
        self.readings = readings

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> ICLNode: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ICLNode]: ...
    def __getitem__(self, index: int | slice) -> ICLNode | Sequence[ICLNode]:
        picked = range(self.length)[index]
        if isinstance(picked, range):
            return tuple(self.base[i] for i in picked)
        return self.base[picked]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class ICLNode:
    """A chunk of text, or of token ids, and the chunks that its tokens may attend to.

    Parameters
    ----------
    content
        Text, tokenized by itself with nothing added, or token ids (a sequence or a 1-D tensor).
    parents
        The nodes this one sees, among them groups that it reads in another way (:func:`leattn.read`). They exist already, so
        no cycle can be built.
    id
        The name in graphs, pictures and results. Without one a graph names the node after its first ten characters.
    start_pos_id, end_pos_id
        Pin the position of the first token, or one past the last; at most one of the two. Numbers that are not whole take
        a model with rotary positions.
    special_tokens
        ``"parse"``: strings such as ``<|eot_id|>`` in the text become control tokens. ``"text"``: they stay text, tokenized as
        by the same tokenizer without control tokens, which is what retrieved documents want.

    Raises
    ------
    GraphError
        A parent that is not a node, or is given twice.
    CompileError
        Both pins, a negative pin, or no content.

    Examples
    --------
    >>> a = ICLNode("The sky is blue.", id="a")
    >>> b = ICLNode("What colour is the sky?", parents=[a], id="b")
    >>> b.parents[0] is a
    True

    Notes
    -----
    Nodes compare by identity: two demonstrations with the same text are two nodes. A tokenizer that puts a space before
    every text (SentencePiece) does so for every node; give token ids where that matters.
    """

    content: str | tuple[int, ...]
    parents: Sequence[ICLNode]
    id: str | None
    start_pos_id: Position | None
    end_pos_id: Position | None
    special_tokens: Literal["parse", "text"]
    created: int

    def __init__(
        self,
        content: str | Iterable[int] | torch.Tensor,
        parents: Iterable[ICLNode | Read] | None = (),
        id: str | None = None,
        start_pos_id: Position | None = None,
        end_pos_id: Position | None = None,
        *,
        special_tokens: Literal["parse", "text"] = "parse",
    ) -> None:
        put = object.__setattr__
        put(self, "content", content if isinstance(content, str) else _as_ids(content))
        put(self, "parents", as_parents(parents))
        put(self, "id", id)
        put(self, "start_pos_id", start_pos_id)
        put(self, "end_pos_id", end_pos_id)
        put(self, "special_tokens", special_tokens)
        put(self, "created", next(_created))
        self._check()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied node. Nodes made after it, in whichever process, count as created after it."""
        global _created
        self.__dict__.update(state)
        with _created_lock:
            _created = itertools.count(max(next(_created), state["created"] + 1))

    def _check(self) -> None:
        if self.id is not None and not isinstance(self.id, str):
            raise GraphError(f"the id of a node is a string, not {self.id!r}")
        if self.id == "":
            raise GraphError("the id of a node is empty; leave it out to let the graph name the node")
        if not self.content:
            raise CompileError(f"node {str(self)!r} has no content; give it text or token ids, or remove it")
        if self.special_tokens not in ("parse", "text"):
            raise LeattnError(choices("special_tokens", self.special_tokens, ("parse", "text")))
        if self.start_pos_id is not None and self.end_pos_id is not None:
            raise CompileError(
                f"node {str(self)!r} has both start_pos_id={self.start_pos_id} and end_pos_id={self.end_pos_id}; "
                "give one of them"
            )
        for name in ("start_pos_id", "end_pos_id"):
            value = getattr(self, name)
            if value is None:
                continue
            position = as_position(value)
            if position is None:
                raise CompileError(f"node {str(self)!r} has {name}={value!r}; give a number")
            if position < 0:
                raise CompileError(f"node {str(self)!r} has {name}={value}; positions start at 0")
            object.__setattr__(self, name, position)

    @property
    def readings(self) -> tuple[Read, ...]:
        """The groups of parents that it reads in another way than as they are."""
        return getattr(self.parents, "readings", ())

    @property
    def default_name(self) -> str:
        """What a graph calls this node if it has no id: the first ten characters of its content."""
        if isinstance(self.content, str):
            return self.content[:10]
        return ("ids " + " ".join(map(str, self.content)))[:10].rstrip()

    def tokenize(self, tokenizer: PreTrainedTokenizerBase | None = None, remove_bos_token: bool = True) -> torch.Tensor:
        """Token ids of this node alone, ``[n]`` int64, nothing added in front or behind.

        ``tokenizer`` may be left out if the content is token ids already. ``remove_bos_token=False`` leaves the BOS token in
        front of text where the tokenizer puts one; nothing else that leattn makes of the node has it.
        """
        ids = tokenize_all([self], tokenizer)[0]
        if tokenizer is not None:
            tokenized_with[self] = tokenizer
            if not remove_bos_token and isinstance(self.content, str) and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
                ids = [tokenizer.bos_token_id, *ids]
        return torch.tensor(ids, dtype=torch.long)

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Token ids ``[n]`` by the tokenizer that :meth:`tokenize` was last given; None for text before that."""
        tokenizer = tokenized_with.get(self)
        return None if tokenizer is None and isinstance(self.content, str) else self.tokenize(tokenizer)

    @property
    def position_ids(self) -> torch.Tensor | None:
        """Positions ``[n]`` of the node by itself: from 0, or as it is pinned; None where :attr:`token_ids` is."""
        ids = self.token_ids
        if ids is None:
            return None
        start = (self.start_pos_id or 0) if self.end_pos_id is None else self.end_pos_id - len(ids)
        return torch.arange(start, start + len(ids))

    def get_parents_input_position_ids(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Token ids and positions of the parents and then of this node, ``[1, S]`` each; None without parents.

        Raises
        ------
        LeattnError
            A text among them that :meth:`tokenize` was never given a tokenizer for.
        """
        chain = [*self.parents, self]
        for node in chain:
            if node.token_ids is None:
                raise LeattnError(f"node {str(node)!r} was not tokenized yet; call its tokenize(tokenizer) before")
        ids, positions = ([getattr(node, name) for node in chain] for name in ("token_ids", "position_ids"))
        return (torch.cat(ids)[None], torch.cat(positions)[None]) if self.parents else None

    def __str__(self) -> str:
        """Its id, or its default name."""
        return self.default_name if self.id is None else self.id

    def __repr__(self) -> str:
        return f"ICLNode({self._described()})"

    def _described(self) -> str:
        content = self.content if isinstance(self.content, str) else list(self.content)
        shown = repr(content)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        parents = ", ".join(repr(str(parent)) for parent in self.parents[:4]) + (", ..." if len(self.parents) > 4 else "")
        return f"{shown}, parents=[{parents}], id={self.id!r}"


def whole_number(value: object) -> int | None:
    """The integer that a value is, of Python, numpy or torch; None for fractions, NaN, booleans and what is no number.

    Examples
    --------
    >>> whole_number(torch.tensor(7)), whole_number(7.0), whole_number(7.5), whole_number(True)
    (7, 7, None, None)
    """
    if type(value) is int:
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0:
        return None
    return int(value)  # type: ignore[call-overload, no-any-return]


def as_position(value: object) -> Position | None:
    """The position that a number is: an integer where it is whole, else the nearest multiple of 2⁻²⁰; None for what is none.

    Examples
    --------
    >>> as_position(7.0), as_position(2.5), as_position(float("nan")), as_position(True)
    (7, 2.5, None, None)
    """
    whole = whole_number(value)
    if whole is not None:
        return whole
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    nearest = round(float(value) * 2**20) / 2**20
    return int(nearest) if nearest % 1 == 0 else nearest


def _as_ids(content: Any) -> tuple[int, ...]:
    if isinstance(content, torch.Tensor):
        if content.dim() != 1 or content.is_floating_point() or content.dtype == torch.bool:
            raise CompileError(
                f"token ids are a 1-D integer tensor, not {content.dtype} of shape {list(content.shape)}; "
                "take one row of a batch, e.g. input_ids[0]"
            )
        content = content.tolist()
    if not isinstance(content, Iterable):
        raise CompileError(f"the content of a node is text or token ids, not {content!r}")
    content = list(content)
    numbers = [token if type(token) is int else whole_number(token) for token in content]
    ids = tuple(number for number in numbers if number is not None)
    if len(ids) < len(numbers):
        raise CompileError(f"the content of a node is text or token ids, not {content!r}")
    if any(token < 0 for token in ids):
        raise CompileError(f"token ids are not negative, but {min(ids)} is among them")
    return ids


class ReadParents(tuple["ICLNode", ...]):
    """Parents of which some groups are read in another way."""

    readings: tuple[Read, ...] = ()


def as_parents(parents: Iterable[ICLNode | Read] | None) -> Sequence[ICLNode]:
    """Parents as one checked, immutable sequence; a :class:`Prefix` and a tuple of nodes stay the object they are.

    Groups are taken apart: their nodes are parents like others, and the sequence has them as ``readings``.
    """
    if isinstance(parents, Prefix | ReadParents):
        return parents
    if isinstance(parents, ICLNode):
        raise GraphError(f"parents is a list of nodes; write parents=[{str(parents)!r}]")
    given = tuple(parents or ())
    groups = tuple(parent for parent in given if isinstance(parent, Read))
    nodes: tuple[ICLNode, ...] = given  # type: ignore[assignment]
    if groups:
        flat = ((parent,) if not isinstance(parent, Read) else parent.nodes for parent in given)
        nodes = ReadParents(node for each in flat for node in each)
        nodes.readings = tuple(group for group in groups if not group.reading.is_identity)
    for parent in nodes:
        if not isinstance(parent, ICLNode):
            raise GraphError(f"a parent is an ICLNode that exists already, not {parent!r}")
    if len(set(map(id, nodes))) != len(nodes):
        twice = next(parent for i, parent in enumerate(nodes) if any(parent is other for other in nodes[:i]))
        raise GraphError(f"parent {str(twice)!r} is given twice; an edge exists or it does not")
    return nodes


def regrouped(node: ICLNode, new: Mapping[ICLNode, ICLNode] | None = None) -> list[ICLNode | Read]:
    """A node's parents as they were given, groups included; each as ``new`` has it, if it is there."""
    replaced = new or {}
    grouped = {id(parent) for group in node.readings for parent in group.nodes}
    alone: list[ICLNode | Read] = [replaced.get(parent, parent) for parent in node.parents if id(parent) not in grouped]
    groups = [Read(tuple(replaced.get(one, one) for one in group.nodes), group.reading) for group in node.readings]
    return [*alone, *groups]
