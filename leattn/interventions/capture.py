"""What goes into a layer on a prompt: ``capture``, for Inject."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from leattn.generation.forward import forward
from leattn.interventions.operation import checked_layers
from leattn.interventions.where import Place, tokens_at
from leattn.prompt.compile import CompiledPrompt


@dataclass(frozen=True, eq=False)
class States(Mapping[Place, torch.Tensor]):
    """Hidden states of one layer on one prompt: ``states[node_or_id]`` is ``[n, d]``, ``states[index]`` is ``[d]``.

    As a mapping it goes over the prompt's nodes, so that it can be given to :class:`Inject` whole.
    """

    prompt: CompiledPrompt
    layer: int
    hidden: torch.Tensor

    def __getitem__(self, place: Place) -> torch.Tensor:
        tokens = tokens_at(self.prompt, place)
        return self.hidden[tokens[0]] if isinstance(place, int) else self.hidden[tokens]

    def __iter__(self) -> Iterator[Place]:
        return iter(self.prompt.graph.nodes)

    def __len__(self) -> int:
        return len(self.prompt.graph)


def capture(model: Any, prompt: CompiledPrompt, *, layer: int, backend: str = "auto") -> States:
    """The inputs of a layer on a prompt, for :class:`Inject`.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky", id="a"), tokenizer)
    >>> states = capture(model, prompt, layer=1)
    >>> states["a"].shape == (len(prompt), model.config.hidden_size)
    True
    """
    checked_layers("capture", layer, model.config.num_hidden_layers)
    with torch.no_grad():
        output = forward(model, prompt, backend=backend, output_hidden_states=True, use_cache=False)
    return States(prompt, layer, output.hidden_states[layer][0])
