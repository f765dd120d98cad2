"""How one layer of a model family turns its keys with the position: the ways there are, to be told apart by measuring."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from leattn.model.record import Model

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Turn:
    """One way to turn: by which angles, by the family's own function, on the first or last dimensions of each head, or on all.

    ``angles`` are where cosines and sines come from: a rotary embedding (of one layer type, where it has several) or a table.
    """

    angles: tuple[torch.nn.Module, str | None]
    function: Callable[..., Any]
    part: str

    def at(self, positions: Tensor) -> Angles:
        """Cosines and sines ``[1, n, W]`` in fp32 at positions ``[n]``."""
        module, layer_type = self.angles
        table = getattr(module, "embed_positions", None)
        if table is not None:
            sin, cos = table[positions][None].float().chunk(2, -1)
            return cos, sin
        named = {} if layer_type is None else {"layer_type": layer_type}
        cos, sin = module(torch.zeros(1, device=positions.device), position_ids=positions[None], **named)
        return cos, sin

    def between(self, old: Tensor, new: Tensor) -> Angles:
        """Cosines and sines of the turn from positions ``old`` to ``new``, without any scale that the family puts on them."""
        (cos_old, sin_old), (cos_new, sin_new) = self.at(old), self.at(new)
        scale = cos_old.square() + sin_old.square()
        return (cos_old * cos_new + sin_old * sin_new) / scale, (cos_old * sin_new - sin_old * cos_new) / scale

    def apply(self, tensor: Tensor, angles: Angles) -> Tensor:
        """Turn ``[L, G, n, D]``, in fp32; the same dtype comes back. What is not turned is left as it is, bit by bit."""
        cos, sin = angles
        # A function that takes sin before cos is of those (GPT-J's) that put heads after tokens and give each pair one angle.
        names = list(inspect.signature(self.function).parameters)
        tokens_first = names.index("sin") < names.index("cos")
        width = cos.shape[-1] * (2 if tokens_first else 1)
        where = {"first": slice(0, width), "last": slice(-width, None), "all": slice(None)}[self.part]
        part = tensor[..., where].float()
        if tokens_first:
            turned = self.function(part.transpose(1, 2), sin, cos).transpose(1, 2)
        elif names[0] == "q":
            turned = self.function(part, part, cos=cos, sin=sin)[1]
        else:
            turned = self.function(part, cos=cos, sin=sin)
        if self.part == "all":
            return cast(Tensor, turned.to(tensor.dtype))
        result = tensor.clone()
        result[..., where] = turned
        return result


def possible_turns(record: Model, index: int) -> list[Turn]:
    """All the ways in which layer ``index`` of a model might turn what it caches, most likely first.

    Raises
    ------
    BackendError
        Layers that leattn does not find its way in.
    """
    layers = record.layers
    library = vars(sys.modules[type(layers[index]).__module__])
    functions = [library[name] for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave") if name in library]
    return [
        Turn(angles, function, part)
        for angles in _angles(record.base, layers, index)
        for function in functions
        for part in ("all", "first", "last")
    ]


def _angles(base: torch.nn.Module, layers: list[torch.nn.Module], index: int) -> Iterator[tuple[torch.nn.Module, str | None]]:
    yield from ((module, None) for module in layers[index].modules() if hasattr(module, "embed_positions"))
    of_layers = {id(module) for layer in layers for module in layer.modules()}
    shared = [module for module in base.modules() if id(module) not in of_layers]
    types = list(getattr(cast(Any, base).config, "layer_types", None) or ())
    for module in [*layers[index].modules(), *shared]:
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        if "layer_type" in inspect.signature(module.forward).parameters:
            # Its own type first.
            for layer_type in sorted(set(types), key=lambda name: name != types[index]):
                yield module, layer_type
        else:
            yield module, None
