"""What a target costs: the continuation that attribution and sweeps ask a model about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch

from leattn.attention.request import Backend
from leattn.errors import LeattnError
from leattn.interventions.intervene import intervene
from leattn.interventions.operation import Operation
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt

Target: TypeAlias = str | Iterable[int] | torch.Tensor
"""What is asked about: a text, or token ids."""


def one_backend(model: Any, prompt: CompiledPrompt, operations: Sequence[Operation], backend: str | Backend) -> Backend:
    """One backend for everything, so that losses differ by the intervention alone; resolved before anything runs."""
    with intervene(model, prompt, operations, backend=backend) as attention:
        return attention.backend


def target_ids(model: Any, prompts: Sequence[CompiledPrompt], targets: Sequence[Target]) -> list[tuple[int, ...]]:
    """The token ids of each prompt's target, checked against the model before anything runs.

    Raises
    ------
    LeattnError
        An empty target, a prompt with several sinks, a model in training mode.
    BackendError
        A token that the model has no embedding for, or positions past its limit.
    """
    if model.training:
        raise LeattnError("the model is in training mode, where dropout would make every loss a draw; call model.eval() first")
    continued = [prompt.continued(target) for prompt, target in zip(prompts, targets, strict=True)]
    facts = Model.of(model).facts
    facts.check_tokens(continued)
    facts.check_positions(continued)
    return [tuple(whole.input_ids[0, len(prompt) :].tolist()) for whole, prompt in zip(continued, prompts, strict=True)]


@torch.no_grad()
def target_logits(
    model: Any,
    prompts: Sequence[CompiledPrompt],
    targets: Sequence[Sequence[int]],
    operations: Sequence[Operation] = (),
    *,
    backend: str | Backend = "auto",
) -> list[torch.Tensor]:
    """One forward pass over a batch: the logits from which each target token is predicted, float32 ``[T, V]`` per prompt.

    Targets stand behind the prompts as generated tokens do: they see the sink and what it sees, and operations touch them only
    where they name generated tokens.
    """
    longest = max(map(len, targets))
    with intervene(model, prompts, operations, backend=backend) as attention:
        ids = attention.inputs["input_ids"]
        after = ids.new_zeros(len(prompts), longest)  # padding behind a shorter target: nothing sees it
        for row, target in enumerate(targets):
            after[row, : len(target)] = torch.tensor(target)
        whole = torch.cat([ids, after], 1)
        rows = range(ids.shape[1] - 1, whole.shape[1] - 1)
        logits = attention.record.run(model, whole, rows, use_cache=False).logits.float()  # [P, T, V]
    return [logits[row, : len(target)] for row, target in enumerate(targets)]


@torch.no_grad()
def last_logits(
    model: Any, prompts: Sequence[CompiledPrompt], count: int, operations: Sequence[Operation], *, backend: str | Backend
) -> list[torch.Tensor]:
    """One forward pass over a batch: the logits of each prompt's last ``count`` tokens, float32 ``[count, V]``."""
    with intervene(model, prompts, operations, backend=backend) as attention:
        ids = attention.inputs["input_ids"]
        rows = range(ids.shape[1] - count, ids.shape[1])
        logits = attention.record.run(model, ids, rows, use_cache=False).logits.float()
    return list(logits)


def token_losses(logits: torch.Tensor, target: Sequence[int]) -> torch.Tensor:
    """Cross-entropy in nats of each target token, float64 ``[T]`` on the CPU, from logits ``[T, V]``."""
    labels = torch.tensor(target, device=logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu()
