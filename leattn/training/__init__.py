"""Training on graphs: a collator for transformers' ``Trainer`` that puts loss on chosen nodes and nowhere else."""

from leattn.training.collator import Collator
from leattn.training.example import Example
from leattn.training.loss import Targets, loss, predictions, targets

__all__ = ["Collator", "Example", "Targets", "loss", "predictions", "targets"]
