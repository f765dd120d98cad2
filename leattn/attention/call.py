"""The call of a model that follows a graph: what it was given is checked, and what the prompt knows is filled in."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from leattn.attention.batch import Batch
from leattn.errors import BackendError
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt

if TYPE_CHECKING:
    from leattn.attention.block import Attention


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    signature = inspect.signature(module.forward)
    call = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    return call


def prepared_call(attention: Attention, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a backbone's call with the prompt's positions, a padding mask and a cache that keeps every key.

    Raises
    ------
    BackendError
        Other tokens than the prompt's, a mask that is not padding, a cache that drops keys, a continuation of several sinks.
    """
    batch = attention.batch
    ids = call.get("input_ids")
    tokens = ids if ids is not None else call.get("inputs_embeds")
    if tokens is None:
        raise BackendError("inside attend the model is called with input_ids (or inputs_embeds); it got neither")
    use_cache = call.get("use_cache")
    if attention.facts.windowed and (attention.base.config.use_cache if use_cache is None else use_cache):
        call["past_key_values"] = hf.full_length_cache(call.get("past_key_values"))
    first, length, rows = hf.cached_tokens(call.get("past_key_values")), tokens.shape[1], tokens.shape[0]
    attention.columns = range(first, first + length)
    repeats = batch.repeats(rows)
    if ids is not None:
        _check_ids(batch, ids, first, repeats)
    if first + length > batch.table.columns:
        for prompt in batch.prompts:
            if len(prompt.graph.sinks) > 1:
                raise BackendError(several_sinks(prompt))
    positions = batch.table.positions_at(first, length).repeat_interleave(repeats, 0).to(tokens.device)
    call["position_ids"] = positions
    mask = call.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, first + length, dtype=torch.long, device=tokens.device)
        prompt_part = batch.attention_mask.repeat_interleave(repeats, 0).to(tokens.device)
        shared = min(first + length, prompt_part.shape[1])
        mask[:, :shared] = prompt_part[:, :shared]
        call["attention_mask"] = mask
    elif mask is attention.made_ahead:
        attention.masks_asked += 1
    elif not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise BackendError("inside attend the attention_mask is 2D padding; give a 4D mask of your own to attend(mask=...)")
    attention.computed += rows * length
    return call


def several_sinks(prompt: CompiledPrompt) -> str:
    """Why a prompt whose branches end apart cannot be continued as one."""
    names = ", ".join(repr(prompt.graph.names[sink]) for sink in prompt.graph.sinks[:6])
    return (
        f"a prompt with several sinks ({names}) has no single continuation; leattn.generate continues all of them together, "
        "or let one last node see them"
    )


def _check_ids(batch: Batch, ids: torch.Tensor, first: int, repeats: int) -> None:
    """The prompt's columns of ``ids`` must be the prompt's tokens; padding and what is generated are free."""
    last = min(first + ids.shape[1], batch.table.columns)
    if last <= first:
        return
    expected = batch.input_ids[:, first:last].repeat_interleave(repeats, 0).to(ids.device)
    is_prompt = batch.attention_mask[:, first:last].repeat_interleave(repeats, 0).to(ids.device).bool()
    given = ids[:, : last - first]
    wrong = (given != expected) & is_prompt
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise BackendError(
            f"other input_ids than the prompt's inside attend: row {row}, column {first + column} is "
            f"{int(given[row, column])}, the prompt has {int(expected[row, column])}; call the model with "
            "**attention.inputs, or leave the block first"
        )
