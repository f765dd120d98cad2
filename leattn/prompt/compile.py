"""A graph and a tokenizer become one frozen prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from leattn.dag.gennode import GenNode
from leattn.dag.graph import ICLGraph, as_graph
from leattn.dag.node import ICLNode
from leattn.dag.tokens import tokenize_all
from leattn.errors import CompileError, LeattnError
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions, token_positions
from leattn.prompt.visible import Visibility, visible_relation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def compile_prompt(
    target: ICLNode | Iterable[ICLNode] | ICLGraph,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
) -> CompiledPrompt:
    """Lay out a graph in topological order, tokenize it and fix who sees whom.

    Parameters
    ----------
    target
        A node, several nodes (one graph) or a graph.
    tokenizer
        Needed if any node holds text.
    positions
        ``"after_parents"``: a node starts at the furthest end among the nodes it sees. ``"sequential"``: the index in the
        layout. ``"restart"``: every node at 0. ``"equilibrium"``: every path of a fork is stretched so that all end together
        (Merth et al., arXiv 2404.06910), which takes rotary positions. Or a callable ``(graph, {node: tokens}) → starts``, one
        number per node or one per token. Pins on nodes win.
    visibility
        ``"parents"``: a token sees its node up to itself and all of the direct parents. ``"ancestors"``: all of all
        ancestors.

    Raises
    ------
    CompileError
        A node without tokens, a negative position, a :class:`GenNode`, whose text is not written yet.
    LeattnError
        An unknown option.

    Examples
    --------
    >>> doc = ICLNode([1, 2, 3], id="doc")
    >>> print(compile_prompt(ICLNode([4], parents=[doc], id="Q")))
    2 nodes, 4 tokens, density 1.00
      0  doc  tokens 0:3  positions 0:3  ■⬚
      1  Q    tokens 3:4  positions 3:4  ■■
    """
    if isinstance(target, CompiledPrompt):
        raise LeattnError("this prompt is compiled already; use it as it is, or compile its .graph again")
    graph = as_graph(target)
    written = next((node for node in graph if isinstance(node, GenNode)), None)
    if written is not None:
        raise CompileError(
            f"node {graph.name(written)!r} is written by the model, so its tokens are not known yet; use "
            "leattn.generate(model, graph, tokenizer), and compile the result's .realised where a prompt is needed"
        )
    ids = tokenize_all(graph.nodes, tokenizer)
    lengths = [len(node_ids) for node_ids in ids]
    visible = visible_relation(graph, visibility)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = token_positions(graph, lengths, visible, positions)
    flat = np.fromiter((token for node_ids in ids for token in node_ids), np.int64, int(offsets[-1]))
    return CompiledPrompt(
        graph=graph,
        tokenizer=tokenizer,
        input_ids=torch.from_numpy(flat)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        offsets=tuple(offsets.tolist()),
        visible=visible,
    )


def read_by(prompt: CompiledPrompt, tokenizer: PreTrainedTokenizerBase | None) -> CompiledPrompt:
    """The prompt with the same ids, which are turned into text with ``tokenizer``, as is what continues them."""
    return prompt if tokenizer is prompt.tokenizer else replace(prompt, tokenizer=tokenizer)
