"""Injection as a grid of a sweep: states of donor prompts from one layer into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leattn.analysis.targets import Target, target_ids
from leattn.attention.request import Backend
from leattn.errors import LeattnError
from leattn.generation.forward import forward
from leattn.interventions.hidden import Inject
from leattn.interventions.operation import Layers, Operation
from leattn.interventions.where import Where, tokens_at
from leattn.prompt.compiled import CompiledPrompt


@dataclass(frozen=True, eq=False)
class Injection:
    """States of donor prompts, taken before every layer a and put in before every layer b: the heat map.

    Attributes
    ----------
    donors
        One prompt for each prompt of the sweep.
    at
        Whose states: a node's id, or whatever names tokens, or a function of the prompt that does. In a prompt and its donor
        it must name equally many tokens.
    targets
        What the donor's answer would be. With it every cell is measured twice: on the prompt's own target ("own": the answer
        stays) and on the donor's ("donor": the answer becomes the donor's).
    source_layers
        The layers a; all of them for None. The layers b are the sweep's.
    """

    donors: Sequence[CompiledPrompt]
    at: Where | Callable[[CompiledPrompt], Where]
    targets: Sequence[Target] | None = None
    source_layers: Layers | None = None

    def tokens(self, prompt: CompiledPrompt) -> list[int]:
        """The indices of the tokens in one prompt."""
        return tokens_at(prompt, self.at(prompt) if callable(self.at) else self.at)


@dataclass(frozen=True, eq=False)
class Donor:
    """An injection that knows its prompts: ``places[p]`` are token indices, ``states[p]`` ``[L, n, d]`` once computed."""

    injection: Injection
    model: Any
    places: list[list[int]]
    donor_places: list[list[int]]
    targets: list[tuple[int, ...]] | None
    backend: Backend
    states: dict[int, torch.Tensor]

    @classmethod
    def build(cls, model: Any, prompts: Sequence[CompiledPrompt], injection: Injection, backend: Backend) -> Donor:
        donors = injection.donors
        for what, given in (("donors", donors), ("targets", injection.targets)):
            if given is not None and (len(given) != len(prompts) or isinstance(given, str)):
                raise LeattnError(f"Injection has {len(given)} {what} for {len(prompts)} prompts; give one for each")
        places = [injection.tokens(prompt) for prompt in prompts]
        donor_places = [injection.tokens(donor) for donor in donors]
        for i, (here, there) in enumerate(zip(places, donor_places, strict=True)):
            if len(here) != len(there):
                raise LeattnError(
                    f"Injection names {len(here)} tokens in prompt {i} and {len(there)} in its donor; choose equally many"
                )
        targets = None if injection.targets is None else target_ids(model, prompts, injection.targets)
        return cls(injection, model, places, donor_places, targets, backend, {})

    def operations(self, source: int, layer: int, batch: range) -> list[Operation]:
        if batch[0] not in self.states:
            self._capture(batch)
        return [
            Inject(layer, dict(zip(self.places[p], self.states[p][source], strict=True)), rows=[row])
            for row, p in enumerate(batch)
        ]

    @torch.no_grad()
    def _capture(self, batch: range) -> None:
        """What :func:`leattn.interventions.capture` gives, for all layers in one pass, and only at the tokens wanted."""
        donors = [self.injection.donors[p] for p in batch]
        output = forward(self.model, donors, backend=self.backend, output_hidden_states=True, use_cache=False)
        inputs = output.hidden_states[:-1]
        for row, p in enumerate(batch):
            columns = torch.tensor(self.donor_places[p]) + inputs[0].shape[1] - len(donors[row])
            self.states[p] = torch.stack([hidden[row, columns.to(hidden.device)].cpu() for hidden in inputs])
