"""``trace``: where a model looked and how large its states were, reduced to nodes while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias, cast

import torch

from leattn.analysis.fold import Pair
from leattn.analysis.memory import Footprint
from leattn.analysis.watch import Tracer, watched
from leattn.attention.request import Backend
from leattn.dag.node import ICLNode
from leattn.errors import BackendError, LeattnError
from leattn.interventions import Operation
from leattn.interventions.operation import Layers, checked_layers
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt

NodePair: TypeAlias = tuple[ICLNode | str, ICLNode | str]
TILE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False, repr=False)
class TokenWeights:
    """Attention between the tokens of two nodes.

    ``weights`` ``[L, H, Q, K]`` are whole where a node has up to 512 tokens; a longer side is cut into cells of ``pool``
    (query, key) tokens, each the largest weight in it. ``scores``, if asked for, are what the softmax is taken of, in the same
    cells; −inf where a query does not see a key.
    """

    weights: torch.Tensor
    pool: tuple[int, int]
    scores: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"TokenWeights({list(self.weights.shape)}, pool {self.pool})"


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What :func:`trace` keeps, on the CPU in float32. L layers traced, H heads, G key/value heads, S tokens, N nodes.

    Attributes
    ----------
    prompt : CompiledPrompt
        What was run.
    layers : tuple of int
        Which layers of the model the first dimension stands for, ascending.
    mass : Tensor
        ``[L, H, N, N]``. Entry (i, j): the attention that a token of node i gives to all tokens of node j together, as the
        mean over the tokens of i. Rows sum to 1; to less in a model with learned sinks (gpt_oss), which take the rest.
    first_tokens : Tensor
        ``[L, H, N]``. The attention that the first token of each node gets, as the mean over the *other* tokens that see it
        in that layer (windows included); nan if none does. First tokens are where attention goes that has nowhere to go.
    hidden_norms : Tensor
        ``[L, S]``. Euclidean norm of each token's hidden state at the input of the layer.
    key_norms, value_norms : Tensor
        ``[L, G, S]``. Norms of keys (after RoPE) and values.
    mean_key_norms, mean_value_norms : Tensor
        ``[L, S]``. Norms of the mean over the heads of keys and of values, where :attr:`key_norms` are norms by head.
    tokens : mapping of (str, str) to TokenWeights
        The pairs of nodes asked for, by name: query, key.
    scores : Tensor or None
        With ``scores=True`` and no pair: ``[L, H, Q, K]``, the scores of all tokens before the softmax, as in
        :class:`TokenWeights`.
    backend, model, dtype : str
        What ran.
    """

    prompt: CompiledPrompt
    layers: tuple[int, ...]
    mass: torch.Tensor
    first_tokens: torch.Tensor
    hidden_norms: torch.Tensor
    key_norms: torch.Tensor
    value_norms: torch.Tensor
    mean_key_norms: torch.Tensor
    mean_value_norms: torch.Tensor
    tokens: Mapping[tuple[str, str], TokenWeights]
    backend: str
    model: str
    dtype: str
    scores: torch.Tensor | None = None

    @property
    def roots(self) -> tuple[str, ...]:
        """Names of the nodes that see no other, such as BOS: their first token sees itself alone. R of them."""
        names = list(self.prompt.graph.names.values())
        return tuple(names[i] for i in self._roots)

    @property
    def sinks(self) -> torch.Tensor:
        """``[L, H, R]``: :attr:`first_tokens` of the :attr:`roots`."""
        return self.first_tokens[..., self._roots]

    @property
    def _roots(self) -> list[int]:
        return [i for i, runs in enumerate(self.prompt.visible.runs) if not runs]

    def __repr__(self) -> str:
        layers, heads, nodes, _ = self.mass.shape
        return f"Trace({layers} layers, {heads} heads, {nodes} nodes, {len(self.prompt)} tokens, backend {self.backend!r})"


