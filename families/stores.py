"""The columns reuse and shift: keys and values from a store, where they were computed and at other positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import leattn
from families.build import Builder
from families.decode import batch, continued, program
from families.oracle import Oracle, difference
from families.outcome import Mismatch, Outcome, judged
from families.prompts import Chunk, Graph, compiled, one_sink, tokens
from leattn import KVStore, LeattnError

DISTANCES = (7, 210)


def from_store(model: Any, oracle: Oracle, graph: Graph, store: KVStore) -> tuple[float | None, int]:
    """The error of the logits of the last node, and how many nodes came from the store."""
    sink = graph[-1].name
    before = store.stats.hits
    logits = leattn.forward(model, compiled(graph), kv_store=store).logits[0]
    hits = store.stats.hits - before
    if not oracle.knows(graph, sink):
        return None, hits
    right = oracle.node(graph, sink)
    return difference(logits[-len(right) :], right), hits


def other_question() -> Graph:
    """The documents of ``one_sink`` in another order and another company."""
    root, a, b, c, note, _ = one_sink()
    return (root, c, b, a, note, Chunk("question", tokens(6, 93), ("root", "b", "c", "a")))


def at(graph: Graph, start: int) -> Graph:
    """The same graph further on: its root is pinned, everything follows."""
    return (replace(graph[0], start=start), *graph[1:])


def check_reuse(builder: Builder, oracle: Oracle) -> list[Outcome]:
    """All checks of the column."""
    model, store = builder.fresh(), KVStore(max_bytes=2**26)

    def cold() -> float | None:
        return from_store(model, oracle, one_sink(), store)[0]

    def again(graph: Graph) -> float | None:
        error, hits = from_store(model, oracle, graph, store)
        if not hits:
            raise Mismatch("nothing came from the store, and no reason was given")
        return error

    def generated() -> float | None:
        used = store.stats.hits
        error = continued(model, oracle, one_sink(), kv_store=store)
        if store.stats.hits == used:
            raise Mismatch("nothing came from the store, and no reason was given")
        return error

    return [
        judged("an empty store", oracle.tolerance, cold),
        judged("the same prompt again", oracle.tolerance, lambda: again(one_sink())),
        judged("other company", oracle.tolerance, lambda: again(other_question())),
        judged("generate", oracle.tolerance, generated),
        judged("generate again", oracle.tolerance, generated),
        judged("a program", oracle.tolerance, lambda: program(model, oracle, kv_store=store)),
        judged("a batch", oracle.tolerance, lambda: batch(model, oracle, kv_store=store)),
    ]


def check_shift(builder: Builder, oracle: Oracle) -> list[Outcome]:
    """All checks of the column; keys that are computed anew elsewhere are a refusal to shift, with the report's reason."""
    model, store = builder.fresh(), KVStore(max_bytes=2**26)

    def moved(distance: int) -> float | None:
        error, hits = from_store(model, oracle, at(one_sink(), distance), store)
        if hits or (error is not None and not error < oracle.tolerance):
            return error
        reason = leattn.check_model(model)["shifted reuse"].reason
        if not reason:
            raise Mismatch("nothing came from the store, and check_model says that shifting works")
        raise LeattnError(reason)

    def check(distance: int) -> float | None:
        leattn.forward(model, compiled(one_sink()), kv_store=store)
        return moved(distance)

    return [judged(f"by {distance}", oracle.tolerance, lambda distance=distance: check(distance)) for distance in DISTANCES]  # type: ignore[misc]
