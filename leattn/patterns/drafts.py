"""A ``GenNode`` as the description of several drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from leattn.dag.gennode import GenNode, copied
from leattn.errors import LeattnError
from leattn.generation.result import Generation


def check_written(node: object, what: str) -> None:
    """Refuse what the model does not write."""
    if not isinstance(node, GenNode):
        raise LeattnError(
            f"{what} is written by the model: give a GenNode(header, parents, max_new_tokens=…), not a {type(node).__name__}"
        )


def sampled(draft: GenNode, n: int, options: Mapping[str, Any]) -> list[GenNode]:
    """``draft`` ``n`` times side by side, to be written by sampling; ``options`` are those of the run.

    Raises
    ------
    LeattnError
        Not a ``GenNode``; ``n`` below 1; several drafts without sampling, which would all be the same.
    """
    check_written(draft, "the draft")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise LeattnError(f"n={n!r} drafts; give a whole number from 1 up")
    do_sample = draft.sampling.get("do_sample", options.get("do_sample", True))
    if n > 1 and not do_sample:
        raise LeattnError(f"do_sample={do_sample!r} would write the same draft {n} times; leave it out")
    name = draft.id or "draft"
    return [copied(draft, draft.parents, f"{name} {i}", do_sample=do_sample) for i in range(1, n + 1)]


def texts_of(drafts: Iterable[GenNode], generation: Generation) -> dict[str, str]:
    """What the drafts say, by name: without other nodes that were written, and, after an interrupt, what had not begun."""
    return {str(node.id): generation.texts[str(node.id)] for node in drafts if node.id in generation.branches}
