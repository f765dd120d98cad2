"""The arguments of the projects that leattn absorbs, translated: an experiment written for them runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from leattn.errors import LeattnError, choices
from leattn.interventions.draws import RandomNoise, Shuffle
from leattn.interventions.hidden import Freeze, Inject, SkipAttention
from leattn.interventions.scores import Suppress
from leattn.interventions.where import Place

KINDS = {
    "freeze": "freeze",
    "random": "random",
    "random_switch": "random",
    "noise": "random",
    "angle_switch": "angle",
    "shuffle": "shuffle",
    "random_shuffle": "shuffle",
    "information_injection": "inject",
    "switch_dict": "inject",
    "inject": "inject",
    "skip": "skip",
}
"""What ``manipulation_type`` may say: the README's words, those inside the code, and those of its earlier versions."""

Indices: TypeAlias = Sequence[int | None]


def from_atman(
    model: Any,
    *,
    suppression_token_indices: Indices | Sequence[Indices],
    suppression_factors: Sequence[float] | Sequence[Sequence[float]],
    layers: Sequence[int | None] | None = None,
    multiplicative: bool = True,
    manipulate_attn_scores_after_scaling: bool = False,
) -> list[Suppress]:
    """AtMan's suppression, as its code and the modified LLaMA name it, as operations.

    Parameters
    ----------
    suppression_token_indices, suppression_factors
        One list per batch row, or one flat list, which holds for every row. An index of −1 or None means nothing; of an index
        given twice the last factor counts.
    layers
        None, an empty list and ``[None]`` are all layers.
    multiplicative
        Factors multiply scores (``shift="all"``, as published). False: a matrix is added that is 1 everywhere and f at the
        suppressed keys. The softmax ignores what all keys get, so f − 1 is added where the others get 0.
    manipulate_attn_scores_after_scaling
        What is added before the division by √d is worth 1/√d of it after. For factors there is no difference.

    Raises
    ------
    LeattnError
        Lists of different lengths, or flat lists beside lists per row.

    Notes
    -----
    This follows AtMan (Deiseroth et al., arXiv 2301.08110). The modified LLaMA's own code does something else, and nothing
    here follows it: it hands its layers the mask as it was given, so that without one attention is not causal at all, and with
    a 4D mask its eager attention leaves the suppression out; the attributes that its README sets are never read.

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> from_atman(model, suppression_token_indices=[[2, -1]], suppression_factors=[[0.1, 0.5]])[0].tokens
    [2]
    >>> from_atman(model, suppression_token_indices=[2, 4], suppression_factors=[0.1, 0.5])[0].factor
    [0.1, 0.5]
    """
    rows = _rows(suppression_token_indices, suppression_factors)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = 1.0 if manipulate_attn_scores_after_scaling else size**-0.5
    named = [layer for layer in layers or () if layer is not None]
    operations = []
    for row, indices, factors in rows:
        kept: dict[Place, float] = {}
        for index, factor in zip(indices, factors, strict=True):
            if index is not None and index != -1:
                kept[int(index)] = float(factor) if multiplicative else (float(factor) - 1) * scale
        if kept:
            operations.append(
                Suppress(
                    list(kept),
                    list(kept.values()),
                    mode="multiplicative" if multiplicative else "additive",
                    shift="all" if multiplicative else "visible",
                    layers=named or None,
                    rows=None if row is None else [row],
                )
            )
    return operations


