"""The columns eager, sdpa, flex and sparse: one forward over graphs of several kinds, on one backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import leattn
from families.build import Builder
from families.oracle import Oracle, difference
from families.outcome import Outcome, judged
from families.prompts import Chunk, Graph, chain, changed, compiled, everyone, fan, long_fan, reordered

BACKENDS = ("eager", "sdpa", "flex", "sparse")
SHORT, LONG = (5, 1, 17, 19), (40, 3, 50, 37)


def rows_of(model: Any, graph: Graph, backend: str, visibility: str = "parents") -> dict[str, Tensor]:
    """leattn's logits of every node, ``[n, V]``."""
    prompt = compiled(graph, visibility)
    with torch.no_grad():
        logits = leattn.forward(model, prompt, backend=backend, use_cache=False).logits[0]
    return {chunk.name: logits[slice(*prompt.spans[prompt.graph[chunk.name]])] for chunk in graph}


def largest(found: Mapping[str, Tensor], right: Callable[[str], Tensor | None]) -> float | None:
    """The largest error over the nodes that have an oracle."""
    errors = [difference(rows, answer) for name, rows in found.items() if (answer := right(name)) is not None]
    return max_or_nan(errors)


def max_or_nan(errors: list[float]) -> float | None:
    """The largest; not a number if any is not, None if there are none."""
    if any(error != error for error in errors):
        return float("nan")
    return max(errors, default=None)


def model_for(builder: Builder, backend: str) -> Any:
    """A model that nothing else has touched; loaded with the backend's implementation where leattn says that this helps."""
    model = builder.fresh()
    try:
        rows_of(model, fan(), backend)
    except leattn.LeattnError as refusal:
        if f"load it with attn_implementation={backend!r}" in str(refusal):
            return builder.fresh(backend)
    except Exception:
        return model
    return model


def check_backend(builder: Builder, oracle: Oracle, backend: str) -> list[Outcome]:
    """All checks of one backend."""
    model = model_for(builder, backend)

    def answers(graph: Graph) -> Callable[[str], Tensor | None]:
        return lambda name: oracle.node(graph, name) if oracle.knows(graph, name) else None

    def plain(graph: Graph, visibility: str) -> float | None:
        right = oracle.plain(tuple(token for chunk in graph for token in chunk.tokens))
        found = rows_of(model, graph, backend, visibility)
        return difference(torch.cat([found[chunk.name] for chunk in graph]), right)

    def graph(graph: Graph) -> float | None:
        return largest(rows_of(model, graph, backend), answers(graph))

    def other_order(graph: Graph) -> float | None:
        order = ["root", "c", "b", "a", "question", "tail"]
        first, again = rows_of(model, graph, backend), rows_of(model, reordered(graph, order), backend)
        return max_or_nan([difference(again[name], first[name]) for name in order])

    def unreached() -> float | None:
        first, again = rows_of(model, fan(), backend), rows_of(model, changed(fan(), "c"), backend)
        return max_or_nan([difference(again[name], first[name]) for name in first if name != "c"])

    def batch() -> float | None:
        graphs: list[Graph] = [fan(), *shorter()]
        prompts = [compiled(each) for each in graphs]
        with torch.no_grad():
            logits = leattn.forward(model, prompts, backend=backend, use_cache=False).logits
        errors = []
        for row, prompt, each in zip(logits, prompts, graphs, strict=True):
            own = row[len(row) - len(prompt) :]
            found = {chunk.name: own[slice(*prompt.spans[prompt.graph[chunk.name]])] for chunk in each}
            errors.append(largest(found, answers(each)))
        return max_or_nan([error for error in errors if error is not None])

    return [
        judged("a chain", oracle.tolerance, lambda: plain(chain(SHORT), "ancestors")),
        judged("everyone sees everything", oracle.tolerance, lambda: plain(everyone(SHORT), "parents")),
        judged("a node by its ancestors", oracle.tolerance, lambda: graph(fan())),
        judged("another order", oracle.tolerance, lambda: other_order(fan())),
        judged("an unreached node changed", oracle.tolerance, unreached),
        judged("a batch", oracle.tolerance, batch),
        judged("everyone sees everything, 130 tokens", oracle.tolerance, lambda: plain(everyone(LONG), "parents")),
        judged("a node by its ancestors, 128 tokens", oracle.tolerance, lambda: graph(long_fan())),
        judged("another order, 128 tokens", oracle.tolerance, lambda: other_order(long_fan())),
    ]


def shorter() -> list[Graph]:
    """Smaller graphs, for a batch with padding."""
    root, a, _, _, question, _ = fan(3, 8, 8, 8, 4, seed=80)
    return [(root, a, Chunk("question", question.tokens, ("root", "a")))]
