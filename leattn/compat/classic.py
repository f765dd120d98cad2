"""The arguments of the projects that leattn absorbs, translated: an experiment written for them runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from leattn.errors import LeattnError, choices
from leattn.interventions.hidden import Freeze, Inject, RandomNoise, Shuffle, SkipAttention
from leattn.interventions.scores import Suppress
from leattn.interventions.where import Place

KINDS = {
    "freeze": "freeze",
    "random": "random",
    "random_switch": "random",
    "noise": "random",
    "shuffle": "shuffle",
    "random_shuffle": "shuffle",
    "switch_dict": "inject",
    "inject": "inject",
    "skip": "skip",
}


def from_atman(
    model: Any,
    *,
    suppression_token_indices: Sequence[Sequence[int]],
    suppression_factors: Sequence[Sequence[float]],
    layers: Sequence[int] | None = None,
    multiplicative: bool = True,
    manipulate_attn_scores_after_scaling: bool = False,
) -> list[Suppress]:
    """The modified LLaMA's per-row suppression as operations.

    Parameters
    ----------
    suppression_token_indices, suppression_factors
        One list per batch row. An index of −1 means nothing, as published.
    multiplicative
        Factors multiply scores (``shift="all"``, as published), or are added to them.
    manipulate_attn_scores_after_scaling
        What is added before the division by √d is worth 1/√d of it after. For factors there is no difference.

    Raises
    ------
    LeattnError
        Lists of different lengths.

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> from_atman(model, suppression_token_indices=[[2, -1]], suppression_factors=[[0.1, 0.5]])[0].tokens
    [2]
    """
    if len(suppression_token_indices) != len(suppression_factors):
        raise LeattnError(
            f"suppression_token_indices has {len(suppression_token_indices)} rows and suppression_factors "
            f"{len(suppression_factors)}; give one list each per batch row"
        )
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = 1.0 if multiplicative or manipulate_attn_scores_after_scaling else size**-0.5
    operations = []
    for row, (indices, factors) in enumerate(zip(suppression_token_indices, suppression_factors, strict=True)):
        if len(indices) != len(factors):
            raise LeattnError(f"row {row} has {len(indices)} indices and {len(factors)} factors; give one factor per index")
        kept = [(int(index), float(factor) * scale) for index, factor in zip(indices, factors, strict=True) if index != -1]
        if kept:
            operations.append(
                Suppress(
                    [index for index, _ in kept],
                    [factor for _, factor in kept],
                    mode="multiplicative" if multiplicative else "additive",
                    shift="all" if multiplicative else "visible",
                    layers=None if layers is None else list(layers),
                    rows=[row],
                )
            )
    return operations


def from_attend_first(
    model: Any,
    *,
    manipulation_type: str | None = None,
    manipulation_layer: int | None = None,
    distrupt_type: str | None = None,
    distrupt_layer: int | None = None,
    distrupt_tokens: Sequence[int] | None = None,
    injection_dict: Mapping[int, torch.Tensor] | None = None,
    skip_attention_layers: Sequence[int] | None = None,
) -> list[Freeze | RandomNoise | Shuffle | SkipAttention | Inject]:
    """The arguments of *Attend First, Consolidate Later*'s code as operations, with its own seeding and its held layer.

    ``distrupt_type`` and ``distrupt_layer`` are its spelling of ``manipulation_type`` (``"freeze"``, ``"random"``,
    ``"shuffle"``, ``"skip"``, and the spellings inside its code) and ``manipulation_layer``. Layers past the last are left out.

    Raises
    ------
    LeattnError
        An unknown type, a type without a layer, or an injection without states.

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
    elif layer < count:
        operations.append(RandomNoise(layer, tokens) if name == "random" else Shuffle(layer, tokens, seeding="published"))
    return operations
