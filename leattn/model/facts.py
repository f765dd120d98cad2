"""What the config and the modules of a model say about it, without running it."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from leattn.errors import BackendError, LeattnWarning
from leattn.prompt.columns import Columns
from leattn.prompt.compiled import CompiledPrompt


@dataclass(frozen=True)
class Facts:
    """What does not change while a model lives (its vocabulary may; see :attr:`Model.facts`). Can travel without the model.

    ``windows`` is the sliding window of each layer type that a model takes a mask for; one unnamed type ``""`` where all layers
    are alike. ``first_position`` is what the model's own count of positions begins with. ``position_limit`` is how many
    positions a table holds, ``rope_limit`` up to where rotary angles do not depend on the length of the input, ``index_limit``
    how many tokens a sequence may have before its attention depends on their index in it, ``seen_limit`` how many a token may
    see before the model chooses among them, ``trained_length`` what the model was trained for; None where there is no such
    thing. ``threshold`` is how many tokens it takes to see what the config says begins later. ``cached_beside`` is why its
    cache cannot be put together from keys and values, or None.
    """

    family: str
    vocabulary: int
    can_switch: bool
    takes_positions: bool
    stateful: bool
    cached_beside: str | None
    windowed: bool
    windows: dict[str, int | None]
    windows_by_index: bool
    chunked: bool
    softcap: bool
    learned_sinks: bool
    supports_sdpa: bool
    supports_flex: bool
    first_position: int
    position_limit: int | None
    positions_learned: bool
    rope_limit: int | None
    index_limit: int | None
    seen_limit: int | None
    trained_length: int | None
    threshold: int

    def check_tokens(self, prompts: Sequence[CompiledPrompt]) -> None:
        """Refuse token ids that the model has no embedding for."""
        for prompt in prompts:
            node = prompt.graph.nodes[int(prompt.node_index[int(prompt.input_ids[0].argmax())])]
            self.check_token(int(prompt.input_ids.max()), prompt.graph.name(node))

    def check_token(self, largest: int, node: str) -> None:
        """Refuse the largest token id of a node if the model has no embedding for it."""
        if largest >= self.vocabulary:
            raise BackendError(
                f"node {node!r} holds token id {largest}, but the model has {self.vocabulary} embeddings: "
                "tokenizer and model do not belong together, or model.resize_token_embeddings was not called"
            )

    def check_positions(self, prompts: Sequence[CompiledPrompt], *, new_tokens: int = 0) -> None:
        """Refuse positions past a table or a length-dependent RoPE's limit, and sequences in which attention depends on the
        index; warn past what RoPE was trained for.

        The last of ``new_tokens`` is not fed.
        """
        fed = max(0, new_tokens - 1)
        for prompt in prompts:
            last = math.ceil(max(prompt.position_ids.max().item(), prompt.position_ids[0, -1].item() + fed))
            which = f"the last position is {last}" + (f" with {new_tokens} new tokens" if new_tokens else "")
            self.check_last_position(last, which)
            self.check_length(len(prompt) + fed)
            self.check_seen(prompt.columns, range(len(prompt) + fed))

    def check_seen(self, columns: Columns, queries: range) -> None:
        """Refuse tokens that see so many others that the model chooses among them."""
        if self.seen_limit is not None:
            self.check_seen_tokens(columns.most_seen(queries))

    def check_seen_tokens(self, seen: int) -> None:
        """Refuse a number of tokens that one token sees, itself among them."""
        if self.seen_limit is not None and seen > self.seen_limit:
            raise BackendError(
                f"{seen} tokens: where one token sees more than {self.seen_limit}, {self.family} attends to the "
                f"{self.seen_limit} with the best scores, and among equal scores it goes by the index in the sequence, which a "
                "graph's positions cannot reach; let nodes see fewer or shorter ones"
            )

    def check_length(self, tokens: int) -> None:
        """Refuse a sequence in which attention depends on the index."""
        if self.index_limit is not None and tokens > self.index_limit:
            raise BackendError(
                f"{tokens} tokens: in a sequence of more than {self.index_limit}, what {self.family} attends to depends on the "
                "index in the sequence, which a graph's positions cannot reach; use fewer or shorter nodes"
            )

    def check_last_position(self, last: int, which: str) -> None:
        """Refuse a last position, or warn of it; ``which`` begins the sentence."""
        if self.position_limit is not None and last >= self.position_limit:
            raise BackendError(
                f"{which}, but {self.family} has a table of {self.position_limit} positions; "
                "use fewer or shorter nodes, or let siblings share positions (positions='after_parents')"
            )
        if self.rope_limit is not None and last >= self.rope_limit:
            raise BackendError(
                f"{which}, but past {self.rope_limit} this model's rotary angles depend on the length of the whole input, so "
                "unrelated nodes would change each other; keep positions below it, or load the model without that RoPE scaling"
            )
        if self.trained_length is not None and last >= self.trained_length:
            warnings.warn(f"{which}; {self.family} was trained for {self.trained_length}", LeattnWarning, stacklevel=5)


def read_facts(base: PreTrainedModel) -> Facts:
    """The facts of a backbone."""
    config, caches = base.config, _cache_layers(base.config)
    table, offset = _position_table(base)
    limit = None if table is None else len(table) - offset
    return Facts(
        family=str(config.model_type),
        vocabulary=len(embeddings(base)),
        can_switch=bool(base._can_set_attn_implementation()),
        takes_positions="position_ids" in inspect.signature(base.forward).parameters,
        stateful=_is_stateful(base, caches),
        cached_beside=_cached_beside(caches),
        windowed=any(getattr(layer, "is_sliding", False) for layer in caches),
        windows=_windows(config),
        windows_by_index="local" in (getattr(config, "attention_layers", None) or ()),  # GPT-Neo
        chunked="chunked_attention" in (getattr(config, "layer_types", None) or ()),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        learned_sinks=any(name.endswith(".sinks") for name, _ in base.named_parameters()),
        supports_sdpa=bool(getattr(base, "_supports_sdpa", False)),
        supports_flex=bool(getattr(base, "_supports_flex_attn", False)),
        first_position=_first_position(base),
        position_limit=limit,
        positions_learned=isinstance(table, Parameter),
        rope_limit=_rope_limit(config),
        index_limit=_index_limit(config),
        seen_limit=_seen_limit(config),
        trained_length=getattr(config, "max_position_embeddings", None),
        threshold=_threshold(config) if _index_limit(config) is None and _seen_limit(config) is None else 0,
    )


def _cached_beside(caches: Sequence[Any]) -> str | None:
    """Why the model's cache cannot be put together from keys and values, or None. Sparse indexers keep keys of their own."""
    kinds = {type(layer) for layer in caches if hasattr(layer, "keys") and isinstance(layer, DynamicLayer)}
    others = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if not others:
        return None
    return f"its cache keeps more than keys and values ({', '.join(others)}), and that would be missing"


