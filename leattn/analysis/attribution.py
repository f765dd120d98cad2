"""``attribute``: what each node, edge and token of a prompt is worth for a target, by suppressing and by cutting it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from leattn.analysis.attribution_result import MEASURES, METHODS, Attribution, Importance, Measure, Method
from leattn.analysis.targets import Target, last_logits, one_backend, target_ids, target_logits, token_losses
from leattn.attention.request import Backend
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError, choices
from leattn.interventions.operation import Layers, checked_layers
from leattn.interventions.scores import MODES, SHIFTS, Mode, Shift, Suppress
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt


def attribute(
    model: Any,
    prompt: CompiledPrompt,
    target: Target,
    *,
    nodes: Iterable[ICLNode | str] | ICLNode | str | None = None,
    edges: Iterable[tuple[ICLNode | str, ICLNode | str]] | None = None,
    methods: Method | Sequence[Method] = ("suppress_nodes", "cut_nodes", "cut_edges"),
    factor: float = 0.1,
    mode: Mode = "multiplicative",
    layers: Layers | None = None,
    neighbours: float | None = None,
    shift: Shift = "visible",
    target_tokens: bool = False,
    measure: Measure = "loss",
    squared: bool = False,
    batch_size: int = 16,
    backend: str | Backend = "auto",
    progress: bool = True,
) -> Attribution:
    """How much each node, edge and token of a prompt matters for a target that continues it.

    importance = loss(target | intervened) − loss(target | untouched): larger is more important, negative means that the
    target is likelier without. A loss is the summed cross-entropy of the target tokens in nats. Layout, tokens and positions
    stay as they are; the target sees the last node (the sink) and what that one sees, after the cut.

    Parameters
    ----------
    target
        Text, tokenized by itself, or token ids: T tokens, each predicted from the prompt and the target tokens before it.
    nodes
        Which nodes to suppress or cut, as what is seen; of ``"suppress_tokens"``, whose tokens. Default: all but the sink,
        which the target continues; its tokens may be named for ``"suppress_tokens"`` alone. BOS is a candidate.
    edges
        ``(who sees, who is seen)`` for ``"cut_edges"``. Default: every edge of the visible relation towards ``nodes``.
    methods
        ``"suppress_nodes"``: attention scores of each node's tokens, as keys, changed by ``factor`` (AtMan by node).
        ``"cut_nodes"``: nobody sees the node any more. ``"cut_edges"``: one node no longer sees one other.
        ``"suppress_tokens"``: each token by itself.
    factor, mode, shift, layers
        As in :class:`leattn.interventions.Suppress`; for suppression only. AtMan's published code has ``shift="all"``.
    neighbours
        A cosine κ, 0.6 in the paper: a token is suppressed together with the tokens of the prompt whose input embeddings
        have cosine c ≥ κ with its own, by ``factor + (1 − factor)(1 − c)``. None: alone.
    target_tokens
        Target tokens count too, but for the last: with ``"suppress_tokens"`` as candidates, each for those after it, and as
        neighbours. Without ``nodes`` the sink's tokens are then candidates as well.
    measure
        ``"loss"``, or ``"logit"``: importance = logit(target | untouched) − logit(target | intervened).
    squared
        Each target token's difference is squared.
    batch_size
        Interventions per forward pass. They change no result, up to rounding.
    progress
        A bar for what takes longer than two seconds.

    Notes
    -----
    The numbers of AtMan's published explainer (Deiseroth et al., arXiv 2301.08110) are those of ``methods="suppress_tokens"``
    with ``shift="all"``, ``neighbours=0.6`` and ``target_tokens=True``. Its delta of cross-entropies is the untouched loss less
    the other, so the sign is the opposite of ours unless ``squared``; its delta of logits is ours.

    Raises
    ------
    LeattnError
        An unknown method, node, edge or layer, an empty target, the sink as a candidate, a model in training mode, a prompt
        with several sinks.
    BackendError
        A backend that cannot carry suppression; a target token that the model has no embedding for.

    Examples
    --------
    >>> import leattn
    >>> from leattn import ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> a = ICLNode("\\nThe capital of Zarvia is Lumo.", [bos], id="a")
    >>> b = ICLNode("\\nThe capital of Genia is Madan.", [bos], id="b")
    >>> q = ICLNode("\\nQ: What is the capital of Zarvia?\\nA:", [bos, a, b], id="Q")
    >>> found = attribute(model, leattn.compile_prompt(q, tokenizer), " Lumo")
    >>> found.rank("cut_nodes")[0].node, found.rank("cut_edges")[0].query
    ('a', 'Q')
    """
    if not isinstance(prompt, CompiledPrompt):
        raise LeattnError(f"attribute takes one compiled prompt, not {type(prompt).__name__}; call leattn.compile_prompt first")
    chosen = (methods,) if isinstance(methods, str) else tuple(dict.fromkeys(methods))
    for method in chosen:
        if method not in METHODS:
            raise LeattnError(choices("method", method, METHODS))
    if not chosen:
        raise LeattnError("methods is empty; " + choices("method", None, METHODS))
    if mode not in MODES:
        raise LeattnError(choices("mode", mode, MODES))
    if batch_size < 1:
        raise LeattnError(f"batch_size is {batch_size}; give 1 or more")
    if neighbours is not None and mode == "additive":
        raise LeattnError("neighbours are suppressed by factor + (1 − factor)(1 − c), which is no shift; use another mode")
    if neighbours is not None and not 0 < neighbours <= 1:
        raise LeattnError(f"neighbours={neighbours} is a least cosine; give a number above 0 and up to 1, or None")
    if shift not in SHIFTS:
        raise LeattnError(choices("shift", shift, SHIFTS))
    if measure not in MEASURES:
        raise LeattnError(choices("measure", measure, MEASURES))
    (ids,) = target_ids(model, [prompt], [target])
    whole = _continued(prompt, ids) if target_tokens else prompt
    by_token = chosen == ("suppress_tokens",)
    candidates = _candidates(prompt, nodes, sink=by_token)
    token_nodes = list(whole.graph.nodes) if target_tokens and nodes is None else candidates
    if target_tokens and nodes is not None:
        token_nodes = [*candidates, *whole.graph.nodes[len(prompt.graph) :]]
    chosen_edges = _edges(prompt, candidates, edges) if "cut_edges" in chosen else []
    count = len(Model.of(model).layers)
    numbers = None if layers is None else tuple(sorted(checked_layers("attribute", layers, count)))
    suppress = Suppress(0, factor, mode=mode, shift=shift, layers=numbers)
    backend = one_backend(model, prompt, [suppress] if any(m.startswith("suppress") for m in chosen) else [], backend)

    trials = [_Trial("cut_nodes", "", prompt)]  # untouched
    for method in chosen:
        if method == "suppress_nodes":
            trials += [
                _Trial(method, prompt.graph.name(node), prompt, replace(suppress, tokens=prompt.spans[node]))
                for node in candidates
            ]
        elif method == "cut_nodes":
            trials += [_Trial(method, prompt.graph.name(node), prompt.without_node(node)) for node in candidates]
        elif method == "cut_edges":
            trials += [
                _Trial(method, prompt.graph.name(seen), prompt.without_edge(node, seen), query=prompt.graph.name(node))
                for node, seen in chosen_edges
            ]
        else:
            trials += _token_trials(model, whole, prompt, token_nodes, suppress, factor, neighbours)

    measured: list[torch.Tensor] = []
    loss = torch.empty(0)
    batches = [trials[i : i + batch_size] for i in range(0, len(trials), batch_size)]
    for batch in tqdm(batches, desc="attribute", leave=False, disable=not progress or len(batches) < 2, delay=2):
        operations = [replace(trial.suppress, rows=[i]) for i, trial in enumerate(batch) if trial.suppress is not None]
        if target_tokens:
            some = [_continued(trial.prompt, ids) for trial in batch]
            logits = last_logits(model, some, len(ids), operations, backend=backend)
        else:
            logits = target_logits(model, [trial.prompt for trial in batch], [ids] * len(batch), operations, backend=backend)
        if not measured:
            loss = token_losses(logits[0], ids)
        measured += [token_losses(one, ids) if measure == "loss" else -_own_logits(one, ids) for one in logits]
    rows = []
    for trial, value in zip(trials[1:], measured[1:], strict=True):
        gained = value - measured[0]
        if trial.token is not None and trial.token >= len(prompt):  # only what comes after a target token can depend on it
            gained[: trial.token - len(prompt) + 1] = 0.0
        each = tuple((gained**2 if squared else gained).tolist())
        text = None if trial.token is None else whole.decode(whole.input_ids[0, trial.token : trial.token + 1])
        rows.append(Importance(trial.method, trial.node, trial.query, trial.token, text, sum(each), each))
    return Attribution(
        prompt=whole,
        target_ids=ids,
        loss=tuple(loss.tolist()),
        rows=tuple(rows),
        methods=chosen,
        factor=float(factor),
        mode=mode,
        layers=numbers,
        backend=backend.name,
        shift=shift,
        measure=measure,
        squared=squared,
    )


@dataclass(frozen=True)
class _Trial:
    """One intervention: an edited prompt, or a suppression of the prompt as it is."""

    method: Method
    node: str
    prompt: CompiledPrompt
    suppress: Suppress | None = None
    query: str | None = None
    token: int | None = None


def _continued(prompt: CompiledPrompt, ids: Sequence[int]) -> CompiledPrompt:
    """The prompt with the target behind it, but for its last token, which nothing comes after."""
    if len(ids) == 1:
        return prompt
    return prompt.continued(ids[:-1], None if "target" in prompt.graph else "target")


def _own_logits(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Each target token's own logit, float64 ``[T]`` on the CPU, of ``[T, V]``."""
    return logits[range(len(ids)), list(ids)].double().cpu()


