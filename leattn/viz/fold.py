"""Token × token attention weights folded to node × node. Needs no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from leattn.errors import LeattnError

if TYPE_CHECKING:
    from leattn.prompt.compiled import CompiledPrompt


def fold_attention(weights: torch.Tensor | Sequence[torch.Tensor], prompt: CompiledPrompt) -> torch.Tensor:
    """How much of its attention each node gives to each node.

    Entry (i, j) is the weight that a query token of node i puts on all tokens of node j together, averaged over the query
    tokens of i. Rows sum to 1 as the rows of the weights do.

    Parameters
    ----------
    weights
        One prompt's after the softmax: ``[1, H, S, S]``, ``[H, S, S]`` or ``[S, S]``, or one such tensor per layer
        (``outputs.attentions``), which are stacked. Of a batch, the prompt's row without the padding, which is on the left:
        ``weights[i : i + 1, :, -S:, -S:]``.
    prompt
        The S tokens that the weights are about.

    Returns
    -------
    Tensor ``[..., N, N]``, with the layers in front if they come one by one; float32, or float64 for float64 weights.

    Raises
    ------
    LeattnError
        Weights that are missing, that do not fit the prompt's S tokens, of a batch of several rows, or of several generation
        steps.

    Examples
    --------
    >>> from leattn import ICLNode, compile_prompt
    >>> doc = ICLNode([5, 6], id="doc")
    >>> prompt = compile_prompt(ICLNode([7], parents=[doc], id="Q"))
    >>> weights = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.25, 0.25, 0.5]])
    >>> fold_attention(weights, prompt).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    if not isinstance(weights, torch.Tensor):
        return torch.stack([_fold(check_weights(layer, prompt, f"layer {i}: "), prompt) for i, layer in enumerate(weights)])
    return _fold(check_weights(weights, prompt), prompt)


def check_weights(weights: object, prompt: CompiledPrompt, where: str = "") -> torch.Tensor:
    """``weights`` as they are if they are this prompt's: ``[S, S]``, ``[H, S, S]`` or ``[1, H, S, S]``.

    ``where`` opens the error.
    """
    size = len(prompt)
    if weights is None:
        raise LeattnError(
            f"{where}the attention weights are None; only eager attention returns them: "
            "model.set_attn_implementation('eager') and output_attentions=True"
        )
    if isinstance(weights, tuple | list):
        raise LeattnError(
            f"{where}expected a tensor, got a {type(weights).__name__}: generate() returns one tuple per step; "
            f"give the first, attentions[0], which is about the prompt's {size} tokens"
        )
    if not isinstance(weights, torch.Tensor) or weights.dim() < 2 or not weights.is_floating_point():
        what = f"{weights.dtype} of shape {list(weights.shape)}" if isinstance(weights, torch.Tensor) else repr(weights)
        raise LeattnError(f"{where}attention weights are a floating-point tensor [H, S, S], not {what}")
    if weights.dim() > 4 or (weights.dim() == 4 and weights.shape[0] != 1):
        row = f"of a batch its row i, without the padding, which is on the left: weights[i : i + 1, :, -{size}:, -{size}:]; "
        raise LeattnError(
            f"{where}weights of shape {list(weights.shape)} are more than one prompt's [1, H, S, S]; take "
            f"{row if weights.dim() == 4 else ''}of layers stacked in one tensor a list of them, list(weights)"
        )
    queries, keys = weights.shape[-2:]
    if (queries, keys) != (size, size):
        raise LeattnError(
            f"{where}the weights have {queries} queries and {keys} keys, but the prompt {size} tokens; "
            + (_SLICE.format(size=size) if min(queries, keys) > size else "run the whole prompt in one forward")
        )
    return weights


_SLICE = (
    "slice weights[..., -{size}:, -{size}:], as the padding of a batch is on the left; where tokens were generated after the "
    "prompt, its own are the first {size}"
)


def _fold(weights: torch.Tensor, prompt: CompiledPrompt) -> torch.Tensor:
    """``[..., S, S]`` to ``[..., N, N]``."""
    nodes = len(prompt.graph)
    weights = weights if weights.dtype == torch.float64 else weights.float()
    node_index = prompt.node_index.to(weights.device)
    lengths = torch.tensor(prompt.offsets, device=weights.device).diff()
    by_key = weights.new_zeros(*weights.shape[:-1], nodes).index_add(-1, node_index, weights)  # [..., S, N]
    total = by_key.new_zeros(*by_key.shape[:-2], nodes, nodes).index_add(-2, node_index, by_key)
    return total / lengths[:, None]
