"""What a user asks about, prompts, graphs or nodes, as what is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph, as_graph
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.prompt.compile import compile_prompt, read_by
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions, scheme_of
from leattn.prompt.visible import Visibility

Target: TypeAlias = CompiledPrompt | ICLGraph | ICLNode


def reader_of(targets: Iterable[Target], tokenizer: Any) -> Any:
    """What reads and writes texts: the tokenizer that is given, or else that of the first prompt which has one."""
    if tokenizer is not None:
        return tokenizer
    own = (item.tokenizer for item in targets if isinstance(item, CompiledPrompt))
    return next((one for one in own if one is not None), None)


def ready(
    target: Target, reader: Any, reads_all: bool, positions: Positions, visibility: Visibility
) -> CompiledPrompt | ICLGraph:
    """A target compiled, unless it has nodes to write; ``reads_all``: its texts are read by ``reader`` whatever it brings.

    Raises
    ------
    LeattnError
        Several sinks, and positions at which they would go on over each other.
    """
    graph = target if isinstance(target, CompiledPrompt) else as_graph(target)
    if isinstance(graph, ICLGraph) and not any(isinstance(node, GenNode) for node in graph.nodes):
        if len(graph.sinks) > 1 and scheme_of(positions).branches_collide:
            raise LeattnError(
                f"with positions={positions!r} the {len(graph.sinks)} sinks of a graph would go on at each other's "
                "positions; use 'after_parents', or compile and generate each sink by itself"
            )
        graph = compile_prompt(graph, reader, positions=positions, visibility=visibility)
    if isinstance(graph, CompiledPrompt) and (reads_all or graph.tokenizer is None):
        graph = read_by(graph, reader)
    return graph
