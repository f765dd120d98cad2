"""HF's own flex_attention with a ``BlockMask`` straight from node spans.

On a CPU, torch 2.13 fails to compile flex for many padded or odd shapes; ``torch.compiler.set_stance("force_eager")`` around
the call runs it uncompiled, slowly. There is no backward on a CPU.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from leattn.attention.batch import Batch, MaskRequest
from leattn.attention.kinds import ModelFacts
from leattn.errors import BackendError
from leattn.prompt import masks

BLOCK = 128


class Flex:
    name = "flex"
    implementation = "flex_attention"
    function = None

    def refusal(self, facts: ModelFacts) -> str | None:
        if facts.sinks and facts.device.type == "cpu":
            return "transformers has no attention sinks for flex_attention on a CPU; use backend='eager'"
        if not facts.supports_flex:
            return f"transformers does not run {facts.family} through flex_attention; use backend='eager'"
        return None

    def mask(self, batch: Batch, request: MaskRequest) -> BlockMask:
        """``[B, 1 or H, Q blocks, K blocks]``.

        Raises
        ------
        BackendError
            An additive mask of the user's: a ``BlockMask`` holds yes or no only.
        """
        if batch.user_mask is not None:
            return self._with_user_mask(batch, request)
        size = (len(request.queries), request.keys)
        mask_mod = batch.table.mask_mod(
            rows_per_prompt=batch.repeats(request.rows), query_offset=request.queries.start, window=request.window
        )
        counts = batch.block_counts(request, BLOCK)
        counts = counts.repeat_interleave(batch.repeats(request.rows), 0).to(request.device)
        full = counts == BLOCK * BLOCK
        if request.window is not None:
            counts, full = self._windowed(batch, request, counts, full)
        if not batch.is_own_padding(request):
            mask_mod, full = _and_padding(mask_mod, request), torch.zeros_like(full)
        return masks.block_mask_from_counts(counts, size, BLOCK, mask_mod, full)

    @staticmethod
    def _windowed(
        batch: Batch, request: MaskRequest, counts: torch.Tensor, full: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop the blocks that lie wholly outside the window, and call full only those wholly inside it."""
        assert request.window is not None
        repeats = batch.repeats(request.rows)
        query = batch.table.positions_at(request.queries.start, len(request.queries)).repeat_interleave(repeats, 0)
        key = batch.table.positions_at(0, request.keys).repeat_interleave(repeats, 0)
        query_low, query_high = _block_range(query.to(request.device))
        key_low, key_high = _block_range(key.to(request.device))
        reaches = query_low[:, :, None] - key_high[:, None] < request.window
        inside = query_high[:, :, None] - key_low[:, None] < request.window
        return counts * reaches, full & inside

    @staticmethod
    def _with_user_mask(batch: Batch, request: MaskRequest) -> BlockMask:
        assert batch.user_mask is not None
        if batch.user_mask.dtype != torch.bool:
            raise BackendError(
                "flex takes a boolean mask only (a BlockMask holds yes or no); give a boolean mask, or use backend='eager' or "
                "'sdpa'"
            )
        allowed = batch.allowed(request)
        heads = allowed.shape[1]

        def given_mask(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
            return allowed[b, h if heads > 1 else h * 0, q_idx, kv_idx]

        return create_block_mask(
            given_mask, request.rows, heads if heads > 1 else None, len(request.queries), request.keys, request.device
        )


def _block_range(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest position in each block of columns, ``[B, blocks]`` each."""
    columns = positions.shape[1]
    short = -columns % BLOCK
    low = torch.nn.functional.pad(positions, (0, short), value=torch.iinfo(torch.long).max // 2)
    high = torch.nn.functional.pad(positions, (0, short), value=torch.iinfo(torch.long).min // 2)
    shape = (len(positions), -1, BLOCK)
    return low.view(shape).amin(-1), high.view(shape).amax(-1)


def _and_padding(mask_mod: masks.MaskMod, request: MaskRequest) -> masks.MaskMod:
    assert request.padding is not None
    missing = request.keys - request.padding.shape[1]
    visible = torch.nn.functional.pad(request.padding.to(request.device, torch.bool), (0, max(0, missing)), value=True)
    offset = request.queries.start

    def padded_mask(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & (visible[b, kv_idx] | (kv_idx == q_idx + offset))

    return padded_mask
