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
from leattn.errors import BackendError, LeattnError
from leattn.generation.branch import cut_at_stop, decoder
from leattn.generation.program import build
from leattn.generation.result import Generation, Stats
from leattn.generation.result import Sequence as Continuation
from leattn.generation.session import Session, is_intervened, session
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compile import CompiledPrompt

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Options by which ``generate`` feeds several guessed tokens at once."""


def continue_sinks(
    model: Any,
    prompts: Sequence[CompiledPrompt],
    tokenizer: Any,
    *,
    backend: str | Backend,
    kv_store: KVStore | None,
    seed: int | None,
    options: dict[str, Any],
) -> list[Generation]:
    """One generation per prompt; several prompts are a batch, padded on the left. With a store there is one prompt."""
    record = Model.of(model)
    options = _options(model, tokenizer, options)
    record.facts.check_positions(prompts, new_tokens=_new_tokens(model, prompts, options))
    started = time.perf_counter()
    with ExitStack() as stack:
        work = None
        if kv_store is not None and not is_intervened(record):
            _check_with_store(model, options)
            work = _filled(model, record, prompts[0], backend, kv_store)
            before = list(range(len(prompts[0].graph) - 1))
            options["past_key_values"] = work.cache_of(before, _rows(model, options))
        block = stack.enter_context(attend(model, prompts, backend=backend))
        stack.enter_context(_seeded(seed, block.columns.device))
        output = model.generate(**block.inputs, **options)
    cost = Stats(block.computed, 0, 0, block.forwards, time.perf_counter() - started)
    if work is not None:
        sink = torch.arange(*prompts[0].offsets[-2:])
        work.remember(len(prompts[0].graph) - 1, options["past_key_values"], sink)
        cost = replace(cost, computed=cost.computed + work.computed, reused=work.reused, steps=cost.steps + work.block.forwards)
    rows = output if isinstance(output, Tensor) else output.sequences
    return _results(prompts, rows, block, model, options, cost)


def _filled(model: Any, record: Model, prompt: CompiledPrompt, backend: str | Backend, store: KVStore) -> Session:
    """What the one sink of a prompt sees, from the store or computed in one forward."""
    program, _ = build([prompt], prompt.tokenizer)
    with session(model, record, program, backend=backend, kv_store=store) as work:
        work.place(program.sees[len(prompt.graph) - 1])
        for _ in work.run():
            pass
    return work


def _check_with_store(model: Any, options: dict[str, Any]) -> None:
    """Refuse what cannot go on from the keys and values of a store."""
    for name in ("past_key_values", "cache_implementation"):
        if _asked(model, options, name) is not None:
            raise LeattnError(
                f"{name} and kv_store are two ways to hand over keys and values; give one of them"
                + ("" if name in options else " (it is set in the generation_config)")
            )
    if _asked(model, options, "use_cache") is False:
        raise LeattnError("use_cache=False computes everything again for every token; leave it out, or leave kv_store out")
    for name in ASSISTED:
        if _asked(model, options, name):
            raise BackendError(
                f"{name}: transformers' assisted decoding begins with an empty cache, and kv_store fills it before; give one "
                "of them"
            )


def _asked(model: Any, options: dict[str, Any], name: str) -> Any:
    """An option as the caller, or else the generation config, has it."""
    given = options.get(name)
    return getattr(options.get("generation_config") or model.generation_config, name, None) if given is None else given


def _rows(model: Any, options: dict[str, Any]) -> int:
    """Rows that each prompt takes: beams, or return sequences."""
    return max(int(_asked(model, options, name) or 1) for name in ("num_beams", "num_return_sequences"))


def _options(model: Any, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The caller's arguments, and a padding id where the model has none (transformers would warn and do the same)."""
    options = dict(given)
    if options.get("stop_strings") is not None:
        options.setdefault("tokenizer", tokenizer)
    if _asked(model, options, "pad_token_id") is None:
        options["pad_token_id"] = next(iter(_end_ids(model, options)), 0)
    return options


def _end_ids(model: Any, options: dict[str, Any]) -> list[int]:
    end = _asked(model, options, "eos_token_id")
    return [] if end is None else [int(token) for token in torch.as_tensor(end).flatten().tolist()]


def _stop_strings(model: Any, options: dict[str, Any]) -> tuple[str, ...]:
    stop = _asked(model, options, "stop_strings") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _new_tokens(model: Any, prompts: Sequence[CompiledPrompt], options: dict[str, Any]) -> int:
    """How many tokens at most will be generated, as transformers counts: its own default is 20."""
    new, total = (_asked(model, options, name) for name in ("max_new_tokens", "max_length"))
    if new is None:
        new = 20 if total is None else max(0, total - max(len(prompt) for prompt in prompts))
    return int(new)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _results(
    prompts: Sequence[CompiledPrompt], rows: Tensor, block: Block, model: Any, options: dict[str, Any], cost: Stats
) -> list[Generation]:
    """Split the rows ``[P × sequences, columns]`` by prompt; cut off the prompt, an EOS and what follows, and a stop string."""
    ends, stop = torch.tensor(_end_ids(model, options), dtype=torch.long), _stop_strings(model, options)
    per_prompt = len(rows) // len(prompts)
    new = rows[:, block.columns.width :].cpu()
    results = []
    for p, prompt in enumerate(prompts):
        sequences = []
        decode = decoder(prompt.tokenizer)
        for row in new[p * per_prompt : (p + 1) * per_prompt]:
            stops = torch.isin(row, ends).nonzero()
            ids = row[: int(stops[0])] if len(stops) else row
            text, kept = cut_at_stop(ids.tolist(), decode(ids.tolist()), stop, decode)
            sequences.append(Continuation(text, ids[:kept]))
        stats = replace(cost, generated=sum(len(sequence.token_ids) for sequence in sequences))
        sink = prompt.graph.names[prompt.graph.sinks[0]]
        results.append(Generation(prompt.graph, prompt, {sink: tuple(sequences)}, block.backend.name, stats))
    return results
