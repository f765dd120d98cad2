"""Whether a model can follow a graph on a backend: read off its config where possible, and tried out with tiny forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from leattn.attention.backends import BACKENDS, instead, refusal, unfit
from leattn.attention.block import Block
from leattn.attention.follow import check_not_in_use, follow, unfollowed
from leattn.attention.request import NEEDS, Backend
from leattn.attention.sample import PLAIN, in_words, probing, raise_if_not_the_models, sample, sample_tokens
from leattn.attention.verdicts import Failure, verdicts
from leattn.dag.node import ICLNode
from leattn.errors import BackendError
from leattn.model.record import Model, variant
from leattn.model.registry import OURS
from leattn.prompt.columns import columns_of
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt


def route(model: Any, record: Model, backend: Backend) -> tuple[str | None, bool]:
    """Why ``backend`` cannot run ``model``, or None if it can; and whether the model has to keep transformers' implementation.

    Found out once per model and backend, and again under another adapter, wrapper or dtype.
    """
    if record.unplaced is not None:
        return record.unplaced, False
    with record.lock:
        which = (id(backend), variant(model))
        if which not in record.routes:
            # The backend itself is kept, so that its id stays its own.
            record.routes[which] = (backend, *_remembered(model, record, backend))
        _, reason, native = record.routes[which]
        return reason, native


def _remembered(model: Any, record: Model, backend: Backend) -> tuple[str | None, bool]:
    """What the config tells, or an earlier process found out, or else what is found out now."""
    reason = unfit(record)
    if reason is not None:
        return reason, False
    reason = refusal(backend, record)
    if reason is not None:
        # Where the model follows no graph on any backend, it is of no use to name another.
        other = instead(record)
        deeper = None if other is None or other is backend else route(model, record, other)[0]
        return deeper or reason, False
    if BACKENDS.get(backend.name) is not backend:  # the user's own
        return _found_out(model, record, backend)
    kept = verdicts(model, record)
    if kept[backend.name] is not None:
        reason, native = kept[backend.name]
        return reason, native
    found = _found_out(model, record, backend)
    if not isinstance(found[0], Failure):
        kept[backend.name] = found
    return found


def _found_out(model: Any, record: Model, backend: Backend) -> tuple[str | None, bool]:
    plain = _plain_logits(model, record)
    if isinstance(plain, str):
        return plain, False
    found: _Finding | None = None
    if record.facts.can_switch:
        found = _probe(model, record, backend, plain, native=False)
        if found is None:
            return None, False
    if backend.implementation is not None:
        # Families that compare the name of the implementation, or calculate with the mask.
        found = _probe(model, record, backend, plain, native=True)
    if found is None:
        return None, True
    other, advice = instead(record), found.advice
    if advice is not None and other is not None and other is not backend and route(model, record, other)[0] is None:
        advice = f"use backend={other.name!r}"
    reason = "; ".join(filter(None, (found.fact, advice)))
    return (Failure(reason) if found.is_raised else reason), False


@dataclass(frozen=True)
class _Finding:
    """What is wrong on a backend, and what to do if no other one does better; None where the fact says it already."""

    fact: str
    advice: str | None = ""
    is_raised: bool = False


VOCABULARY = 1000
"""Logits per token that a probe compares."""


def _plain_logits(model: Any, record: Model) -> Tensor | str:
    """Logits ``[S, ≤ V]`` of the model's own forward of the nodes root, left, child and tail as plain text, or why not."""
    tokens = sample_tokens(record.facts)
    ids = torch.tensor([[token for name in PLAIN for token in tokens[name]]], device=record.device)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % record.facts.vocabulary
    try:
        with probing(model, record), unfollowed(record), _on_masks(record):
            logits, changed = (_logits(model(input_ids=one, use_cache=False)) for one in (ids, other))
    except Exception as error:
        raise_if_not_the_models(error)
        return Failure(f"its own forward of {ids.shape[1]} tokens of plain text fails with {in_words(error)}")
    if logits.shape[:2] != ids.shape:
        return (
            f"{type(model).__name__} gives {list(logits.shape)} numbers for {ids.shape[1]} tokens, and leattn reads a row of "
            "logits per token; load it as a causal language model, or give its backbone"
        )
    if not torch.isfinite(logits).all():
        return "its logits are not finite on a small text; check its weights and dtype"
    if not _is_causal(record, logits[0], changed[0]):
        return _not_causal(model, record, ids, other, logits[0])
    return logits[0]


