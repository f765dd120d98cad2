"""Refusing token ids and positions that a model does not have, before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from leattn.errors import BackendError, LeattnWarning
from leattn.model.facts import Facts
from leattn.prompt.compile import CompiledPrompt


@dataclass(frozen=True)
class Limits:
    """How far token ids and positions of a model reach; it can travel to another process without the model."""

    facts: Facts
    vocabulary: int

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
        """Refuse positions past a learned table or a length-dependent RoPE's limit; warn past what RoPE was trained for."""
        for prompt in prompts:
            last = max(int(prompt.position_ids.max()), int(prompt.position_ids[0, -1]) + new_tokens)
            which = f"the last position is {last}" + (f" with {new_tokens} new tokens" if new_tokens else "")
            self.check_last_position(last, which)

    def check_last_position(self, last: int, which: str) -> None:
        """The same for the last position of whatever ``which`` says."""
        facts = self.facts
        if facts.position_limit is not None and last >= facts.position_limit:
            raise BackendError(
                f"{which}, but {facts.family} has a table of {facts.position_limit} positions; "
                "use fewer or shorter nodes, or let siblings share positions (positions='after_parents')"
            )
        if facts.rope_limit is not None and last >= facts.rope_limit:
            raise BackendError(
                f"{which}, but past {facts.rope_limit} this model's rotary angles depend on the length of the whole input, so "
                "unrelated nodes would change each other; keep positions below it, or load the model without that RoPE scaling"
            )
        if facts.trained_length is not None and last >= facts.trained_length:
            warnings.warn(f"{which}; {facts.family} was trained for {facts.trained_length}", LeattnWarning, stacklevel=5)
