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
from leattn.training.caller import calling_trainer

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
    if labels.dim() != 2 or labels.shape[1] % columns:
        raise LeattnError(
            f"labels have {labels.shape[-1]} columns and the logits {columns}, which are one prediction per token; {_ONE_BATCH}"
        )
    row, at = (labels != IGNORED).nonzero(as_tuple=True)
    column = at % columns - 1
    if (column < 0).any() or not _fits(labels, columns):
        raise LeattnError(
            f"labels of shape {list(labels.shape)} are not those of logits with {columns} columns: they have targets where the "
            f"collator puts none, such as the first column; {_ONE_BATCH}"
        )
    return Targets(row, column, labels[row, at])


_ONE_BATCH = "take both from one batch of leattn.training.Collator, with all its logits (no logits_to_keep)"


def _fits(labels: torch.Tensor, columns: int) -> bool:
    """Whether further ids that a column predicts stand only where it predicts a first one."""
    there = labels.reshape(len(labels), -1, columns) != IGNORED  # [B, K, S]
    return there.shape[1] == 1 or not bool((there[:, 1:] & ~there[:, :-1]).any())


def loss(outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, scalar: ``Trainer(…, compute_loss_func=leattn.training.loss)``.

    The ``label_smoothing_factor`` of a Trainer that calls it counts as in transformers' own loss.

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
        No labels, labels of another batch, or logits of several predictions per token.
    """
    if labels is None:
        raise LeattnError("the batch has no labels; use leattn.training.Collator as the data_collator")
    logits = _logits(outputs, labels)
    found = targets(labels.to(logits.device), logits.shape[1])
    predicted = logits[found.row, found.column].float()
    total = F.cross_entropy(predicted, found.id, reduction="sum", label_smoothing=_smoothing())
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
    logits = _logits(logits, labels)
    found = targets(labels, logits.shape[1])
    said = torch.full_like(labels, IGNORED)
    said[labels != IGNORED] = logits[found.row, found.column].argmax(-1)
    return said


def _smoothing() -> float:
    """``label_smoothing_factor`` of the Trainer that calls, 0 in a loop of one's own."""
    smoother = getattr(calling_trainer(["compute_loss"]), "label_smoother", None)
    return 0.0 if smoother is None else float(smoother.epsilon)


def _logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The logits in what a model returns: an output class, a dict, or a tuple that begins with them."""
    if isinstance(outputs, dict):
        outputs = (outputs["logits"],)
    every = outputs if isinstance(outputs, tuple | list) else (outputs,)
    logits = every[0]
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        what = f"logits of shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise LeattnError(f"the model returned {what} {_ONE_PREDICTION}")
    if any(isinstance(other, torch.Tensor) and other.shape == logits.shape for other in every[1:]):
        raise LeattnError(f"the model returned several logits of shape {list(logits.shape)} {_ONE_PREDICTION}")
    if len(logits) != len(labels):
        raise LeattnError(f"there are labels of {len(labels)} rows and logits of {len(logits)}; {_ONE_BATCH}")
    return logits


_ONE_PREDICTION = (
    "where logits [B, S, V] belong, one prediction per token; train a causal model, one with several heads on the logits of "
    "the next token alone"
)
