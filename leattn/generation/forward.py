"""``forward``: one pass of a model over prompts, all of it or only what a store does not have; ``warm`` fills a store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from leattn.attention.attend import attend
from leattn.attention.request import Backend, MaskMode
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import BackendError, LeattnError
from leattn.generation.program import build
from leattn.generation.session import is_intervened, session
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions
from leattn.prompt.visible import Visibility

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def forward(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str | Backend = "auto",
    kv_store: KVStore | None = None,
    mask: Tensor | None = None,
    mask_mode: MaskMode = "combine",
    **model_kwargs: Any,
) -> Any:
    """One pass of the model over a prompt, or over several as a batch.

    Returns the model's own output class: ``logits`` are ``[P, S, V]``; in a batch shorter prompts are padded on the left.
    Further keyword arguments go to the model (``output_attentions=True`` wants ``backend="eager"``). Gradients follow the
    caller's ``torch.no_grad``. Raises as :func:`leattn.attend` does.

    With ``kv_store``, for one prompt, without gradients and without further arguments, only the sinks and what the store does
    not have are computed, and ``logits`` (``last_hidden_state`` of a model without a head) are those of the sinks' tokens, in
    layout order. Inside ``intervene`` the store is neither read nor written.

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
    asked = [*model_kwargs, *(name for name in ("output_attentions", "output_hidden_states") if _is_set(model, name))]
    if asked:
        raise LeattnError(
            f"{', '.join(asked)} does not go together with kv_store: only missing tokens are computed, from the prompt "
            "alone and in an order of their own; leave it out, or leave kv_store out"
        )
    return _with_store(model, prompts, backend, kv_store)


def _is_set(model: Any, name: str) -> bool:
    """Whether the model's own config asks for more than logits."""
    return bool(getattr(Model.of(model).base.config, name, False))


def _with_store(model: Any, prompt: CompiledPrompt, backend: str | Backend, store: KVStore) -> Any:
    record = Model.of(model)
    sinks = [prompt.graph.index[sink] for sink in prompt.graph.sinks]
    lengths = {i: prompt.offsets[i + 1] - prompt.offsets[i] for i in sinks}
    if is_intervened(record):
        output = forward(model, prompt, backend=backend)
        name = "logits" if hasattr(output, "logits") else "last_hidden_state"
        tokens = torch.cat([torch.arange(*prompt.offsets[i : i + 2]) for i in sinks])
        setattr(output, name, getattr(output, name)[:, tokens])
        return output
    record.facts.check_positions([prompt])
    program, _ = build([prompt], prompt.tokenizer)
    with session(model, record, program, backend=backend, kv_store=store) as work:
        output = work.logits(lengths)
    output.past_key_values = None  # in the order in which tokens were computed, of no use outside
    return output


WARM = 2048
"""Tokens that one forward computes at most while a store is warmed."""


def warm(
    model: Any,
    nodes: CompiledPrompt | ICLGraph | ICLNode | Iterable[ICLNode],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    kv_store: KVStore,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
    backend: str | Backend = "auto",
    progress: bool = True,
) -> None:
    """Compute nodes and everything they see, so that later prompts find their keys and values in a store.

    Parameters
    ----------
    model, nodes, tokenizer, positions, visibility, backend
        As for :func:`leattn.compile_prompt` and :func:`leattn.forward`; what the store has already is not computed again.
    progress
        A progress bar over the nodes.

    Raises
    ------
    LeattnError
        As ``compile_prompt`` and ``forward`` do; inside ``intervene``.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> documents = leattn.parallel(["The sky is blue.", "Snow is white."])
    >>> store = leattn.KVStore()
    >>> leattn.warm(model, documents, tokenizer, kv_store=store, progress=False)
    >>> len(store)
    2
    """
    record = Model.of(model)
    if is_intervened(record):
        raise BackendError("inside intervene a store is neither read nor written, so none can be warmed; leave the block first")
    if isinstance(nodes, CompiledPrompt):
        prompt = nodes
    else:
        prompt = compile_prompt(nodes, tokenizer, positions=positions, visibility=visibility)
    record.facts.check_positions([prompt])
    program, _ = build([prompt], prompt.tokenizer)
    every = range(len(prompt.graph))
    with (
        session(model, record, program, backend=backend, kv_store=kv_store) as work,
        tqdm(total=len(every), unit="node", disable=not progress) as bar,
    ):
        missing = [i for i in every if not work.is_stored(i)]
        bar.update(len(every) - len(missing))
        work.place(missing, compute=missing)
        for fed in work.run(WARM):
            bar.update(len(fed))
