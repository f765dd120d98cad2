"""The dial between parallel documents and plain text: how much is computed again, and how far the result is from plain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leattn.analysis.targets import last_logits
from leattn.attention.request import Backend
from leattn.dag.builders import Content
from leattn.methods.plain import plain
from leattn.methods.recompute import Choice, Parts, check_choice
from leattn.prompt.compiled import CompiledPrompt
from leattn.table import html_table, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = ("share", "tokens again", "logits", "KL")


@dataclass(frozen=True)
class DialRow:
    """One share.

    Attributes
    ----------
    share
        As asked for.
    again
        How many tokens were computed again.
    documents
        How many tokens the documents have.
    logits
        The largest difference to plain text among the last token's logits.
    kl
        The divergence of the next token's distribution from that of plain text, KL(plain ‖ this), in nats.
    """

    share: float
    again: int
    documents: int
    logits: float
    kl: float


@dataclass(frozen=True)
class Dial:
    """What :func:`dial` measured: ``rows``, one :class:`DialRow` per share. Prints as a table."""

    rows: tuple[DialRow, ...]

    def _cells(self) -> list[list[str]]:
        return [
            [f"{row.share:.2f}", f"{row.again} of {row.documents}", f"{row.logits:.3f}", f"{abs(row.kl):.4f}"]
            for row in self.rows
        ]

    def __str__(self) -> str:
        return text_table(_HEAD, self._cells())

    def _repr_html_(self) -> str:
        return html_table(_HEAD, self._cells())


def dial(
    model: Any,
    header: Content | None,
    documents: Iterable[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    shares: Sequence[float] = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0),
    choose: Choice = "first",
    layer: int = 1,
    backend: str | Backend = "auto",
) -> Dial:
    """Compute a growing share of the documents again (:func:`leattn.methods.recompute`), and compare with plain text.

    Parameters
    ----------
    model, header, documents, question, tokenizer, choose, layer
        As for ``recompute``.
    shares
        One forward each, beside that of plain text (and two more for ``choose="keys"``).
    backend
        As for :func:`leattn.forward`.

    Raises
    ------
    LeattnError
        As ``recompute`` does.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> texts = ["\\nThe capital of Genia is Pardan.", "\\nThe capital of Zarvia is Lumo."]
    >>> ask = "\\nQ: What is the capital of Zarvia?\\nA:"
    >>> measured = dial(model, None, texts, ask, tokenizer, shares=[0, 0.5, 1])
    >>> [row.again for row in measured.rows], measured.rows[-1].logits < 1e-4
    ([0, 4, 8], True)
    """
    check_choice(choose, model)
    listed = list(documents)
    parts = Parts.of(header, listed, question, tokenizer)
    picks = parts.deviations(model, layer) if choose == "keys" else None
    chosen = [parts.chosen(share, picks) for share in shares]
    expected = _last(model, plain(header, listed, question, tokenizer), backend)
    total = sum(map(len, parts.documents))
    rows = []
    for share, taken in zip(shares, chosen, strict=True):
        found = _last(model, parts.prompt(taken), backend)
        logs, others = expected.log_softmax(-1), found.log_softmax(-1)
        divergence = float((logs.exp() * (logs - others)).sum())
        rows.append(DialRow(float(share), sum(map(sum, taken)), total, float((found - expected).abs().max()), divergence))
    return Dial(tuple(rows))


def _last(model: Any, prompt: CompiledPrompt, backend: str | Backend) -> Tensor:
    """The last token's logits, ``[V]`` in float64 on the CPU."""
    (logits,) = last_logits(model, [prompt], 1, [], backend=backend)
    return logits[0].double().cpu()
