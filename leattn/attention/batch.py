"""Prompts as they run: side by side, padded on the left, with the user's own mask on top.

Shapes: P prompts, B rows (a multiple of P: beams and return sequences repeat a prompt's row), H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch

from leattn.attention.plan import Stretch, clipped, prompt_stretches
from leattn.errors import BackendError, LeattnError, choices
from leattn.prompt import masks
from leattn.prompt.compile import CompiledPrompt
from leattn.prompt.masks import MaskTable, additive

MaskMode: TypeAlias = Literal["combine", "replace"]


@dataclass(frozen=True)
class MaskRequest:
    """What a model asks for in one forward: the columns of the queries and how many keys there are.

    ``window`` is None for full attention. ``padding`` is the caller's own ``attention_mask``, ``[B, ≤ K]`` bool, or None.
    """

    rows: int
    queries: range
    keys: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    padding: torch.Tensor | None


class Batch:
    """One or more prompts as one left-padded batch on one device.

    Attributes
    ----------
    input_ids, attention_mask, position_ids : LongTensor
        ``[P, S]``, what to give the model. Padding holds id 0, mask 0 and position 0.
    table : MaskTable
        Who sees whom, by column.
    """

    def __init__(
        self,
        prompts: Sequence[CompiledPrompt],
        device: torch.device,
        *,
        mask: torch.Tensor | None = None,
        mask_mode: MaskMode = "combine",
    ) -> None:
        self.prompts = tuple(prompts)
        self.table = MaskTable.build(
            [prompt.visible for prompt in prompts],
            [prompt.offsets for prompt in prompts],
            [prompt.position_ids[0].cpu() for prompt in prompts],
        ).to(device)
        columns = self.table.columns
        self.input_ids = torch.zeros(len(prompts), columns, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros_like(self.input_ids)
        for p, prompt in enumerate(prompts):
            self.input_ids[p, self.table.padding[p] :] = prompt.input_ids[0].to(device)
            self.attention_mask[p, self.table.padding[p] :] = 1
        if mask_mode not in ("combine", "replace"):
            raise LeattnError(choices("mask_mode", mask_mode, ("combine", "replace")))
        self.user_mask = None if mask is None else _checked(mask, len(prompts), columns).to(device)
        self.mask_mode = mask_mode

    @property
    def position_ids(self) -> torch.Tensor:
        return self.table.positions

    @cached_property
    def is_plain(self) -> bool:
        """Whether this is what the model would do anyway: causal, positions that count by one, no mask of the user's."""
        return self.user_mask is None and all(
            prompt.visible.is_causal and bool((prompt.position_ids.diff() == 1).all()) for prompt in self.prompts
        )

    def repeats(self, rows: int) -> int:
        """How many rows each prompt has among ``rows``."""
        if rows % len(self.prompts):
            raise BackendError(
                f"the model was called with {rows} rows for {len(self.prompts)} prompts; rows come in equal numbers per prompt"
            )
        return rows // len(self.prompts)

    def is_own_padding(self, request: MaskRequest) -> bool:
        """Whether the caller's attention_mask hides nothing but the padding, which the table hides already."""
        if request.padding is None:
            return True
        starts = torch.tensor(self.table.padding, device=request.padding.device)
        starts = starts.repeat_interleave(self.repeats(request.rows))
        index = torch.arange(request.padding.shape[1], device=request.padding.device)
        return bool((request.padding.bool() | (index < starts[:, None])).all())

    @cached_property
    def _stretches(self) -> list[list[Stretch]]:
        return [
            prompt_stretches(prompt.visible, [padding + offset for offset in prompt.offsets])
            for prompt, padding in zip(self.prompts, self.table.padding, strict=True)
        ]

    @cached_property
    def kept(self) -> dict[tuple[int, int], Any]:
        """What a backend keeps from one decoding step to the next, by layer and prompt; empty whenever the prompt runs."""
        return {}

    def stretches(self, request: MaskRequest) -> list[list[Stretch]]:
        """The queries of each prompt as stretches that see the same keys; padding is in none of them."""
        found = []
        for stretches in self._stretches:
            # Generated tokens see the last node and what it sees, as if it went on.
            last = replace(stretches[-1], stop=max(stretches[-1].stop, request.queries.stop))
            found.append(clipped([*stretches[:-1], last], request.queries))
        return found

    def block_counts(self, request: MaskRequest, block: int) -> torch.Tensor:
        """Allowed pairs in each block of ``block`` queries × ``block`` keys, padding included, ``[P, Q blocks, K blocks]``."""
        counts = []
        for prompt, padding in zip(self.prompts, self.table.padding, strict=True):
            visible, offsets = prompt.visible, [padding + offset for offset in prompt.offsets]
            if request.queries.stop > offsets[-1]:
                visible, offsets = visible.continued(), [*offsets, request.queries.stop]
            part = masks.block_counts(visible, offsets, request.queries, request.keys, block)
            for column in range(request.queries.start, min(padding, request.queries.stop)):  # padding sees itself
                part[(column - request.queries.start) // block, column // block] += 1
            counts.append(torch.from_numpy(part))
        return torch.stack(counts)

    def allowed(self, request: MaskRequest) -> torch.Tensor:
        """Who may attend, ``[B, 1 or H, Q, K]`` bool: the graph, the user's mask if boolean, and the caller's padding."""
        queries = torch.arange(request.queries.start, request.queries.stop, device=request.device)
        table = self.table if self.table.positions.device == request.device else self.table.to(request.device)
        if self.mask_mode == "replace" and self.user_mask is not None:
            allowed = table.causal_continuation(queries, request.keys, window=request.window)[:, None]
        else:
            allowed = table.rows(queries, request.keys, window=request.window)[:, None]
        if self.user_mask is not None and self.user_mask.dtype == torch.bool:
            allowed = allowed & self._user(queries, request.keys)
        allowed = allowed.repeat_interleave(self.repeats(request.rows), 0)
        return self._with_padding(allowed, request)

    def additive(self, request: MaskRequest) -> torch.Tensor:
        """The same as numbers to add to the scores, ``[B, 1 or H, Q, K]`` in ``request.dtype``, with a maximum of 0."""
        mask = additive(self.allowed(request), request.dtype)
        if self.user_mask is None or self.user_mask.dtype == torch.bool:
            return mask
        queries = torch.arange(request.queries.start, request.queries.stop, device=request.device)
        user = self._user(queries, request.keys).to(request.dtype).repeat_interleave(self.repeats(request.rows), 0)
        # The smallest number twice would overflow to −inf, and a row of −inf has no softmax.
        return (mask + user).clamp(min=torch.finfo(request.dtype).min)

    def _user(self, queries: torch.Tensor, keys: int) -> torch.Tensor:
        """The user's mask for these columns, ``[P, 1 or H, Q, K]``: later queries inherit its last row, later keys are open."""
        mask = self.user_mask
        assert mask is not None
        mask = mask.to(queries.device).expand(len(self.prompts), -1, -1, -1)
        rows = mask[:, :, queries.clamp(max=mask.shape[2] - 1), :keys]
        missing = keys - rows.shape[-1]
        return torch.nn.functional.pad(rows, (0, missing), value=True if mask.dtype == torch.bool else 0.0)

    def _with_padding(self, allowed: torch.Tensor, request: MaskRequest) -> torch.Tensor:
        """Hide the keys that the caller's ``attention_mask`` hides; each padding token still sees itself."""
        if request.padding is None:
            return allowed
        visible = request.padding[:, : request.keys].to(request.device, torch.bool)
        visible = torch.nn.functional.pad(visible, (0, request.keys - visible.shape[1]), value=True)
        starts = torch.tensor(self.table.padding, device=request.device).repeat_interleave(self.repeats(request.rows))
        visible = visible | (torch.arange(request.keys, device=request.device) < starts[:, None])
        return allowed & visible[:, None, None]


def _checked(mask: torch.Tensor, prompts: int, columns: int) -> torch.Tensor:
    """The user's 4D mask, after everything that can be wrong with it."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise BackendError(f"mask is a 4D tensor [B, 1 or H, Q, K], not {shape}")
    if mask.shape[0] not in (1, prompts) or mask.shape[2] < columns or mask.shape[3] < columns:
        raise BackendError(
            f"mask has shape {list(mask.shape)}; these {prompts} prompts of at most {columns} tokens need "
            f"[1 or {prompts}, 1 or H, ≥ {columns}, ≥ {columns}]"
        )
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise BackendError(
            f"mask has dtype {mask.dtype}; give a boolean mask (True may attend), e.g. mask.bool(), or an additive one"
        )
    if mask.isnan().any() or mask.max() != 0:
        raise BackendError(
            f"an additive mask is in inverted form: 0 where a token may attend and negative elsewhere, so its maximum is 0; "
            f"this one has maximum {mask.max().item():g}. For a 0/1 mask give mask.bool()"
        )
    return mask
