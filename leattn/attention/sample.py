"""What all probes share: a small graph on which much can be told, a model held still, exceptions as reasons."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from leattn.attention.verdicts import KNOWN_CODE
from leattn.dag.node import ICLNode, Position
from leattn.model.facts import Facts
from leattn.model.record import Model
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

LENGTHS = {"root": 4, "left": 5, "right": 3, "other": 2, "child": 4, "tail": 3}
"""Tokens of the nodes of :func:`sample`."""
PLAIN = ("root", "left", "child", "tail")
"""Those that stand one after the other in it."""


def sample_tokens(facts: Facts) -> dict[str, list[int]]:
    """Random tokens for the nodes of :func:`sample`; more of them where the config speaks of something that begins later.

    But no more than half of the positions that there are: the other half is for trying it further on.
    """
    limits = [limit for limit in (facts.position_limit, facts.rope_limit, facts.trained_length) if limit is not None]
    longest = sum(LENGTHS[name] for name in PLAIN)
    times = max(1, min(1 + facts.threshold // LENGTHS["left"], min(limits, default=2**31) // (2 * longest)))
    generator = torch.Generator().manual_seed(0)
    # Token 0 and its neighbours are specials of many families, padding for one, which some leave out.
    low = min(3, facts.vocabulary - 1)
    return {
        name: torch.randint(low, facts.vocabulary, (n * times,), generator=generator).tolist() for name, n in LENGTHS.items()
    }


def sample(
    tokens: Mapping[str, Sequence[int]], *, start: Position = 0, swap: bool = False, only: str | None = None
) -> CompiledPrompt:
    """A graph on which much can be told of a model, or one of its nodes with its ancestors.

    A root, two siblings and a node that nobody sees, which see it; a child of the first three; and a node that sees the child
    alone. Everyone's position is relative to the root's, which is ``start``.
    """
    nodes = {"root": ICLNode(tokens["root"], id="root", start_pos_id=start)}
    siblings = ("right", "left") if swap else ("left", "right")
    parents = {name: ["root"] for name in (*siblings, "other")} | {"child": ["root", "left", "right"], "tail": ["child"]}
    for name, seen in parents.items():
        nodes[name] = ICLNode(tokens[name], [nodes[parent] for parent in seen], id=name)
    return compile_prompt([nodes["tail"], nodes["other"]] if only is None else nodes[only])


@contextmanager
def probing(model: Any, record: Model) -> Iterator[None]:
    """Inside the block a model is in evaluation mode, without gradients, autocast or compilation; afterwards as it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Uncompiled: the question is what the model does, not what torch's compiler makes of it. Torch warns that it is slow.
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            torch.autocast(record.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            yield
    finally:
        for module in was_training:
            module.training = True


def raise_if_not_the_models(error: Exception) -> None:
    """Let pass what says nothing of the model: no memory left, or an exception of the user's own, who stops a forward by it."""
    module = type(error).__module__
    home, file = module.partition(".")[0], str(getattr(sys.modules.get(module), "__file__", ""))
    is_known = home in {*sys.stdlib_module_names, *KNOWN_CODE} or "-packages" in file
    if isinstance(error, torch.OutOfMemoryError) or not is_known:
        raise error


def in_words(error: Exception) -> str:
    """An exception of a family's code as part of a sentence."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
