"""What a model computes with, wherever its modules keep it: parameters, buffers, and tensors in attributes of any kind.

Packed and quantised weights are no parameters, offloaded ones are not in their module, and those of an adapter that is loaded
but not active do not count.
"""

from __future__ import annotations

import functools
import os
import re
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leattn.errors import BackendError

_MACHINERY = {*vars(nn.Module()), "_compiled_call_impl", "_hf_hook", "_old_forward", "config", "_is_hf_initialized"}
"""Attributes of a module that hold nothing that is computed with, or that are looked at by name."""
_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_STRANGERS = ("leattn", "torch", "builtins", "weakref", "threading", "logging", "transformers.configuration_utils")
"""Where objects come from whose attributes are none of the model's weights."""


@dataclass
class Weights:
    """What was found. Names are those of a model without adapters.

    Attributes
    ----------
    tensors
        Ordinary tensors by name.
    opaque
        What has to be unpacked first, by name: how to tell cheaply whether it is the same as before, and how to unpack it.
    facts
        What else says how a module computes: kinds of packed tensors, dropout, the scales of active adapters.
    state
        Numbers and hooks on modules, which may change for no reason: worth another look, and no more.
    """

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    opaque: list[tuple[str, Any, Callable[[], Any]]] = field(default_factory=list)
    facts: list[Any] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)


def weights(base: nn.Module) -> Weights:
    """Everything that the modules of a backbone compute with.

    Raises
    ------
    BackendError
        Weights that are nowhere (on the meta device, and not offloaded).
    """
    found = Weights()
    _Walk(found).module(base, "", None)
    return found


def unpacked(name: str, value: Any) -> Weights:
    """What an opaque value holds."""
    found = Weights()
    _Walk(found).value(value, name, None)
    return found


@dataclass(frozen=True)
class _Offloaded:
    """Where accelerate keeps the weights of a module: a mapping, and the module's name in it."""

    weights: Any
    name: str

    def inside(self, child: str) -> _Offloaded:
        return _Offloaded(self.weights, f"{self.name}{child}.")


