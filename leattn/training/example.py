"""One training example: a graph, and which of its nodes the model is to learn to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions
from leattn.prompt.visible import Visibility

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Name: TypeAlias = ICLNode | str


@dataclass(frozen=True)
class Example:
    """A graph with labels on chosen nodes.

    Attributes
    ----------
    target
        What to train on: a node, several nodes, a graph, or a prompt compiled already.
    labels
        The nodes whose tokens are learnt, by node or name; or a mapping ``{node: n}`` for the last ``n`` tokens of each,
        where one node holds a question and its answer. All other tokens only stand there to be seen.
    predicted_from
        ``{labelled node: node}``: whose last token predicts the first token of the labelled node, where that is not the node
        it continues. None as the value: its first token is not learnt.
    positions, visibility
        As in :func:`leattn.compile_prompt`; not for a prompt that is compiled already.

    Notes
    -----
    Inside a node, each token is predicted by the one before it. The first token is predicted by the last token of the node
    that this one *continues*, which is what generation does: n continues p if n sees p and all that p sees, sees nothing
    else, and starts at the position where p ends. There is at most one such node. Where there is none, the example is refused
    with the reason, and ``predicted_from`` decides. The first token of a node that sees nothing is not learnt, as in any text.

    Several labelled nodes may continue the same one: each is a branch of its own.

    Examples
    --------
    >>> doc, other = ICLNode([5, 6], id="doc"), ICLNode([7], id="other")
    >>> q = ICLNode([8, 9], parents=[doc, other], id="Q")
    >>> answer = ICLNode([10, 11], parents=[doc, other, q], id="answer")
    >>> Example(answer, labels=["answer"]).targets(compile_prompt(answer))  # the tokens at 4 and 5 predict 10 and 11
    [(4, 10), (5, 11)]
    """

    target: ICLNode | Sequence[ICLNode] | ICLGraph | CompiledPrompt
    labels: Name | Sequence[Name] | Mapping[Name, int]
    predicted_from: Mapping[Name, Name | None] = field(default_factory=dict, kw_only=True)
    positions: Positions | None = field(default=None, kw_only=True)
    visibility: Visibility | None = field(default=None, kw_only=True)

    def compile(self, tokenizer: PreTrainedTokenizerBase | None = None) -> CompiledPrompt:
        """The prompt; one that was compiled already is returned as it is.

        Raises
        ------
        LeattnError
            ``positions`` or ``visibility`` given for a compiled prompt, or what :func:`leattn.compile_prompt` raises.
        """
        if not isinstance(self.target, CompiledPrompt):
            return compile_prompt(
                self.target, tokenizer, positions=self.positions or "after_parents", visibility=self.visibility or "parents"
            )
        if self.positions is not None or self.visibility is not None:
            raise LeattnError(
                f"positions={self.positions!r}, visibility={self.visibility!r} given for a prompt that is compiled already; "
                "give them to compile_prompt"
            )
        return self.target

    def targets(self, prompt: CompiledPrompt) -> list[tuple[int, int]]:
        """What is learnt from :meth:`compile`'s prompt: pairs of (token index that predicts, id that it should predict).

        Raises
        ------
        LeattnError
            A label that the prompt does not have or that nothing predicts, more labelled tokens than a node has.
        """
        counts = self._counts(prompt)
        given = {prompt.graph[node]: source for node, source in self.predicted_from.items()}
        for node in given:
            if node not in counts:
                raise LeattnError(
                    f"predicted_from names {prompt.graph.name(node)!r}, which is not labelled; its keys are labelled nodes"
                )
        ids = prompt.input_ids[0].tolist()
        pairs = []
        for node, count in counts.items():
            start, end = prompt.spans[node]
            first = end - count
            if first == start:
                source = _named(prompt, node, given[node]) if node in given else _continued(prompt, node)
                if source is not None:
                    pairs.append((prompt.spans[source][1] - 1, ids[start]))
                first += 1
            pairs += [(i - 1, ids[i]) for i in range(first, end)]
        if not pairs:
            names = ", ".join(repr(prompt.graph.name(node)) for node in counts)
            raise LeattnError(
                f"nothing to learn: {names or 'no node'} labelled, and no other token predicts a labelled one; label a node "
                "with two tokens or more, or one that continues another"
            )
        return pairs

    def _counts(self, prompt: CompiledPrompt) -> dict[ICLNode, int]:
        """How many of its last tokens each labelled node learns."""
        labels = [self.labels] if isinstance(self.labels, ICLNode | str) else self.labels
        counts: dict[ICLNode, int] = {}
        for key in labels:
            node = prompt.graph[key]
            start, end = prompt.spans[node]
            count = labels[key] if isinstance(labels, Mapping) else end - start
            if node in counts:
                raise LeattnError(f"{prompt.graph.name(node)!r} is labelled twice; label each node once")
            if not 1 <= count <= end - start:
                raise LeattnError(
                    f"the last {count} tokens of {prompt.graph.name(node)!r} are labelled, but it has {end - start}; "
                    f"give a number from 1 to {end - start}, or the node without a number"
                )
            counts[node] = count
        return counts


def _named(prompt: CompiledPrompt, node: ICLNode, source: Name | None) -> ICLNode | None:
    """What ``predicted_from`` says, after making sure that the node sees it."""
    if source is None:
        return None
    source, graph = prompt.graph[source], prompt.graph
    if source not in prompt.sees(node):
        raise LeattnError(
            f"predicted_from says {graph.name(source)!r} for {graph.name(node)!r}, which does not see it; "
            f"name one of {', '.join(repr(graph.name(seen)) for seen in prompt.sees(node)) or 'nothing: it sees nothing'}"
        )
    return source


def _continued(prompt: CompiledPrompt, node: ICLNode) -> ICLNode | None:
    """The node that this one continues, None for one that sees nothing.

    What the continued node sees stands before it, so it can only be the last that is seen.
    """
    seen = prompt.sees(node)
    if not seen:
        return None
    last, name = seen[-1], prompt.graph.name
    missing = set(prompt.sees(last)) - set(seen)
    more = set(seen[:-1]) - set(prompt.sees(last))
    way_out = f"or decide with predicted_from={{{name(node)!r}: …}}"
    if missing or more:
        one = min(missing or more, key=prompt.graph.index.__getitem__)
        who, whom = (last, node) if missing else (node, last)
        raise LeattnError(
            f"no token predicts the first of {name(node)!r}: it continues no node. The last it sees is {name(last)!r}, but "
            f"{name(who)!r} sees {name(one)!r} and {name(whom)!r} does not; let {name(node)!r} see {name(last)!r} and exactly "
            f"what that one sees (put a node such as '\\nA:' between), {way_out}"
        )
    at, end = int(prompt[node].positions[0]), int(prompt[last].positions[-1]) + 1
    if at != end:
        raise LeattnError(
            f"{name(node)!r} starts at position {at}, but what continues {name(last)!r} is generated from {end} on; "
            f"compile with positions='after_parents', give it start_pos_id={end}, {way_out}"
        )
    return last
