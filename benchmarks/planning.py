"""What happens before a model runs: compiling, block masks, pictures, imports."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import Disagreement, check_close, interleaved, peak_megabytes
from benchmarks.row import Effort, Goal, Measured, Row
from leattn import CompiledPrompt, ICLNode, causal, compile_prompt, parallel, viz

GRAPHS: dict[str, Callable[[int], ICLNode]] = {
    "causal": lambda nodes: causal([[1, 2, 3]] * nodes)[-1],
    "fan": lambda nodes: _fan(nodes, 3),
}
"""Everyone sees everyone before; documents between a head and a question."""


def _fan(documents: int, length: int) -> ICLNode:
    head = ICLNode([1])
    return ICLNode([1] * 30, [head, *parallel([[1] * length] * documents, [head])])


def measure_compile(nodes: int, effort: Effort) -> Measured:
    """Token ids given, nothing to tokenize: the slower of the two graphs counts."""
    targets = {name: make(effort.length(nodes)) for name, make in GRAPHS.items()}
    prompt = compile_prompt(targets["causal"])
    if prompt.density != 1 or len(prompt.visible.runs[-1]) != 1:
        raise Disagreement(f"the causal graph was compiled to density {prompt.density}, not 1; nothing was timed")
    times = interleaved({name: partial(compile_prompt, node) for name, node in targets.items()}, effort.rounds)
    return Measured(times.medians(), {"slowest, s": max(times.medians().values())})


def compile_memory(graph: int, nodes: int) -> Callable[[], CompiledPrompt]:
    make = list(GRAPHS.values())[graph]
    compile_prompt(make(10))
    node = make(nodes)
    return lambda: compile_prompt(node)


def measure_compile_memory(effort: Effort) -> Measured:
    """Peak memory of compiling 10 000 and 100 000 nodes."""
    figures = {}
    for graph, name in enumerate(GRAPHS):
        small, large = (peak_megabytes(compile_memory, graph, effort.length(nodes)) for nodes in (10_000, 100_000))
        figures[f"{name}, MB"] = large
        figures[f"{name}, growth"] = large / small
    return Measured(figures=figures)


def _prompt_of_blocks(shrink: int) -> CompiledPrompt:
    return compile_prompt(_fan(4000 // shrink, 32))


def block_mask_memory(shrink: int) -> Callable[[], object]:
    _prompt_of_blocks(100).block_mask()
    return _prompt_of_blocks(shrink).block_mask


def measure_block_mask(effort: Effort) -> Measured:
    """A ``BlockMask`` of 128 031 tokens from spans, with the table that its ``mask_mod`` reads."""
    small = _prompt_of_blocks(100)
    # Blocks of one token: their number is the density.
    sparsity = torch.tensor(small.block_mask(block_size=1).sparsity())
    check_close("sparsity of the BlockMask", 1 - sparsity / 100, small.dense_mask().float().mean(), 1e-5)
    prompt = _prompt_of_blocks(effort.shrink)
    prompt.mask_mod  # noqa: B018  the table is made once per prompt
    times = interleaved({"block_mask": prompt.block_mask}, effort.rounds)
    return Measured(
        times.medians(),
        {"block_mask, s": times.median("block_mask"), "peak, MB": peak_megabytes(block_mask_memory, effort.shrink)},
        (f"{len(prompt)} tokens in {len(prompt.graph)} nodes",),
    )


def measure_picture(documents: int, length: int, effort: Effort) -> Measured:
    """A PNG of the mask, without tokenizing or compiling."""
    prompt = compile_prompt(_fan(documents, effort.length(length)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.png"
        times = interleaved({"plot_mask": lambda: viz.plot_mask(prompt, path=path)}, effort.rounds)
        kilobytes = path.stat().st_size / 1000
    return Measured(times.medians(), {"plot_mask, s": times.median("plot_mask"), "file, kB": kilobytes})


def measure_import(effort: Effort) -> Measured:
    """Wall time of fresh interpreters: the work is another process's."""
    codes = {"torch": "import torch", "leattn": "import leattn, leattn.prompt.compile, torch"}
    rivals = {name: partial(subprocess.run, [sys.executable, "-c", code], check=True) for name, code in codes.items()}
    times = interleaved(rivals, effort.rounds, clock=time.perf_counter)
    return Measured(times.medians(), {"leattn / torch": times.ratio("leattn", "torch")})


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


LINEAR = 15
"""Ten times the nodes: linear memory grows by 10, give or take how lists are allocated, quadratic by 100."""
QUICK = frozenset({"planning", "quick"})
ROWS = (
    *(
        Row(
            f"compile-{nodes}",
            f"compile {_thousands(nodes)} nodes of token ids",
            partial(measure_compile, nodes),
            (Goal("slowest, s", "≤", goal, "s"),),
            QUICK,
        )
        for nodes, goal in ((10_000, 0.05), (100_000, 0.6))
    ),
    Row(
        "memory-compile",
        "peak memory of compiling ten times as many nodes (10 000, 100 000)",
        measure_compile_memory,
        (Goal("causal, growth", "≤", LINEAR), Goal("fan, growth", "≤", LINEAR)),
        frozenset({"planning", "memory"}),
    ),
    Row(
        "block-mask",
        "BlockMask from spans, 128 000 tokens",
        measure_block_mask,
        (Goal("block_mask, s", "≤", 0.1, "s"), Goal("peak, MB", "≤", 50, "MB")),
        QUICK,
    ),
    *(
        Row(
            f"picture-{tokens}",
            f"picture of a mask, {_thousands(tokens)} tokens",
            partial(measure_picture, documents, length),
            (Goal("plot_mask, s", "≤", 0.3, "s"), Goal("file, kB", "≤", 200, "kB")),
            QUICK,
        )
        for tokens, documents, length in ((4096, 16, 254), (100_000, 50, 2000))
    ),
    Row(
        "import",
        "`import leattn`, `import torch`",
        measure_import,
        (Goal("leattn / torch", "≤", 1.2),),
        QUICK,
    ),
)
