"""Keyword arguments for plain calls of a model, mask included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leattn.attention.backends import BACKENDS
from leattn.attention.probe import route
from leattn.attention.request import Backend, Request
from leattn.attention.roots import warn_of_roots
from leattn.attention.turning import raise_if_not_real, real_refusal
from leattn.errors import BackendError
from leattn.model.facts import Facts
from leattn.model.record import Model
from leattn.prompt.columns import columns_of
from leattn.prompt.compiled import CompiledPrompt


@dataclass(frozen=True)
class InputForm:
    """The form in which a model takes its inputs, read off it once; it can travel to another process without the model.

    Attributes
    ----------
    facts
        What token ids and positions are checked against, and the window of each layer type that wants a mask of its own.
    implementation, backend
        The model's current implementation, and what makes its masks.
    dtype
        Of additive masks.
    real
        Why positions have to be whole numbers, or None.
    """

    facts: Facts
    implementation: str
    backend: Backend
    dtype: torch.dtype
    real: str | None

    def inputs(self, prompts: Sequence[CompiledPrompt], device: torch.device) -> dict[str, Any]:
        """``input_ids`` and ``position_ids`` ``[P, S]``, padded on the left, and ``attention_mask`` as the model takes it.

        That is ``[P, 1, S, S]``, boolean for sdpa and additive for eager, or a ``BlockMask`` for flex; and a dict of those
        where layer types differ. Padding sees itself.

        Raises
        ------
        BackendError
            A token id or a position that the model has no embedding for; a prompt in which something is read in another way.
        """
        for prompt in prompts:
            prompt.check_masks_say_all()
        self.facts.check_tokens(prompts)
        self.facts.check_positions(prompts)
        columns = columns_of(prompts, device)
        if not columns.are_whole:
            raise_if_not_real(self.facts.family, self.real)
        every = range(columns.width)
        masks = {}
        for kind, window in self.facts.windows.items():
            request = Request(columns, len(prompts), every, len(every), window, self.dtype, device, may_skip=False)
            masks[kind] = self.backend.attention(request).mask  # type: ignore[attr-defined]
        mask = masks[""] if list(masks) == [""] else masks
        positions = columns.position_ids(every) + self.facts.first_position
        return {"input_ids": columns.input_ids, "position_ids": positions, "attention_mask": mask}


def input_form(model: Any) -> InputForm:
    """How the model, with the attention implementation it has now, takes its inputs.

    Raises
    ------
    BackendError
        The model, or its implementation, cannot follow a graph.
    """
    record = Model.of(model)
    name = next((name for name, backend in BACKENDS.items() if backend.implementation == record.implementation), None)
    if name is None:
        raise BackendError(
            f"the masks of {record.implementation!r} cannot be set; call model.set_attn_implementation('sdpa') first, "
            "or use attend"
        )
    reason, _ = route(model, record, BACKENDS[name])
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run this model: {reason}")
    return InputForm(record.facts, record.implementation, BACKENDS[name], model.dtype, real_refusal(model, record))


def model_inputs(model: Any, prompts: CompiledPrompt | Sequence[CompiledPrompt]) -> dict[str, Any]:
    """Keyword arguments for ``model(**leattn.model_inputs(model, prompt))``, for loops of one's own.

    The mask has the form that the model's current implementation needs: additive for eager, boolean for sdpa, a ``BlockMask``
    for flex_attention, and a dict with one of them per layer type for a model that mixes full and sliding-window layers.
    Several prompts are a batch, padded on the left. :func:`leattn.attend` needs none of this.

    Returns
    -------
    dict
        ``input_ids`` and ``position_ids`` ``[P, S]``, and ``attention_mask``, ``[P, 1, S, S]`` where it is a tensor.

    Raises
    ------
    BackendError
        The model, or its implementation, cannot follow a graph; a token id or a position that it does not have.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> inputs = model_inputs(model, leattn.compile_prompt(leattn.ICLNode("The sky"), tokenizer))
    >>> sorted(inputs), inputs["attention_mask"].dtype
    (['attention_mask', 'input_ids', 'position_ids'], torch.bool)
    """
    several = [prompts] if isinstance(prompts, CompiledPrompt) else list(prompts)
    form, record = input_form(model), Model.of(model)
    warn_of_roots(model, record, several)
    return form.inputs(several, record.device)
