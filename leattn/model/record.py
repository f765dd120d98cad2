"""One record per model: what is known of it, what was measured on it, and what is bound to it while blocks are open."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from leattn.errors import BackendError
from leattn.model.facts import Facts, read_facts
from leattn.model.registry import OURS

_records: WeakKeyDictionary[Any, Model] = WeakKeyDictionary()
_lock = threading.Lock()


class Model:
    """What leattn knows of one transformers model; ``Model.of(model)`` gives the same record every time.

    Attributes
    ----------
    lock : RLock
        Around everything below, which other rooms fill in.
    routes : dict
        Why a backend cannot run this model, or how it can (attention/probe.py).
    certificate, fingerprint
        Of its keys and values (kv/).
    blocks : list
        The blocks that are open on it, in all threads, oldest first; ``handles`` are their hooks, ``originals`` what the model
        goes back to when the last one closes.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = ref(base)
        self._facts = read_facts(base)
        self.lock = threading.RLock()
        self.routes: dict[Any, Any] = {}
        self.certificate: Any = None
        self.fingerprint: tuple[bytes, bytes] | None = None
        self.blocks: list[Any] = []
        self.handles: tuple[Any, ...] = ()
        self.originals: list[tuple[Any, Any]] = []
        self._is_placed = False

    @classmethod
    def of(cls, model: Any) -> Model:
        """The record of a model: with or without its head, compiled, or under an adapter (PEFT).

        Raises
        ------
        BackendError
            Not a transformers model, or one with an encoder.
        """
        base = _backbone(model)
        with _lock:
            if base not in _records:
                _records[base] = cls(base)
            return _records[base]

    @property
    def base(self) -> Any:
        """The backbone: the module that builds the masks."""
        return self._base()

    @property
    def implementation(self) -> str:
        """The attention implementation that the model has outside of any block."""
        config = self.base.config
        return str(next((name for one, name in self.originals if one is config), config._attn_implementation))

    @property
    def runs_on(self) -> str:
        """The attention implementation that the model has at this moment."""
        return str(self.base.config._attn_implementation)

    @property
    def _embeddings(self) -> Tensor:
        return cast(Tensor, self.base.get_input_embeddings().weight)

    @property
    def device(self) -> torch.device:
        """Where its inputs go: to its embeddings, or to where accelerate runs those that it offloads.

        Raises
        ------
        BackendError
            Weights on the meta device, which nobody puts in place before they are used.
        """
        weight = self._embeddings
        if weight.is_meta or not self._is_placed:
            lost = next((name for name, tensor in self.base.named_parameters() if tensor.is_meta), None)
            if lost is not None and not any(_offloads(module) for module in self.base.modules()):
                raise BackendError(
                    f"{type(self.base).__name__} has no values for {lost!r} (meta device); load its weights, or move it with "
                    "to_empty and load_state_dict"
                )
            self._is_placed = lost is None
        return weight.device if not weight.is_meta else _execution_device(self.base)

    @property
    def dtype(self) -> torch.dtype:
        """Of its first floating-point parameter."""
        dtypes = (parameter.dtype for parameter in self.base.parameters() if parameter.is_floating_point())
        return next(dtypes, torch.float32)

    @property
    def facts(self) -> Facts:
        """Read once, and once more after ``resize_token_embeddings``."""
        if self._facts.vocabulary != len(self._embeddings):
            self._facts = read_facts(self.base)
        return self._facts

    @cached_property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder layers, first to last.

        Raises
        ------
        BackendError
            No list of ``num_hidden_layers`` modules in the backbone.
        """
        base = self.base
        for child in base.children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == base.config.num_hidden_layers:
                return list(child)
        raise BackendError(
            f"{type(base).__name__} keeps its layers in a way that leattn does not know; interventions need them"
        )

    @cached_property
    def attentions(self) -> list[torch.nn.Module]:
        """The self-attention module of each layer: the child that knows its layer index.

        Raises
        ------
        BackendError
            A layer without one, or with several.
        """
        modules = []
        for layer in self.layers:
            children = [m for m in layer.children() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
            if len(children) != 1:
                raise BackendError(
                    f"{type(layer).__name__} has {len(children)} attention modules; this needs layers with exactly one"
                )
            modules.append(children[0])
        return modules

    @property
    def checkpoints(self) -> bool:
        """Whether it is in training with gradient checkpointing, which runs layers again in backward."""
        base = self.base
        # The older name, gone in transformers 6, warns in releases that have both.
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")
        name = next((name for name in names if hasattr(type(base), name)), "")
        with self.lock:  # a probe, which holds it, has the model in evaluation mode
            return bool(base.training and getattr(base, name, False))

    @property
    def drops(self) -> bool:
        """Whether it is in training with dropout of attention weights."""
        if not self.base.training:
            return False
        named = {name: value for name, value in self.base.config.to_dict().items() if "drop" in name}
        values = (value for name, value in named.items() if "att" in name or name == "dropout")
        return any(isinstance(value, float) and value > 0 for value in values)

    @cached_property
    def _configs(self) -> list[Any]:
        """Every config below the backbone that names an implementation, with the name it was loaded with."""
        modules = (module for module in self.base.modules() if isinstance(module, PreTrainedModel))
        return list({id(module.config): module.config for module in modules}.values())

    def implementations(self) -> list[tuple[Any, Any]]:
        """Every config below the backbone with the implementation that it names, to be put back by :meth:`restore`."""
        return [(config, config._attn_implementation_internal) for config in self._configs]

    def switch(self, implementation: str) -> None:
        """Set another attention implementation, ours or, with transformers' own checks, one of theirs."""
        if implementation == OURS:
            self.restore([(config, implementation) for config in self._configs])
        elif implementation == self.implementation:
            self.restore(self.originals)
        else:
            self.base.set_attn_implementation(implementation)

    def restore(self, implementations: Sequence[tuple[Any, Any]]) -> None:
        """Put implementations back, exactly and without any check."""
        for config, name in implementations:
            config._attn_implementation_internal = name

    def run(self, model: Any, input_ids: Tensor, rows: Sequence[int] | Tensor, **kwargs: Any) -> Any:
        """Call ``model`` (this one, with its head or without); ``logits`` ``[B, rows, V]`` of the tokens in ``rows``.

        A backbone has ``last_hidden_state`` ``[B, rows, d]`` instead.
        """
        index = torch.as_tensor(rows, device=input_ids.device)
        if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
            return model(input_ids=input_ids, logits_to_keep=index, **kwargs)
        output = model(input_ids=input_ids, **kwargs)  # an old head, or none
        name = "logits" if hasattr(output, "logits") else "last_hidden_state"
        found = getattr(output, name)
        setattr(output, name, found[:, index.to(found.device)])
        return output