def _is_causal(record: Model, logits: Tensor, changed: Tensor) -> bool:
    """Whether another last token left the logits ``[S, V]`` of those before it as they were."""
    return _change(changed[:-1], logits[:-1]) <= _allowed(record, _change(changed[-1:], logits[-1:]))


def _not_causal(model: Any, record: Model, ids: Tensor, other: Tensor, logits: Tensor) -> str:
    """Why a later token changes an earlier one, and what helps."""

    def run(tokens: Tensor) -> Tensor:
        return _logits(model(input_ids=tokens, use_cache=False))[0]

    with probing(model, record), unfollowed(record):
        with _on_masks(record):
            again = run(ids)
        if not _is_causal(record, logits, again):
            return (
                "the same text gives other logits each time, in evaluation mode too: something is drawn at random, so that "
                "nothing can be told of it; use a model that draws nothing"
            )
        if record.facts.can_switch and not record.blocks and record.runs_on == "sdpa":
            # Transformers leaves a causal mask to sdpa, which asks the layer; some layers say that they are not causal.
            with _on(record, "eager"):
                is_causal = _is_causal(record, run(ids), run(other))
            if is_causal:
                return (
                    "a later token of plain text changes an earlier one, but not on 'eager': on 'sdpa' its attention goes in "
                    "both directions, and a graph's is causal; load it with attn_implementation='eager'"
                )
    config = record.base.config
    settings = ((name, getattr(config, name, None), causal) for name, causal in _DIRECTION.items())
    for name, value, causal in settings:
        if value not in (None, causal):
            return (
                "a later token of plain text changes an earlier one: its attention is not causal (its config says "
                f"{name}={value!r}), and a graph's is; load it with {name}={causal!r}"
            )
    return (
        "a later token of plain text changes an earlier one: its attention is not causal, and a graph's is; use a model whose "
        "attention is causal"
    )


_DIRECTION = {"is_decoder": True, "use_bidirectional_attention": False}
"""Settings of a config that say whether attention is causal, and what they say where it is."""


@contextmanager
def _on_masks(record: Model) -> Iterator[None]:
    """Inside, a model that no block is open on runs on an attention that takes masks; flash and paged attention take none."""
    if record.blocks or not record.facts.can_switch or record.runs_on in ("eager", "sdpa"):
        yield
        return
    with _on(record, "eager"):
        yield


@contextmanager
def _on(record: Model, implementation: str) -> Iterator[None]:
    before = record.implementations()
    try:
        record.switch(implementation)
        yield
    finally:
        record.restore(before)


