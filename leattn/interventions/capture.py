"""What goes into a layer on a prompt: ``capture``, for Inject."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from leattn.attention.block import running
from leattn.attention.request import Backend
from leattn.interventions.intervene import intervene
from leattn.interventions.operation import checked_layers
from leattn.interventions.where import Place, tokens_at
from leattn.prompt.compiled import CompiledPrompt


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


def capture(model: Any, prompt: CompiledPrompt, *, layer: int, backend: str | Backend = "auto", before: bool = False) -> States:
    """The inputs of a layer on a prompt, for :class:`Inject`.

    Inside :func:`intervene` its operations happen here too, and the states are those after their edits of this layer;
    ``before=True`` gives those before.

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
    seen: list[torch.Tensor] = []
    with torch.no_grad(), intervene(model, prompt, [], backend=backend) as attention:
        record = attention.record

        def see(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if running(record) is attention:  # not the forward of another thread
                seen.append(args[0] if args else kwargs["hidden_states"])

        handle = record.layers[layer].register_forward_pre_hook(see, with_kwargs=True, prepend=before)
        try:
            record.base(**attention.inputs, use_cache=False)
        finally:
            handle.remove()
    return States(prompt, layer, seen[0][0])
