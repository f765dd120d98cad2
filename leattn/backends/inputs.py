"""Keyword arguments for one plain call of a model, mask included."""

from __future__ import annotations

from typing import Any

from leattn.backends import BACKENDS, hf
from leattn.backends.attend import check_positions, check_tokens, choose
from leattn.backends.batch import Batch, MaskRequest
from leattn.compile import CompiledPrompt
from leattn.errors import BackendError


def model_inputs(model: Any, prompt: CompiledPrompt) -> dict[str, Any]:
    """Ids, positions and the mask in the form that the model's current implementation takes."""
    facts = hf.read_facts(model)
    name = next((name for name, backend in BACKENDS.items() if backend.implementation == facts.implementation), None)
    if name is None:
        raise BackendError(
            f"the masks of {facts.implementation!r} cannot be set; call model.set_attn_implementation('sdpa') first, "
            "or use attend"
        )
    backend = choose(model, facts, name)
    check_tokens([prompt], facts)
    check_positions([prompt], facts)
    batch = Batch([prompt], facts.device)
    masks = {}
    for kind, window in hf.window_of(model).items():
        request = MaskRequest(1, range(len(prompt)), len(prompt), window, model.dtype, facts.device, None)
        masks[kind] = backend.mask(batch, request)
    mask = masks[""] if list(masks) == [""] else masks
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": mask}
