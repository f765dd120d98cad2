"""``python -m families.soak [--graphs N] [--seed S] [NAMES …]``: random graphs of every shape, on every way to run them.

Each graph is drawn anew: up to eight nodes of one to nine tokens, any parents among those before, sometimes a pinned start,
sometimes ``visibility="ancestors"``. Each is run one way: one pass on a backend, decoding with and without a cache, a store
that is shared by all graphs of the family and too small to hold them, a batch, or a program in which a random node is
written by the model. The answers come from the oracle, which knows nothing of leattn.
"""

from __future__ import annotations

import argparse
import collections
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

import leattn
from families.build import Builder
from families.catalogue import families
from families.decode import Recorder, compare, greedy, is_tie, written_by
from families.oracle import Oracle, difference
from families.outcome import Mismatch
from families.prompts import Chunk, Graph, compiled, graph_tokens, nodes
from leattn import GenNode, ICLGraph, KVStore, LeattnError
from leattn.errors import LeattnWarning

WORDS = 40
"""Nodes draw their text from so many texts, so that a store meets the same ones again."""
NEW = 3


def drawn(dice: random.Random) -> Graph:
    """A random graph with one sink, in an order in which parents come first."""
    count = dice.randint(1, 8)
    chunks: list[Chunk] = []
    for i in range(count):
        text = random.Random(dice.randrange(WORDS))
        tokens = tuple(text.randint(3, 89) for _ in range(text.randint(1, 9)))
        share = dice.choice((0.2, 0.5, 0.9))
        parents = [chunk.name for chunk in chunks if dice.random() < share]
        if i == count - 1 and chunks:  # one sink: it sees whatever nobody else does
            seen = {name for chunk in chunks for name in chunk.parents}
            parents += [chunk.name for chunk in chunks if chunk.name not in seen and chunk.name not in parents]
        start = dice.randint(0, 60) if dice.random() < 0.1 else None
        chunks.append(Chunk(f"n{i}", tokens, tuple(parents), start))
    return tuple(chunks)