def trace(
    model: Any,
    prompt: CompiledPrompt,
    *,
    layers: Layers | None = None,
    tokens: NodePair | Sequence[NodePair] = (),
    scores: bool = False,
    operations: Sequence[Operation] = (),
    backend: str | Backend = "auto",
    tile_bytes: int = TILE_BYTES,
) -> Trace:
    """Run a prompt once and keep node-level statistics of attention, hidden states, keys and values.

    Attention weights are recomputed from queries and keys in tiles of queries, on whichever backend runs: there is never
    anything of size H × S × S. Long prompts take time in proportion to the pairs of tokens. What is kept grows with the pairs
    of nodes, L × H × N × N numbers, and is asked room for before anything runs.

    Parameters
    ----------
    prompt
        One compiled prompt. To look at what was generated, too, make it a node:
        ``trace(model, result.prompt.continued(result.token_ids, "answer"))``.
    layers
        Which to keep; all of them for None. The way to trace many nodes in parts.
    tokens
        A pair of nodes (query, key), or several, whose weights are kept token by token.
    scores
        Keep what the softmax is taken of, too: scaled, soft-capped and changed by operations as it is in the model. Of the
        pairs in ``tokens``, or of the whole prompt where there are none; then ``layers`` says of which.
    operations
        Run under :func:`leattn.interventions.intervene` with these, and see what they do; also where such a block is already
        open around the call. A layer of ``SkipAttention`` shows the attention that is thrown away.
    backend
        As in :func:`leattn.attend`; with operations ``"eager"`` or ``"sdpa"``.
    tile_bytes
        Size of the largest tensor of weights; a few of them exist at a time.

    Raises
    ------
    LeattnError
        A layer or node that does not exist, a pair of which the first does not see the second, several prompts, more to keep
        than there is memory for.
    BackendError
        A model that does not use transformers' attention interface, or that no backend serves.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> fact = leattn.ICLNode("\\nThe capital of Zarvia is Lumo.", [bos], id="fact")
    >>> question = leattn.ICLNode("\\nQ: What is the capital of Zarvia?\\nA:", [bos, fact], id="Q")
    >>> result = leattn.generate(model, leattn.compile_prompt(question, tokenizer), max_new_tokens=1)
    >>> seen = trace(model, result.prompt.continued(result.token_ids, "answer"), tokens=("answer", "fact"))
    >>> seen.mass.shape[-2:], seen.roots == (seen.prompt.graph.name(bos),)
    (torch.Size([4, 4]), True)
    >>> bool((seen.mass.sum(-1) - 1).abs().max() < 1e-5), seen.tokens["answer", "fact"].pool
    (True, (1, 1))
    """
    if not isinstance(prompt, CompiledPrompt):
        raise LeattnError(f"trace looks at one compiled prompt, not at {type(prompt).__name__}; call it for each prompt")
    if isinstance(tile_bytes, bool) or not isinstance(tile_bytes, int) or tile_bytes < 1:
        raise LeattnError(f"tile_bytes is a number of bytes of at least 1, not {tile_bytes!r}; leave it out for {TILE_BYTES}")
    record = Model.of(model)
    base = record.base
    kept = sorted(checked_layers("trace", layers, base.config.num_hidden_layers))
    if not kept:
        raise LeattnError("layers=[] keeps nothing; leave it out for all layers")
    pairs = _pairs(prompt, tokens)
    everything = Pair(range(len(prompt)), range(len(prompt)))
    scored = (list(pairs.values()) or [everything]) if scores else []
    _footprint(base, prompt, kept, [*pairs.values(), *scored]).check(record.device)
    tracer = Tracer(prompt, kept, list(pairs.values()), scored, tile_bytes)
    with torch.no_grad(), watched(model, record, prompt, operations, backend, tracer) as attention:
        # Not the model itself: logits of a long prompt over a large vocabulary are the largest tensor of all.
        base(**attention.inputs, use_cache=False)
    missing = sorted(tracer.mass.missing | tracer.hidden.missing)
    if missing:
        raise BackendError(f"layers {missing} of {record.facts.family} ran no attention that trace could see; leave them out")
    raw = [rows.whole for rows in tracer.scores]
    of_pairs = raw if pairs and scores else [None] * len(pairs)
    return Trace(
        prompt=prompt,
        layers=tuple(kept),
        mass=tracer.mass.whole,
        first_tokens=tracer.first_tokens.whole,
        hidden_norms=tracer.hidden.whole,
        key_norms=tracer.keys.whole,
        value_norms=tracer.values.whole,
        mean_key_norms=tracer.mean_keys.whole,
        mean_value_norms=tracer.mean_values.whole,
        tokens={
            name: TokenWeights(rows.whole, pair.pool, of_pair)
            for (name, pair), rows, of_pair in zip(pairs.items(), tracer.tokens, of_pairs, strict=True)
        },
        scores=raw[0] if scores and not pairs else None,
        backend=attention.backend.name,
        model="/".join(PurePath(str(base.config.name_or_path)).parts[-2:]) or type(model).__name__,
        dtype=str(base.dtype).removeprefix("torch."),
    )


def _footprint(base: Any, prompt: CompiledPrompt, layers: Sequence[int], pairs: Sequence[Pair]) -> Footprint:
    """What a trace takes; heads as the configuration says, the most where layers differ."""
    heads = getattr(base.config, "num_attention_heads", 1)
    most = max(heads) if isinstance(heads, Sequence) else int(heads)
    item = 8 if base.dtype == torch.float64 else 4
    return Footprint.of(len(layers), most, len(prompt.graph), len(prompt), pairs, item)


def _pairs(prompt: CompiledPrompt, tokens: NodePair | Sequence[NodePair]) -> dict[tuple[str, str], Pair]:
    """Spans of the pairs of nodes, by name."""
    several = [tokens] if len(tokens) == 2 and all(isinstance(node, (ICLNode, str)) for node in tokens) else list(tokens)
    found = {}
    for pair in several:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise LeattnError(f"tokens is a pair of nodes (query, key) or a list of pairs, not {tokens!r}")
        query, key = (prompt.graph[node] for node in cast(NodePair, pair))
        names = prompt.graph.name(query), prompt.graph.name(key)
        if query is not key and key not in prompt.sees(query):
            raise LeattnError(f"{names[0]!r} does not see {names[1]!r}, so there is no attention between them")
        found[names] = Pair(range(*prompt.spans[query]), range(*prompt.spans[key]))
    return found
