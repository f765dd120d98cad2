"""``score``: how likely continuations of prompts are. Everything that prompts have in common is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from leattn.attention.request import Backend
from leattn.dag.node import ICLNode
from leattn.dag.tokens import tokenize_all
from leattn.errors import LeattnError
from leattn.generation.program import Program
from leattn.generation.result import Stats
from leattn.generation.schedule import COMPACT
from leattn.generation.scores import Score, Scores
from leattn.generation.session import Session, is_intervened, session
from leattn.generation.targets import Target, reader_of, ready
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions
from leattn.prompt.visible import Visibility

Continuation: TypeAlias = str | Sequence[int] | Tensor
"""A text, or token ids."""


def score(
    model: Any,
    prompts: Target | Sequence[Target],
    continuations: Continuation | Sequence[Continuation] | Sequence[Sequence[Continuation]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    unconditional: Target | str | None = None,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
    backend: str | Backend = "auto",
    kv_store: KVStore | None = None,
    token_budget: int = 2048,
    progress: bool = True,
) -> Scores:
    """Log-probabilities of continuations of one or many prompts, in nats.

    All of it is one program: what prompts have in common, by tokens, by what it sees and by its place, is computed once, and so
    is each prompt for all of its continuations. A continuation stands behind its prompt as what is generated does: it sees the
    sink and what that sees, and reads as it does. Runs without gradients.

    Parameters
    ----------
    model
        A transformers model with a language-model head, in evaluation mode.
    prompts
        A compiled prompt, a graph or a node, or a list of them. Of a graph with several sinks (a paraphrase group) each sink is
        continued.
    continuations
        Texts or token ids, the same for all prompts; or a list of those for each prompt. Texts are tokenized by themselves with
        nothing added, so an answer that follows a space begins with one.
    tokenizer, positions, visibility, backend, kv_store
        As in :func:`leattn.generate`. Continuations are not stored.
    unconditional
        A prompt that says nothing of the question, such as ``"Answer:"``, for ``scores.normalised("unconditional")``: how much
        likelier a continuation is made by the prompt (Holtzman et al., arXiv 2104.08315).
    token_budget
        Tokens that one forward computes at most (at least one node), which bounds memory.
    progress
        A progress bar over the prompts, if there are several.

    Returns
    -------
    Scores
        ``scores.logprobs`` are the totals: a list for one prompt, a list of lists for several; a prompt with several sinks has
        a list for each of them. See there for the rest.

    Raises
    ------
    LeattnError
        Nothing to score, an empty continuation, lists of unequal length, nodes that are still to be written, a model in
        training mode, texts without a tokenizer.
    BackendError
        A model that cannot follow a graph, or cannot cache; tokens and positions that it does not have.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> fact = leattn.ICLNode("The capital of Zarvia is Lumo.", id="fact")
    >>> ask = leattn.ICLNode("\\nQ: What is the capital of Zarvia?\\nA:", [fact], id="Q")
    >>> scores = leattn.score(model, ask, [" Lumo", " Pardan"], tokenizer)
    >>> scores.best(), scores.logprobs[0] > scores.logprobs[1]
    (0, True)
    """
    record = Model.of(model)
    if model.training:
        raise LeattnError("the model is in training mode, where dropout would make every score a draw; call model.eval() first")
    if isinstance(prompts, str):
        raise LeattnError(f"prompts are compiled prompts, graphs or nodes; make one of the text: ICLNode({prompts[:20]!r})")
    is_list = isinstance(prompts, Sequence)
    targets: list[Target] = list(prompts) if isinstance(prompts, Sequence) else [prompts]
    if not targets:
        raise LeattnError("there is nothing to score: the list of prompts is empty")
    reader = reader_of(targets, tokenizer)
    given = _per_prompt(continuations, len(targets))
    if unconditional is not None:
        targets.append(ICLNode(unconditional) if isinstance(unconditional, str) else unconditional)
        given.append([one for each in given for one in each])
    compiled = []
    for target in targets:
        prompt = ready(target, reader, tokenizer is not None, positions, visibility)
        if not isinstance(prompt, CompiledPrompt):
            raise LeattnError(
                "a graph with a GenNode has no text to score yet; generate it first, and score the result's .realised"
            )
        compiled.append(prompt)
    asked = [[_ids(one, reader) for one in each] for each in given]

    program = Program(by_node=is_intervened(record))
    parts = [_added(program, prompt, ids) for prompt, ids in zip(compiled, asked, strict=True)]
    for prompt, ids in zip(compiled, asked, strict=True):
        record.facts.check_token(max(map(max, ids)), "a continuation")
        record.facts.check_positions([prompt], new_tokens=max(map(len, ids)))
    room = min(sum(len(unit.ids) for unit in program.units), COMPACT) + 2 * token_budget
    started = perf_counter()
    with (
        session(model, record, program, backend=backend, kv_store=kv_store, room=room) as work,
        tqdm(total=len(parts), unit="prompt", disable=not progress or len(parts) == 1) as bar,
    ):
        for done in _run(work, parts, token_budget):
            bar.update(done)
        stats = Stats(work.computed, work.reused, 0, work.block.forwards, perf_counter() - started)
        name = work.block.backend.name
    by_itself = {} if unconditional is None else {ids: float(each.sum()) for ids, each in parts.pop().found[0].items()}
    rows = [
        Score(
            prompt=p,
            node=node,
            continuation=c,
            text=one if isinstance(one, str) else compiled[p].decode(torch.tensor(ids)),
            token_logprobs=found[ids],
            unconditional=by_itself.get(ids),
        )
        for p, part in enumerate(parts)
        for node, found in zip(part.names, part.found, strict=True)
        for c, (one, ids) in enumerate(zip(given[p], asked[p], strict=True))
    ]
    return Scores(tuple(rows), is_list, stats, name)


@dataclass
class _Part:
    """One prompt within the program.

    ``sinks`` are the units of its sinks, ``continuations`` those of what continues each of them, by ids: None for a single
    token, which needs none, for the sink's logits say how likely it is. ``found`` are the log-probabilities ``[n]`` of each.
    """

    names: list[str]
    nodes: list[int]
    sinks: list[int]
    continuations: list[dict[tuple[int, ...], int | None]]
    found: list[dict[tuple[int, ...], Tensor]]

    @property
    def units(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """Continuations of more than one token, and their units."""
        return ((ids, unit) for each in self.continuations for ids, unit in each.items() if unit is not None)


def _added(program: Program, prompt: CompiledPrompt, asked: Iterable[tuple[int, ...]]) -> _Part:
    nodes, different = program.add_nodes(prompt), dict.fromkeys(asked)
    sinks = prompt.graph.sinks
    continuations = [
        {ids: program.add_continuation(prompt, sink, nodes) if len(ids) > 1 else None for ids in different} for sink in sinks
    ]
    names = [prompt.graph.names[sink] for sink in sinks]
    return _Part(names, nodes, [nodes[prompt.graph.index[sink]] for sink in sinks], continuations, [{} for _ in sinks])


def _run(work: Session, parts: Sequence[_Part], budget: int) -> Iterator[int]:
    """Score some parts in every round, as many as fill a forward; yields how many."""
    sees = work.program.sees
    last_use = {j: p for p, part in enumerate(parts) for i in part.nodes for j in (*sees[i], i)}
    sinks = dict.fromkeys((sink for part in parts for sink in part.sinks), 1)  # one of them may be another prompt's document
    next_tokens: dict[int, Tensor] = {}  # after each sink: log-probabilities of all tokens, [V]
    compact_at = COMPACT
    begin = end = 0
    while begin < len(parts):
        last = dict(sinks)
        while end < len(parts) and (end == begin or sum(len(ids) for _, ids in work.queue) < budget):
            part = parts[end]
            work.place(part.sinks, compute=sinks)
            work.queue.extend((unit, ids[:-1]) for ids, unit in part.units)
            last |= {unit: len(ids) - 1 for ids, unit in part.units}
            end += 1
        after = {unit: ids for part in parts[begin:end] for ids, unit in part.units}
        later: dict[int, Tensor] = {}
        for fed in work.run(budget, last):
            for unit, logits in fed.items():
                if unit in after:
                    later[unit] = _chosen(logits, after[unit][1:])
                elif unit in sinks:
                    next_tokens[unit] = logits[-1].float().log_softmax(-1)
        for part in parts[begin:end]:
            for sink, continuations, found in zip(part.sinks, part.continuations, part.found, strict=True):
                for ids, goes_on in continuations.items():
                    first = next_tokens[sink][ids[0]].double().cpu()[None]
                    found[ids] = first if goes_on is None else torch.cat([first, later[goes_on]])
        yield end - begin
        begin = end
        next_tokens = {sink: row for sink, row in next_tokens.items() if last_use[sink] >= end}
        if work.row.length > compact_at:
            work.forget_all_but([unit for unit, use in last_use.items() if use >= end and work.is_placed(unit)])
            compact_at = max(COMPACT, 2 * work.row.length)


def _chosen(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of one token per row of logits ``[n, V]``, float64 ``[n]`` on the CPU."""
    logits = logits.float()
    at = torch.tensor(ids, device=logits.device)[:, None]
    return (logits.gather(1, at)[:, 0] - logits.logsumexp(-1)).double().cpu()


def _per_prompt(continuations: Any, count: int) -> list[list[Continuation]]:
    """The continuations of each prompt.

    Raises
    ------
    LeattnError
        None at all, or not one list per prompt.
    """
    if _is_one(continuations):
        return [[continuations] for _ in range(count)]
    each = list(continuations)
    if each and all(map(_is_one, each)):
        return [each for _ in range(count)]
    found = [list(one) for one in each]
    if len(found) != count or not all(found):
        raise LeattnError(
            f"continuations are one list for all prompts, or a list that is not empty for each of the {count}; there are "
            f"{len(found)}, of {', '.join(str(len(one)) for one in found) or 'none'}"
        )
    return found


def _is_one(given: Any) -> bool:
    return isinstance(given, str | Tensor) or (isinstance(given, Sequence) and bool(given) and isinstance(given[0], int))


def _ids(continuation: Continuation, reader: Any) -> tuple[int, ...]:
    return tuple(tokenize_all([ICLNode(continuation, id="a continuation")], reader)[0])
