"""The one place that touches transformers: its registries of mask functions, its configs, its caches."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

from leattn.attention.batch import MaskRequest
from leattn.attention.kinds import ModelFacts
from leattn.errors import BackendError

MaskFunction = Callable[..., Any]
Answer = Callable[[Any, str, MaskRequest, MaskFunction], Any]


def unwrapped(model: Any) -> Any:
    """The model itself, below ``torch.compile`` and an adapter (PEFT)."""
    module = getattr(model, "_orig_mod", model)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def backbone(model: Any) -> PreTrainedModel:
    """The module that builds the masks: below a language-model head, an adapter (PEFT) or ``torch.compile``.

    Raises
    ------
    BackendError
        Not a transformers model, or one with an encoder.
    """
    module = unwrapped(model)
    if not isinstance(module, PreTrainedModel):
        raise BackendError(f"leattn runs transformers models (PreTrainedModel), not {type(model).__name__}")
    if module.config.is_encoder_decoder:
        raise BackendError(f"{type(module).__name__} has an encoder; a graph is followed by decoder-only models")
    # Some heads call past their base model (OPT calls base_model.decoder), so that a hook there would never run.
    return cast(PreTrainedModel, module.get_decoder())  # type: ignore[no-untyped-call]


def read_facts(model: Any) -> ModelFacts:
    """What the config and the modules of a model say about it."""
    base = backbone(model)
    config = base.config
    embeddings = base.get_input_embeddings()
    weight = cast(torch.Tensor, embeddings.weight)
    layer_types = set(getattr(config, "layer_types", None) or ())
    caches = DynamicCache(config=config).layers
    return ModelFacts(
        family=str(config.model_type),
        implementation=str(config._attn_implementation),
        can_switch=bool(base._can_set_attn_implementation()),
        takes_positions="position_ids" in inspect.signature(base.forward).parameters,
        stateful=bool(getattr(base, "_is_stateful", False)) or any(not isinstance(layer, CacheLayerMixin) for layer in caches),
        windowed=any(getattr(layer, "is_sliding", False) for layer in caches),
        chunked="chunked_attention" in layer_types,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=any(name.endswith(".sinks") for name, _ in base.named_parameters()),
        supports_sdpa=bool(getattr(base, "_supports_sdpa", False)),
        supports_flex=bool(getattr(base, "_supports_flex_attn", False)),
        vocabulary=int(weight.shape[0]),
        position_limit=_learned_positions(base, embeddings),
        rope_limit=_rope_limit(config),
        trained_length=getattr(config, "max_position_embeddings", None),
        device=weight.device,
    )


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


def switch(base: PreTrainedModel, implementation: str) -> Callable[[], None]:
    """Set another attention implementation; the function returned puts back the old one, exactly and without any check."""
    configs = {id(module.config): module.config for module in base.modules() if isinstance(module, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    base.set_attn_implementation(implementation)

    def restore() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    return restore


def window_of(model: Any) -> dict[str, int | None]:
    """The window of each layer type a model takes a mask for; one unnamed type ``""`` where all layers are alike."""
    config = backbone(model).config
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(types) > 1:
        return {kind: window if kind == "sliding_attention" else None for kind in types}
    return {"": None if types == ["full_attention"] else window}


WRAPPED = "leattn"
"""Our own name among transformers' attention implementations: a backend's attention with something around it."""


def install(implementations: list[str], answer: Answer, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Put ``answer`` in front of transformers' mask functions; it is asked first, and may hand on to the original.

    Under their own names, because some families compare the name of the implementation. A wrapper that finds nothing to do
    passes straight through, so it stays in place.
    """
    for name, function in functions.items():
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, function)
            AttentionMaskInterface.register(name, eager_mask)
    for name in [*implementations, *functions]:
        original = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(original, "leattn_original"):
            AttentionMaskInterface.register(name, _wrap(name, original, answer))


def attention_function(module: torch.nn.Module, implementation: str) -> Callable[..., Any]:
    """What transformers would call for an attention module on this implementation.

    Raises
    ------
    BackendError
        A family without the function that others have for eager attention.
    """
    if implementation != "eager":
        return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[implementation])
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return cast(Callable[..., Any], function)
    raise BackendError(f"{type(module).__name__} has no eager attention function of its own; use backend='sdpa'")


def decoder_layers(base: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of a backbone, first to last.

    Raises
    ------
    BackendError
        No list of ``num_hidden_layers`` modules in it.
    """
    count = base.config.num_hidden_layers
    for child in base.children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == count:
            return list(child)
    raise BackendError(f"{type(base).__name__} keeps its layers in a way that leattn does not know; interventions need them")


def attention_of(layer: torch.nn.Module) -> torch.nn.Module:
    """The self-attention module of a layer: the child that knows its layer index.

    Raises
    ------
    BackendError
        A layer without one, or with several.
    """
    found = [child for child in layer.children() if hasattr(child, "layer_idx") and "Attention" in type(child).__name__]
    if len(found) != 1:
        raise BackendError(f"{type(layer).__name__} has {len(found)} attention modules; this needs layers with exactly one")
    return found[0]


def _wrap(name: str, original: MaskFunction, answer: Answer) -> MaskFunction:
    def mask_function(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | torch.Tensor = 0,
        kv_offset: int = 0,
        mask_function: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        def plain() -> Any:
            given = {} if mask_function is None else {"mask_function": mask_function}
            return original(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                attention_mask=attention_mask,
                **given,
                **kwargs,
            )

        first = int(q_offset)
        request = MaskRequest(
            rows=batch_size,
            queries=range(first, first + q_length),
            keys=kv_length + kv_offset,
            window=kwargs.get("local_size"),
            dtype=kwargs.get("dtype", torch.float32),
            device=torch.device(kwargs.get("device", "cpu")),
            padding=attention_mask,
        )
        return answer(kwargs.get("config"), name, request, plain)

    mask_function.leattn_original = original  # type: ignore[attr-defined]
    return mask_function


def full_length_cache(cache: Any) -> Any:
    """A cache that keeps every key, which windows measured in positions need.

    The default cache of a sliding-window model drops keys by index. An empty ``DynamicCache`` is changed in place (``generate``
    made it and holds on to it); one that dropped keys already, or cannot grow, is refused.
    """
    if cache is None:
        return DynamicCache()
    if not any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", [])):
        return cache
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0:
        raise BackendError(
            f"a {type(cache).__name__} with sliding-window layers drops keys by index, but windows on a graph are measured in "
            "positions; pass past_key_values=DynamicCache() (built without the config) or leave the cache to the model"
        )
    layers: list[Any] = cache.layers
    cache.layers = [DynamicLayer() if layer.is_sliding else layer for layer in layers]  # type: ignore[no-untyped-call]
    return cache


def cached_tokens(cache: Any) -> int:
    """Columns that a cache holds already."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
