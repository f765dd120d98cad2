"""Ways to load a model, of which each becomes a line of the table: what a graph gives must not depend on them."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch


class Missing(Exception):
    """A package that a way needs and that is not installed."""


def _package(name: str, distribution: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise Missing(f"{distribution} is not installed") from None


def _to(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda model: model.to(dtype)


def _adapted(kind: str, std: float = 0.4, **options: Any) -> Callable[[Any], Any]:
    """An adapter of peft's, with weights so large that leaving it out would show."""

    def load(model: Any) -> Any:
        peft = _package("peft", "peft")
        tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
        return tuned

    return load


def _compiled(model: Any) -> Any:
    # Dynamo alone: whether inductor's kernels are right is torch's affair.
    return torch.compile(model, backend="eager")


def _offloaded(model: Any) -> Any:
    accelerate = _package("accelerate", "accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _folder(model: Any) -> str:
    """A folder that lasts as long as the model."""
    model._folder = tempfile.TemporaryDirectory()
    return str(model._folder.name)


def _offloaded_to_disk(model: Any) -> Any:
    accelerate = _package("accelerate", "accelerate")
    return accelerate.disk_offload(model, _folder(model), execution_device=torch.device("cpu"))


def _dispatched(model: Any) -> Any:
    accelerate = _package("accelerate", "accelerate")
    places = {name: "cpu" for name, _ in model.named_children()} | {"model.layers.1": "disk"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"model.layers.{i}": "cpu" for i in range(len(model.model.layers)) if i != 1}
    del places["model"]
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=_folder(model), force_hooks=True)


def _torchao(config: str) -> Callable[[Any], Any]:
    def load(model: Any) -> Any:
        quantization = _package("torchao.quantization", "torchao")
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return load


def _quanto(model: Any, **options: Any) -> Any:
    quanto = _package("optimum.quanto", "optimum-quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head", **options)
    quanto.freeze(model)
    return model


def _quanto_activations(model: Any) -> Any:
    return _quanto(model, activations=_package("optimum.quanto", "optimum-quanto").qint8)


def _named(implementation: str) -> Callable[[Any], Any]:
    """As a model is whose config names an attention implementation that this machine cannot run, if no other is asked for."""

    def load(model: Any) -> Any:
        if model.config._attn_implementation != "eager":
            model.config._attn_implementation_internal = implementation
        return model

    return load


LOADED: dict[str, Callable[[Any], Any]] = {
    "bf16": _to(torch.bfloat16),
    "fp16": _to(torch.float16),
    "LoRA": _adapted("LoraConfig", r=4, target_modules=["q_proj", "k_proj", "v_proj"]),
    "IA3": _adapted("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt tuning": _adapted("PromptTuningConfig", num_virtual_tokens=3),
    "prefix tuning": _adapted("PrefixTuningConfig", num_virtual_tokens=3),
    "p-tuning": _adapted("PromptEncoderConfig", num_virtual_tokens=3),
    "training mode": lambda model: model.train(),
    "torch.compile": _compiled,
    "cpu_offload": _offloaded,
    "disk_offload": _offloaded_to_disk,
    "dispatch_model": _dispatched,
    "torchao int8 weights": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto int8 weights": _quanto,
    "quanto int8 activations": _quanto_activations,
    "flash_attention_2 in the config": _named("flash_attention_2"),
    "paged|sdpa in the config": _named("paged|sdpa"),
    "an unknown implementation in the config": _named("mine"),
}
"""From a model in fp32 to the same one, loaded in this way."""
