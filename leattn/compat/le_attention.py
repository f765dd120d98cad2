"""LE-ATTENTION's own names, as its README uses them. Each calls the one real implementation.

>>> X1 = ICLNode("example1.", id="X1")
>>> X2 = ICLNode("example2.", parents=[X1], id="X2")
>>> print(print_dag(X2))
└── X2
    └── X1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from leattn.dag.draw import draw
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode, whole_number
from leattn.dag.tokens import tokenized_with
from leattn.errors import LeattnError
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.masks import MaskMod

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase


def upstream_nodes(leaf_node: ICLNode) -> list[ICLNode]:
    """The node and all its ancestors, in layout order: parents first, otherwise as created.

    Examples
    --------
    >>> a = ICLNode("a", id="a")
    >>> [node.id for node in upstream_nodes(ICLNode("b", parents=[a], id="b"))]
    ['a', 'b']
    """
    return list(ICLGraph(leaf_node).nodes)


def print_dag(leaf_node: ICLNode, output_character_limit: int = 10, repeat_shared: bool = False) -> str:
    """The graph above a node as a tree of names, each cut after ``output_character_limit`` characters.

    Returns the text; it is the caller who prints it. What several nodes see is drawn once; with ``repeat_shared=True`` again
    under each of them, as LE-ATTENTION prints it, up to some hundred lines.
    """
    return draw([leaf_node], ICLGraph(leaf_node).names, name_limit=output_character_limit, repeat=repeat_shared)


def build_attention_matrix(
    leaf_node: ICLNode, tokenizer: PreTrainedTokenizerBase | None = None, materialize_attention_matrix: bool = True
) -> tuple[npt.NDArray[np.int64] | None, list[ICLNode], list[tuple[int, int]], list[str]]:
    """The mask of a node and its ancestors, and what its rows and columns are.

    Returns
    -------
    matrix
        ``[S, S]`` of 0 and 1, rows are queries; None if ``materialize_attention_matrix`` is False.
    nodes
        In layout order.
    start_end_pos
        ``(start, end)`` of each node in tokens, end exclusive.
    names
        Unique within the graph, also where nodes have no id.

    Examples
    --------
    >>> a = ICLNode([7, 8], id="a")
    >>> matrix, nodes, start_end_pos, names = build_attention_matrix(ICLNode([9], parents=[a], id="b"))
    >>> matrix.tolist(), start_end_pos, names
    ([[1, 0, 0], [1, 1, 0], [1, 1, 1]], [(0, 2), (2, 3)], ['a', 'b'])
    """
    prompt = compile_prompt(leaf_node, tokenizer, positions="restart")
    nodes = list(prompt.graph.nodes)
    for node in nodes:
        if tokenizer is not None:
            tokenized_with[node] = tokenizer
    matrix = prompt.dense_mask().numpy().astype(np.int64) if materialize_attention_matrix else None
    return matrix, nodes, list(prompt.spans.values()), list(prompt.graph.names.values())


def prepare_inputs(
    nodes: Sequence[ICLNode], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of some nodes one after the other, ``[1, S]`` each.

    Positions start at 0 in every node, unless ``start_pos_id`` or ``end_pos_id`` say otherwise. Nodes that
    :func:`build_attention_matrix` or ``tokenize`` has seen keep the tokenizer they were last given; others take ``tokenizer``.

    Raises
    ------
    LeattnError
        No tokenizer is known for a node that holds text, or the nodes were built with different ones.

    Examples
    --------
    >>> a = ICLNode([7, 8])
    >>> prepare_inputs([a, ICLNode([9], parents=[a], start_pos_id=2)])
    (tensor([[7, 8, 9]]), tensor([[0, 1, 2]]))
    """
    if isinstance(nodes, ICLNode):
        raise LeattnError(
            f"prepare_inputs takes a list of nodes; write prepare_inputs([{str(nodes)!r}]) or give its upstream_nodes"
        )
    graph = ICLGraph(*nodes)
    prompt = compile_prompt(graph, _last_tokenizer(graph) if tokenizer is None else tokenizer, positions="restart")
    parts = [prompt[node] for node in nodes]
    return torch.cat([part.input_ids for part in parts])[None], torch.cat([part.positions for part in parts])[None]


def _last_tokenizer(graph: ICLGraph) -> PreTrainedTokenizerBase | None:
    """The one tokenizer that all text in the graph was last built with; None if there is no text."""
    texts = [node for node in graph if isinstance(node.content, str)]
    tokenizers = {id(tokenized_with.get(node)): tokenized_with.get(node) for node in texts}
    unknown = next((node for node in texts if tokenized_with.get(node) is None), None)
    if unknown is not None:
        raise LeattnError(
            f"no tokenizer is known for node {str(unknown)!r}, which holds text; "
            "call build_attention_matrix(leaf, tokenizer) before, or give tokenizer="
        )
    if len(tokenizers) > 1:
        raise LeattnError(
            f"the nodes were last built with {len(tokenizers)} different tokenizers; give tokenizer= to say which"
        )
    return next(iter(tokenizers.values()), None)