def embeddings(base: PreTrainedModel) -> Tensor:
    """The token embeddings, ``[V, d]``.

    Raises
    ------
    BackendError
        A model that embeds something else than one token per index.
    """
    weight = getattr(base.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise BackendError(
            f"{type(base).__name__} has no table with one embedding per token (it reads several codes at once, or bytes), and "
            "a graph is made of tokens"
        )
    return weight


def _cache_layers(config: Any) -> list[Any]:
    """The layers of the model's own cache; none where transformers makes no cache for such a config."""
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _is_stateful(base: PreTrainedModel, caches: Sequence[Any]) -> bool:
    """Whether any layer carries a state; a hybrid's config may consist of attention alone."""
    if any(hasattr(layer, "recurrent_states") for layer in caches):
        return True
    return bool(getattr(base, "_is_stateful", False)) and not getattr(base.config, "layer_types", None)


def _windows(config: Any) -> dict[str, int | None]:
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(types) > 1:
        return {kind: window if kind == "sliding_attention" else None for kind in types}
    return {"": None if types == ["full_attention"] else window}


def _first_position(base: PreTrainedModel) -> int:
    """RoBERTa and its relatives count from the padding id on; positions that they are given are taken as they are."""
    counting = (one for one in base.modules() if hasattr(one, "create_position_ids_from_input_ids"))
    padding: Any = getattr(next(counting, None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _position_table(base: PreTrainedModel) -> tuple[Tensor | None, int]:
    """The table that positions index, a parameter or a fixed buffer, and which of its rows the first position is."""
    length = getattr(base.config, "max_position_embeddings", None)
    tables = [*base.named_parameters(), *base.named_buffers()]
    for name, table in tables:
        if table.dim() != 2 or not table.is_floating_point() or not _POSITIONS.search(name) or "relative" in name:
            continue
        module: Any = base.get_submodule(name.rpartition(".")[0])
        offset = max(getattr(module, "offset", 0), _first_position(base))
        if length is None or length <= len(table) <= length + offset:
            return table, offset
    return None, 0


_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*|pos_emb\w*)(\.weights?)?$")
"""Tables of positions by name."""


def _index_limit(config: Any) -> int | None:
    """How many tokens a sequence may have before something is cut or scaled by the index; None if nothing ever is."""
    limits = []
    if getattr(config, "floor_scale", None) and getattr(config, "attn_temperature_tuning", False):  # Llama 4
        limits.append(int(config.floor_scale) - 1)
    if getattr(config, "index_topk", None) and _seen_limit(config) is None:
        limits.append(int(config.index_topk))
    if getattr(config, "index_topk_blocks", None) and getattr(config, "index_block_size", None):  # MiniMax M3
        limits.append(int(config.index_topk_blocks) * int(config.index_block_size))
    return min(limits, default=None)


def _seen_limit(config: Any) -> int | None:
    """How many tokens an indexer may choose among: as many as it takes, or fewer, are all taken (DeepSeek sparse attention).

    Equal scores are no accident: a token that no head of the indexer cares for has 0. Indexers that choose among groups of
    tokens, which are cut by the index, are another matter.
    """
    grouped = any(_GROUPS.search(name) for name in config.to_dict())
    topk = getattr(config, "index_topk", None)
    return None if grouped or not topk else int(topk)


_GROUPS = re.compile(r"compress_r|pool")
"""Settings that say how many tokens are one to an indexer (DeepSeek V4, GLM 5), by name."""


def _threshold(config: Any) -> int:
    """The largest number up to 256 in the config after which something may begin, or 0."""
    named = {name: value for name, value in config.to_dict().items() if _BEGINS.search(name)}
    return max((value for value in named.values() if type(value) is int and value <= 256), default=0)


_BEGINS = re.compile(r"chunk|block_|_block|index_|topk|compress|stride|floor|bucket|segment|sparse")
"""Settings that speak of a length, by name."""


def _rope_limit(config: Any) -> int | None:
    """Where rotary angles begin to depend on the length of the input (dynamic NTK, longrope), or None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [kind for kind in parameters.values() if isinstance(kind, dict)]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