class Family:
    """One family's model, oracle and store, and the ways it can be run."""

    def __init__(self, name: str) -> None:
        self.name, builder = name, Builder(families()[name])
        self.oracle = Oracle(builder)
        if self.oracle.way is None or self.oracle.way.longest is not None:
            raise LeattnError(f"{name} has no oracle for graphs")
        self.model = builder.fresh()
        report = leattn.check_model(self.model)
        self.backends = [one for one in ("eager", "sdpa", "flex", "sparse") if report[one].works] + ["auto"]
        self.store = KVStore(max_bytes=60_000)
        self.ways: list[Callable[[random.Random, Graph], float]] = [self.forward, self.forward, self.batch, self.decode]
        if report["reuse"].works:
            self.ways += [self.stored, self.stored, self.decode_stored, self.program]

    def expected(self, graph: Graph) -> torch.Tensor:
        return self.oracle.node(graph, graph[-1].name)

    def forward(self, dice: random.Random, graph: Graph) -> float:
        """One pass on a backend."""
        logits = leattn.forward(self.model, compiled(graph), backend=dice.choice(self.backends)).logits[0]
        right = self.expected(graph)
        return difference(logits[-len(right) :], right)

    def batch(self, dice: random.Random, graph: Graph) -> float:
        """Two graphs at once, the shorter one padded."""
        both = [graph, drawn(dice)]
        logits = leattn.forward(self.model, [compiled(one) for one in both], backend=dice.choice(self.backends)).logits
        rights = [self.expected(one) for one in both]
        return max(difference(row[-len(right) :], right) for row, right in zip(logits, rights, strict=True))

    def stored(self, dice: random.Random, graph: Graph) -> float:
        """One pass on what the store has."""
        backend = dice.choice(self.backends)
        logits = leattn.forward(self.model, compiled(graph), backend=backend, kv_store=self.store).logits[0]
        return difference(logits, self.expected(graph))

    def decode(self, dice: random.Random, graph: Graph) -> float:
        """Greedy decoding, with a cache or without."""
        return self._written(graph, backend=dice.choice(self.backends), use_cache=dice.random() < 0.7)

    def decode_stored(self, dice: random.Random, graph: Graph) -> float:
        """Greedy decoding after what the store has."""
        return self._written(graph, backend=dice.choice(self.backends), kv_store=self.store)

    def _written(self, graph: Graph, **options: Any) -> float:
        recorder = Recorder()
        result = leattn.generate(
            self.model, compiled(graph), max_new_tokens=NEW, do_sample=False, logits_processor=[recorder], **options
        )
        right, steps = greedy(self.oracle, graph, graph[-1].name, NEW)
        return compare(written_by(result), recorder.steps[0], right, steps, self.oracle.tolerance)

    def program(self, dice: random.Random, graph: Graph) -> float:
        """One node is written by the model before its children are read; the last one is written too."""
        which = dice.randrange(len(graph))
        written = {graph[which].name, graph[-1].name}
        made = dict(nodes(graph[:which]))
        for chunk in graph[which:]:
            parents = [made[name] for name in chunk.parents]
            options: dict[str, Any] = {"id": chunk.name, "start_pos_id": chunk.start}
            if chunk.name in written:
                made[chunk.name] = GenNode(list(chunk.tokens), parents, max_new_tokens=NEW, **options)
            else:
                made[chunk.name] = leattn.ICLNode(list(chunk.tokens), parents, **options)
        recorder = Recorder()
        store = self.store if dice.random() < 0.5 else None
        result = leattn.generate(
            self.model,
            ICLGraph(made[graph[-1].name]),
            backend=dice.choice(self.backends),
            kv_store=store,
            do_sample=False,
            logits_processor=[recorder],
        )
        worst = 0.0
        for i, name in enumerate(chunk.name for chunk in graph if chunk.name in written):
            right, steps = greedy(self.oracle, graph, name, NEW)
            worst = max(worst, compare(written_by(result, name), recorder.steps[i], right, steps, self.oracle.tolerance))
            if any(is_tie(scores, self.oracle.tolerance) for scores in steps):
                break  # what comes after a tie proves nothing
            graph = tuple(
                Chunk(name, (*graph_tokens(graph, name), *right), chunk.parents, chunk.start) if chunk.name == name else chunk
                for chunk in graph
            )
        return worst


def soak(names: Sequence[str], graphs: int, seed: int) -> int:
    """Run them; how many were wrong or crashed, each of which is printed with what draws it again."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LeattnWarning)  # pins before the end of what a node sees are drawn on purpose
    counts: collections.Counter[str] = collections.Counter()
    worst, bad, started = 0.0, 0, time.perf_counter()
    with tqdm(total=graphs, unit="graph", mininterval=5) as bar, torch.compiler.set_stance("force_eager"), torch.no_grad():
        for number, name in enumerate(names):
            family = Family(name)
            for i in range(number, graphs, len(names)):
                dice = random.Random(f"{seed} {i}")
                graph, way = drawn(dice), dice.choice(family.ways)
                try:
                    error = way(dice, graph)
                    if not error < family.oracle.tolerance:
                        raise Mismatch(f"off by {error:.1e}")
                    worst = max(worst, error)
                except Exception as reason:
                    bad += 1
                    tqdm.write(f"{name} graph {i} {way.__name__}: {type(reason).__name__}: {reason}")
                counts[way.__name__] += 1
                bar.update()
    ways = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    print(
        f"{sum(counts.values())} graphs on {len(names)} families in {time.perf_counter() - started:.0f} s, seed {seed}: {ways}"
    )
    print(f"{bad} wrong; largest error of the others {worst:.1e}")
    return bad


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m families.soak", description=__doc__)
    parser.add_argument("names", nargs="+", help="families")
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    raise SystemExit(1 if soak(args.names, args.graphs, args.seed) else 0)


if __name__ == "__main__":
    main()
