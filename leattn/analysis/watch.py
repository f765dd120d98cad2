"""Around every layer of one forward: what goes in, and what its attention is computed from, reduced on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from leattn.analysis.fold import Folded, Pair, Scores, fold
from leattn.attention import BACKENDS
from leattn.attention.attend import prepare
from leattn.attention.block import Attention, Call, Wrapped, follow, innermost, running
from leattn.attention.probe import refusal
from leattn.errors import BackendError
from leattn.interventions import Operation, Suppress, intervene
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt


@dataclass(eq=False)
class Tracer:
    """What :func:`leattn.analysis.trace` puts around a model; ``folded``, ``hidden``, ``keys``, ``values`` by layer.

    ``inner`` is what was around the attention before, and does its work first. ``windows`` has one entry per layer.
    """

    prompt: CompiledPrompt
    layers: frozenset[int]
    pairs: Sequence[Pair]
    windows: Sequence[int | None]
    tile_bytes: int
    inner: Wrapped | None = None
    folded: dict[int, Folded] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    _added: torch.Tensor | None = None

    def before(self, call: Call) -> Any:
        mask = call.mask if self.inner is None else self.inner.before(call)
        self._added = None if mask is call.mask else mask[0]
        return mask

    def after(self, call: Call) -> None:
        if self.inner is not None:
            self.inner.after(call)
        if call.layer not in self.layers:
            return
        module = hf.attention_of(hf.decoder_layers(call.attention.base)[call.layer])
        sinks = cast("torch.Tensor | None", getattr(module, "sinks", None))
        scores = Scores(call.query[0], call.key[0], call.scaling, call.softcap, self._added, sinks)
        self._added = None
        try:
            self.folded[call.layer] = fold(
                scores,
                self.prompt.offsets,
                call.attention.batch.table.to(call.query.device),
                window=self.windows[call.layer],
                pairs=self.pairs,
                tile_bytes=self.tile_bytes,
                mask=call.mask[0, 0] if isinstance(call.mask, torch.Tensor) else None,
            )
        except ValueError as error:
            raise BackendError(
                f"layer {call.layer} of {call.attention.facts.family} ran with another mask than its config says (window "
                f"{self.windows[call.layer]}), so trace would be wrong; leave the layer out"
            ) from error
        self.keys[call.layer] = call.key[0].float().norm(dim=-1)
        self.values[call.layer] = call.value[0].float().norm(dim=-1)

    def hook(self, attention: Attention, layer: int) -> Any:
        """To go before a layer, after whatever edits its input."""

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if running(attention.base) is attention:  # not the forward of another thread or block
                hidden = args[0] if args else kwargs["hidden_states"]
                self.hidden[layer] = hidden[0].float().norm(dim=-1)

        return before


@contextmanager
def watched(
    model: Any, prompt: CompiledPrompt, operations: Sequence[Operation], backend: str, tracer: Tracer
) -> Iterator[Attention]:
    """Follow the prompt with the tracer around its attention, inside of any operations; afterwards nothing is left.

    Raises
    ------
    BackendError
        A model whose attention cannot be reached.
    """
    around = innermost(hf.backbone(model))
    with ExitStack() as stack:
        if operations or (around is not None and around.operations):
            # A suppression of nothing sends every layer through our attention function, whatever the other operations are.
            nothing = Suppress((), 1.0)
            name = _for_scores(model, prompt) if backend == "auto" else backend
            attention = stack.enter_context(intervene(model, prompt, [*operations, nothing], backend=name))
            tracer.inner, attention.wrapped = attention.wrapped, tracer
        else:
            attention = prepare(model, prompt, backend=backend)
            _check_reach(attention)
            attention.wrapped = tracer
            stack.enter_context(follow(attention))
        layers = hf.decoder_layers(attention.base)
        for number in tracer.layers:
            handle = layers[number].register_forward_pre_hook(tracer.hook(attention, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield attention


def _for_scores(model: Any, prompt: CompiledPrompt) -> str:
    """What ``"auto"`` would choose if it is a backend with scores to change, else one that is."""
    first = prepare(model, prompt).backend.name
    order = [name for name in (first, "sdpa", "eager") if name in ("sdpa", "eager")]
    return next((name for name in order if refusal(model, BACKENDS[name]) is None), "eager")


def _check_reach(attention: Attention) -> None:
    if not attention.facts.can_switch:
        raise BackendError(
            f"trace goes through transformers' attention interface, which {attention.facts.family} does not use; the "
            "weights of a short prompt: leattn.forward(model, prompt, backend='eager', output_attentions=True).attentions"
        )
    for layer in hf.decoder_layers(attention.base):
        hf.attention_function(hf.attention_of(layer), attention.backend.implementation)


def windows(model: Any) -> list[int | None]:
    """The sliding window of each layer in positions; None for full attention."""
    config, by_type = hf.backbone(model).config, hf.window_of(model)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return [by_type.get(kind, by_type.get("")) for kind in kinds]
