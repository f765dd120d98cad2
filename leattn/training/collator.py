"""From examples to a batch that a model takes in a plain call, outside of any ``with attend`` block."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import get_worker_info

from leattn.attention.inputs import input_form
from leattn.errors import BackendError, LeattnError
from leattn.model.record import Model
from leattn.training.caller import calling_trainer
from leattn.training.example import Example
from leattn.training.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FETCHING = ("get_batch_samples", "evaluation_loop")
"""The methods of a Trainer in which it takes batches from its collator."""


class Collator:
    """Makes a batch of examples: ids, positions, masks and labels. ``Trainer(…, data_collator=Collator(model, tokenizer))``.

    The masks have the form that the model's implementation takes at this moment: additive for eager, boolean for sdpa, a
    ``BlockMask`` for flex_attention, a dict of them for a model with several kinds of layers. Nothing about the model
    changes in a step, so that gradient checkpointing runs the layers again with the very same masks.

    Parameters
    ----------
    model
        A transformers model; choose the implementation before, with ``model.set_attn_implementation(…)``. Only what
        has to be known of it is kept, so that the collator can be sent to a data loader's worker processes.
    tokenizer
        For examples that hold text and are not compiled yet.

    Raises
    ------
    BackendError
        The model, or its implementation, cannot follow a graph.

    Notes
    -----
    Masks are ``[B, 1, S, S]``, one byte per entry for sdpa, made on the CPU and moved like any other input. A ``BlockMask``
    cannot be moved: it is made on the model's device, in the main process (``dataloader_num_workers=0``). Several GPUs in one
    process (``DataParallel``) cannot share it either; start one process for each, with ``torchrun`` or ``accelerate launch``.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> q = leattn.ICLNode("\\nQ: What is the capital of Zarvia?\\nA:", id="Q")
    >>> answers = [leattn.ICLNode(text, parents=[q], id=text) for text in (" Lumo", " Madan.")]
    >>> collate = Collator(model, tokenizer)
    >>> batch = collate([Example(answers[0], labels=" Lumo"), Example(answers[1], labels=" Madan.")])
    >>> {name: list(tensor.shape) for name, tensor in batch.items()}
    {'input_ids': [2, 15], 'position_ids': [2, 15], 'attention_mask': [2, 1, 15, 15], 'labels': [2, 15]}
    >>> batch["labels"][:, -2:].tolist() == [[-100, tokenizer.encode(" Lumo")[0]], tokenizer.encode(" Madan.")]
    True
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.form = input_form(model)
        self.tokenizer = tokenizer
        self._base = weakref.ref(Model.of(model).base)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch, padded on the left.

        Returns
        -------
        dict
            ``input_ids`` and ``position_ids`` ``[B, S]``; ``attention_mask`` in the model's form; ``labels`` ``[B, K · S]``,
            see :mod:`leattn.training.loss`.

        Raises
        ------
        LeattnError
            Something else than examples, or labels that cannot be learnt; a token that predicts several ids, for a Trainer
            without ``compute_loss_func``.
        BackendError
            The model runs another implementation by now.
        """
        for example in examples:
            if not isinstance(example, Example):
                raise LeattnError(
                    f"the collator takes leattn.training.Example, not {type(example).__name__}; make one of each row in the "
                    "data set's __getitem__ or with_transform, and set remove_unused_columns=False, or columns are dropped"
                )
        if not examples:
            raise LeattnError("there is no example in this batch; give one or more")
        prompts = [example.compile(self.tokenizer) for example in examples]
        pairs = [example.targets(prompt) for example, prompt in zip(examples, prompts, strict=True)]
        inputs = self.form.inputs(prompts, self._device())
        starts = [inputs["input_ids"].shape[1] - len(prompt) for prompt in prompts]
        device = torch.device("cpu") if self.form.backend.name != "flex" else inputs["input_ids"].device
        labels = _labels(pairs, starts, inputs["input_ids"].shape[1])
        if labels.shape[1] > inputs["input_ids"].shape[1]:
            _check_loss()
        return {**inputs, "labels": labels.to(device)}

    def _device(self) -> torch.device:
        """Where masks are made, after making sure that they are the ones the model takes."""
        base = self._base()
        made_for = self.form.implementation
        if base is not None and Model.of(base).runs_on != made_for:
            raise BackendError(
                f"this collator was made for {made_for!r} and the model runs {Model.of(base).runs_on!r} now, which "
                "takes other masks; make the collator after model.set_attn_implementation"
            )
        if self.form.backend.name != "flex":
            return torch.device("cpu")
        if base is None or get_worker_info() is not None:
            raise BackendError(
                "flex_attention's masks are made on the model's device and cannot leave a worker process; "
                "set dataloader_num_workers=0, or train with sdpa"
            )
        return Model.of(base).device

    def __getstate__(self) -> dict[str, Any]:
        self._device()
        return {"form": self.form, "tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _base=lambda: None)


def _check_loss() -> None:
    """Refuse several ids for one token where the Trainer that asks for the batch computes transformers' own loss.

    A worker process, or a loop of one's own, cannot be looked at: there transformers refuses the batch by its size.
    """
    trainer = calling_trainer(FETCHING)
    if trainer is None or trainer.compute_loss_func is not None:
        return
    if type(trainer).compute_loss is sys.modules["transformers.trainer"].Trainer.compute_loss:
        raise LeattnError(
            "a token of this batch predicts several ids, as several labelled branches continue one node, and transformers' own "
            "loss takes one; give the Trainer compute_loss_func=leattn.training.loss, or label one branch per example"
        )


def _labels(pairs: Sequence[Sequence[tuple[int, int]]], starts: Sequence[int], columns: int) -> torch.Tensor:
    """Labels ``[B, K · S]`` of the (token index, id) pairs of each row, whose prompt starts at a column."""
    placed: list[tuple[int, int, int, int]] = []  # row, which of its column's labels, column, id
    for row, (found, start) in enumerate(zip(pairs, starts, strict=True)):
        used: dict[int, int] = {}
        for index, token in found:
            rank = used[index] = used.get(index, -1) + 1
            placed.append((row, rank, start + index + 1, token))
    most = 1 + max(rank for _, rank, _, _ in placed)
    labels = torch.full((len(pairs), most, columns), IGNORED)
    row, rank, column, token = torch.tensor(placed).T
    labels[row, rank, column] = token
    return labels.flatten(1)
