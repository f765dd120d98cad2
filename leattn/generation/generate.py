"""``generate``: one sink goes through transformers' own ``generate``, everything else runs as a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from leattn.attention.backends import named, unfit
from leattn.attention.request import Backend
from leattn.errors import BackendError, LeattnError
from leattn.generation.options import HARMLESS, Options
from leattn.generation.program import build, is_program
from leattn.generation.result import Generation
from leattn.generation.session import is_intervened
from leattn.generation.sink import continue_sinks
from leattn.generation.targets import Target, reader_of, ready
from leattn.generation.together import OnInterrupt, write_together
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions
from leattn.prompt.visible import Visibility

SHARED = 0.1
"""The share of a list's tokens that have to be equal to others for it to be worth a program."""
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
    backend: str | Backend = "auto",
    kv_store: KVStore | None = None,
    seed: int | None = None,
    streamer: Any = None,
    on_finished: Callable[[str, str], None] | None = None,
    progress: bool = False,
    token_budget: int | None = None,
    on_interrupt: OnInterrupt = "raise",
    logprobs: bool = False,
    **hf_generate_kwargs: Any,
) -> Generation | list[Generation]:
    """Continue the sinks of a graph, or write its ``GenNode`` s.

    A graph with one sink goes through transformers' own ``generate``. With several sinks, all of them are continued together;
    with ``GenNode`` s only those are written, each as soon as everything it sees is complete. Both run as a program: one
    sequence, one cache, one forward per step, in which no token is computed twice.

    Parameters
    ----------
    model
        A transformers model with ``generate``.
    target
        A compiled prompt, a graph or a node; a list of them is a batch and gives a list. What several of them have in common,
        nodes of the same tokens that see the same in the same place, is computed once: such a list runs as one program, unless
        it is sampled from, or asked for what a program cannot do.
    tokenizer
        To compile with, and to read what is written: texts and stop strings. The one given here counts, also for a prompt that
        was compiled from ids or with another one; for None a compiled prompt's own, or, where it has none, that of the first
        prompt in the list which has one.
    positions, visibility
        To compile with; a compiled prompt brings its own.
    backend
        As in :func:`leattn.attend`.
    kv_store
        Keys and values of nodes are taken from it where it has them, and given to it where it has not.
    seed
        Seeds sampling, and leaves the global random state as it was. In a program every branch draws by itself, from the seed
        and its name, so that its neighbours never change its draws.
    streamer
        For one sink a streamer of transformers; for a program a function ``(node id, text piece)``.
    on_finished
        Programs only: called with ``(node id, text)`` when a node is finished.
    progress
        Programs only: a progress bar over the nodes to write.
    token_budget
        Programs only: how many tokens one step feeds at most, which bounds its memory; branches past it wait.
    on_interrupt
        Programs only: ``"return"`` gives what was written so far after a keyboard interrupt, with ``complete`` False.
    logprobs
        Whether ``result.sequences`` have the log-probabilities of their tokens.
    **hf_generate_kwargs
        Everything that ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``num_return_sequences``,
        ``stopping_criteria``, ``logits_processor``, ``assistant_model``, ``use_cache``, … but what a :class:`Generation` has no
        room for (``output_scores``). A program takes what a ``GenerationConfig`` says about one sequence, for all branches
        alike; what a ``GenNode`` says itself wins. With a store, nothing that would reach the model. An option means the same
        in ``generation_config=`` and in the model's own ``generation_config``.

    Returns
    -------
    Generation
        ``.text`` is what was written; see there for the rest.

    Raises
    ------
    LeattnError
        Arguments that belong to the prompt, positions that the model does not have, beams or several return sequences in a
        program.

    Examples
    --------
    >>> import leattn
    >>> from leattn import GenNode, ICLGraph, ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> result = leattn.generate(model, ICLNode("The capital of"), tokenizer, max_new_tokens=3)
    >>> result.stats.generated <= 3
    True
    >>> fact = ICLNode("The capital of Zarvia is Mirelle.", id="fact")
    >>> first = GenNode("\\nQ: What is the capital of Zarvia?\\nA:", [fact], "first", max_new_tokens=4)
    >>> second = GenNode("\\nA:", [fact, first], "second", max_new_tokens=4)
    >>> result = leattn.generate(model, ICLGraph(second), tokenizer)
    >>> list(result.texts), result.realised["first"] is not first
    (['first', 'second'], True)
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
    reason = unfit(Model.of(model))  # what no option changes goes before all that is said of options
    if reason is not None:
        is_auto = isinstance(backend, str) and backend == "auto"
        cannot = "{} cannot follow a graph" if is_auto else "backend {!r} cannot run this model"
        who = cannot.format(type(model).__name__ if is_auto else named(backend).name)
        raise BackendError(f"{who}: {reason}")
    reader = reader_of(targets, tokenizer)
    prompts = [ready(item, reader, tokenizer is not None, positions, visibility) for item in targets]

    for_programs = {
        "on_finished": on_finished,
        "progress": progress,
        "token_budget": token_budget,
        "on_interrupt": on_interrupt,
    }
    single = [prompt for prompt in prompts if isinstance(prompt, CompiledPrompt) and not is_program(prompt)]
    together = len(single) < len(prompts) or (len(prompts) > 1 and kv_store is not None)
    if together or (streamer is None and _worth_sharing(model, single, reader, backend, hf_generate_kwargs)):
        results = write_together(
            model,
            prompts,
            reader,
            positions=positions,
            visibility=visibility,
            backend=backend,
            kv_store=kv_store,
            seed=seed,
            streamer=streamer,
            config=hf_generate_kwargs,
            logprobs=logprobs,
            **for_programs,  # type: ignore[arg-type]
        )
    else:
        for name, value in for_programs.items():
            if value not in (None, False, "raise"):
                raise LeattnError(f"{name} is for programs; a graph with one sink and no GenNode is continued by transformers")
        if streamer is not None:
            hf_generate_kwargs["streamer"] = streamer
        results = continue_sinks(
            model, single, reader, backend=backend, kv_store=kv_store, seed=seed, options=hf_generate_kwargs, logprobs=logprobs
        )
    return results if is_batch else results[0]


def _worth_sharing(
    model: Any,
    prompts: Sequence[CompiledPrompt],
    reader: Any,
    backend: str | Backend,
    options: Mapping[str, Any],
) -> bool:
    """Whether a list of prompts has nodes in common, and may run as one program in which they are computed once."""
    if backend not in ("auto", "sparse") or not {"generation_config"}.issuperset(set(options) & set(HARMLESS)):
        return False  # whoever looks at tokens as they come looks at a batch
    record = Model.of(model)
    if is_intervened(record) or record.facts.cached_beside is not None:
        return False
    program, _ = build(prompts, reader)
    tokens = sum(map(len, prompts))
    if tokens - sum(len(unit.ids) for unit in program.units) < SHARED * tokens:
        return False
    try:
        config = Options(model, options, "a program").config
    except LeattnError:  # transformers can do more, or says itself what it cannot
        return False
    return not config.do_sample
