"""Around every layer of one forward: what goes in, and what its attention is computed from, reduced on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

from leattn.analysis.fold import Pair, RowReading, Scores, fold
from leattn.attention.around import Call
from leattn.attention.block import Block, running
from leattn.attention.reading import active, in_window, moved_query
from leattn.attention.request import Backend
from leattn.interventions import Operation, intervene
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.stretch import columns_in


class Rows:
    """A tensor per layer, put at its place in one float32 tensor ``whole`` ``[L, …]`` on the CPU as it comes."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.places = {layer: place for place, layer in enumerate(layers)}
        self.missing = set(layers)
        self.whole = torch.empty(0)

    def put(self, layer: int, row: torch.Tensor) -> None:
        if len(self.missing) == len(self.places):
            self.whole = torch.empty(len(self.places), *row.shape)
        self.whole[self.places[layer]] = row
        self.missing.discard(layer)


class Tracer:
    """What :func:`leattn.analysis.trace` puts around a model; what it keeps is in rows, one for each of ``layers``.

    ``inner`` is what was around the attention before, and does its work first.
    """

    def __init__(
        self, prompt: CompiledPrompt, layers: Sequence[int], pairs: Sequence[Pair], scored: Sequence[Pair], tile_bytes: int
    ) -> None:
        self.prompt, self.layers, self.pairs, self.scored, self.tile_bytes = prompt, layers, pairs, scored, tile_bytes
        self.inner: Any = None
        self.mass, self.first_tokens, self.hidden, self.keys, self.values = (Rows(layers) for _ in range(5))
        self.mean_keys, self.mean_values = Rows(layers), Rows(layers)
        self.tokens, self.scores = [Rows(layers) for _ in pairs], [Rows(layers) for _ in scored]
        self._added: torch.Tensor | None = None

    def before(self, call: Call) -> Any:
        mask = call.mask if self.inner is None else self.inner.before(call)
        self._added = None if mask is call.mask else mask[0]
        return mask

    def after(self, call: Call) -> None:
        if self.inner is not None:
            self.inner.after(call)
        if call.layer not in self.mass.places:
            return
        sinks = cast("torch.Tensor | None", getattr(call.module, "sinks", None))
        scores = Scores(call.query[0], call.key[0], call.scaling, call.softcap, self._added, sinks, row_readings(call))
        self._added = None
        request = call.request
        folded = fold(
            scores,
            self.prompt.offsets,
            request.columns,
            window=request.window,
            pairs=self.pairs,
            scored=self.scored,
            tile_bytes=self.tile_bytes,
        )
        self.mass.put(call.layer, folded.mass)
        self.first_tokens.put(call.layer, folded.first_tokens)
        for rows, weights in zip(self.tokens, folded.pairs, strict=True):
            rows.put(call.layer, weights)
        for rows, raw in zip(self.scores, folded.scores, strict=True):
            rows.put(call.layer, raw)
        key, value = call.key[0].float(), call.value[0].float()  # [G, S, D]
        self.keys.put(call.layer, key.norm(dim=-1))
        self.values.put(call.layer, value.norm(dim=-1))
        self.mean_keys.put(call.layer, key.mean(0).norm(dim=-1))
        self.mean_values.put(call.layer, value.mean(0).norm(dim=-1))

    def hook(self, attention: Block, layer: int) -> Any:
        """To go before a layer, after whatever edits its input."""

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if running(attention.record) is attention:  # not the forward of another thread or block
                hidden = args[0] if args else kwargs["hidden_states"]
                self.hidden.put(layer, hidden[0].float().norm(dim=-1))

        return before


def row_readings(call: Call) -> list[RowReading]:
    """What the queries of one prompt's forward read in other ways in the layer that calls."""
    request, device = call.request, call.query.device
    readings, found = active(request.columns.readings, call.module), []
    for stretch in request.columns.stretches(request.queries)[0]:
        queries = range(stretch.start, stretch.stop)
        for runs, reading in stretch.readings:
            if reading not in readings:
                continue
            columns = torch.from_numpy(columns_in(runs)).to(device)
            query = call.query[:, :, stretch.start : stretch.stop]
            moved = moved_query(query, reading, request.turns, call.module)
            visible = None
            if reading.shift and request.window is not None:
                visible = in_window(request.columns, 0, queries, columns.cpu(), request.window, reading.shift).to(device)
            found.append(RowReading(queries, columns, reading, None if moved is query else moved[0], visible))
    return found


@contextmanager
def watched(
    model: Any, record: Model, prompt: CompiledPrompt, operations: Sequence[Operation], backend: str | Backend, tracer: Tracer
) -> Iterator[Block]:
    """Follow the prompt with the tracer around its attention, inside of any operations; afterwards nothing is left.

    Raises
    ------
    BackendError
        A model whose attention cannot be reached.
    """
    with ExitStack() as stack:
        attention = stack.enter_context(intervene(model, prompt, operations, backend=backend))
        tracer.inner = attention.wrapped
        attention.wrap(tracer, "trace")
        for number in tracer.layers:
            handle = record.layers[number].register_forward_pre_hook(tracer.hook(attention, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield attention
