"""``generate``: a prompt with one sink is continued by transformers' own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, overload

import torch
from transformers import PreTrainedTokenizerBase

from leattn.backends import hf
from leattn.backends.attend import attend, check_positions
from leattn.backends.binding import Attention
from leattn.backends.call import several_sinks
from leattn.compile import CompiledPrompt, compile_prompt
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.generation.result import Generation, Stats
from leattn.generation.result import Sequence as Continuation
from leattn.positions import Positions
from leattn.visible import Visibility

Target: TypeAlias = CompiledPrompt | ICLGraph | ICLNode
OURS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids")


@overload
def generate(model: Any, target: Target, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any) -> Generation: ...
@overload
def generate(
    model: Any, target: Sequence[Target], tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
) -> list[Generation]: ...
def generate(
    model: Any,
    target: Target | Sequence[Target],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
    backend: str = "auto",
    seed: int | None = None,
    **hf_generate_kwargs: Any,
) -> Generation | list[Generation]:
    """Continue the sink of a graph with transformers' own ``generate``.

    Parameters
    ----------
    model
        A transformers model with ``generate``.
    target
        A compiled prompt, a graph or a node; a list of them is a batch and gives a list.
    tokenizer, positions, visibility
        To compile with; a compiled prompt brings its own.
    backend
        As in :func:`leattn.attend`.
    seed
        Seeds sampling, and leaves the global random state as it was.
    **hf_generate_kwargs
        Everything that ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``num_return_sequences``,
        ``streamer``, ``stopping_criteria``, ``logits_processor``, ``assistant_model``, ``use_cache``, …

    Returns
    -------
    Generation
        ``.text`` is the continuation; see there for the rest.

    Raises
    ------
    LeattnError
        Several sinks, arguments that belong to the prompt, positions that the model does not have.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> result = leattn.generate(model, leattn.ICLNode("The capital of"), tokenizer, max_new_tokens=3)
    >>> result.stats.generated <= 3
    True
    """
    is_batch = isinstance(target, Sequence)
    targets: Sequence[Target] = target if isinstance(target, Sequence) else [target]
    if not targets:
        raise LeattnError("there is nothing to generate from: the list of prompts is empty")
    for name in OURS:
        if name in hf_generate_kwargs:
            raise LeattnError(
                f"{name} comes from the prompt; put the tokens into a node, or use leattn.attend with model.generate"
            )
    prompts = [
        item
        if isinstance(item, CompiledPrompt)
        else compile_prompt(item, tokenizer, positions=positions, visibility=visibility)
        for item in targets
    ]
    for prompt in prompts:
        if len(prompt.graph.sinks) > 1:
            raise LeattnError(several_sinks(prompt))
    if tokenizer is None:
        tokenizer = prompts[0].tokenizer
    options = _options(model, tokenizer, hf_generate_kwargs)
    check_positions(prompts, hf.read_facts(model), new_tokens=_new_tokens(model, prompts, options))

    with attend(model, prompts, backend=backend) as attention, _seeded(seed, attention.facts.device):
        started = time.perf_counter()
        output = model.generate(**attention.inputs, **options)
        seconds = time.perf_counter() - started
    rows = output if isinstance(output, torch.Tensor) else output.sequences
    results = _results(prompts, rows, attention, _end_ids(model, options), seconds)
    return results if is_batch else results[0]


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
    prompts: Sequence[CompiledPrompt], rows: torch.Tensor, attention: Attention, ends: list[int], seconds: float
) -> list[Generation]:
    """Split the rows ``[P × sequences, columns]`` by prompt and cut the prompt and what follows an EOS."""
    per_prompt = len(rows) // len(prompts)
    new = rows[:, attention.batch.table.columns :].cpu()
    results = []
    for p, prompt in enumerate(prompts):
        sequences = []
        for row in new[p * per_prompt : (p + 1) * per_prompt]:
            stops = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
            ids = row[: int(stops[0])] if len(stops) else row
            sequences.append(Continuation(prompt.decode(ids), ids))
        stats = Stats(
            computed=attention.computed,
            reused=0,
            generated=sum(len(sequence.token_ids) for sequence in sequences),
            steps=attention.forwards,
            seconds=seconds,
        )
        sink = prompt.graph.names[prompt.graph.sinks[0]]
        results.append(Generation(prompt, {sink: tuple(sequences)}, attention.backend.name, stats))
    return results