def _rows(indices: Any, factors: Any) -> list[tuple[int | None, Indices, Sequence[float]]]:
    """(row, its indices, its factors); flat lists have no row."""
    flat = [not any(isinstance(one, Iterable) for one in given) for given in (indices, factors)]
    if len(indices) and flat[0] != flat[1]:
        raise LeattnError(
            f"suppression_token_indices is {list(indices)!r} and suppression_factors {list(factors)!r}; give two flat lists, "
            "or both as one list per batch row"
        )
    if len(indices) != len(factors):
        what = "indices" if flat[0] else "rows"
        raise LeattnError(
            f"suppression_token_indices has {len(indices)} {what} and suppression_factors {len(factors)}; "
            "give one factor per index, or one list each per batch row"
        )
    if flat[0]:
        return [(None, indices, factors)]
    for row, (some, given) in enumerate(zip(indices, factors, strict=True)):
        if len(some) != len(given):
            raise LeattnError(f"row {row} has {len(some)} indices and {len(given)} factors; give one factor per index")
    return list(zip(range(len(indices)), indices, factors, strict=True))


def from_attend_first(
    model: Any,
    *,
    manipulation_type: str | None = None,
    manipulation_layer: int | None = None,
    distrupt_type: str | None = None,
    distrupt_layer: int | None = None,
    distrupt_tokens: Sequence[int] | None = None,
    angle: float | None = None,
    injection_dict: Mapping[int, torch.Tensor] | None = None,
    skip_attention_layers: Sequence[int] | None = None,
) -> list[Freeze | RandomNoise | Shuffle | SkipAttention | Inject]:
    """The arguments of *Attend First, Consolidate Later*'s code as operations, with its own seeding and its held layer.

    Parameters
    ----------
    manipulation_type, distrupt_type
        ``"freeze"``, ``"random"``, ``"shuffle"``, ``"skip"``, ``"information_injection"``, ``"angle_switch"`` (noise at
        ``angle`` degrees), and the earlier spellings ``"random_switch"``, ``"random_shuffle"``, ``"switch_dict"``. Noise is
        drawn from torch's global generator, a shuffle seeded with layer · token: ``seeding="published"``.
    manipulation_layer, distrupt_layer
        Layers past the last are left out.
    distrupt_tokens
        Which tokens; all but the last for None.
    injection_dict
        ``{token index: state}``, which stands for ``"information_injection"`` where no type is given.

    Raises
    ------
    LeattnError
        An unknown type, a type without a layer, an injection without states, an ``angle_switch`` without an angle.

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> from_attend_first(model, distrupt_type="freeze", distrupt_layer=2)
    [Freeze(layer=2, tokens=None, source='previous', rows=None, generated=False)]
    """
    kind = manipulation_type if manipulation_type is not None else distrupt_type
    layer = manipulation_layer if manipulation_layer is not None else distrupt_layer
    count = model.config.num_hidden_layers
    operations: list[Freeze | RandomNoise | Shuffle | SkipAttention | Inject] = []
    if skip_attention_layers is not None:
        operations.append(SkipAttention([number for number in skip_attention_layers if number < count]))
    if kind is None and injection_dict is not None:
        kind = "inject"
    if kind is None:
        return operations
    if kind not in KINDS:
        raise LeattnError(choices("manipulation_type", kind, KINDS))
    if layer is None:
        raise LeattnError(f"manipulation_type={kind!r} needs manipulation_layer")
    tokens = None if distrupt_tokens is None else list(distrupt_tokens)
    name = KINDS[kind]
    if name == "freeze":
        operations.append(Freeze(layer, tokens, source="previous"))
    elif name == "skip":
        operations.append(SkipAttention(range(layer, count)))
    elif name == "inject":
        if injection_dict is None:
            raise LeattnError("an injection needs injection_dict, {token index: state}")
        states: Mapping[Place, torch.Tensor] = dict[Place, torch.Tensor](injection_dict.items())
        operations += [Inject(layer, states)] if layer < count else []
    elif name == "angle" and angle is None:
        raise LeattnError(f"manipulation_type={kind!r} needs angle, in degrees")
    elif layer < count and name == "shuffle":
        operations.append(Shuffle(layer, tokens, seeding="published"))
    elif layer < count:
        operations.append(RandomNoise(layer, tokens, seeding="published", angle=angle if name == "angle" else None))
    return operations