def _probe(model: Any, record: Model, backend: Backend, plain: Tensor, *, native: bool) -> _Finding | None:
    """Six tiny forwards on graphs whose answers are known, whatever the weights are."""
    vocabulary = record.facts.vocabulary
    tokens = sample_tokens(record.facts)

    # Weights that the config asks for are of no use here, and no reason to refuse.
    willing = replace(backend, carries=tuple(NEEDS))

    def changed(name: str) -> dict[str, list[int]]:
        return {**tokens, name: [(token + 1) % vocabulary for token in tokens[name]]}

    def logits(prompt: CompiledPrompt) -> dict[str, Tensor]:
        block = Block(record, model, columns_of([prompt], record.device), [willing], native=native)
        with follow(block) as attention:
            found = _logits(model(**attention.inputs, use_cache=False))[0]
        return {node.id or "": found[slice(*span)] for node, span in prompt.spans.items()}

    check_not_in_use(record, str(backend.implementation) if native else OURS)
    try:
        with probing(model, record):
            chain, everyone = (torch.cat(list(logits(prompt).values())) for prompt in _as_plain(tokens))
            base = logits(sample(tokens))
            swapped = logits(sample(tokens, swap=True))
            unrelated = logits(sample(changed("other")))
            related = logits(sample(changed("left")))
    except BackendError as error:
        return _Finding(str(error), None)
    except Exception as error:  # whatever a family's code raises is a reason
        raise_if_not_the_models(error)
        hint = "" if native else "its code may calculate with the mask, which is no tensor on this backend: "
        return _Finding(f"{hint}a forward on a small graph fails with {in_words(error)}", is_raised=True)

    def change(other: dict[str, Tensor], *names: str) -> float:
        return max(_change(other[name], base[name]) for name in names)

    # What must not change may change by rounding; what must change moves by far more than that.
    rounding = _allowed(record, change(related, "child"))
    if not all(torch.isfinite(value).all() for value in base.values()):
        return _Finding("its logits are not finite on a small graph", "check its weights and dtype")
    by_order, by_others = (change(found, "left", "child") for found in (swapped, unrelated))
    begin = torch.cat([base["root"], base["left"]])
    off = max(_change(chain, plain), _change(everyone, plain), _change(begin, plain[: len(begin)]))
    rounding_off = _allowed(record, 4 * change(related, "child"))  # of two kernels, not of one
    # What a backend of the user's own computes of plain text is the user's matter: an approximation, say.
    is_off = off > rounding_off and BACKENDS.get(backend.name) is backend
    if by_order > rounding or by_others > rounding or is_off:
        with probing(model, record), _trembling(record):
            by_rounding = change(logits(sample(tokens)), *base)
        if by_rounding > max(rounding, max(by_order, by_others, off if is_off else 0) / 10):
            return _Finding(
                f"changes of its embeddings in their last digits change what it computes by {by_rounding:.1e}: rounding is "
                "made large (activations that are quantised while they are computed), so that nothing can be told of it",
                "use a model of which weights alone are quantised",
            )
    if by_order > rounding:
        return _Finding(
            f"swapping two siblings changed what their child computes: by {by_order:.1e}, and {rounding:.1e} is rounding, so "
            "something in it goes by the index in the sequence (ALiBi, relative positions, a convolution over tokens, groups "
            "of them)",
            "use a model that goes by position_ids alone",
        )
    if by_others > rounding:
        return _Finding(
            "changing a node changed one that does not see it: something passes around the mask (a recurrent or convolutional "
            "layer, code that drops the mask)",
            "use a model whose layers are all attention",
        )
    if change(related, "child") == 0:
        return _Finding("changing a parent changed nothing at its child: the mask does not reach the model's attention")
    if is_off:
        return _Finding(
            f"plain text as a graph differs by {off:.1e} from the model's own forward of it ({rounding_off:.1e} is rounding): "
            "its positions, or what its attention adds to the mask, are not those of a graph"
        )
    return None


@contextmanager
def _trembling(record: Model) -> Iterator[None]:
    """Inside, embeddings are off by what several sums in another order would do."""
    generator = torch.Generator().manual_seed(0)
    size = max(64 * torch.finfo(torch.float32).eps, torch.finfo(record.dtype).eps)

    def tremble(_module: Any, _args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + size * noise)

    handle = record.base.get_input_embeddings().register_forward_hook(tremble)
    try:
        yield
    finally:
        handle.remove()


def _as_plain(tokens: Mapping[str, Sequence[int]]) -> tuple[CompiledPrompt, CompiledPrompt]:
    """The same plain text as one node, and as nodes of which each sees all before it."""
    nodes: list[ICLNode] = []
    for name in PLAIN:
        nodes.append(ICLNode(tokens[name], list(nodes), id=name))
    return compile_prompt(ICLNode([token for name in PLAIN for token in tokens[name]])), compile_prompt(nodes[-1])


def _logits(output: Any) -> Tensor:
    """``[B, S, ≤ V]`` in fp32, 0 for tokens that the model rules out; hidden states of a model without a head."""
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    found = found[..., :VOCABULARY]
    return found.masked_fill(found == torch.finfo(found.dtype).min, 0).float()


def _change(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of a token's logits, among ``[n, V]``."""
    difference, scale = (found - expected).norm(dim=-1), expected.norm(dim=-1)
    return float((difference / scale.clamp_min(1e-30)).max())


def _allowed(record: Model, needed: float) -> float:
    """What rounding may do. In half precision that is told by what must change, ``needed``, not by the size of the format."""
    eps = torch.finfo(record.dtype).eps
    return max(512 * torch.finfo(torch.float32).eps, min(64 * eps, max(4 * eps, needed / 32)))
