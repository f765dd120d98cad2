"""Prompts with one sink each, continued by transformers' own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leattn.attention.attend import attend
from leattn.attention.block import Block
from leattn.attention.request import Backend
from leattn.generation.branch import cut_at_stop, decoder
from leattn.generation.options import Options
from leattn.generation.program import build
from leattn.generation.result import Generation, Stats
from leattn.generation.result import Sequence as Continuation
from leattn.generation.session import Session, is_intervened, session
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt


def continue_sinks(
    model: Any,
    prompts: Sequence[CompiledPrompt],
    tokenizer: Any,
    *,
    backend: str | Backend,
    kv_store: KVStore | None,
    seed: int | None,
    options: dict[str, Any],
    logprobs: bool = False,
) -> list[Generation]:
    """One generation per prompt; several prompts are a batch, padded on the left. With a store there is one prompt."""
    record = Model.of(model)
    asked = Options(model, options, "one sink" if kv_store is None else "one sink and a store")
    arguments = asked.for_transformers(tokenizer)
    if logprobs:
        arguments |= {"output_logits": True, "return_dict_in_generate": True}
    longest = max(len(prompt) for prompt in prompts)
    record.facts.check_positions(prompts, new_tokens=asked.new_tokens(longest))
    started = time.perf_counter()
    with ExitStack() as stack:
        work = None
        if kv_store is not None and not is_intervened(record):
            work = _filled(model, record, prompts[0], backend, kv_store)
            before = list(range(len(prompts[0].graph) - 1))
            arguments |= {"past_key_values": work.cache_of(before, asked.rows), "cache_implementation": None}
        block = stack.enter_context(attend(model, prompts, backend=backend))
        stack.enter_context(_seeded(seed, block.columns.device))
        output = model.generate(**block.inputs, **arguments)
    cost = Stats(block.computed, 0, 0, block.forwards, time.perf_counter() - started)
    if work is not None:
        sink = torch.arange(*prompts[0].offsets[-2:])
        work.remember(len(prompts[0].graph) - 1, arguments["past_key_values"], sink)
        cost = replace(cost, computed=cost.computed + work.computed, reused=work.reused, steps=cost.steps + work.block.forwards)
    rows = output if isinstance(output, Tensor) else output.sequences
    return _results(prompts, rows, block, asked, cost, _logprobs(model, output) if logprobs else None)


def _logprobs(model: Any, output: Any) -> Tensor:
    """Of every new token of every row, as the model itself has them, ``[rows, new]``."""
    logits = tuple(step.double() for step in output.logits)
    found: Tensor = model.compute_transition_scores(
        output.sequences, logits, getattr(output, "beam_indices", None), normalize_logits=True
    )
    return found.cpu()


def _filled(model: Any, record: Model, prompt: CompiledPrompt, backend: str | Backend, store: KVStore) -> Session:
    """What the one sink of a prompt sees, from the store or computed in one forward."""
    program, _ = build([prompt], prompt.tokenizer)
    with session(model, record, program, backend=backend, kv_store=store) as work:
        work.place(program.sees[len(prompt.graph) - 1])
        for _ in work.run():
            pass
    return work


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _results(
    prompts: Sequence[CompiledPrompt], rows: Tensor, block: Block, asked: Options, cost: Stats, logprobs: Tensor | None
) -> list[Generation]:
    """Split the rows ``[P × sequences, columns]`` by prompt; cut off the prompt, an EOS and what follows, and a stop string."""
    ends = torch.tensor(asked.ends, dtype=torch.long)
    per_prompt = len(rows) // len(prompts)
    new = rows[:, block.columns.width :].cpu()
    results = []
    for p, prompt in enumerate(prompts):
        sequences = []
        decode = decoder(prompt.tokenizer)
        for i in range(p * per_prompt, (p + 1) * per_prompt):
            row = new[i]
            stops = torch.isin(row, ends).nonzero()
            ids = row[: int(stops[0])] if len(stops) else row
            text, kept = cut_at_stop(ids.tolist(), decode(ids.tolist()), asked.stop, decode)
            sequences.append(Continuation(text, ids[:kept], None if logprobs is None else logprobs[i, :kept]))
        stats = replace(cost, generated=sum(len(sequence.token_ids) for sequence in sequences))
        sink = prompt.graph.names[prompt.graph.sinks[0]]
        results.append(Generation(prompt.graph, prompt, {sink: tuple(sequences)}, block.backend.name, stats))
    return results
