"""How the next token of a branch is chosen: transformers' own configuration and logits processors, one set per branch.

A branch's draws come from a generator of its own, seeded by the run's seed and the branch's name, so that what its neighbours
do never changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from leattn.generation.branch import Branch, Decode
from leattn.generation.options import Options


class Sampling:
    """The caller's options for a whole run, and what each branch makes of them. ``stop`` are its ``stop_strings``.

    Raises
    ------
    LeattnError
        An option that nobody knows, or one that is about a single sequence: beams, return sequences, assistants.
    """

    def __init__(self, model: Any, options: Mapping[str, Any], device: torch.device, *, logprobs: bool = False) -> None:
        self.model, self.device, self.given, self.logprobs = model, device, dict(options), logprobs
        self.criteria = list(self.given.get("stopping_criteria") or [])
        self._options: dict[str, Options] = {}
        self.stop = self.options({}).stop

    def options(self, own: Mapping[str, Any]) -> Options:
        """The options of a branch: the model's, then the caller's, then its own."""
        key = json.dumps(dict(own), sort_keys=True, default=repr)
        if key not in self._options:
            self._options[key] = Options(self.model, {**self.given, **own}, "a program")
        return self._options[key]

    def branch(
        self, name: str, own: Mapping[str, Any], seen: list[int], *, limit: int, stop: Sequence[str], decode: Decode, seed: int
    ) -> Branch:
        """A branch that starts now; ``own`` are its own options, ``seen`` the ids that processors see in front of it."""
        options, ids = self.options(own), torch.tensor([seen], dtype=torch.long, device=self.device)
        return Branch(
            name,
            limit=limit,
            ends=frozenset(options.ends),
            stop=stop,
            decode=decode,
            seen=ids,
            processors=options.processors(ids, limit),
            criteria=self.criteria,
            do_sample=bool(options.config.do_sample),
            seed=branch_seed(seed, name),
            logprobs=self.logprobs,
        )

    def limit(self, own: Mapping[str, Any], prompt_length: int) -> int:
        """How many tokens a branch may get at most, as transformers counts: 20 if nothing says otherwise."""
        return self.options(own).new_tokens(prompt_length)


def branch_seed(seed: int, name: str) -> int:
    """A seed of 63 bits for the branch ``name`` of a run with ``seed``."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


Streamer = Callable[[str, str], None]
