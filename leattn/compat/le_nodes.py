"""LE-ATTENTION's smaller names: matrices of nodes and of layers, and a picture of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from leattn.dag.node import ICLNode
from leattn.errors import LeattnError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def build_adjacency_matrix(nodes: Sequence[ICLNode]) -> list[list[int]]:
    """Which node sees which, ``[N][N]`` of 0 and 1, rows are those that see; every node sees itself.

    Nodes count by identity, where LE-ATTENTION takes two of one name for the same node.

    Raises
    ------
    LeattnError
        A node of which a parent is missing.

    Examples
    --------
    >>> a = ICLNode("a")
    >>> build_adjacency_matrix([a, ICLNode("b", parents=[a])])
    [[1, 0], [1, 1]]
    """
    places = {node: i for i, node in enumerate(nodes)}
    matrix = [[int(i == j) for j in range(len(nodes))] for i in range(len(nodes))]
    for node, i in places.items():
        for parent in node.parents:
            if parent not in places:
                raise LeattnError(
                    f"the parent {str(parent)!r} of {str(node)!r} is not among the nodes; give upstream_nodes(leaf)"
                )
            matrix[i][places[parent]] = 1
    return matrix


def aggregate_attention_matrix(attention_matrices: Iterable[torch.Tensor]) -> npt.NDArray[Any]:
    """A model's ``attentions``, one tensor ``[1, H, Q, K]`` per layer, as one array ``[L, H, Q, K]``.

    LE-ATTENTION drops whatever dimension has one entry; this drops the batch alone, and makes float32 of bfloat16, which numpy
    does not have.

    Raises
    ------
    LeattnError
        No layers, or a batch of several rows.

    Examples
    --------
    >>> aggregate_attention_matrix([torch.ones(1, 1, 2, 2)] * 3).shape
    (3, 1, 2, 2)
    """
    layers = list(attention_matrices)
    if not layers or any(layer.dim() != 4 or layer.shape[0] != 1 for layer in layers):
        shapes = [list(layer.shape) for layer in layers]
        raise LeattnError(f"attentions are one tensor [1, H, Q, K] per layer, not {shapes}; take one row of a batch")
    as_numbers = (layer[0].detach().float() if layer.dtype == torch.bfloat16 else layer[0].detach() for layer in layers)
    return np.stack([layer.cpu().numpy() for layer in as_numbers])


def is_in(node: ICLNode, nodes: Iterable[ICLNode]) -> bool:
    """Whether a node is one of some nodes. Two nodes of the same text are two."""
    return any(node == other for other in nodes)


def make_and_viz_dag(leaf_node: ICLNode) -> Axes:
    """Draw a node and its ancestors, which LE-ATTENTION announces and raises NotImplementedError for."""
    from leattn.viz import plot_dag

    return plot_dag(leaf_node)
