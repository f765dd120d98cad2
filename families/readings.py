"""The column readings: a question that reads its documents in other ways, against the plain model with a softmax done by hand.

The rule stands here again, in front of the plain model's softmax: whatever a family adds to its scores or caps them with is
there already. Taking the largest score off all of them, as some families do, changes no softmax, but what a group weighs; so it
is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import leattn
from families.build import Builder
from families.oracle import Oracle, difference, split
from families.outcome import Outcome, judged
from families.prompts import Graph, compiled, fan
from families.softmax import SOFTMAXES

SUMS = (*SOFTMAXES, torch.logsumexp, Tensor.logsumexp)
DIFFERENCES = (torch.sub, Tensor.sub, Tensor.__sub__)
READER = "question"
WAYS: dict[str, dict[str, Any]] = {"a": {"temperature": 0.6, "scale": 0.8}, "b": {"temperature": 1.5, "log_weight": -1.2}}
"""How it reads each of its documents."""


class _Reading(TorchFunctionMode):
    """Changes the reader's rows of scores ``[…, S, S]``, or ``[…, S, S + 1]`` where a model appends a sink."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.columns: dict[str, list[int]] = {name: [] for name in WAYS}
        self.size = 0
        for chunk in graph:
            for _ in chunk.tokens:
                if chunk.name == READER:
                    self.rows.append(self.size)
                if chunk.name in WAYS:
                    self.columns[chunk.name].append(self.size)
                self.size += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and self.is_of_scores(args[0]):
            if func in SUMS:
                args = (self.changed(args[0]), *args[1:])
            elif func in DIFFERENCES and args[1].shape == (*args[0].shape[:-1], 1):
                return args[0]
        return func(*args, **(kwargs or {}))

    def is_of_scores(self, tensor: Tensor) -> bool:
        return tensor.dim() >= 3 and tensor.shape[-2] == self.size and self.size <= tensor.shape[-1] <= self.size + 1

    def changed(self, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for name, way in WAYS.items():
            for row in self.rows:
                seen = scores[..., row, self.columns[name]].float()
                hidden = seen < torch.finfo(scores.dtype).min / 4
                sharp = (seen / way["temperature"]).masked_fill(hidden, -torch.inf)
                most = sharp.amax(-1, keepdim=True)
                total = most + (sharp - most).exp().sum(-1, keepdim=True).log()
                power = way.get("scale", 1.0) * way["temperature"]
                log_weights = (sharp - total) + power * total + way.get("log_weight", 0.0)
                scores[..., row, self.columns[name]] = torch.where(hidden, seen, log_weights).to(scores.dtype)
        return scores


def check_readings(builder: Builder, oracle: Oracle) -> list[Outcome]:
    """All checks of the column."""
    model, graph = builder.fresh(), fan()
    prompt = compiled(graph)
    for name, way in WAYS.items():
        prompt = prompt.with_reading(READER, name, **way)

    def read(backend: str) -> float | None:
        with torch.no_grad():
            logits = leattn.forward(model, prompt, backend=backend, use_cache=False).logits[0]
        if not oracle.follows(graph):
            return None
        assert oracle.way is not None
        with _Reading(graph):
            right = split(graph, oracle.way.logits(graph))
        found = split(graph, logits)
        return max(difference(found[name], rows) for name, rows in right.items())

    return [judged(f"on {backend}", oracle.tolerance, lambda backend=backend: read(backend)) for backend in ("auto", "eager")]  # type: ignore[misc]
