"""``attend``: inside the block a model's own ``forward`` and ``generate`` follow the graph; afterwards nothing is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from leattn.backends import BACKENDS, hf
from leattn.backends.batch import Batch, MaskMode
from leattn.backends.binding import Attention, follow, innermost
from leattn.backends.check import refusal
from leattn.backends.kinds import Backend, ModelFacts
from leattn.compile import CompiledPrompt
from leattn.errors import BackendError, LeattnError, LeattnWarning, choices


@contextmanager
def attend(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str = "auto",
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
) -> Iterator[Attention]:
    """Make the model's own ``forward`` and ``generate`` follow the graph, inside the block and nowhere else.

    Parameters
    ----------
    model
        A transformers model, as it is. Nothing of it is edited; hooks and the implementation are restored at the end.
    prompts
        A compiled prompt, or several as one batch, padded on the left.
    backend
        ``"eager"``, ``"sdpa"``, ``"flex"``, or ``"auto"``: the model's current implementation, and sdpa or eager for a model
        loaded with one whose masks cannot be set (flash, paged).
    mask
        A 4D mask of one's own, ``[1 or P, 1 or H, ≥ S, ≥ S]``: boolean (True may attend) or additive with maximum 0. Generated
        tokens inherit its last row, and its columns past the last are open.
    mask_mode
        ``"combine"``: both the graph and the mask must allow. ``"replace"``: the mask alone decides (sliding windows of the
        model stay).

    Yields
    ------
    Attention
        ``**attention.inputs`` is what the model wants to be called with.

    Raises
    ------
    BackendError
        Model, backend and prompts do not go together, before anything runs; or, inside the block, other ``input_ids`` than
        the prompts'.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> prompt = leattn.compile_prompt(leattn.ICLNode("The sky is blue."), tokenizer)
    >>> with leattn.attend(model, prompt) as attention:
    ...     logits = model(**attention.inputs).logits
    >>> logits.shape[1] == len(prompt)
    True
    """
    attention = prepare(model, prompts, backend=backend, mask=mask, mask_mode=mask_mode)
    around = innermost(attention.base)
    enter = follow if around is None or around.reenter is None else around.reenter
    with enter(attention):
        yield attention


def prepare(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str = "auto",
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
) -> Attention:
    """Check that model, backend and prompts go together; the block to follow, before anything is touched."""
    given = [prompts] if isinstance(prompts, CompiledPrompt) else list(prompts)
    for prompt in given:
        if not isinstance(prompt, CompiledPrompt):
            raise LeattnError(f"attend follows compiled prompts, not {type(prompt).__name__}; call leattn.compile_prompt first")
    if not given:
        raise LeattnError("there is no prompt to attend to; give one or more compiled prompts")
    base, facts = hf.backbone(model), hf.read_facts(model)
    around = innermost(base)
    chosen = around.backend if backend == "auto" and around is not None else choose(model, facts, backend)
    check_tokens(given, facts)
    check_positions(given, facts)
    batch = Batch(given, facts.device, mask=mask, mask_mode=mask_mode)
    return Attention(base, batch, chosen, facts)


def forward(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str = "auto",
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
    **model_kwargs: Any,
) -> Any:
    """One pass of the model over a prompt, or over several as a batch.

    Returns the model's own output class: ``logits`` are ``[P, S, V]``; in a batch shorter prompts are padded on the left.
    Further keyword arguments go to the model (``output_attentions=True`` wants ``backend="eager"``). Gradients follow the
    caller's ``torch.no_grad``. Raises as :func:`attend` does.
    """
    with attend(model, prompts, backend=backend, mask=mask, mask_mode=mask_mode) as attention:
        return model(**attention.inputs, **model_kwargs)


def check_tokens(prompts: Sequence[CompiledPrompt], facts: ModelFacts) -> None:
    """Refuse token ids that the model has no embedding for."""
    for prompt in prompts:
        largest = int(prompt.input_ids.max())
        if largest >= facts.vocabulary:
            node = prompt.graph.nodes[int(prompt.node_index[int(prompt.input_ids[0].argmax())])]
            raise BackendError(
                f"node {prompt.graph.name(node)!r} holds token id {largest}, but the model has {facts.vocabulary} embeddings: "
                "tokenizer and model do not belong together, or model.resize_token_embeddings was not called"
            )


def check_positions(prompts: Sequence[CompiledPrompt], facts: ModelFacts, *, new_tokens: int = 0) -> None:
    """Refuse positions past a learned table or a length-dependent RoPE's limit; warn past what RoPE was trained for."""
    for prompt in prompts:
        last = max(int(prompt.position_ids.max()), int(prompt.position_ids[0, -1]) + new_tokens)
        which = f"the last position is {last}" + (f" with {new_tokens} new tokens" if new_tokens else "")
        if facts.position_limit is not None and last >= facts.position_limit:
            raise BackendError(
                f"{which}, but {facts.family} has a table of {facts.position_limit} positions; "
                "use fewer or shorter nodes, or let siblings share positions (positions='after_parents')"
            )
        if facts.rope_limit is not None and last >= facts.rope_limit:
            raise BackendError(
                f"{which}, but past {facts.rope_limit} this model's rotary angles depend on the length of the whole input, so "
                "unrelated nodes would change each other; keep positions below it, or load the model without that RoPE scaling"
            )
        if facts.trained_length is not None and last >= facts.trained_length:
            warnings.warn(f"{which}; {facts.family} was trained for {facts.trained_length}", LeattnWarning, stacklevel=4)


def choose(model: Any, facts: ModelFacts, name: str) -> Backend:
    """The backend by name, after making sure that it can serve the model."""
    if name != "auto":
        if name not in BACKENDS:
            raise BackendError(choices("backend", name, ["auto", *BACKENDS]))
        backend = BACKENDS[name]
        reason = refusal(model, backend)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run this model: {reason}")
        return backend
    # The current implementation first; then the others, sdpa before eager.
    order = sorted(
        (BACKENDS[candidate] for candidate in ("sdpa", "eager", "flex")),
        key=lambda backend: backend.implementation != facts.implementation,
    )
    reasons = []
    for backend in order:
        reason = refusal(model, backend)
        if reason is None:
            return backend
        reasons.append(reason)
    raise BackendError(f"{type(model).__name__} cannot follow a graph: {reasons[0]}")
