"""Prompts with one sink each, continued by transformers' own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from leattn.attention.attend import attend, check_positions
from leattn.attention.block import Attention
from leattn.errors import LeattnError
from leattn.generation.branch import cut_at_stop, decoder
from leattn.generation.fill import fill, is_intervened
from leattn.generation.result import Generation, Stats
from leattn.generation.result import Sequence as Continuation
from leattn.kv.store import KVStore
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt


def continue_sinks(
    model: Any,
    prompts: Sequence[CompiledPrompt],
    tokenizer: Any,
    *,
    backend: str,
    kv_store: KVStore | None,
    seed: int | None,
    options: dict[str, Any],
) -> list[Generation]:
    """One generation per prompt; several prompts are a batch, padded on the left. With a store there is one prompt."""
    options = _options(model, tokenizer, options)
    check_positions(prompts, hf.read_facts(model), new_tokens=_new_tokens(model, prompts, options))
    started = time.perf_counter()
    filled = None
    if kv_store is not None and not is_intervened(model):
        for name in ("past_key_values", "cache_implementation"):
            if options.get(name) is not None:
                raise LeattnError(f"{name} and kv_store are two ways to hand over keys and values; give one of them")
        if options.get("use_cache") is False:
            raise LeattnError("use_cache=False computes everything again for every token; leave it out, or leave kv_store out")
        filled = fill(model, prompts[0], backend=backend, kv_store=kv_store)
        options["past_key_values"] = filled.cache_of(_rows(model, options))
    with attend(model, prompts, backend=backend) as attention, _seeded(seed, attention.facts.device):
        output = model.generate(**attention.inputs, **options)
    if filled is not None:
        filled.keep_sink(options["past_key_values"])
    seconds = time.perf_counter() - started
    rows = output if isinstance(output, torch.Tensor) else output.sequences
    computed = attention.computed + (filled.computed if filled else 0)
    cost = Stats(computed, filled.reused if filled else 0, 0, attention.forwards + (filled.forwards if filled else 0), seconds)
    return _results(prompts, rows, attention, model, options, cost)


def _rows(model: Any, options: dict[str, Any]) -> int:
    """Rows that each prompt takes: beams, or return sequences."""
    config = options.get("generation_config") or model.generation_config
    return max(int(options.get(name) or getattr(config, name) or 1) for name in ("num_beams", "num_return_sequences"))


def _options(model: Any, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The caller's arguments, and a padding id where the model has none (transformers would warn and do the same)."""
    options = dict(given)
    if options.get("stop_strings") is not None:
        options.setdefault("tokenizer", tokenizer)
    config = options.get("generation_config") or model.generation_config
    if options.get("pad_token_id") is None and config.pad_token_id is None:
        ends = _end_ids(model, options)
        options["pad_token_id"] = ends[0] if ends else 0
    return options


def _end_ids(model: Any, options: dict[str, Any]) -> list[int]:
    config = options.get("generation_config") or model.generation_config
    end = options.get("eos_token_id", config.eos_token_id)
    if end is None:
        return []
    return [int(token) for token in (end if isinstance(end, (list, tuple)) else torch.as_tensor(end).flatten().tolist())]


def _stop_strings(model: Any, options: dict[str, Any]) -> tuple[str, ...]:
    config = options.get("generation_config") or model.generation_config
    stop = options.get("stop_strings") or config.stop_strings or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _new_tokens(model: Any, prompts: Sequence[CompiledPrompt], options: dict[str, Any]) -> int:
    """How many tokens at most will be generated, as transformers counts: its own default is 20."""
    config = options.get("generation_config") or model.generation_config
    new = options.get("max_new_tokens") or config.max_new_tokens
    if new is None:
        total = options.get("max_length") or config.max_length
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
    prompts: Sequence[CompiledPrompt],
    rows: torch.Tensor,
    attention: Attention,
    model: Any,
    options: dict[str, Any],
    cost: Stats,
) -> list[Generation]:
    """Split the rows ``[P × sequences, columns]`` by prompt; cut off the prompt, an EOS and what follows, and a stop string."""
    ends, stop = torch.tensor(_end_ids(model, options), dtype=torch.long), _stop_strings(model, options)
    per_prompt = len(rows) // len(prompts)
    new = rows[:, attention.batch.table.columns :].cpu()
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
        results.append(Generation(prompt.graph, prompt, {sink: tuple(sequences)}, attention.backend.name, stats))
    return results
