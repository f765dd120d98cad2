"""``attend``: inside the block a model's own ``forward`` and ``generate`` follow the graph; afterwards nothing is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from leattn.attention.block import Block, innermost
from leattn.attention.choose import chosen
from leattn.attention.follow import follow
from leattn.attention.request import Backend, MaskMode, checked_mask
from leattn.attention.roots import warn_of_roots
from leattn.attention.turning import check_readings, check_real_positions, key_turns
from leattn.errors import LeattnError, choices
from leattn.model.record import Model
from leattn.prompt.columns import Columns, columns_of
from leattn.prompt.compiled import CompiledPrompt


@contextmanager
def attend(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str | Backend = "auto",
    mask: Tensor | None = None,
    mask_mode: MaskMode = "combine",
) -> Iterator[Block]:
    """Make the model's own ``forward`` and ``generate`` follow the graph, inside the block and nowhere else.

    Parameters
    ----------
    model
        A transformers model, as it is. Nothing of it is edited; hooks, the implementation and transformers' registries are
        restored at the end.
    prompts
        A compiled prompt, or several as one batch, padded on the left.
    backend
        ``"eager"``, ``"sdpa"``, ``"flex"``, ``"sparse"``, ``"varlen"`` (CUDA), a :class:`Backend` of one's own, or ``"auto"``:
        decided once per forward, with everything that it is called with in hand, sparse where it serves, otherwise the model's
        current implementation, and sdpa or eager for a model loaded with one whose masks cannot be set (flash, paged). Plain
        text stays on the current one. ``attention.backend`` is what was chosen.
    mask
        A 4D mask of one's own, ``[1 or P, 1 or H, ≥ S, ≥ S]``: boolean (True may attend) or additive with maximum 0. Generated
        tokens inherit its last row, and its columns past the last are open.
    mask_mode
        ``"combine"``: both the graph and the mask must allow. ``"replace"``: the mask alone decides (sliding windows of the
        model stay).

    Yields
    ------
    Block
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
    attention = prepare(model, Model.of(model), prompts, backend=backend, mask=mask, mask_mode=mask_mode)
    if not attention.replaces:
        warn_of_roots(model, attention.record, attention.prompts)
    with entered(attention):
        yield attention


def entered(block: Block) -> AbstractContextManager[Block]:
    """Open a block, with what an ``intervene`` around the current code asks for."""
    around = innermost(block.record)
    enter = follow if around is None or around.reenter is None else around.reenter
    return enter(block)


def prepare(
    model: Any,
    record: Model,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    *,
    backend: str | Backend = "auto",
    mask: Tensor | None = None,
    mask_mode: MaskMode = "combine",
) -> Block:
    """Check that model, backend and prompts go together; the block to follow, before anything is touched."""
    several = [prompts] if isinstance(prompts, CompiledPrompt) else list(prompts)
    for prompt in several:
        if not isinstance(prompt, CompiledPrompt):
            raise LeattnError(f"attend follows compiled prompts, not {type(prompt).__name__}; call leattn.compile_prompt first")
    if not several:
        raise LeattnError("there is no prompt to attend to; give one or more compiled prompts")
    record.facts.check_tokens(several)
    record.facts.check_positions(several)
    columns = columns_of(several, record.device)
    if mask_mode not in ("combine", "replace"):
        raise LeattnError(choices("mask_mode", mask_mode, ("combine", "replace")))
    user = None if mask is None else checked_mask(mask, columns)
    block = block_for(model, record, columns, backend, user)
    block.prompts = tuple(several)
    block.replaces = user is not None and mask_mode == "replace"
    return block


def block_for(model: Any, record: Model, columns: Columns, backend: str | Backend, user: Tensor | None = None) -> Block:
    """The block that follows these columns, and knows what their readings take.

    Raises
    ------
    BackendError
        No backend, or not the one that was named, can run the model with this mask of the user's, or with these readings.
    """
    if columns.readings:
        check_readings(model, record, columns.readings)
    block = chosen(model, record, columns, backend, user)
    if not columns.are_whole:
        check_real_positions(model, record)
    if any(reading.shift for reading in columns.readings):
        block.turns = key_turns(model, record)
    return block
