"""How one layer of a model family turns its keys with the position: the ways there are, to be told apart by measuring."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from leattn.dag.node import Position
from leattn.errors import BackendError
from leattn.model.record import Model

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Turn:
    """One way to turn: by which angles, by the family's own function, on the first or last dimensions of each head, or on all.

    ``angles`` are where cosines and sines come from: a rotary embedding (of one layer type, where it has several) or a table.
    ``tokens_first`` is the layout that the function takes, ``[L, n, G, D]`` instead of ``[L, G, n, D]``.
    """

    angles: tuple[torch.nn.Module, str | None]
    function: Callable[..., Any]
    part: str
    tokens_first: bool = False

    def at(self, positions: Tensor) -> Angles:
        """Cosines and sines ``[1, n, W]`` in fp32 at positions ``[n]``."""
        module, layer_type = self.angles
        table = getattr(module, "embed_positions", None)
        if table is not None:
            sin, cos = table[positions][None].float().chunk(2, -1)
            return cos, sin
        named = {} if layer_type is None else {"layer_type": layer_type}
        angles = module(torch.zeros(1, device=positions.device), position_ids=positions[None], **named)
        if isinstance(angles, Tensor):  # one complex number for each pair of dimensions
            return angles.real, angles.imag
        cos, sin = angles
        return cos, sin

    def between(self, old: Tensor, new: Tensor) -> Angles:
        """Cosines and sines of the turn from positions ``old`` to ``new``, without any scale that the family puts on them."""
        (cos_old, sin_old), (cos_new, sin_new) = self.at(old), self.at(new)
        scale = cos_old.square() + sin_old.square()
        return (cos_old * cos_new + sin_old * sin_new) / scale, (cos_old * sin_new - sin_old * cos_new) / scale

    def apply(self, tensor: Tensor, angles: Angles) -> Tensor:
        """Turn ``[L, G, n, D]``, in fp32; the same dtype comes back. What is not turned is left as it is, bit by bit."""
        cos, sin = angles
        names = _names(self.function)
        is_complex = "freqs_cis" in names
        # Most functions take an angle for each dimension; these take one for each pair.
        width = cos.shape[-1] * (2 if is_complex or _is_gptj(names) else 1)
        where = {"first": slice(0, width), "last": slice(-width, None), "all": slice(None)}[self.part]
        part = tensor[..., where].float()
        if self.function.__name__.endswith("_interleave"):  # takes pairs side by side, and leaves one half after the other
            part = torch.stack(part.chunk(2, -1), -1).flatten(-2)
        if self.tokens_first:
            part = part.transpose(1, 2)
        if is_complex:
            turned = self.function(part, part, torch.complex(cos, sin))[1]
        elif _is_gptj(names):
            turned = self.function(part, sin, cos)
        elif names[0] == "q":
            turned = self.function(part, part, cos=cos, sin=sin)[1]
        else:
            turned = self.function(part, cos=cos, sin=sin)
        if self.tokens_first:
            turned = turned.transpose(1, 2)
        if self.part == "all":
            return cast(Tensor, turned.to(tensor.dtype))
        result = tensor.clone()
        result[..., where] = turned
        return result


def positions_from(start: Position, steps: Tensor) -> Tensor:
    """Positions ``[n]`` that are whole ``steps`` from one, as a model takes them: whole numbers, or float32."""
    return steps + start if isinstance(start, int) else (steps.double() + start).float()


def possible_turns(record: Model, index: int) -> list[Turn]:
    """All the ways in which layer ``index`` of a cache might be turned, most likely first."""
    layer, others = _layer(record, index)
    library = vars(sys.modules[type(layer).__module__])
    return [
        Turn(angles, function, part, tokens_first)
        for angles in _angles(record.base, layer, others, index)
        for function in (library[name] for name in FUNCTIONS if name in library)
        for tokens_first in _layouts(_names(function))
        for part in ("all", "first", "last")
    ]


FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")
"""What families call the function that turns queries and keys."""


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _is_gptj(names: Sequence[str]) -> bool:
    """Whether a function takes sin before cos, as GPT-J's and its relatives' do."""
    return "sin" in names and "cos" in names and names.index("sin") < names.index("cos")


def _layouts(names: Sequence[str]) -> tuple[bool, ...]:
    """Whether a function takes heads after tokens; complex ones come in both kinds (Llama 4, DeepSeek V2)."""
    return (True, False) if "freqs_cis" in names else (_is_gptj(names),)


def _layer(record: Model, index: int) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """The layer that fills layer ``index`` of a cache, and all layers.

    The backbone and none where that is not one to one: layers that run several times, or have several attentions.
    """
    try:
        return record.layers[index], record.layers
    except (BackendError, IndexError):
        return record.base, []


def _angles(
    base: torch.nn.Module, layer: torch.nn.Module, layers: list[torch.nn.Module], index: int
) -> Iterator[tuple[torch.nn.Module, str | None]]:
    yield from ((module, None) for module in layer.modules() if hasattr(module, "embed_positions"))
    of_layers = {id(module) for one in (layers or [layer]) for module in one.modules()}
    shared = [module for module in base.modules() if id(module) not in of_layers]
    types = list(getattr(cast(Any, base).config, "layer_types", None) or ())
    for module in [*layer.modules(), *shared]:
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        if "layer_type" in inspect.signature(module.forward).parameters:
            # Its own type first.
            for layer_type in sorted(set(types), key=lambda name: name not in types[index : index + 1]):
                yield module, layer_type
        else:
            yield module, None
