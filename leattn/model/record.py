"""One record per model: what is known of it, what was measured on it, and what is bound to it while blocks are open."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from leattn.errors import BackendError
from leattn.model.facts import Facts, embeddings, read_facts
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
        Why a backend cannot run this model, or how it can (attention/probe.py); ``verdicts`` are what is kept of it on disk
        (attention/verdicts.py).
    readings : dict
        Whether its queries can read in other ways, and how its keys turn (attention/turning.py).
    rooted : set
        Variants of it of which nothing is left to say about first tokens (attention/roots.py).
    certificates, fingerprint
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
        self.verdicts: dict[Any, Any] = {}
        self.readings: dict[Any, Any] = {}
        self.rooted: set[Any] = set()
        self.certificates: dict[Any, Any] = {}
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

    def around(self, model: Any) -> torch.nn.Module | None:
        """The model around the backbone, where it does more than call it: embed pictures or sounds among the text."""
        outer = unwrapped(model)
        return None if outer is self.base or outer.base_model is self.base else cast(torch.nn.Module, outer)

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
        return embeddings(self.base)

    @property
    def unplaced(self) -> str | None:
        """What to say where it has weights on the meta device that nobody puts in place before they are used, else None."""
        if not self._embeddings.is_meta and self._is_placed:
            return None
        lost = next((name for name, tensor in self.base.named_parameters() if tensor.is_meta), None)
        self._is_placed = lost is None
        if lost is None or any(_offloads(module) for module in self.base.modules()):
            return None
        return (
            f"{type(self.base).__name__} has no values for {lost!r} (meta device); load its weights, or move it with to_empty "
            "and load_state_dict"
        )

    @property
    def device(self) -> torch.device:
        """Where its inputs go: to its embeddings, or to where accelerate runs those that it offloads.

        Raises
        ------
        BackendError
            Weights on the meta device, see :attr:`unplaced`.
        """
        reason = self.unplaced
        if reason is not None:
            raise BackendError(reason)
        weight = self._embeddings
        return weight.device if not weight.is_meta else _execution_device(self.base)

    @property
    def device_type(self) -> str:
        """The kind of its device; ``"meta"`` where weights have no values."""
        return "meta" if self.unplaced else self.device.type

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
        count = getattr(self.base.config, "num_hidden_layers", None)
        for module in self.base.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == count:
                return list(module)
        raise BackendError(f"{type(self.base).__name__} keeps its layers in a way that leattn does not know")

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


def variant(model: Any) -> tuple[Any, ...]:
    """What a verdict about a model holds for: how it is wrapped, its dtype, and its active adapters."""
    module = unwrapped(model)
    tuned = [one for one in module.modules() if hasattr(one, "get_base_layer")] if "peft" in sys.modules else []
    adapters = {(str(one.active_adapters), str(one.disable_adapters)) for one in tuned}
    return type(model).__name__, type(module).__name__, str(module.dtype), tuple(sorted(adapters))


def check_plain_text(outer: torch.nn.Module, call: Mapping[str, Any]) -> None:
    """Refuse what a model gives positions of its own: tokens of pictures and videos, in three dimensions (M-RoPE)."""
    has_own = any(hasattr(one, "get_rope_index") for one in (outer, getattr(outer, "model", None)))
    # An empty dict is what ``generate`` gives for text alone.
    other = [name for name, value in call.items() if value is not None and value != {} and _PICTURES.search(name)]
    kinds = call.get("mm_token_type_ids")
    other += [] if kinds is None or not kinds.any() else ["mm_token_type_ids"]
    if has_own and other:
        raise BackendError(
            f"{other[0]}: {type(outer).__name__} gives the tokens of a picture positions in three dimensions, which nodes of a "
            "graph do not have; give it text alone"
        )


_PICTURES = re.compile(r"pixel|grid|image|video|audio|input_features|encoder_outputs")


def unwrapped(model: Any) -> Any:
    """The model itself, below ``torch.compile`` and an adapter (PEFT)."""
    module = getattr(model, "_orig_mod", model)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _check_no_virtual_tokens(model: Any) -> None:
    """Refuse prompt, prefix and p-tuning, which put tokens of their own in front of every input."""
    adapter = getattr(model, "_orig_mod", model)
    tuning: Any = getattr(adapter, "active_peft_config", None)
    # With its adapter disabled, it has its base model's forward.
    if getattr(tuning, "is_prompt_learning", False) and "forward" not in vars(adapter):
        raise BackendError(
            f"{tuning.peft_type.value} puts {tuning.num_virtual_tokens} virtual tokens in front of every input, which are no "
            "columns of the prompt; use an adapter of weights (LoRA, IA3), or the base model: model.get_base_model()"
        )


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
    _check_no_virtual_tokens(model)
    if isinstance(model, str | PathLike):
        raise BackendError(f"{str(model)!r} is no model; load it first: AutoModelForCausalLM.from_pretrained({str(model)!r})")
    if not isinstance(module, PreTrainedModel):
        raise BackendError(f"leattn runs transformers models (PreTrainedModel), not {type(model).__name__}")
    if module.config.is_encoder_decoder:
        raise BackendError(f"{type(module).__name__} has an encoder; a graph is followed by decoder-only models")
    # Some heads call past their base model (OPT calls base_model.decoder), so that a hook there would never run.
    decoder = module.get_decoder()  # type: ignore[no-untyped-call]
    return decoder if isinstance(decoder, PreTrainedModel) else cast(PreTrainedModel, module.base_model)
