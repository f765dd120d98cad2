"""What was generated as nodes of a graph, ready to be compiled, plotted, traced or extended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leattn.dag.gennode import GenNode, copied
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, regrouped
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.slots import continued_name


def continued_graph(prompt: CompiledPrompt, written: Mapping[str, Sequence[int]]) -> ICLGraph:
    """The graph of a prompt with what was written after each of its sinks as one more node.

    Each new node sees the sink and what that sees, edits included, and is pinned to the position at which it was generated.
    """
    graph = prompt.graph
    continuations = []
    for name, ids in written.items():
        if ids:
            sink = graph[name]
            end = prompt.position_ids[0, prompt.spans[sink][1] - 1].item() + 1
            continuations.append(ICLNode(ids, [*prompt.parents(sink), sink], continued_name(name), start_pos_id=end))
    return ICLGraph(*graph.sinks, *continuations)


def written_graph(graph: ICLGraph, headers: Mapping[str, Sequence[int]], written: Mapping[str, Sequence[int]]) -> ICLGraph:
    """The graph with every ``GenNode`` that was written as a node of its header and what follows it.

    Such a node, and whatever sees one, is made anew under the same name; all other nodes are the same objects. A node that was
    not finished, after an interrupt, stays what it was.
    """
    new: dict[ICLNode, ICLNode] = {}
    for node in graph.nodes:
        name = graph.names[node]
        parents = regrouped(node, new)
        if isinstance(node, GenNode) and name in written:
            new[node] = ICLNode([*headers[name], *written[name]], parents, name, start_pos_id=node.start_pos_id)
        elif all(new[parent] is parent for parent in node.parents):
            new[node] = node
        else:
            new[node] = copied(node, parents, name)
    return ICLGraph(*(new[node] for node in graph.sinks))
