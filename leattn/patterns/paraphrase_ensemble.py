"""Several phrasings of one question, answered with one voice: at every step their next-token distributions become one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from tqdm.auto import tqdm

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError, choices
from leattn.generation.branch import decoder
from leattn.generation.program import build
from leattn.generation.result import Generation, Stats
from leattn.generation.result import Sequence as Written
from leattn.generation.sampling import Sampling
from leattn.generation.session import Feed, session
from leattn.kv.store import KVStore
from leattn.model.record import Model
from leattn.prompt.compile import compile_prompt, read_by
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.positions import Positions, scheme_of
from leattn.prompt.visible import Visibility
from leattn.table import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mean: TypeAlias = Literal["arithmetic", "geometric", "max"]
MEANS = ("arithmetic", "geometric", "max")
KEPT = 10
"""How many of the likeliest tokens of a step are kept."""
NAME = "ensemble"
"""The branch, where one is named: its draws come from a run's seed and this."""


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """What the phrasings of a question say together. P phrasings, T steps, V tokens of the vocabulary.

    Attributes
    ----------
    candidates : LongTensor ``[T, k]``
        The likeliest tokens of every step under the mean distribution, the likeliest first; a step that ended the text counts.
    probabilities : Tensor ``[T, k]``
        Their mean probabilities.
    first_step : Tensor ``[P, V]``
        What each phrasing by itself gives for the first token, as probabilities, in the order of ``generation.branches``: where
        phrasings disagree, it shows.
    generation : Generation
        Every phrasing continued with the same tokens.
    """

    candidates: torch.Tensor
    probabilities: torch.Tensor
    first_step: torch.Tensor
    generation: Generation

    @property
    def text(self) -> str:
        """What they say."""
        return self._sequence.text

    @property
    def token_ids(self) -> torch.Tensor:
        """The ids of it, ``[n]``."""
        return self._sequence.token_ids

    @property
    def _sequence(self) -> Written:
        return next(iter(self.generation.branches.values()))[0]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Ensemble({self.text!r}, {len(self.first_step)} phrasings, {len(self.candidates)} steps)"

    def _repr_html_(self) -> str:
        prompt = self.generation.prompt
        assert prompt is not None
        best = self.candidates[0, :5]
        rows = [(name, *own[best].tolist()) for name, own in zip(self.generation.branches, self.first_step, strict=True)]
        rows.append(("mean", *self.probabilities[0, :5].tolist()))
        return html_table(["first token", *(prompt.decode(token) for token in best)], rows, f"together: {self.text!r}")