def generate_flex_attention_mask_mod(leaf_node: ICLNode, tokenizer: PreTrainedTokenizerBase | None = None) -> MaskMod:
    """The mask of a node and its ancestors as ``mask_mod(b, h, q_idx, kv_idx)`` for flex_attention.

    Examples
    --------
    >>> mask_mod = generate_flex_attention_mask_mod(ICLNode([7, 8]))
    >>> index = torch.arange(2)
    >>> mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
    tensor([[ True, False],
            [ True,  True]])
    """
    return compile_prompt(leaf_node, tokenizer).mask_mod


def visualize_attention_matrix(
    matrix: npt.ArrayLike,
    start_end_pos: Sequence[tuple[int, int]],
    names: Sequence[str],
    grid_spacing: float = 0.05,
    size_ratio: float = 1.0,
    show_legend: bool = False,
    save_dir: str | Path | None = None,
) -> Axes:
    """Draw what :func:`build_attention_matrix` returned: queries downwards, keys to the right, grey where masked.

    Parameters
    ----------
    matrix
        ``[S, S]``, rows are queries.
    start_end_pos, names
        ``(start, end)`` in tokens and the name of each node.
    grid_spacing
        The white space between two cells, in parts of a cell.
    size_ratio
        Pixels per inch, in parts of what pictures of leattn have.
    show_legend
        Say what 0 and 1 look like, the latter for the first node.
    save_dir
        The picture's file, as in LE-ATTENTION; its folder is made where it is missing. Nothing is written without it.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    LeattnError
        No matrix, spans or names that do not fit it, or a matrix that is not one of whole nodes.

    Examples
    --------
    >>> matrix, nodes, start_end_pos, names = build_attention_matrix(ICLNode([7, 8], id="a"))
    >>> visualize_attention_matrix(matrix, start_end_pos, names).get_title(loc="left")
    'attention mask: 2 tokens, 1 node, density 1.00'
    """
    from leattn.viz import plot_mask
    from leattn.viz.style import DPI, MASKED, node_colours

    if size_ratio <= 0:
        raise LeattnError(f"size_ratio={size_ratio} is no size; give a number above 0")
    if not 0 <= grid_spacing < 1:
        raise LeattnError(f"grid_spacing={grid_spacing} leaves no cells; give a number from 0 to below 1")
    ax = plot_mask(_prompt_of(matrix, start_end_pos, names))
    figure: Any = ax.figure
    size = len(np.asarray(matrix))
    cell = 72 * ax.get_position().height * figure.get_size_inches()[1] / size  # in points
    inner = np.arange(1, size)
    style: dict[str, Any] = {"colors": "white", "linewidths": grid_spacing * cell, "zorder": 1.6}
    ax.vlines(inner, 0, size, **style)
    ax.hlines(inner, 0, size, **style)
    if show_legend:
        colours = {"0": MASKED, "1": node_colours(len(names))[0]}
        handles = [ax.scatter([], [], marker="s", color=colour, label=value) for value, colour in colours.items()]
        figure.legend(handles=handles, loc="upper right", title="Binary Values")
    figure.set_dpi(figure.dpi * size_ratio)
    if save_dir is not None:
        Path(save_dir).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save_dir, dpi=DPI * size_ratio)
    return ax


def _prompt_of(matrix: npt.ArrayLike, start_end_pos: Sequence[tuple[int, int]], names: Sequence[str]) -> CompiledPrompt:
    """The graph that has this matrix, its nodes made of as many nameless tokens: pictures are drawn from nodes."""
    if matrix is None:
        raise LeattnError("the matrix is None; build it with materialize_attention_matrix=True")
    mask = np.asarray(matrix).astype(bool)
    spans = [_whole_span(pair) for pair in start_end_pos]
    ends = [0, *(end for _, end in spans)]
    if mask.ndim != 2 or mask.shape != (ends[-1], ends[-1]) or ends[:-1] != [start for start, _ in spans]:
        raise LeattnError(
            f"start_end_pos covers {ends[-1]} tokens, one node after the other, but the matrix is {list(np.shape(mask))}; "
            "give all three as build_attention_matrix returned them"
        )
    if len(names) != len(spans):
        raise LeattnError(f"{len(names)} names for {len(spans)} nodes; give one per node")
    nodes: list[ICLNode] = []
    for (start, end), name in zip(spans, names, strict=True):
        parents = [nodes[j] for j, (first, _) in enumerate(spans[: len(nodes)]) if mask[start, first]]
        nodes.append(ICLNode([0] * (end - start), parents, id=name))
    prompt = compile_prompt(nodes, positions="restart")
    different = np.argwhere(prompt.dense_mask().numpy() != mask)
    if len(different):
        row, column = different[0].tolist()
        raise LeattnError(
            f"the matrix is not one of whole nodes: query token {row} and key token {column} break the pattern of their nodes; "
            "draw it with matplotlib's imshow"
        )
    return prompt


def _whole_span(pair: tuple[int, int]) -> tuple[int, int]:
    start, end = map(whole_number, pair)
    if start is None or end is None:
        raise LeattnError(
            f"start_end_pos has {tuple(pair)!r}; give pairs of whole numbers, the first token and one past the last"
        )
    return start, end
