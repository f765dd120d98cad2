"""What ``generate`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import torch

from leattn.compile import CompiledPrompt
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import GraphError, LeattnError


@dataclass(frozen=True)
class Sequence:
    """One continuation of one branch: ``token_ids`` ``[n]`` without a trailing EOS, and their text."""

    text: str
    token_ids: torch.Tensor


@dataclass(frozen=True)
class Stats:
    """What a generation cost. ``computed`` counts tokens that went through the model, prompt included; ``reused`` those whose
    keys and values were at hand already; ``generated`` the new ones; ``steps`` forward passes."""

    computed: int
    reused: int
    generated: int
    steps: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Generation:
    """The continuation of a prompt.

    Attributes
    ----------
    prompt : CompiledPrompt
        What was continued.
    branches : mapping of str to tuple of Sequence
        For each continued node, by name, its continuations: one, or as many as ``num_return_sequences`` asked for.
    backend : str
        Which backend ran.
    stats : Stats
        Tokens, steps and seconds.
    """

    prompt: CompiledPrompt
    branches: Mapping[str, tuple[Sequence, ...]]
    backend: str
    stats: Stats

    @property
    def text(self) -> str:
        """The text of the one branch (its first sequence).

        Raises
        ------
        LeattnError
            There are several branches; the message lists them.
        """
        return self._only_branch()[0].text

    @property
    def texts(self) -> dict[str, str]:
        """The text of every branch (its first sequence) by node name."""
        return {name: sequences[0].text for name, sequences in self.branches.items()}

    @property
    def token_ids(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """The new ids, ``[n]``; by node name if there are several branches."""
        ids = {name: sequences[0].token_ids for name, sequences in self.branches.items()}
        return next(iter(ids.values())) if len(ids) == 1 else ids

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All continuations of the one branch, best beam first."""
        return self._only_branch()

    def __getitem__(self, key: ICLNode | str) -> str:
        """The text that continues a node."""
        name = self.prompt.graph.name(key)
        if name not in self.branches:
            raise GraphError(f"node {name!r} was not continued; these were: {', '.join(map(repr, self.branches))}")
        return self.branches[name][0].text

    @property
    def realised(self) -> ICLGraph:
        """The graph with the (first) continuation as a node, ready to be compiled, plotted or extended.

        The new node sees the continued one and what that one sees; it is called ``"… (continued)"`` after it and pinned to the
        position at which it was generated. A continuation of no tokens adds no node.
        """
        (name, sequences), *_ = self.branches.items()
        ids = sequences[0].token_ids
        return self.prompt.continued(ids, f"{name} (continued)").graph if len(ids) else self.prompt.graph

    def _only_branch(self) -> tuple[Sequence, ...]:
        if len(self.branches) != 1:
            raise LeattnError(
                f"there are {len(self.branches)} branches ({', '.join(map(repr, self.branches))}); "
                "take result[node_or_id] or result.texts"
            )
        return next(iter(self.branches.values()))

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.texts.items()) if len(self.branches) > 1 else self.text

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(name)}</td>"
            f"<td style='text-align:left;white-space:pre-wrap'>{escape(sequence.text)}</td></tr>"
            for name, sequences in self.branches.items()
            for sequence in sequences
        )
        note = f"{self.stats.generated} new tokens, {self.stats.computed} computed, {self.stats.seconds:.2f} s, {self.backend}"
        return f"<table>{rows}</table><p>{note}</p>"
