"""Whether a prompt gives a model the first token that it needs; one warning per model if not.

Most language models put much of their attention on the first token of a text, whatever it is (Xiao et al., arXiv 2309.17453):
a sink. A node that sees nothing begins with such a token; a node that sees none of them has no sink, and one that sees several
has more than any plain text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leattn.attention.backends import refusal
from leattn.attention.block import Block
from leattn.attention.dense import EAGER
from leattn.attention.follow import follow
from leattn.attention.request import LayerAttention, Request
from leattn.attention.sample import probing, raise_if_not_the_models
from leattn.attention.verdicts import verdicts
from leattn.dag.node import ICLNode
from leattn.errors import BackendError, LeattnWarning
from leattn.model.record import Model, variant
from leattn.prompt.columns import columns_of
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.visible import Visible

SINK = 0.3
"""The share of attention on the first token from which it counts as a sink, as in Gu et al., arXiv 2410.10781."""
TEXTS, LENGTH = 4, 24
"""How many random texts are looked at, and their tokens. Looked at are the rows of their second half."""


def warn_of_roots(model: Any, record: Model, prompts: Sequence[CompiledPrompt]) -> None:
    """Warn, once per model, of prompts in which a node sees no first token, or several, if that matters to the model.

    What edits took away (``without_edge``, ``without_node``) was meant to be missing.
    """
    for prompt in prompts:
        if variant(model) in record.rooted:
            return
        nodes = prompt.graph.nodes
        parents = np.fromiter((len(node.parents) for node in nodes), np.int64, len(nodes))
        warn_of(model, record, prompt.visible, parents, lambda i, prompt=prompt: prompt.graph.names[prompt.graph.nodes[i]])  # type: ignore[misc]


def warn_of(model: Any, record: Model, visible: Visible, parents: npt.NDArray[np.int64], name: Callable[[int], str]) -> None:
    """The same of nodes of which each was meant to see so many others, ``parents`` ``[N]``."""
    which = variant(model)
    with record.lock:
        if which in record.rooted:
            return
        i = _astray(visible, parents)
        if i is None:
            return
        record.rooted.add(which)
        share = _share(model, record)
    if share is None or share < SINK:
        return
    roots = [repr(name(j)) for j in visible.nodes_seen(i) if not parents[j]]
    if roots:
        listed = ", ".join(roots[:4]) + (", …" if len(roots) > 4 else "")
        what = f"sees {len(roots)} nodes that see nothing ({listed})"
        so = "each of them has one of its own, more than any plain text has, so that answers may be wrong or end at once"
    else:
        first = i
        while visible.runs[first]:
            first = visible.runs[first][0][0]
        what = f"does not see {name(first)!r}, with which what it sees begins"
        so = "a node without it in sight often goes wrong"
    warnings.warn(
        f"node {name(i)!r} {what}. In one of its layers this model puts {share:.0%} of its attention on the first token of a "
        f"text: {so}. Let every node see one first node, and no other that sees nothing: root= in the builders, 'root' in a "
        "prompt file, or parents=[root, …] with root = leattn.bos(tokenizer) (said once per model; docs/roots.md)",
        LeattnWarning,
        stacklevel=5,
    )


def _astray(visible: Visible, parents: npt.NDArray[np.int64]) -> int | None:
    """The first node that sees something, all of what it was meant to see, but not exactly one node that sees nothing."""
    node, start, stop = visible.flat()
    before = np.concatenate([[0], np.cumsum(parents == 0)])
    seen = np.bincount(node, stop - start, minlength=len(parents))
    roots = np.bincount(node, before[stop] - before[start], minlength=len(parents))
    found = np.flatnonzero((parents > 0) & (seen >= parents) & (roots != 1))
    return int(found[0]) if len(found) else None


def _share(model: Any, record: Model) -> float | None:
    """How much attention the first token of a text gets in the layer where it gets most; None if that cannot be told."""
    kept = verdicts(model, record)
    share: float | None = kept["first token"]
    if share is None:
        share = _measured(model, record)
        if share is not None:
            kept["first token"] = share
    return share


def _measured(model: Any, record: Model) -> float | None:
    """One forward of a few random texts; without ``output_attentions``, which leaves hooks of transformers on a model."""
    if refusal(EAGER, record) is not None:
        return None
    shares: list[float] = []

    def watched(request: Request) -> LayerAttention:
        eager = EAGER.attention(request)

        def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, weights = eager(*args, **kwargs)
            if weights is not None:  # [B, H, Q, K]
                shares.append(float(weights[:, :, LENGTH // 2 :, 0].float().mean()))
            return output, weights

        return attention

    # As for the probe: the first few ids are often specials.
    low = min(3, record.facts.vocabulary - 1)
    ids = torch.randint(low, record.facts.vocabulary, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    columns = columns_of([compile_prompt(ICLNode(text)) for text in ids], record.device)
    try:
        with probing(model, record), follow(Block(record, model, columns, [replace(EAGER, attention=watched)])) as block:
            record.base(**block.inputs, use_cache=False)
    except BackendError:  # it cannot run so, or another thread has it on another implementation
        return None
    except Exception as error:
        raise_if_not_the_models(error)
        return None
    return max(shares, default=None)
