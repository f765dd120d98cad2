"""Keyword arguments for plain calls of a model, mask included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leattn.attention import BACKENDS
from leattn.attention.attend import check_positions, check_tokens, choose
from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.kinds import Backend, ModelFacts
from leattn.errors import BackendError
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt


@dataclass(frozen=True)
class InputForm:
    """The form in which a model takes its inputs, read off it once; it can travel to another process without the model.

    Attributes
    ----------
    facts, backend
        What the model is, and what its current implementation wants for a mask.
    windows
        The window of each layer type that wants a mask of its own; ``""`` where all layers take the same.
    dtype
        Of additive masks.
    """

    facts: ModelFacts
    backend: Backend
    windows: dict[str, int | None]
    dtype: torch.dtype

    def inputs(self, prompts: Sequence[CompiledPrompt], device: torch.device) -> dict[str, Any]:
        """``input_ids`` and ``position_ids`` ``[P, S]``, padded on the left, and ``attention_mask`` as the model takes it.

        That is ``[P, 1, S, S]``, boolean for sdpa and additive for eager, or a ``BlockMask`` for flex; and a dict of those
        where layer types differ. Padding sees itself.

        Raises
        ------
        BackendError
            A token id or a position that the model has no embedding for.
        """
        check_tokens(prompts, self.facts)
        check_positions(prompts, self.facts)
        batch = Batch(prompts, device)
        columns = batch.table.columns
        masks = {
            kind: self.backend.mask(batch, MaskRequest(len(prompts), range(columns), columns, window, self.dtype, device, None))
            for kind, window in self.windows.items()
        }
        mask = masks[""] if list(masks) == [""] else masks
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": mask}


def input_form(model: Any) -> InputForm:
    """How the model, with the attention implementation it has now, takes its inputs.

    Raises
    ------
    BackendError
        The model, or its implementation, cannot follow a graph.
    """
    facts = hf.read_facts(model)
    theirs = (name for name, backend in BACKENDS.items() if backend.function is None)
    name = next((name for name in theirs if BACKENDS[name].implementation == facts.implementation), None)
    if name is None:
        raise BackendError(
            f"the masks of {facts.implementation!r} cannot be set; call model.set_attn_implementation('sdpa') first, "
            "or use attend"
        )
    return InputForm(facts, choose(model, facts, name), hf.window_of(model), model.dtype)


def model_inputs(model: Any, prompt: CompiledPrompt) -> dict[str, Any]:
    """Ids, positions and the mask in the form that the model's current implementation takes."""
    form = input_form(model)
    return form.inputs([prompt], form.facts.device)
