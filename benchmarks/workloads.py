"""The graphs that are measured, of token ids."""

from __future__ import annotations

import random
from collections.abc import Callable

from leattn import CompiledPrompt, ICLNode, chain, compile_prompt, parallel


def _ids(count: int) -> list[int]:
    return [1] * count


def head_and_documents() -> CompiledPrompt:
    """One head node, 500 documents of 7 tokens that see it, a question that sees all."""
    head = ICLNode(_ids(7))
    return compile_prompt(ICLNode(_ids(7), [head, *parallel([_ids(7)] * 500, [head])]))


def retrieval() -> CompiledPrompt:
    """16 documents of 256 tokens, a question of 64 that sees all."""
    return compile_prompt(ICLNode(_ids(64), parallel([_ids(256)] * 16)))


def paraphrases() -> CompiledPrompt:
    """A context of 512 tokens, 6 questions of 32 that see it, an answer of 16 that sees all."""
    context = ICLNode(_ids(512))
    return compile_prompt(ICLNode(_ids(16), [context, *parallel([_ids(32)] * 6, [context])]))


def local_chain() -> CompiledPrompt:
    """A chain of 64 nodes of 64 tokens, each sees only its parent."""
    return compile_prompt(chain([_ids(64)] * 64))


def plain() -> CompiledPrompt:
    """One node of 4096 tokens: plain causal."""
    return compile_prompt(ICLNode(_ids(4096)))


def many_documents() -> CompiledPrompt:
    """64 documents of 512 tokens: a dense mask no longer fits."""
    return compile_prompt(ICLNode(_ids(64), parallel([_ids(512)] * 64)))


def irregular() -> CompiledPrompt:
    """A random DAG of 200 nodes, 5 to 120 tokens, 0 to 4 parents."""
    rng = random.Random(0)
    nodes: list[ICLNode] = []
    for _ in range(200):
        parents = rng.sample(nodes, min(len(nodes), rng.randint(0, 4)))
        nodes.append(ICLNode(_ids(rng.randint(5, 120)), parents))
    return compile_prompt(nodes)


WORKLOADS: dict[str, Callable[[], CompiledPrompt]] = {
    "a": head_and_documents,
    "b": retrieval,
    "c": paraphrases,
    "d": local_chain,
    "e": plain,
    "f": many_documents,
    "g": irregular,
}
