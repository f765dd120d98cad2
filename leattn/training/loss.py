"""Loss and predictions on the labelled tokens.

``labels`` are ``[B, K · S]`` with -100 where nothing is learnt. The id that column s should predict stands at s + 1, where
transformers' own loss looks for it, whatever token is there itself. K is how many different ids one column predicts: 1 as a
rule, and then the labels are those of any causal model; more where several labelled branches continue one node. Then they
are K such rows end to end, which transformers' own loss refuses by their size and :func:`loss` takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from leattn.errors import LeattnError

IGNORED = -100
"""transformers' label for "no loss here"."""


class Targets(NamedTuple):
    """Who predicts what in a batch, A targets: ``row``, ``column`` and ``id``, ``[A]`` each."""

    row: torch.Tensor
    column: torch.Tensor
    id: torch.Tensor


def targets(labels: torch.Tensor, columns: int) -> Targets:
    """The targets in a batch's labels.

    Parameters
    ----------
    labels
        ``[B, K · S]``, from the collator.
    columns
        S, the columns of the batch.

    Raises
    ------
    LeattnError
        Labels of another batch.

    Examples
    --------
    >>> found = targets(torch.tensor([[-100, -100, 7, -100, -100, 8]]), columns=3)  # column 1 predicts 7, and also 8
    >>> found.column.tolist(), found.id.tolist()
    ([1, 1], [7, 8])
    """
    if labels.shape[1] % columns:
        raise LeattnError(
            f"labels have {labels.shape[1]} columns and the logits {columns}; take both from one batch, with all its logits "
            "(no logits_to_keep)"
        )
    row, at = (labels != IGNORED).nonzero(as_tuple=True)
    return Targets(row, at % columns - 1, labels[row, at])


def loss(outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, scalar: ``Trainer(…, compute_loss_func=leattn.training.loss)``.

    Parameters
    ----------
    outputs
        What the model returned, called without ``labels``; its logits are ``[B, S, V]``. Only the rows that predict a
        labelled token are made float32.
    labels
        ``[B, K · S]``, from the collator.
    num_items_in_batch
        By how many targets to divide the sum, all batches of an accumulated step together. The Trainer counts them; None:
        those of this batch.

    Raises
    ------
    LeattnError
        No labels, or labels of another batch.
    """
    if labels is None:
        raise LeattnError("the batch has no labels; use leattn.training.Collator as the data_collator")
    logits = _logits(outputs)
    found = targets(labels.to(logits.device), logits.shape[1])
    total = F.cross_entropy(logits[found.row, found.column].float(), found.id, reduction="sum")
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / (len(found.id) if num_items_in_batch is None else num_items_in_batch)


def predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest id for each label, ``[B, K · S]`` like ``labels``, and -100 where there is none.

    For ``Trainer(…, preprocess_logits_for_metrics=leattn.training.predictions)``: ``compute_metrics`` then gets predictions
    beside label ids, and no logits have to be kept.

    Examples
    --------
    >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])  # [1, 2, 2]
    >>> predictions(logits, torch.tensor([[-100, 0]])).tolist()
    [[-100, 1]]
    """
    logits = _logits(logits)
    found = targets(labels, logits.shape[1])
    said = torch.full_like(labels, IGNORED)
    said[labels != IGNORED] = logits[found.row, found.column].argmax(-1)
    return said


def _logits(outputs: Any) -> torch.Tensor:
    """The logits in what a model returns: an output class, a dict, or a tuple that begins with them."""
    if isinstance(outputs, dict):
        outputs = outputs["logits"]
    logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise LeattnError(f"the model returned {type(outputs).__name__} where logits [B, S, V] belong; train a causal model")
    return logits
