"""Recorded: the old and the new vectors of an edit are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from leattn.errors import LeattnError
from leattn.interventions.operation import Operation, State, Subject


class Edit(NamedTuple):
    """One token's state before a layer, ``[d]`` each on the CPU.

    ``row`` is the model's, ``token`` the index in its prompt: None in a program, where a token has none before everything is
    written. ``node`` is the name of its node, and ``place`` which of that node's tokens it is.
    """

    layer: int
    row: int
    token: int | None
    old: torch.Tensor
    new: torch.Tensor
    node: str
    place: int


class Recorded:
    """An edit of hidden states, and what it changed: ``edits`` has one :class:`Edit` per token, layer and forward.

    Tokens whose state the edit leaves as it is are not among them.

    Raises
    ------
    LeattnError
        On entering the block: an operation that edits no hidden states.

    Examples
    --------
    >>> import leattn
    >>> from leattn.interventions import RandomNoise, Recorded, intervene
    >>> model, tokenizer = leattn.tiny.load()
    >>> a = leattn.ICLNode("The sky is", id="a")
    >>> prompt = leattn.compile_prompt(leattn.ICLNode(" blue.", [a], id="b"), tokenizer)
    >>> noise = Recorded(RandomNoise(1, [0, 2]))
    >>> with intervene(model, prompt, [noise]) as attention:
    ...     logits = model(**attention.inputs).logits
    >>> [(edit.layer, edit.token) for edit in noise.edits], bool(noise.edits[0].old.norm() > 0)
    ([(1, 0), (1, 2)], True)
    """

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.edits: list[Edit] = []

    def __repr__(self) -> str:
        return f"Recorded({self.operation!r})"

    def bind(self, subject: Subject) -> _Recorded:
        bound = self.operation.bind(subject)
        if not hasattr(bound, "edit") or hasattr(bound, "scores") or hasattr(bound, "attended"):
            raise LeattnError(f"Recorded keeps edits of hidden states alone; give {self.operation!r} by itself")
        return _Recorded(bound, self.edits)


class _Recorded:
    def __init__(self, bound: Any, edits: list[Edit]) -> None:
        self.bound, self.edits = bound, edits

    def edit(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        edited: torch.Tensor = self.bound.edit(state, hidden)
        if edited is not hidden:
            for row, i in (edited != hidden).any(-1).nonzero().tolist():
                queries = state.queries
                token = None if queries.in_prompt is None else int(queries.in_prompt[row, i])
                old, new = (one[row, i].detach().cpu().clone() for one in (hidden, edited))
                self.edits.append(Edit(state.layer, row, token, old, new, queries.names[row][i], int(queries.indices[row, i])))
        return edited