def _candidates(prompt: CompiledPrompt, nodes: Iterable[ICLNode | str] | ICLNode | str | None, *, sink: bool) -> list[ICLNode]:
    """The nodes asked for, by default all but the last; ``sink`` says whether that may be named."""
    last = prompt.graph.nodes[-1]
    if nodes is None:
        return list(prompt.graph.nodes[:-1])
    given = [nodes] if isinstance(nodes, (str, ICLNode)) else list(nodes)
    found = [prompt.graph[node] for node in given]
    if last in found and not sink:
        raise LeattnError(
            f"{prompt.graph.name(last)!r} is the last node, which the target continues; it cannot be a candidate, leave it out "
            "(methods='suppress_tokens' alone takes its tokens)"
        )
    return list(dict.fromkeys(found))


def _edges(
    prompt: CompiledPrompt, candidates: Sequence[ICLNode], edges: Iterable[tuple[ICLNode | str, ICLNode | str]] | None
) -> list[tuple[ICLNode, ICLNode]]:
    if edges is None:
        wanted = set(candidates)
        return [(node, seen) for node in prompt.graph.nodes for seen in prompt.sees(node) if seen in wanted]
    found = []
    for edge in edges:
        if isinstance(edge, str) or len(tuple(edge)) != 2:
            raise LeattnError(f"an edge is a pair (who sees, who is seen), not {edge!r}")
        node, seen = (prompt.graph[end] for end in edge)
        prompt.without_edge(node, seen)  # says so if there is no such edge
        found.append((node, seen))
    return list(dict.fromkeys(found))


def _token_trials(
    model: Any,
    whole: CompiledPrompt,
    prompt: CompiledPrompt,
    candidates: Sequence[ICLNode],
    suppress: Suppress,
    factor: float,
    neighbours: float | None,
) -> Iterator[_Trial]:
    """Each token of the candidates, alone or with its neighbours in embedding space; ``whole`` is the prompt, or continued."""
    embedded = None
    if neighbours is not None:
        table = model.get_input_embeddings().weight.detach()
        embedded = torch.nn.functional.normalize(table[whole.input_ids[0].to(table.device)].float(), dim=-1)  # [S, d]
    for node in candidates:
        for token in range(*whole.spans[node]):
            factors = {token: float(factor)}
            if embedded is not None and neighbours is not None:
                cosines = (embedded @ embedded[token]).clamp(max=1.0).tolist()
                near = {j: factor + (1 - factor) * (1 - c) for j, c in enumerate(cosines) if c >= neighbours}
                factors = near | factors
            one = replace(suppress, tokens=list(factors), factor=list(factors.values()))
            yield _Trial("suppress_tokens", whole.graph.name(node), prompt, one, token=token)
