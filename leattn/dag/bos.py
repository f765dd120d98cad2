"""The begin-of-sequence token as a node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from leattn.dag.node import ICLNode
from leattn.errors import CompileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bos(tokenizer: PreTrainedTokenizerBase) -> ICLNode:
    """The begin-of-sequence node of a tokenizer: one token, no parents.

    No other node gets a BOS token, so a prompt that wants one names it.

    Raises
    ------
    CompileError
        The tokenizer has no BOS token (Qwen, for one): such prompts start without it.
    """
    if tokenizer.bos_token_id is None:
        raise CompileError(
            f"{type(tokenizer).__name__} has no BOS token; models that come with it start without one, so leave the node out"
        )
    return _BosNode([tokenizer.bos_token_id], token=str(tokenizer.bos_token))


class _BosNode(ICLNode):
    """A node of one token id that graphs call by the token's own text."""

    token: str

    def __init__(self, content: Iterable[int], *, token: str) -> None:
        object.__setattr__(self, "token", token)
        super().__init__(content)

    @property
    def default_name(self) -> str:
        return self.token
