"""Graphs with several sinks, or with nodes that the model writes: run as one program, and taken apart into results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from tqdm.auto import tqdm

from leattn.attention.request import Backend
from leattn.dag.graph import ICLGraph
from leattn.dag.node import Position
from leattn.errors import LeattnError, choices
from leattn.generation.branch import Branch, decoder
from leattn.generation.program import Part, Program, build
from leattn.generation.result import Generation, Stats
from leattn.generation.result import Sequence as Continuation
from leattn.generation.sampling import Sampling, Streamer
from leattn.generation.schedule import Schedule
from leattn.generation.session import is_intervened, session
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Place, Positions, after_seen
from leattn.prompt.visible import Visibility

OnInterrupt: TypeAlias = Literal["raise", "return"]


def write_together(
    model: Any,
    targets: Sequence[CompiledPrompt | ICLGraph],
    tokenizer: Any,
    *,
    positions: Positions,
    visibility: Visibility,
    backend: str | Backend,
    kv_store: KVStore | None,
    seed: int | None,
    streamer: Streamer | None,
    on_finished: Callable[[str, str], None] | None,
    progress: bool,
    token_budget: int | None,
    on_interrupt: OnInterrupt,
    config: Mapping[str, Any],
    logprobs: bool,
) -> list[Generation]:
    """One generation per target; all of them run in one sequence."""
    if streamer is not None and (hasattr(streamer, "put") or not callable(streamer)):
        raise LeattnError(
            "several branches are written at once, so the streamer is a function (node id, text piece), not "
            f"{type(streamer).__name__}; for example streamer=lambda node, piece: print(node, piece)"
        )
    if token_budget is not None and token_budget < 1:
        raise LeattnError(f"token_budget={token_budget!r}; give the tokens a step may feed at most, from 1 up")
    if on_interrupt not in ("raise", "return"):
        raise LeattnError(choices("on_interrupt", on_interrupt, ("raise", "return")))
    record = Model.of(model)
    program, parts = build(targets, tokenizer, positions=positions, visibility=visibility, by_node=is_intervened(record))
    sampling = Sampling(model, config, record.device, logprobs=logprobs)
    readers = {i: tokenizer if part.prompt is None else part.prompt.tokenizer for part in parts for i in part.branches.values()}
    if any(reader is None and (sampling.stop or program.units[i].stop) for i, reader in readers.items()):
        raise LeattnError("stop strings are text, and there is no tokenizer to decode with; give one, or use eos_token_id")
    for i in program.written:
        sampling.options(program.units[i].sampling)
    last = _last_position(program, sampling)
    record.facts.check_last_position(last, f"the last position may be {last}")
    if seed is None:
        seed = int(torch.randint(2**62, ()))  # so that torch.manual_seed is honoured
    bar = tqdm(total=len(program.written), unit="node", disable=not progress)

    def finished(name: str, text: str) -> None:
        bar.update()
        if on_finished is not None:
            on_finished(name, text)

    started = time.perf_counter()
    complete = True
    with bar, session(model, record, program, backend=backend, kv_store=kv_store) as work:
        run = Schedule(
            work,
            sampling,
            seed=seed,
            decode={i: decoder(reader) for i, reader in readers.items()},
            token_budget=token_budget,
            streamer=streamer,
            on_finished=finished,
        )
        try:
            for _ in run.steps():
                bar.set_postfix(tokens=work.computed, refresh=False)
        except KeyboardInterrupt:
            if on_interrupt == "raise":
                raise
            run.break_off()
            complete = False
    stats = Stats(
        computed=work.computed,
        reused=work.reused,
        generated=sum(len(branch.ids) for branch in run.branches.values()),
        steps=work.block.forwards,
        seconds=time.perf_counter() - started,
    )
    return [_generation(part, run, work.block.backend.name, stats, complete) for part in parts]


def _generation(part: Part, run: Schedule, backend: str, stats: Stats, complete: bool) -> Generation:
    branches = {name: (_written(run.branches[i]),) for name, i in part.branches.items() if i in run.branches}
    headers = {name: run.program.units[i].ids for name, i in part.branches.items()}
    return Generation(part.graph, part.prompt, branches, backend, stats, headers, complete)


def _written(branch: Branch) -> Continuation:
    return Continuation(branch.text, torch.tensor(branch.ids, dtype=torch.long), branch.logprobs)


def _last_position(program: Program, sampling: Sampling) -> int:
    """The last position that may be reached, if every branch takes all of its tokens."""
    ends: list[Position] = []
    for i, unit in enumerate(program.units):
        place = unit.place or Place(after_seen(ends[j] for j in program.sees[i]) or 0)
        new = 0
        if unit.writes:
            new = unit.max_new_tokens or sampling.limit(unit.sampling, 0)
        ends.append(place.end(len(unit.ids)) + new)
    return math.ceil(max(ends) - 1)
