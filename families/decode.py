"""The column generate: greedy decoding with and without a cache, programs and batches, against full forwards by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

import leattn
from families.build import Builder
from families.oracle import Oracle, difference
from families.outcome import Mismatch, Outcome, judged
from families.prompts import Chunk, Graph, compiled, everyone, nodes, one_sink, tokens
from leattn import GenNode, ICLGraph

NEW = 5


def is_tie(scores: Tensor, tolerance: float) -> bool:
    """Whether the two likeliest tokens are so near that what comes after proves nothing."""
    first, second = scores.topk(2).values
    return float(first - second) < 10 * tolerance * float(scores.abs().max())


class Recorder:
    """A logits processor that keeps what it is shown, by sequence: ids that go on from earlier ids by one are the same one."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []
        self._ids: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for ids, row in zip(input_ids.tolist(), scores.detach().float(), strict=True):
            if ids[:-1] in self._ids:
                i = self._ids.index(ids[:-1])
            else:
                i = len(self.steps)
                self.steps.append([])
                self._ids.append([])
            self.steps[i].append(row.clone())
            self._ids[i] = ids
        return scores

    def shown(self, sequence: int) -> list[Tensor]:
        """The logits of one sequence, step by step; nothing where a generate of the family's own (Janus) asks no processors."""
        return self.steps[sequence] if self.steps else []


def greedy(oracle: Oracle, graph: Graph, name: str, count: int) -> tuple[list[int], list[Tensor]]:
    """Tokens after a node and the logits each was chosen from: a full forward per token, of node and ancestors alone."""
    written: list[int] = []
    steps = []
    for _ in range(count):
        grown = tuple(replace(chunk, tokens=(*chunk.tokens, *written)) if chunk.name == name else chunk for chunk in graph)
        steps.append(oracle.node(grown, name)[-1])
        written.append(int(steps[-1].argmax()))
    return written, steps


def compare(found: list[int], logits: list[Tensor], right: list[int], steps: list[Tensor], tolerance: float) -> float:
    """The largest error of the logits that tokens were chosen from, up to the first near tie.

    Raises
    ------
    Mismatch
        Another number of steps, or another token where there is no tie.
    """
    if len(found) != len(right) or len(logits) not in (0, len(steps)):
        raise Mismatch(f"{len(found)} tokens in {len(logits)} steps instead of {len(right)}")
    errors = [0.0]
    logits = logits or steps  # then the tokens alone are compared
    for token, scores, answer, expected in zip(found, logits, right, steps, strict=True):
        errors.append(difference(scores, expected))
        if is_tie(expected, tolerance):
            break
        if token != answer:
            raise Mismatch(f"wrote {found} instead of {right}; logits differ by {max(errors):.1e}")
    return max(errors)


def written_by(result: leattn.Generation, node: str | None = None) -> list[int]:
    """The ids of a branch, or of the only one."""
    branch = node or next(iter(result.branches))
    ids: list[int] = result.branches[branch][0].token_ids.tolist()
    return ids


def continued(model: Any, oracle: Oracle, graph: Graph, **options: Any) -> float | None:
    """``generate`` on a graph with one sink."""
    sink = graph[-1].name
    recorder = Recorder()
    result = leattn.generate(
        model, compiled(graph), max_new_tokens=NEW, do_sample=False, logits_processor=[recorder], **options
    )
    if not oracle.knows(graph, sink):
        return None
    right, steps = greedy(oracle, graph, sink, NEW)
    return compare(written_by(result), recorder.shown(0), right, steps, oracle.tolerance)


def program(model: Any, oracle: Oracle, **options: Any) -> float | None:
    """A node is written, and then another that sees it."""
    root, a, b, c, _, _ = one_sink()
    header, last = tokens(3, 90), tokens(4, 91)
    made = nodes((root, a, b, c))
    writer = GenNode(list(header), [made["root"], made["a"]], "writer", max_new_tokens=NEW)
    reader = GenNode(list(last), [made["root"], made["b"], writer], "reader", max_new_tokens=NEW)
    recorder = Recorder()
    result = leattn.generate(model, ICLGraph(reader), do_sample=False, logits_processor=[recorder], **options)

    graph: Graph = (root, a, b, c, Chunk("writer", header, ("root", "a")))
    if not oracle.follows(graph):
        return None
    first, steps = greedy(oracle, graph, "writer", NEW)
    graph = (*graph[:-1], Chunk("writer", (*header, *first), ("root", "a")), Chunk("reader", last, ("root", "b", "writer")))
    second, more = greedy(oracle, graph, "reader", NEW)
    if len(recorder.steps) != 2:
        raise Mismatch(f"processors were shown {len(recorder.steps)} sequences instead of 2")
    return max(
        compare(written_by(result, "writer"), recorder.shown(0), first, steps, oracle.tolerance),
        compare(written_by(result, "reader"), recorder.shown(1), second, more, oracle.tolerance),
    )


def branches(model: Any, oracle: Oracle, **options: Any) -> float | None:
    """Two questions are answered side by side; one of them sees a document that the other does not."""
    root, a, b, _, _, _ = one_sink()
    first, second = Chunk("first", tokens(3, 94), ("root", "a")), Chunk("second", tokens(4, 95), ("root", "a", "b"))
    made = nodes((root, a, b, first, second))
    recorder = Recorder()
    graph = ICLGraph(made["first"], made["second"])
    result = leattn.generate(model, graph, max_new_tokens=NEW, do_sample=False, logits_processor=[recorder], **options)
    if not oracle.follows((root, a, b, first, second)):
        return None
    if len(recorder.steps) != 2:
        raise Mismatch(f"processors were shown {len(recorder.steps)} sequences instead of 2")
    errors = []
    for name, steps in zip(("first", "second"), recorder.steps, strict=True):
        right, expected = greedy(oracle, (root, a, b, first, second), name, NEW)
        errors.append(compare(written_by(result, name), steps, right, expected, oracle.tolerance))
    return max(errors)


def batch(model: Any, oracle: Oracle, **options: Any) -> float | None:
    """Two graphs of different lengths at once."""
    root, a, *_ = one_sink()
    small: Graph = (root, a, Chunk("question", tokens(6, 92), ("root", "a")))
    graphs = [one_sink(), small]
    recorder = Recorder()
    results = leattn.generate(
        model,
        [compiled(graph) for graph in graphs],
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=[recorder],
        **options,
    )
    if not all(oracle.knows(graph, "question") for graph in graphs):
        return None
    errors = []
    for i, (graph, result) in enumerate(zip(graphs, results, strict=True)):
        right, steps = greedy(oracle, graph, "question", NEW)
        errors.append(compare(written_by(result), recorder.shown(i), right, steps, oracle.tolerance))
    return max(errors)


def check_generate(builder: Builder, oracle: Oracle) -> list[Outcome]:
    """All checks of the column."""
    model = builder.fresh()
    text = everyone((13, 1, 17, 9))
    return [
        judged("plain text", oracle.tolerance, lambda: continued(model, oracle, text)),
        judged("a graph", oracle.tolerance, lambda: continued(model, oracle, one_sink())),
        judged("without a cache", oracle.tolerance, lambda: continued(model, oracle, one_sink(), use_cache=False)),
        judged("a batch", oracle.tolerance, lambda: batch(model, oracle)),
        judged("branches", oracle.tolerance, lambda: branches(model, oracle)),
        judged("a program", oracle.tolerance, lambda: program(model, oracle)),
    ]
