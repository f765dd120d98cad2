"""What the config and the modules of a model say about it, without running it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from leattn.errors import BackendError, LeattnWarning
from leattn.prompt.compile import CompiledPrompt


@dataclass(frozen=True)
class Facts:
    """What does not change while a model lives (its vocabulary may; see :attr:`Model.facts`). Can travel without the model.

    ``windows`` is the sliding window of each layer type that a model takes a mask for; one unnamed type ``""`` where all layers
    are alike. ``position_limit`` is how many positions a learned table holds, ``rope_limit`` up to where rotary angles do not
    depend on the length of the input, ``trained_length`` what the model was trained for; None where there is no such thing.
    """

    family: str
    vocabulary: int
    can_switch: bool
    takes_positions: bool
    stateful: bool
    windowed: bool
    windows: dict[str, int | None]
    chunked: bool
    softcap: bool
    learned_sinks: bool
    supports_sdpa: bool
    supports_flex: bool
    position_limit: int | None
    rope_limit: int | None
    trained_length: int | None

    def check_tokens(self, prompts: Sequence[CompiledPrompt]) -> None:
        """Refuse token ids that the model has no embedding for."""
        for prompt in prompts:
            node = prompt.graph.nodes[int(prompt.node_index[int(prompt.input_ids[0].argmax())])]
            self.check_token(int(prompt.input_ids.max()), prompt.graph.name(node))

    def check_token(self, largest: int, node: str) -> None:
        """Refuse the largest token id of a node if the model has no embedding for it."""
        if largest >= self.vocabulary:
            raise BackendError(
                f"node {node!r} holds token id {largest}, but the model has {self.vocabulary} embeddings: "
                "tokenizer and model do not belong together, or model.resize_token_embeddings was not called"
            )

    def check_positions(self, prompts: Sequence[CompiledPrompt], *, new_tokens: int = 0) -> None:
        """Refuse positions past a learned table or a length-dependent RoPE's limit; warn past what RoPE was trained for."""
        for prompt in prompts:
            last = max(int(prompt.position_ids.max()), int(prompt.position_ids[0, -1]) + new_tokens)
            which = f"the last position is {last}" + (f" with {new_tokens} new tokens" if new_tokens else "")
            self.check_last_position(last, which)

    def check_last_position(self, last: int, which: str) -> None:
        """Refuse a last position, or warn of it; ``which`` begins the sentence."""
        if self.position_limit is not None and last >= self.position_limit:
            raise BackendError(
                f"{which}, but {self.family} has a table of {self.position_limit} positions; "
                "use fewer or shorter nodes, or let siblings share positions (positions='after_parents')"
            )
        if self.rope_limit is not None and last >= self.rope_limit:
            raise BackendError(
                f"{which}, but past {self.rope_limit} this model's rotary angles depend on the length of the whole input, so "
                "unrelated nodes would change each other; keep positions below it, or load the model without that RoPE scaling"
            )
        if self.trained_length is not None and last >= self.trained_length:
            warnings.warn(f"{which}; {self.family} was trained for {self.trained_length}", LeattnWarning, stacklevel=5)


def read_facts(base: PreTrainedModel) -> Facts:
    """The facts of a backbone."""
    config, embeddings = base.config, cast(Any, base.get_input_embeddings())
    caches = DynamicCache(config=config).layers
    return Facts(
        family=str(config.model_type),
        vocabulary=int(embeddings.weight.shape[0]),
        can_switch=bool(base._can_set_attn_implementation()),
        takes_positions="position_ids" in inspect.signature(base.forward).parameters,
        stateful=bool(getattr(base, "_is_stateful", False)) or any(not isinstance(layer, CacheLayerMixin) for layer in caches),
        windowed=any(getattr(layer, "is_sliding", False) for layer in caches),
        windows=_windows(config),
        chunked="chunked_attention" in (getattr(config, "layer_types", None) or ()),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        learned_sinks=any(name.endswith(".sinks") for name, _ in base.named_parameters()),
        supports_sdpa=bool(getattr(base, "_supports_sdpa", False)),
        supports_flex=bool(getattr(base, "_supports_flex_attn", False)),
        position_limit=_learned_positions(base, embeddings),
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
