"""The call of a model that follows a graph: what it was given is checked, and what the prompt knows is filled in."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leattn.errors import BackendError
from leattn.model.cache import cached_tokens, full_length_cache
from leattn.model.record import Model
from leattn.prompt.columns import Columns
from leattn.prompt.compiled import CompiledPrompt


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(module.forward)
    call = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    return call


def prepared_call(
    record: Model, columns: Columns, prompts: Sequence[CompiledPrompt], call: dict[str, Any], *, embedded: bool
) -> tuple[dict[str, Any], range]:
    """The arguments of a backbone's call with the prompt's positions, a padding mask and a cache that keeps every key.

    And the columns that its tokens stand in. ``embedded`` says that ``inputs_embeds``, if any, are the caller's, not a
    wrapper's, which made them of ``input_ids``.

    Raises
    ------
    BackendError
        Other tokens than the prompt's, or embeddings of another number; positions that the prompt does not have; a mask that is
        not padding; a cache that drops keys; a continuation of several sinks.
    """
    ids = call.get("input_ids")
    tokens = ids if ids is not None else call.get("inputs_embeds")
    if tokens is None:
        raise BackendError("inside attend the model is called with input_ids (or inputs_embeds); it got neither")
    use_cache = call.get("use_cache")
    if record.facts.windowed and (record.base.config.use_cache if use_cache is None else use_cache):
        call["past_key_values"] = full_length_cache(call.get("past_key_values"), record.base.config)
    first, length, rows = cached_tokens(call.get("past_key_values")), tokens.shape[1], tokens.shape[0]
    queries = range(first, first + length)
    repeats = columns.repeats(rows)
    if ids is not None:
        _check_ids(columns, ids, first, repeats)
    elif embedded and first < columns.width != queries.stop:
        raise BackendError(
            f"inputs_embeds of {length} tokens after {first} cached ones, and the prompts have {columns.width} columns; inside "
            "attend they are the prompt's own, padding included"
        )
    record.facts.check_length(queries.stop)
    if queries.stop > columns.width:
        for prompt in prompts:
            if len(prompt.graph.sinks) > 1:
                raise BackendError(several_sinks(prompt))
    given = call.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 3 and bool((given != given[:1]).any()):
        raise BackendError(
            "position_ids in several dimensions (M-RoPE), which the nodes of a graph do not have; give it text alone"
        )
    positions = columns.position_ids(queries) + record.facts.first_position
    call["position_ids"] = (positions if repeats == 1 else positions.repeat_interleave(repeats, 0)).to(tokens.device)
    mask = call.get("attention_mask")
    if isinstance(mask, dict):  # made ahead, one for each layer type
        mask = next(iter(mask.values()), None)
    if mask is None:
        mask = torch.ones(rows, queries.stop, dtype=torch.long, device=tokens.device)
        for p, padding in enumerate(columns.padding):
            mask[p * repeats : (p + 1) * repeats, :padding] = 0
    elif not isinstance(mask, Tensor) or mask.dim() != 2:
        raise BackendError("inside attend the attention_mask is 2D padding; give a 4D mask of your own to attend(mask=...)")
    call["attention_mask"] = mask
    return call, queries


def hides_tokens(columns: Columns, mask: Tensor) -> bool:
    """Whether a caller's ``attention_mask`` ``[B, n]`` hides more than the padding, which nobody sees anyway."""
    if not any(columns.padding):
        return not bool(mask.all())
    starts = torch.tensor(columns.padding, device=mask.device).repeat_interleave(columns.repeats(len(mask)))
    index = torch.arange(mask.shape[1], device=mask.device)
    return not bool((mask.bool() | (index < starts[:, None])).all())


def several_sinks(prompt: CompiledPrompt) -> str:
    """Why a prompt whose branches end apart cannot be continued as one."""
    names = ", ".join(repr(prompt.graph.names[sink]) for sink in prompt.graph.sinks[:6])
    return (
        f"a prompt with several sinks ({names}) has no single continuation; leattn.generate continues all of them together, "
        "or let one last node see them"
    )


def _check_ids(columns: Columns, ids: Tensor, first: int, repeats: int) -> None:
    """The prompt's columns of ``ids`` must be the prompt's tokens; padding and what is generated are free."""
    last = min(first + ids.shape[1], columns.width)
    if last <= first:
        return
    expected = columns.input_ids[:, first:last].repeat_interleave(repeats, 0).to(ids.device)
    is_prompt = columns.attention_mask[:, first:last].repeat_interleave(repeats, 0).to(ids.device).bool()
    given = ids[:, : last - first]
    wrong = (given != expected) & is_prompt
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise BackendError(
            f"other input_ids than the prompt's inside attend: row {row}, column {first + column} is "
            f"{int(given[row, column])}, the prompt has {int(expected[row, column])}; call the model with "
            "**attention.inputs, or leave the block first"
        )
