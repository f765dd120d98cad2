"""A tiny random model of a family, as often as it is asked for, always with the same weights."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
)

from families.catalogue import Family
from families.loading import LOADED, Missing
from families.sizes import small

WRAPPED = {**MODEL_FOR_PRETRAINING_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
STD = 0.13
LARGEST = 6_000_000
"""Parameters. Anything larger means that some size in the config was missed."""


class Unbuilt(Exception):
    """Why there is no tiny model of a family that reads text."""


def config_of(family: Family) -> PreTrainedConfig:
    """Its small config."""
    cls = CONFIG_MAPPING[family.model_type]
    config = cls(**small(cls(), family.options))
    if family.part is not None:
        config = getattr(config, family.part)
    if hasattr(config, "is_decoder") and "is_decoder" not in family.options:
        config.is_decoder = True  # encoders such as BERT, made to read from left to right
    for name, value in family.after.items():
        vars(config)[name] = copy.deepcopy(value)  # past the check of types
    return config


@dataclass
class Builder:
    """Makes fresh copies of one family's model."""

    family: Family

    def __post_init__(self) -> None:
        if self.family.takes_no_text is not None:
            raise Unbuilt(self.family.takes_no_text)
        self.config = config_of(self.family)
        self._made: dict[tuple[str | None, bool], Any] = {}
        with torch.device("meta"):
            size = sum(p.numel() for p in self._from_config(copy.deepcopy(self.config)).parameters())
        if size > LARGEST:
            raise Unbuilt(f"{size / 1e6:.0f} million parameters")

    def _from_config(self, config: PreTrainedConfig, **options: Any) -> Any:
        kind = self.family.model_type
        if self.family.wrapper:
            return getattr(transformers, WRAPPED[kind])._from_config(config, **options)
        if self.family.part is not None:
            return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])._from_config(config, **options)
        auto: Any = AutoModelForCausalLM
        return auto.from_config(config, **options)

    def fresh(self, implementation: str | None = None, *, windows: bool = True) -> Any:
        """A model that nobody else has touched; ``windows=False`` is the same with sliding windows that never bite."""
        key = (implementation, windows)
        if key not in self._made:
            config = copy.deepcopy(self.config)
            if not windows:
                _widen(config)
            torch.manual_seed(0)
            options = {} if implementation is None else {"attn_implementation": implementation}
            model = self._from_config(config, **options).eval().float()
            randomise(model)
            generation = model.generation_config if hasattr(model, "generation_config") else None
            if generation is not None:
                for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "suppress_tokens"):
                    setattr(generation, name, None)
                generation.begin_suppress_tokens = None
                generation.pad_token_id, generation.do_sample = 0, False
            self._made[key] = model
        model = copy.deepcopy(self._made[key])
        if self.family.loaded is None:
            return model
        try:
            return LOADED[self.family.loaded](model)
        except Missing as reason:
            raise Unbuilt(str(reason)) from None

    @property
    def tolerance(self) -> float:
        """What counts as rounding, relative to the largest logit; it stays below a tenth of it in the models in fp32."""
        dtype = next(weight.dtype for weight in self.fresh().parameters() if weight.is_floating_point())
        return max(1e-4, 5 * torch.finfo(dtype).eps) if dtype != torch.float32 else 1e-4


def _widen(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("sliding_window", "sliding_window_size", "local_attention"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 100_000)


def randomise(model: nn.Module) -> None:
    """Weights so large that a change in attention shows in the logits; norms and biases a little off what they start at.

    Every parameter is drawn from a seed of its own, its name, so that models which differ in their attention have the same.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.copy_(STD * noise)
            else:
                parameter.add_(0.1 * noise)


def run(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits ``[S, V]`` of one sequence of tokens ``[S]``."""
    with torch.no_grad():
        logits: Tensor = model(ids[None], **options).logits
    return logits[0].float()