def paraphrase_ensemble(
    model: Any,
    phrasings: ICLNode | Iterable[ICLNode] | ICLGraph | CompiledPrompt,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mean: Mean = "arithmetic",
    weights: Sequence[float] | Mapping[ICLNode | str, float] | None = None,
    positions: Positions = "after_parents",
    visibility: Visibility = "parents",
    backend: str = "auto",
    kv_store: KVStore | None = None,
    seed: int | None = None,
    progress: bool = False,
    **hf_generate_kwargs: Any,
) -> Ensemble:
    """Continue all sinks of a graph with the same tokens, each chosen from the mean of their next-token distributions.

    The sinks are phrasings of one question; what they share is computed once, and none sees another. A step is one forward that
    feeds the chosen token once per phrasing.

    Parameters
    ----------
    model
        A transformers model with ``generate``.
    phrasings
        The sinks, as nodes, as a graph, or compiled.
    tokenizer
        To compile with, and to read what is written, as for :func:`leattn.generate`.
    positions, visibility
        To compile with; a compiled prompt brings its own.
    mean
        ``"arithmetic"``: of the probabilities, a token is likely if some phrasings find it likely. ``"geometric"``: of the
        log-probabilities, made to sum to 1, a token is likely if no phrasing rules it out; the token of the largest mean logit
        is that of this mean, too. ``"max"``: each token's largest probability, made to sum to 1.
    weights
        How much each phrasing counts in a mean: by node or id, or in the order of the phrasings (of the sinks, where a graph is
        given); they are divided by their sum. With ``"max"`` the heaviest phrasing decides alone, the first of several, as in
        the published weighted maximum.
    backend, kv_store
        As for :func:`leattn.generate`.
    seed
        For ``do_sample=True``; the global random state stays as it was.
    progress
        A progress bar over tokens.
    **hf_generate_kwargs
        What ``generate`` takes for a program: ``max_new_tokens``, ``stop_strings``, ``do_sample``, ``temperature``,
        ``logits_processor``, … Processors and sampling work on the log of the mean; the ids they are given are those of the
        whole graph in layout order, and what was written.

    Returns
    -------
    Ensemble

    Raises
    ------
    LeattnError
        An unknown mean; weights that are negative, all 0 or not one per phrasing; ``positions="sequential"`` with several
        sinks; stop strings without a tokenizer; options of generation that are not about one sequence.
    CompileError
        A ``GenNode`` in the graph: write it first, and give the result's ``realised``.

    Examples
    --------
    Documents contradict each other, and the phrasing decides whom the model believes:

    >>> import leattn
    >>> from leattn import ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> texts = ["Zarvia is governed from Madan.", "In Zarvia, the capital is Lumo.", "Zarvia's capital is Pardan."]
    >>> docs = [ICLNode("\\n" + text, [bos]) for text in texts]
    >>> asks = ["What is the capital of Zarvia?", "From which city is Zarvia governed?", "Name the capital of Zarvia."]
    >>> phrasings = [ICLNode(f"\\nQ: {ask}\\nA:", [bos, *docs], ask) for ask in asks]
    >>> together = paraphrase_ensemble(model, phrasings, tokenizer, max_new_tokens=2)
    >>> [tokenizer.decode(token) for token in together.first_step.argmax(-1)], together.text
    ([' Lumo', ' Pardan', ' Lumo'], ' Lumo.')
    """
    if mean not in MEANS:
        raise LeattnError(choices("mean", mean, MEANS))
    for name in ("streamer", "on_finished", "on_interrupt", "token_budget"):
        if name in hf_generate_kwargs:
            raise LeattnError(
                f"{name} is for leattn.generate; an ensemble writes one text, its phrasings in step: leave it out"
            )
    if not isinstance(phrasings, (ICLNode, ICLGraph, CompiledPrompt)):
        phrasings = list(phrasings)
    prompt = phrasings if isinstance(phrasings, CompiledPrompt) else _compiled(phrasings, tokenizer, positions, visibility)
    if tokenizer is not None:
        prompt = read_by(prompt, tokenizer)
    program, (part,) = build([prompt], prompt.tokenizer)
    record = Model.of(model)
    counts = None if weights is None else _weights(weights, phrasings, prompt).to(record.device)
    sampling = Sampling(model, hf_generate_kwargs, record.device)
    if prompt.tokenizer is None and sampling.stop:
        raise LeattnError("stop strings are text, and there is no tokenizer to decode with; give one, or use eos_token_id")
    sinks = [prompt.graph.index[sink] for sink in prompt.graph.sinks]
    ends = [math.ceil(prompt.position_ids[0, prompt.offsets[i + 1] - 1].item()) for i in sinks]
    limit = sampling.limit({}, len(prompt))
    if not limit:
        raise LeattnError(f"max_length leaves no token to write after a graph of {len(prompt)} tokens; use max_new_tokens")
    record.facts.check_last_position(max(ends) + limit, f"the last position may be {max(ends) + limit}")
    if seed is None:
        seed = int(torch.randint(2**62, ()))  # so that torch.manual_seed is honoured
    before, decode = prompt.input_ids[0].tolist(), decoder(prompt.tokenizer)
    branch = sampling.branch(NAME, {}, before, limit=limit, stop=sampling.stop, decode=decode, seed=seed)

    started = time.perf_counter()
    steps: list[torch.Tensor] = []
    best: list[torch.Tensor] = []
    continuations = list(part.branches.values())
    with (
        tqdm(total=limit, unit="token", disable=not progress) as bar,
        session(model, record, program, backend=backend, kv_store=kv_store) as work,
    ):
        logprobs = work.logits(dict.fromkeys(sinks, 1)).logits[0].float().log_softmax(-1)
        first_step = logprobs.exp()
        while not branch.finished:
            together = _mean(logprobs, mean, counts)
            top = together.topk(min(KEPT, len(together)))
            steps.append(top.values.exp())
            best.append(top.indices)
            branch.choose(together)
            bar.update()
            if not branch.finished:
                feeds = [Feed(i, branch.ids[-1:], False) for i in continuations]
                logprobs = work.step(feeds, range(len(feeds))).logits[0].float().log_softmax(-1)
        for i in continuations:
            work.complete(i, branch.ids)
    stats = Stats(work.computed, work.reused, len(branch.ids), work.block.forwards, time.perf_counter() - started)
    said = (Written(branch.text, torch.tensor(branch.ids, dtype=torch.long)),)
    generation = Generation(prompt.graph, prompt, dict.fromkeys(part.branches, said), work.block.backend.name, stats)
    return Ensemble(torch.stack(best).cpu(), torch.stack(steps).cpu(), first_step.cpu(), generation)


