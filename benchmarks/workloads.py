"""The graphs that are measured, of token ids. ``shrink`` divides their lengths, to see whether everything runs."""

from __future__ import annotations

import random
from collections.abc import Callable

from leattn import CompiledPrompt, ICLNode, chain, compile_prompt, parallel


def _ids(count: int, shrink: int) -> list[int]:
    return [1] * max(1, count // shrink)


def head_and_documents(shrink: int = 1) -> CompiledPrompt:
    """One head node, 500 documents of 7 tokens that see it, a question that sees all."""
    head = ICLNode(_ids(7, shrink))
    return compile_prompt(ICLNode(_ids(7, shrink), [head, *parallel([_ids(7, shrink)] * (500 // shrink), [head])]))


def retrieval(shrink: int = 1) -> CompiledPrompt:
    """16 documents of 256 tokens, a question of 64 that sees all."""
    return compile_prompt(ICLNode(_ids(64, shrink), parallel([_ids(256, shrink)] * 16)))


def paraphrases(shrink: int = 1) -> CompiledPrompt:
    """A context of 512 tokens, 6 questions of 32 that see it, an answer of 16 that sees all."""
    context = ICLNode(_ids(512, shrink))
    return compile_prompt(ICLNode(_ids(16, shrink), [context, *parallel([_ids(32, shrink)] * 6, [context])]))


def local_chain(shrink: int = 1) -> CompiledPrompt:
    """A chain of 64 nodes of 64 tokens, each sees only its parent."""
    return compile_prompt(chain([_ids(64, shrink)] * 64))


def plain(shrink: int = 1) -> CompiledPrompt:
    """One node of 4096 tokens: plain causal."""
    return compile_prompt(ICLNode(_ids(4096, shrink)))


def many_documents(shrink: int = 1, documents: int = 64) -> CompiledPrompt:
    """64 documents of 512 tokens: a dense mask no longer fits."""
    return compile_prompt(ICLNode(_ids(64, shrink), parallel([_ids(512, shrink)] * documents)))


def irregular(shrink: int = 1) -> CompiledPrompt:
    """A random DAG of 200 nodes, 5 to 120 tokens, 0 to 4 parents."""
    rng = random.Random(0)
    nodes: list[ICLNode] = []
    for _ in range(200 // shrink):
        parents = rng.sample(nodes, min(len(nodes), rng.randint(0, 4)))
        nodes.append(ICLNode([1] * rng.randint(5, 120), parents))
    return compile_prompt(nodes)


WORKLOADS: dict[str, Callable[[int], CompiledPrompt]] = {
    "a": head_and_documents,
    "b": retrieval,
    "c": paraphrases,
    "d": local_chain,
    "e": plain,
    "f": many_documents,
    "g": irregular,
}
