"""``forward``: one pass of a model over prompts, all of it or only what a store does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from leattn.attention.attend import attend, check_positions
from leattn.attention.batch import MaskMode
from leattn.errors import LeattnError
from leattn.generation.fill import is_intervened
from leattn.generation.program import build
from leattn.generation.workspace import workspace
from leattn.kv.store import KVStore
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt

NOT_WITH_A_STORE = (
    "past_key_values",
    "use_cache",
    "labels",
    "logits_to_keep",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
)


def forward(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str = "auto",
    kv_store: KVStore | None = None,
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
    **model_kwargs: Any,
) -> Any:
    """One pass of the model over a prompt, or over several as a batch.

    Returns the model's own output class: ``logits`` are ``[P, S, V]``; in a batch shorter prompts are padded on the left.
    Further keyword arguments go to the model (``output_attentions=True`` wants ``backend="eager"``). Gradients follow the
    caller's ``torch.no_grad``. Raises as :func:`leattn.attend` does.

    With ``kv_store``, for one prompt and without gradients, only the sinks and what the store does not have are computed, and
    ``logits`` (``last_hidden_state`` of a model without a head) are those of the sinks' tokens, in layout order. Inside
    ``intervene`` the store is neither read nor written.

    Examples
    --------
    >>> import leattn
    >>> from leattn import ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> doc = ICLNode("The sky is blue.", id="doc")
    >>> store = leattn.KVStore(max_bytes=2**26)
    >>> for text in ("What is blue?", "What is the sky?"):
    ...     prompt = leattn.compile_prompt(ICLNode(text, parents=[doc]), tokenizer)
    ...     output = leattn.forward(model, prompt, kv_store=store)
    >>> output.logits.shape[1] == len(prompt) - len(prompt["doc"].input_ids), store.stats.hits
    (True, 1)
    """
    if kv_store is None:
        with attend(model, prompts, backend=backend, mask=mask, mask_mode=mask_mode) as attention:
            return model(**attention.inputs, **model_kwargs)
    if isinstance(prompts, Sequence):
        raise LeattnError("with kv_store, forward takes one prompt; call it for each, they share what is in the store")
    if mask is not None:
        raise LeattnError("what the store holds was computed without a mask of your own; give mask or kv_store, not both")
    for name in NOT_WITH_A_STORE:
        if name in model_kwargs:
            raise LeattnError(
                f"{name} does not go together with kv_store, which decides what is computed; leave one of them out"
            )
    return _with_store(model, prompts, backend, kv_store, model_kwargs)


def _with_store(model: Any, prompt: CompiledPrompt, backend: str, store: KVStore, model_kwargs: dict[str, Any]) -> Any:
    sinks = [prompt.graph.index[sink] for sink in prompt.graph.sinks]
    if is_intervened(model):
        output = forward(model, prompt, backend=backend, **model_kwargs)
        name = "logits" if hasattr(output, "logits") else "last_hidden_state"
        tokens = torch.cat([torch.arange(*prompt.offsets[i : i + 2]) for i in sinks])
        setattr(output, name, getattr(output, name)[:, tokens])
        return output
    check_positions([prompt], hf.read_facts(model))
    program, _ = build([prompt], prompt.tokenizer, positions="after_parents", visibility="parents")
    with workspace(model, program, backend=backend, kv_store=store) as work:
        work.demand(sinks, compute=sinks)
        feeds = work.take_all()
        rows: list[int] = []
        first = 0
        for feed in feeds:
            if feed.unit in sinks:
                rows += range(first, first + len(feed.ids))
            first += len(feed.ids)
        output = work.feed(feeds, rows, **model_kwargs)
    output.past_key_values = None  # in the order in which tokens were computed, of no use outside
    return output