class _Walk:
    def __init__(self, found: Weights) -> None:
        self.found = found
        self.met: dict[int, Any] = {}  # the objects themselves, so that no id is given twice

    def module(self, module: nn.Module, name: str, offloaded: _Offloaded | None) -> None:
        """A module and everything below it."""
        if self._is_met(module):
            return
        kept = _offloaded_weights(module)
        offloaded = offloaded if kept is None else _Offloaded(kept, "")
        if module.training:
            self.found.facts.append((name, "training"))
        hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        self.found.state += [(name, key) for key, hook in hooks if not _is_ours(hook)]
        children = {**module._modules, **module._parameters, **module._buffers, **_attributes(module)}
        for child, value in self._without_adapters(module, name, children):
            if value is None:
                continue
            path = ".".join(filter(None, (name, child)))
            if isinstance(value, nn.Module):
                self.module(value, path, offloaded and offloaded.inside(child or "base_layer"))
            elif isinstance(value, Tensor):
                self._placed(value, path, child, offloaded)
            elif isinstance(value, bool | int | float | str):
                self.found.state.append((path, value))
            else:
                self.value(value, path, offloaded)

    def value(self, value: Any, name: str, offloaded: _Offloaded | None) -> None:
        """Whatever an attribute may hold."""
        if isinstance(value, Tensor):
            self.tensor(value, name)
        elif isinstance(value, nn.Module):
            self.module(value, name, offloaded)
        elif isinstance(value, torch.ScriptObject):
            self.found.opaque.append((name, id(value), lambda: value.__getstate__()))
        elif (
            value is not None and not isinstance(value, bool | int | float | complex | str | bytes) and not self._is_met(value)
        ):
            for part, inner in _parts(value):
                self.value(inner, f"{name}.{part}", offloaded)

    def tensor(self, tensor: Tensor, name: str) -> None:
        """A tensor, or the ordinary ones that it is made of.

        Raises
        ------
        BackendError
            It is on the meta device.
        """
        if self._is_met(tensor):
            return
        is_ordinary = type(tensor) in (Tensor, nn.Parameter)
        if not is_ordinary and hasattr(tensor, "__tensor_flatten__"):
            parts, context = tensor.__tensor_flatten__()
            self.found.facts.append((name, type(tensor).__name__, _ADDRESS.sub("", repr(context))))
            for part in parts:
                self.value(getattr(tensor, part), f"{name}.{part}", None)
            return
        if tensor.is_meta:
            raise BackendError(
                f"the weights of {name!r} are not in memory (meta device), so stored keys and values cannot be told "
                "to be of this model; load the model, or run without kv_store"
            )
        if tensor.is_quantized or tensor.layout is not torch.strided:
            self.found.opaque.append((name, (id(tensor), version(tensor)), lambda: _dense(tensor)))
        else:
            plain = tensor.detach()
            self.found.tensors.append((name, plain if is_ordinary else plain.as_subclass(Tensor)))
        for part, inner in vars(tensor).items():  # a scale, a quantisation state
            self.value(inner, f"{name}.{part}", None)

    def _placed(self, tensor: Tensor, path: str, child: str, offloaded: _Offloaded | None) -> None:
        """A parameter or buffer, or what accelerate puts in its place while the module runs."""
        key = "" if offloaded is None else f"{offloaded.name}{child}"
        if offloaded is None or not tensor.is_meta or key not in offloaded.weights:
            self.tensor(tensor, path)
            return
        file = _file(offloaded.weights, key)
        if file is None:
            self.tensor(offloaded.weights[key], path)
            return
        status = os.stat(file)
        self.found.opaque.append((path, (file, status.st_mtime_ns, status.st_size), lambda: offloaded.weights[key]))

    def _without_adapters(self, module: nn.Module, name: str, children: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The children of a module; of a layer with adapters (PEFT) what it computes with now, the layer below in its place."""
        # A transformers model itself has methods of these names.
        if not hasattr(type(module), "active_adapters") or callable(getattr(type(module), "disable_adapters", callable)):
            yield from children.items()
            return
        if not hasattr(module, "adapter_layer_names"):  # not as PEFT has it: all that it says counts
            about = [getattr(module, what, None) for what in ("active_adapters", "disable_adapters", "scaling")]
            self.found.facts.append((name, repr(about)))
            yield from children.items()
            return
        is_merged = bool(getattr(module, "merged_adapters", ()))
        is_at_rest = is_merged or bool(module.disable_adapters)
        if is_merged and module.disable_adapters:
            self.found.state.append((name, "the next forward takes its adapters out of the weights"))
        active = () if is_at_rest else tuple(module.active_adapters)  # type: ignore[arg-type]
        by_adapter = {*module.adapter_layer_names, *getattr(module, "other_param_names", ())}  # type: ignore[misc]
        for child, value in children.items():
            if child in ("base_layer", "original_module"):
                yield "", value
            elif active and child in by_adapter and isinstance(value, Mapping | nn.ModuleDict | nn.ParameterDict):
                for rank, adapter in enumerate(active):
                    if adapter in value:
                        yield from self._of_an_adapter(f"{child}.{rank}", value[adapter], name)
            elif active:
                yield child, value

    def _of_an_adapter(self, child: str, value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, bool | int | float | str):
            self.found.facts.append((name, child, value))
        else:
            yield child, value

    def _is_met(self, value: Any) -> bool:
        if id(value) in self.met:
            return True
        self.met[id(value)] = value
        return False


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _MACHINERY}


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, as far as tensors may be among it."""
    if isinstance(value, dict):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((str(i), inner) for i, inner in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from _parts([value.func, value.args, value.keywords])
    elif isinstance(value, types.MethodType):
        yield from _parts([value.__self__, value.__func__])
    elif isinstance(value, types.FunctionType):
        filled = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        yield from _parts([*(cell.cell_contents for cell in filled), value.__defaults__, value.__kwdefaults__])
    elif not isinstance(value, type | types.ModuleType) and not _is_strange(type(value)):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)]
        yield from ((name, getattr(value, name, None)) for name in slots if name not in ("__dict__", "__weakref__"))
        yield from getattr(value, "__dict__", {}).items()


def _is_strange(kind: type) -> bool:
    return any(
        base.__module__.startswith(f"{home}.") or base.__module__ == home for base in kind.__mro__[:-1] for home in _STRANGERS
    )


def _is_ours(hook: Any) -> bool:
    function = hook
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("leattn", "accelerate")


def _offloaded_weights(module: nn.Module) -> Any:
    """Where accelerate keeps the weights of a module between calls, or None."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])
    return next((one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None), None)


def _file(weights: Any, key: str) -> str | None:
    """The file that an offloaded weight is in, or None where it is in memory."""
    while hasattr(weights, "dataset"):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    if key in getattr(weights, "state_dict", weights):
        return None
    about = weights.index[key]
    return str(about.get("safetensors_file") or os.path.join(weights.save_folder, f"{key}.dat"))


def version(tensor: Tensor) -> int:
    """How often it was written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _dense(tensor: Tensor) -> list[Any]:
    """The values of a sparse or quantised tensor, and their scales."""
    if not tensor.is_quantized:
        return [tensor.to_dense()]
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), torch.tensor([tensor.q_scale(), float(tensor.q_zero_point())])]
    return [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
