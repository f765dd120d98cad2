"""Which layers and heads a picture is about, and how its title says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from leattn.errors import LeattnError
from leattn.viz.fold import check_weights

if TYPE_CHECKING:
    from leattn.analysis.trace import Trace
    from leattn.prompt.compiled import CompiledPrompt

Choice = int | Sequence[int] | None


def check_trace(what: str, given: object) -> None:
    """Raise LeattnError for anything but one trace; ``what`` names the function that wants it."""
    if not hasattr(given, "hidden_norms"):
        raise LeattnError(
            f"{what} draws a leattn.analysis.Trace, which is of one prompt, not {type(given).__name__}; "
            "give it leattn.analysis.trace(model, prompt)"
        )


def chosen_weights(
    weights: torch.Tensor | Sequence[torch.Tensor], prompt: CompiledPrompt, layer: Choice, head: Choice
) -> tuple[list[torch.Tensor], str]:
    """The chosen heads of the chosen layers of one prompt's weights, ``[H, S, S]`` each, and both in words.

    Raises
    ------
    LeattnError
        Weights that are not one prompt's, see :func:`check_weights`; a layer or head that does not exist.
    """
    words = []
    if isinstance(weights, torch.Tensor):
        if layer is not None:
            raise LeattnError(
                f"layer={layer!r} of one tensor: these weights are one layer's; give the whole outputs.attentions"
            )
        chosen = [check_weights(weights, prompt)]
    else:
        if not len(weights):
            raise LeattnError("there are no attention weights: the sequence is empty; ask the model for output_attentions=True")
        picked = indices("layer", layer, len(weights))
        chosen = [check_weights(weights[i], prompt, f"layer {i}: ") for i in picked]
        words.append(in_words("layer", picked, len(weights)))
    first = chosen[0]
    if first.dim() > 2:
        picked = indices("head", head, first.shape[-3])
        words.append(in_words("head", picked, first.shape[-3]))
        chosen = [one if head is None else one[..., picked, :, :] for one in chosen]
    elif head is not None:
        raise LeattnError(f"head={head!r} of weights [S, S]: they have no heads; give [H, S, S]")
    words.append(str(first.dtype).removeprefix("torch."))
    return [one.detach().reshape(-1, *one.shape[-2:]) for one in chosen], ", ".join(words)


def chosen_of(trace: Trace, layer: Choice, head: Choice) -> tuple[list[int], list[int], str]:
    """Rows of a trace for layers of the model, its heads, and both in words. Negative layers count from the last traced."""
    rows = layer_rows(trace, layer)
    heads = indices("head", head, trace.mass.shape[1])
    numbers = [trace.layers[row] for row in rows]
    every = len(numbers) > 1 and len(numbers) == len(trace.layers) and numbers == list(range(len(numbers)))
    layers = f"mean of all {len(numbers)} layers" if every else in_words("layer", numbers, -1)
    return rows, heads, f"{layers}, {in_words('head', heads, trace.mass.shape[1])}"


def layer_rows(trace: Trace, layer: Choice) -> list[int]:
    """Where the chosen layers of the model stand in a trace.

    Raises
    ------
    LeattnError
        A layer that was not traced.
    """
    if layer is None:
        return list(range(len(trace.layers)))
    wanted = [layer] if isinstance(layer, int) else list(layer)
    if not wanted:
        raise LeattnError(f"layer=[] chooses nothing; leave it out for the mean over all {len(trace.layers)}")
    rows = []
    for number in wanted:
        if isinstance(number, int) and -len(trace.layers) <= number < 0:
            rows.append(number % len(trace.layers))
        elif number in trace.layers:
            rows.append(trace.layers.index(number))
        else:
            raise LeattnError(f"there is no layer {number!r} in this trace; it has {', '.join(map(str, trace.layers))}")
    return rows


def indices(what: str, given: int | Sequence[int] | None, count: int) -> list[int]:
    if given is None:
        return list(range(count))
    wanted = [given] if isinstance(given, int) else list(given)
    for index in wanted:
        if not isinstance(index, int) or not -count <= index < count:
            raise LeattnError(f"there is no {what} {index!r}: the weights have {count}, numbered 0 to {count - 1}")
    if not wanted:
        raise LeattnError(f"{what}=[] chooses nothing; leave it out for the mean over all {count}")
    return [index % count for index in wanted]


def in_words(what: str, picked: list[int], count: int) -> str:
    """What was taken the mean of: ``layer 3``, ``mean of 4 layers``, ``mean of heads 0, 2``."""
    if len(picked) == 1:
        return f"{what} {picked[0]}"
    if picked == list(range(count)):
        return f"mean of all {count} {what}s"
    if len(picked) > 6:
        return f"mean of {len(picked)} {what}s"
    return f"mean of {what}s {', '.join(map(str, picked))}"
