"""CacheBlend and EPIC: documents computed alone, and a share of their tokens computed again, seeing everything before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from leattn.attention.attend import attend
from leattn.dag.builders import Content
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError, choices
from leattn.methods.numbered import numbered
from leattn.methods.parts import header_of, listed_documents, tokens_of
from leattn.methods.plain import plain
from leattn.model.cache import Arena
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Choice: TypeAlias = Literal["first", "keys"]


def recompute(
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    share: float = 0.15,
    choose: Choice = "first",
    model: Any = None,
    layer: int = 1,
) -> CompiledPrompt:
    """Parallel documents one after another, of which a share of tokens is computed again, seeing everything before.

    A document is cut where chosen tokens begin and end. A piece that is computed again is there twice at one place: alone,
    which the later pieces of its document were computed with, and again (``… again``), seeing the header and what earlier
    documents and earlier pieces finally are. The question sees what everything finally is: pieces computed again, and the
    others as they were. With ``share=0`` this is :func:`leattn.methods.numbered`, with ``share=1`` plain text. The first
    document is what it is in plain text already, so none of its tokens is chosen. Needs a header.

    Parameters
    ----------
    header, documents, question, tokenizer
        As for every method.
    share
        Of the tokens of the documents after the first, from 0 to 1; rounded up. 0.15 is CacheBlend's (Yao et al., arXiv
        2405.16444); EPIC's LegoLink (Hu et al., arXiv 2410.15332) takes up to 32 tokens of each document.
    choose
        ``"first"``: the first tokens of each document, as EPIC does. ``"keys"``: those of all documents together whose keys and
        values differ most, as squared distance, from those in plain text in one early layer (CacheBlend's KV deviation; its
        code compares values alone, and makes the choice anew while it runs). It takes two whole forwards to find out, so here
        it says what a share is worth, and saves nothing.
    model, layer
        For ``"keys"``: the model, and the layer to compare, from 0. Keys of layer 0 know nothing of what is seen; 1 is
        published.

    Raises
    ------
    LeattnError
        A share outside of 0 to 1, an unknown choice, a layer without keys, or no model for ``"keys"``.

    Examples
    --------
    >>> print(recompute([1], [[2, 3], [4, 5, 6, 7]], [8, 9], share=0.25))
    6 nodes, 10 tokens, density 0.75
      0  header              tokens 0:1   positions 0:1  ■⬚⬚⬚⬚⬚
      1  document 1          tokens 1:3   positions 1:3  ■■⬚⬚⬚⬚
      2  document 2.1        tokens 3:4   positions 3:4  ■⬚■⬚⬚⬚
      3  document 2.1 again  tokens 4:5   positions 3:4  ■■⬚■⬚⬚
      4  document 2.2        tokens 5:8   positions 4:7  ■⬚■⬚■⬚
      5  question            tokens 8:10  positions 7:9  ■■⬚■■■
    """
    check_choice(choose, model)
    parts = Parts.of(header, documents, question, tokenizer)
    far = parts.deviations(model, layer) if choose == "keys" else None
    return parts.prompt(parts.chosen(share, far))


def check_choice(choose: str, model: Any) -> None:
    """Refuse an unknown choice, and one that takes a model where there is none."""
    if choose not in ("first", "keys"):
        raise LeattnError(choices("choose", choose, ("first", "keys")))
    if choose == "keys" and model is None:
        raise LeattnError("choose='keys' compares keys and values of a model; give model=, or take choose='first'")


@dataclass(frozen=True)
class Parts:
    """Header, documents and question as token ids, and what becomes of them when some tokens are chosen."""

    header: ICLNode
    place: int
    documents: list[list[int]]
    question: list[int]
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def of(
        cls,
        header: Content | None,
        documents: Iterable[Content],
        question: Content,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Parts:
        """Tokenized, each by itself; raises as every method does."""
        (first,) = header_of(header, tokenizer, "recompute")
        listed = listed_documents(documents)
        ids = [tokens_of(document, tokenizer, f"document {i}", is_document=True) for i, document in enumerate(listed, 1)]
        return cls(first, len(first.tokenize(tokenizer)), ids, tokens_of(question, tokenizer, "question"), tokenizer)

    def chosen(self, share: float, far: Sequence[Tensor] | None = None) -> list[list[bool]]:
        """Which tokens of each document are computed again; by ``far``, ``[n]`` of each, or the first ones."""
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise LeattnError(f"share={share!r} of the tokens; give a number from 0 to 1")
        first, *later = (len(ids) for ids in self.documents)
        none = [False] * first
        if far is None:
            return [none, *([i < _part(share, n) for i in range(n)] for n in later)]
        flat = torch.cat([torch.zeros(0), *far[1:]])
        taken = torch.zeros(len(flat), dtype=torch.bool)
        taken[flat.argsort(descending=True, stable=True)[: _part(share, len(flat))]] = True
        return [none, *(of.tolist() for of in torch.split(taken, later))]

    def prompt(self, chosen: Sequence[Sequence[bool]]) -> CompiledPrompt:
        """The graph in which these tokens are computed again."""
        place = self.place
        final = [self.header]
        for i, (ids, again) in enumerate(zip(self.documents, chosen, strict=True), 1):
            alone = [self.header]
            runs = [(taken, len(list(run))) for taken, run in groupby(again)]
            start = 0
            for j, (taken, length) in enumerate(runs, 1):
                stop = start + length
                name = f"document {i}.{j}" if len(runs) > 1 else f"document {i}"
                if not taken or j < len(runs):  # the last piece has nothing behind it that was computed with it alone
                    alone.append(ICLNode(ids[start:stop], alone, name, start_pos_id=place + start))
                again_node = ICLNode(ids[start:stop], final, f"{name} again", start_pos_id=place + start) if taken else None
                final.append(again_node or alone[-1])
                start = stop
            place += len(ids)
        return compile_prompt(ICLNode(self.question, final, "question", start_pos_id=place), self.tokenizer)

    @torch.no_grad()
    def deviations(self, model: Any, layer: int) -> list[Tensor]:
        """How far keys and values of each document's tokens are from those in plain text, squared, ``[n]`` float64 each."""
        given = (self.header.content, self.documents, self.question, self.tokenizer)
        alone, whole = (_keys_and_values(model, method(*given), layer) for method in (numbered, plain))
        keys, values = ((a - b).square().sum((0, 2)) for a, b in zip(alone, whole, strict=True))  # [S] each
        lengths = [self.place, *map(len, self.documents), len(self.question)]
        return list(torch.split(keys + values, lengths)[1:-1])


def _part(share: float, of: int) -> int:
    return math.ceil(round(share * of, 9))


def _keys_and_values(model: Any, prompt: CompiledPrompt, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, each ``[G, S, D]`` in float64 on the CPU."""
    cache = Arena(len(prompt))
    with attend(model, prompt) as attention:
        attention.record.run(model, attention.inputs["input_ids"], [len(prompt) - 1], past_key_values=cache, use_cache=True)
    held = cache.layers[layer] if isinstance(layer, int) and 0 <= layer < len(cache.layers) else None
    if held is None or held.keys is None:
        raise LeattnError(
            f"layer={layer!r} has no keys to compare; this model keeps some in layers 0 to {len(cache.layers) - 1}"
        )
    return held.keys[0].double().cpu(), held.values[0].double().cpu()