def _compiled(phrasings: Any, tokenizer: Any, positions: Positions, visibility: Visibility) -> CompiledPrompt:
    prompt = compile_prompt(phrasings, tokenizer, positions=positions, visibility=visibility)
    if len(prompt.graph.sinks) > 1 and scheme_of(positions).branches_collide:
        raise LeattnError(
            f"with positions={positions!r} the {len(prompt.graph.sinks)} phrasings would go on at each other's positions; "
            "use 'after_parents', or pin them with end_pos_id"
        )
    return prompt


def _weights(weights: Sequence[float] | Mapping[ICLNode | str, float], phrasings: Any, prompt: CompiledPrompt) -> torch.Tensor:
    """One for each sink in layout order, ``[P]``; they sum to 1."""
    graph = prompt.graph
    if isinstance(weights, Mapping):
        given = {graph[node]: weight for node, weight in weights.items()}
    else:
        order = phrasings if isinstance(phrasings, list) else graph.sinks
        if len(weights) != len(order):
            raise LeattnError(f"there are {len(weights)} weights for {len(order)} phrasings; give one for each")
        given = dict(zip(order, weights, strict=True))
    if set(given) != set(graph.sinks):
        named = ", ".join(repr(graph.name(node)) for node in graph if (node in given) != (node in graph.sinks))
        raise LeattnError(f"weights are for the sinks, each of them; {named} is no sink, or has none")
    found = torch.tensor([float(given[sink]) for sink in graph.sinks], dtype=torch.float32)
    if not bool(found.isfinite().all()) or bool((found < 0).any()) or not bool(found.sum() > 0):
        raise LeattnError(f"the weights are {found.tolist()}; give numbers from 0 up, of which one is larger")
    return found / found.sum()


def _mean(logprobs: torch.Tensor, mean: Mean, weights: torch.Tensor | None) -> torch.Tensor:
    """The log of one distribution ``[V]`` of several, ``[P, V]``, weighted by ``[P]`` numbers that sum to 1."""
    if mean == "max":
        return logprobs.amax(0).log_softmax(-1) if weights is None else logprobs[int(weights.argmax())]
    if weights is None:
        weights = logprobs.new_full((len(logprobs),), 1 / len(logprobs))
    if mean == "geometric":
        kept = weights > 0  # what counts nothing does not rule a token out
        return (weights[kept, None] * logprobs[kept]).sum(0).log_softmax(-1)
    return (logprobs + weights.log()[:, None]).logsumexp(0)
