"""One text that is being written: how its tokens are chosen, when it ends, and what of it can be shown already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Decode = Callable[[Sequence[int]], str]


class Branch:
    """A text that is being written, and how its next tokens are chosen.

    Its draws come from a generator of its own, so that what its neighbours do never changes them.

    Parameters
    ----------
    limit
        How many tokens it gets at most.
    ends
        The ids that end it.
    stop
        The strings that end it.
    seen
        ``[1, n]``, the ids that logits processors see in front of its own.
    processors
        What changes scores ``[1, V]`` before a choice.
    logprobs
        Whether to keep how likely each token was, before anything changed the scores.
    criteria
        The caller's stopping criteria.

    Attributes
    ----------
    ids : list of int
        What was written and stands: no EOS, nothing of a matched stop string.
    text : str
        The ids decoded; up to the stop string, of which the first characters may share a token with it.
    finished : bool
    """

    def __init__(
        self,
        name: str,
        *,
        limit: int,
        ends: frozenset[int],
        stop: Sequence[str],
        decode: Decode,
        seen: Tensor,
        processors: Any,
        criteria: Sequence[Any],
        do_sample: bool,
        seed: int,
        logprobs: bool = False,
    ) -> None:
        self.name = name
        self.ids: list[int] = []
        self._logprobs: list[float] | None = [] if logprobs else None
        self.text = ""
        self.finished = limit == 0
        self._limit, self._ends, self._stop, self._decode = limit, ends, tuple(stop), decode
        self._seen, self._processors, self._criteria, self._do_sample = seen, processors, criteria, do_sample
        self._generator = torch.Generator(seen.device).manual_seed(seed)
        self._shown = 0

    def choose(self, logits: Tensor, likeliest: int | None = None) -> None:
        """Go on with a token chosen from logits ``[V]``; ``likeliest`` is the largest one's, where it is known."""
        if likeliest is not None and not (self._do_sample or self._processors or self._criteria):
            self._keep(logits, likeliest)
            self.accept(likeliest)
            return
        scores = self._processors(self._seen, logits[None].to(torch.float32, copy=True))
        if self._do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self._seen = torch.cat([self._seen, token], 1)
        self._keep(logits, int(token))
        self.accept(int(token))
        if not self.finished and any(bool(torch.as_tensor(stops(self._seen, scores)).any()) for stops in self._criteria):
            self.finish()

    def accept(self, token: int) -> None:
        """The next token was chosen."""
        if token in self._ends:
            self.finish()
            return
        self.ids.append(token)
        if self._stop and self._stopped():
            return
        if len(self.ids) == self._limit:
            self.finish()

    @property
    def logprobs(self) -> Tensor | None:
        """Of the ids that stand, in nats, float64 ``[n]``; None if they were not asked for."""
        return None if self._logprobs is None else torch.tensor(self._logprobs[: len(self.ids)], dtype=torch.float64)

    def _keep(self, logits: Tensor, token: int) -> None:
        if self._logprobs is not None:
            self._logprobs.append(float(logits.float().log_softmax(-1)[token]))

    def finish(self) -> None:
        """Nothing more is written."""
        self.text = self._decode(self.ids)
        self.finished = True

    def _stopped(self) -> bool:
        # A stop string ends in what the last few tokens decode to: a character takes four tokens at most.
        longest = max(map(len, self._stop))
        if not any(stop in self._decode(self.ids[-4 * longest - 4 :]) for stop in self._stop):
            return False
        text = self._decode(self.ids)
        self.text, kept = cut_at_stop(self.ids, text, self._stop, self._decode)
        self.finished = len(self.text) < len(text)
        if self.finished:
            del self.ids[kept:]
        return self.finished

    def new_text(self) -> str:
        """What can be shown since last time: whole characters, and nothing that may yet turn out to be a stop string."""
        text = self.text if self.finished else self._decode(self.ids)
        if not self.finished:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - _pending(text, self._stop)]
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece


def cut_at_stop(ids: Sequence[int], text: str, stop: Sequence[str], decode: Decode) -> tuple[str, int]:
    """``text`` before the first stop string in it, and how many of ``ids`` end before that: all of both if there is none."""
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    if not found:
        return text, len(ids)
    at, kept = min(found), len(ids)
    while kept and len(decode(ids[:kept])) > at:
        kept -= 1
    return text[:at], kept


def _pending(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of ``text`` could be the beginning of a stop string."""
    longest = max(map(len, stop), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in stop):
            return length
    return 0


def decoder(tokenizer: object) -> Decode:
    """Ids to text with this tokenizer; the ids in brackets without one."""
    if tokenizer is None:
        return lambda ids: str(list(ids))
    return lambda ids: str(tokenizer.decode(torch.tensor(list(ids), dtype=torch.long), clean_up_tokenization_spaces=False))  # type: ignore[attr-defined]
