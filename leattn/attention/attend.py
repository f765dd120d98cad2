"""``attend``: inside the block a model's own ``forward`` and ``generate`` follow the graph; afterwards nothing is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from leattn.attention import BACKENDS
from leattn.attention.batch import Batch, MaskMode
from leattn.attention.block import Attention, follow, implementation_elsewhere, innermost, trains_otherwise
from leattn.attention.kinds import Backend, ModelFacts
from leattn.attention.probe import refusal
from leattn.errors import BackendError, LeattnError, LeattnWarning, choices
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt


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
        ``"eager"``, ``"sdpa"``, ``"flex"``, ``"sparse"``, or ``"auto"``: sparse where it serves the model and what it is called
        with, otherwise the model's current implementation, and sdpa or eager for a model loaded with one whose masks cannot
        be set (flash, paged). Plain text stays on the current one. ``attention.backend`` is what was chosen.
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
    scores: bool = False,
) -> Attention:
    """Check that model, backend and prompts go together; the block to follow, before anything is touched.

    ``scores`` says that the caller will change attention scores, which only a dense mask carries.
    """
    given = [prompts] if isinstance(prompts, CompiledPrompt) else list(prompts)
    for prompt in given:
        if not isinstance(prompt, CompiledPrompt):
            raise LeattnError(f"attend follows compiled prompts, not {type(prompt).__name__}; call leattn.compile_prompt first")
    if not given:
        raise LeattnError("there is no prompt to attend to; give one or more compiled prompts")
    base, facts = hf.backbone(model), hf.read_facts(model)
    check_tokens(given, facts)
    check_positions(given, facts)
    batch = Batch(given, facts.device, mask=mask, mask_mode=mask_mode)
    if backend != "auto":
        return Attention(base, batch, choose(model, facts, backend), facts)
    dense = scores or mask is not None
    around = innermost(base)
    if around is None:
        order = _order(base, facts, sparse="never" if dense else "last" if batch.is_plain else "first")
        chosen = _first_that_serves(model, order)
        others = tuple(other for other in order if other is not chosen and other.refusal(facts) is None)
    else:
        chosen, others = around.backend, around.alternatives
        if dense and chosen.name == "sparse" and others:
            chosen = others[0]
    return Attention(base, batch, chosen, facts, alternatives=() if dense else others)


def check_tokens(prompts: Sequence[CompiledPrompt], facts: ModelFacts) -> None:
    """Refuse token ids that the model has no embedding for."""
    for prompt in prompts:
        node = prompt.graph.nodes[int(prompt.node_index[int(prompt.input_ids[0].argmax())])]
        check_token(int(prompt.input_ids.max()), prompt.graph.name(node), facts)


def check_token(largest: int, node: str, facts: ModelFacts) -> None:
    """Refuse the largest token id of a node if the model has no embedding for it."""
    if largest >= facts.vocabulary:
        raise BackendError(
            f"node {node!r} holds token id {largest}, but the model has {facts.vocabulary} embeddings: "
            "tokenizer and model do not belong together, or model.resize_token_embeddings was not called"
        )


def check_positions(prompts: Sequence[CompiledPrompt], facts: ModelFacts, *, new_tokens: int = 0) -> None:
    """Refuse positions past a learned table or a length-dependent RoPE's limit; warn past what RoPE was trained for."""
    for prompt in prompts:
        last = max(int(prompt.position_ids.max()), int(prompt.position_ids[0, -1]) + new_tokens)
        which = f"the last position is {last}" + (f" with {new_tokens} new tokens" if new_tokens else "")
        check_last_position(last, which, facts)


def check_last_position(last: int, which: str, facts: ModelFacts) -> None:
    """The same for the last position of whatever ``which`` says."""
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
        warnings.warn(f"{which}; {facts.family} was trained for {facts.trained_length}", LeattnWarning, stacklevel=5)


def choose(model: Any, facts: ModelFacts, name: str) -> Backend:
    """The backend by name, after making sure that it can serve the model."""
    if name == "auto":
        return _first_that_serves(model, _order(hf.backbone(model), facts, sparse="first"))
    if name not in BACKENDS:
        raise BackendError(choices("backend", name, ["auto", *BACKENDS]))
    backend = BACKENDS[name]
    reason = refusal(model, backend)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run this model: {reason}")
    return backend


def _order(base: Any, facts: ModelFacts, *, sparse: Literal["first", "last", "never"]) -> list[Backend]:
    """What ``"auto"`` tries: the current implementation, then sdpa before eager, and sparse in the place that it is given.

    A model that another thread is using keeps the implementation that it is running on.
    """
    order = [BACKENDS[name] for name in ("sdpa", "eager", "flex")]
    order.sort(key=lambda backend: backend.implementation != facts.implementation)
    if sparse != "never" and not trains_otherwise(base):
        order.insert(0 if sparse == "first" else len(order), BACKENDS["sparse"])
    elsewhere = implementation_elsewhere(base)
    if elsewhere is not None:
        order.sort(key=lambda backend: backend.implementation != elsewhere)
    return order


def _first_that_serves(model: Any, order: Sequence[Backend]) -> Backend:
    reasons = []
    for backend in order:
        reason = refusal(model, backend)
        if reason is None:
            return backend
        if backend.name != "sparse":
            reasons.append(reason)
    raise BackendError(f"{type(model).__name__} cannot follow a graph: {reasons[0]}")