def unwrapped(model: Any) -> Any:
    """The model itself, below ``torch.compile`` and an adapter (PEFT)."""
    module = getattr(model, "_orig_mod", model)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _hooks(module: torch.nn.Module) -> list[Any]:
    """What accelerate put around a module."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))


def _offloads(module: torch.nn.Module) -> bool:
    """Whether accelerate keeps the weights of a module elsewhere between calls."""
    return any(getattr(hook, "weights_map", None) is not None for hook in _hooks(module))


def _execution_device(base: Any) -> torch.device:
    """Where accelerate runs the embeddings, whose weights are elsewhere between calls."""
    for module in (base.get_input_embeddings(), *base.modules()):
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    raise BackendError(
        f"{type(base).__name__} is offloaded, and nothing says where it runs; give accelerate an execution_device"
    )


def _backbone(model: Any) -> PreTrainedModel:
    module = unwrapped(model)
    if not isinstance(module, PreTrainedModel):
        raise BackendError(f"leattn runs transformers models (PreTrainedModel), not {type(model).__name__}")
    if module.config.is_encoder_decoder:
        raise BackendError(f"{type(module).__name__} has an encoder; a graph is followed by decoder-only models")
    # Some heads call past their base model (OPT calls base_model.decoder), so that a hook there would never run.
    decoder = module.get_decoder()  # type: ignore[no-untyped-call]
    return decoder if isinstance(decoder, PreTrainedModel) else cast(PreTrainedModel, module.base_model)
