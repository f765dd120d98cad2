"""What the config and the modules of a model say about it, without running it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


@dataclass(frozen=True)
class Facts:
    """What does not change while a model lives.

    ``windows`` is the sliding window of each layer type that a model takes a mask for; one unnamed type ``""`` where all layers
    are alike. ``position_limit`` is how many positions a learned table holds, ``rope_limit`` up to where rotary angles do not
    depend on the length of the input, ``trained_length`` what the model was trained for; None where there is no such thing.
    """

    family: str
    can_switch: bool
    takes_positions: bool
    stateful: bool
    windowed: bool
    windows: dict[str, int | None]
    chunked: bool
    softcap: bool
    sinks: bool
    supports_sdpa: bool
    supports_flex: bool
    position_limit: int | None
    rope_limit: int | None
    trained_length: int | None


def read_facts(base: PreTrainedModel) -> Facts:
    """The facts of a backbone."""
    config = base.config
    caches = DynamicCache(config=config).layers
    return Facts(
        family=str(config.model_type),
        can_switch=bool(base._can_set_attn_implementation()),
        takes_positions="position_ids" in inspect.signature(base.forward).parameters,
        stateful=bool(getattr(base, "_is_stateful", False)) or any(not isinstance(layer, CacheLayerMixin) for layer in caches),
        windowed=any(getattr(layer, "is_sliding", False) for layer in caches),
        windows=_windows(config),
        chunked="chunked_attention" in (getattr(config, "layer_types", None) or ()),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=any(name.endswith(".sinks") for name, _ in base.named_parameters()),
        supports_sdpa=bool(getattr(base, "_supports_sdpa", False)),
        supports_flex=bool(getattr(base, "_supports_flex_attn", False)),
        position_limit=_learned_positions(base, base.get_input_embeddings()),
        rope_limit=_rope_limit(config),
        trained_length=getattr(config, "max_position_embeddings", None),
    )


def _windows(config: Any) -> dict[str, int | None]:
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(types) > 1:
        return {kind: window if kind == "sliding_attention" else None for kind in types}
    return {"": None if types == ["full_attention"] else window}


def _learned_positions(base: PreTrainedModel, embeddings: torch.nn.Module) -> int | None:
    """Rows of the table that positions index: an ``nn.Embedding`` or a fixed sinusoid buffer of that length."""
    length = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    for module in base.modules():
        # OPT and its relatives keep two more rows than positions (their offset of 2).
        if (
            isinstance(module, torch.nn.Embedding)
            and module is not embeddings
            and length <= module.num_embeddings <= length + 2
        ):
            return length
    for name, buffer in base.named_buffers():
        if name.endswith("embed_positions") and buffer.dim() == 2 and buffer.shape[0] == length:
            return length
    return None


def _rope_limit(config: Any) -> int | None:
    """Where rotary angles begin to depend on the length of the input (dynamic NTK, longrope), or None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [kind for kind in parameters.values() if isinstance(kind, dict)]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
