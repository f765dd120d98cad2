"""What ``generate`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import GraphError, LeattnError
from leattn.generation.realise import continued_graph, written_graph
from leattn.prompt.compiled import CompiledPrompt
from leattn.table import html_table


@dataclass(frozen=True)
class Sequence:
    """One continuation of one branch: ``token_ids`` ``[n]`` without a trailing EOS or a matched stop string, and their text.

    The text goes up to a matched stop string; the ids end at the last token boundary before it. ``logprobs``, if asked for, are
    the log-probabilities of the ids in nats, float64 ``[n]``, each given those before it: the model's own, before a temperature
    or anything else changed them.
    """

    text: str
    token_ids: Tensor
    logprobs: Tensor | None = None


@dataclass(frozen=True)
class Stats:
    """What a generation cost. ``computed`` counts tokens that went through the model, prompt included; ``reused`` those whose
    keys and values were at hand already; ``generated`` the new ones; ``steps`` forward passes. Programs that ran together in
    one sequence share one count."""

    computed: int
    reused: int
    generated: int
    steps: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Generation:
    """What the model wrote: the continuation of a prompt's sinks, or the ``GenNode`` s of a graph.

    Attributes
    ----------
    graph : ICLGraph
        What was asked for.
    prompt : CompiledPrompt or None
        What was continued; None for a graph with nodes to write, which compiles once it is :attr:`realised`.
    branches : mapping of str to tuple of Sequence
        For each continued or written node, by name, what was written: one, or as many as ``num_return_sequences`` asked for.
    backend : str
        Which backend ran.
    stats : Stats
        Tokens, steps and seconds.
    headers : mapping of str to tuple of int
        The token ids of the headers of written nodes.
    complete : bool
        False after an interrupt, with ``on_interrupt="return"``: what was being written is cut off, what had not begun is not
        among the branches.
    """

    graph: ICLGraph
    prompt: CompiledPrompt | None
    branches: Mapping[str, tuple[Sequence, ...]]
    backend: str
    stats: Stats
    headers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    complete: bool = True

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
    def token_ids(self) -> Tensor | dict[str, Tensor]:
        """The new ids, ``[n]``; by node name if there are several branches."""
        ids = {name: sequences[0].token_ids for name, sequences in self.branches.items()}
        return next(iter(ids.values())) if len(ids) == 1 else ids

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All continuations of the one branch, best beam first."""
        return self._only_branch()

    def __getitem__(self, key: ICLNode | str) -> str:
        """The text that continues a node, or that the model wrote for it."""
        name = self.graph.name(key)
        if name not in self.branches:
            raise GraphError(f"node {name!r} was not continued; these were: {', '.join(map(repr, self.branches))}")
        return self.branches[name][0].text

    @cached_property
    def realised(self) -> ICLGraph:
        """The graph with (the first of) what was written as nodes, ready to be compiled, plotted, traced or extended.

        A written node keeps its name. What continues a sink becomes a node called ``"… (continued)"`` after it, which sees the
        sink and what that sees, pinned to the position at which it was generated; a continuation of no tokens adds no node.
        """
        written = {name: sequences[0].token_ids.tolist() for name, sequences in self.branches.items()}
        if self.prompt is not None:
            return continued_graph(self.prompt, written)
        return written_graph(self.graph, self.headers, written)

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
        rows = [(name, sequence.text) for name, sequences in self.branches.items() for sequence in sequences]
        stats = self.stats
        reused = f", {stats.reused} reused" if stats.reused else ""
        cut = "" if self.complete else ", interrupted"
        note = f"{stats.generated} new tokens, {stats.computed} computed{reused}, {stats.seconds:.2f} s, {self.backend}{cut}"
        return html_table([], rows, note)
