"""``sweep``: layers × operations × seeds over many prompts, as one tidy table; interrupted, it goes on where it stopped."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from leattn.analysis.injection import Donor, Injection
from leattn.analysis.record import Record, digest, model_digest, prompt_digest, spelled
from leattn.analysis.sweep_result import UNTOUCHED, SweepResult, SweepRow
from leattn.analysis.targets import Target, one_backend, target_ids, target_logits, token_losses
from leattn.attention.request import Backend
from leattn.errors import LeattnError, choices
from leattn.interventions.draws import RandomNoise, Shuffle
from leattn.interventions.hidden import Freeze, SkipAttention
from leattn.interventions.operation import Operation, checked_layers
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt

Maker: TypeAlias = Callable[[int, int], Sequence[Operation] | None]
"""``(layer, seed)`` → the operations of one run; None where there is nothing to run at a layer."""
Metric: TypeAlias = Callable[[torch.Tensor, tuple[int, ...]], float]
"""Logits ``[T, V]`` of the target tokens and their ids → one number."""

READY: dict[str, Callable[[int, int, int], Sequence[Operation] | None]] = {
    "freeze": lambda layer, _seed, _count: [Freeze(layer, source="previous")] if layer else None,
    "noise": lambda layer, seed, _count: [RandomNoise(layer, seed=seed)],
    "shuffle": lambda layer, seed, _count: [Shuffle(layer, seed=seed)],
    "shuffle_published": lambda layer, _seed, _count: [Shuffle(layer, seeding="published")],
    "skip": lambda layer, _seed, count: [SkipAttention(range(layer, count))],
}
"""Operations by name: at this layer, and for ``freeze`` and ``skip`` at all after it too."""


def sweep(
    model: Any,
    prompts: Sequence[CompiledPrompt],
    operations: Mapping[str, Maker | Injection] | Sequence[str],
    layers: Collection[int] | None = None,
    metric: str | Metric = "accuracy",
    *,
    targets: Sequence[Target],
    seeds: Sequence[int] = (0,),
    file: str | Path | None = None,
    backend: str | Backend = "auto",
    batch_size: int = 16,
    progress: bool = True,
) -> SweepResult:
    """Measure how prompts are answered under each operation at each layer, and untouched.

    Parameters
    ----------
    operations
        Names of ready ones, or a mapping from names of your own to functions ``(layer, seed) → operations`` (None: nothing is
        measured there) and to :class:`Injection`. Ready are ``"freeze"``, the published one: ``Freeze(source="previous")``,
        which holds what went into the layer before, and is not measured at layer 0, which has none; ``"noise"``;
        ``"shuffle"``, and ``"shuffle_published"`` with the published seeds; ``"skip"``: attention skipped from the layer on.
    layers
        What the functions are called with; all of the model's for None.
    metric
        ``"accuracy"``: 1 if greedy decoding would say exactly the target, else 0. ``"loss"``: summed cross-entropy of the
        target tokens in nats. Or a function of logits ``[T, V]`` and target ids to a number.
    targets
        The answer to each prompt, text or ids, behind its one sink; operations do not touch it unless they name generated
        tokens, as in generation.
    seeds
        Each cell runs once per seed; operations that turn out the same for another seed are not run again.
    file
        Where results are kept as they come, one JSON line per batch. A sweep that finds its own file there goes on where it
        stopped, and ends with the same table.
    batch_size
        Prompts per forward pass.

    Raises
    ------
    LeattnError
        Unknown names or layers, targets or donors that do not fit the prompts, a file of another sweep.

    Examples
    --------
    >>> import leattn
    >>> from random import Random
    >>> from leattn.tiny.examples import make
    >>> model, tokenizer = leattn.tiny.load()
    >>> examples = [make("parallel", Random(seed), n=2) for seed in range(4)]
    >>> prompts = [example.compile(tokenizer) for example in examples]
    >>> result = sweep(model, prompts, ["skip"], layers=[0], targets=[example.answer for example in examples])
    >>> result.mean("untouched"), result.mean("skip", 0) < 1
    (1.0, True)
    """
    prompts = _checked_prompts(prompts)
    if len(targets) != len(prompts) or isinstance(targets, str):
        raise LeattnError(f"{len(prompts)} prompts and {len(targets)} targets; give a list with one target for each prompt")
    if isinstance(metric, str) and metric not in ("accuracy", "loss"):
        raise LeattnError(choices("metric", metric, ("accuracy", "loss")) + ", or give a function")
    if batch_size < 1 or not seeds:
        raise LeattnError(f"batch_size is {batch_size} and there are {len(seeds)} seeds; give 1 or more of both")
    count = len(Model.of(model).layers)
    numbers = tuple(range(count)) if layers is None else tuple(dict.fromkeys(layers))
    checked_layers("sweep", numbers, count)
    makers = _makers(operations, count)
    own = target_ids(model, prompts, targets)
    drawn = tuple(dict.fromkeys(seeds))
    made = {
        (label, layer, seed): tuple(some)
        for label, maker in makers.items()
        if not isinstance(maker, Injection)
        for layer, seed in product(numbers, drawn)
        if (some := maker(layer, seed)) is not None
    }
    kinds = {label: some for (label, _, _), some in made.items()}
    for label, maker in makers.items():
        if label not in kinds and not isinstance(maker, Injection):
            raise LeattnError(f"{label!r} has nothing to measure at layers {list(numbers)}; name others")
    # Every kind of operation at once: what any of them needs, the backend has.
    chosen = one_backend(model, prompts[0], [operation for some in kinds.values() for operation in some], backend)
    if file is not None:
        _check_spelling(kinds)
    cells = [_Cell(UNTOUCHED, None, None, None, (), None)]
    for label, maker in makers.items():
        if isinstance(maker, Injection):
            donor = Donor.build(model, prompts, maker, chosen)
            sources = sorted(checked_layers("Injection", maker.source_layers, count))
            cells += [_Cell(label, layer, a, None, (), donor) for a, layer in product(sources, numbers)]
        else:
            cells += [_Cell(label, b, None, seed, some, None) for (name, b, seed), some in made.items() if name == label]

    settings: dict[str, Any] = {
        "model": model_digest(model),
        "prompts": digest(map(prompt_digest, prompts)),
        "targets": digest(own),
        "operations": list(makers),
        "made": digest(cell.spelled() for cell in cells),
        "layers": list(numbers),
        "seeds": list(drawn),
        "metric": spelled(metric),
        "backend": chosen.name,
        "batch_size": batch_size,
    }
    batches = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    rows: list[SweepRow] = []
    first: dict[tuple[str, int | None], tuple[_Cell, list[SweepRow]]] = {}
    shown = progress and len(cells) * len(batches) > 1
    with (
        Record(file, settings) as record,
        tqdm(total=len(cells) * len(batches), desc="sweep", leave=False, disable=not shown, delay=2) as bar,
    ):
        for cell in cells:
            twin = first.get((cell.operation, cell.layer)) if cell.seed is not None else None
            if twin is not None and twin[0].operations == cell.operations:
                new = [row.with_seed(cell.seed) for row in twin[1]]
                bar.update(len(batches))
            else:
                new = []
                for batch in batches:
                    key = (cell.operation, cell.layer, cell.source_layer, cell.seed, batch.start)
                    values = record.get(key)
                    if values is None:
                        values = cell.run(model, prompts, own, batch, metric, chosen)
                        record.put(key, values)
                    new += cell.rows(batch, values)
                    bar.update()
                first.setdefault((cell.operation, cell.layer), (cell, new))
            rows += new
    return SweepResult(
        tuple(rows),
        spelled(metric),
        tuple(makers),
        numbers,
        drawn,
        len(prompts),
        type(model).__name__,
        chosen.name,
    )


def _check_spelling(kinds: Mapping[str, Sequence[Operation]]) -> None:
    """Refuse operations of the user's own that a file could not tell from others of their class."""
    for label, operations in kinds.items():
        for operation in operations:
            if re.search(r" object at 0x[0-9a-f]+>$", repr(operation)):
                raise LeattnError(
                    f"an operation of {label!r} prints as {operation!r}, so a file cannot tell it from one with other "
                    "settings; give its class a __repr__ (a dataclass has one), or leave file out"
                )


@dataclass(frozen=True, eq=False)
class _Cell:
    """One point of the sweep: an operation at a layer with a seed, for all prompts."""

    operation: str
    layer: int | None
    source_layer: int | None
    seed: int | None
    operations: tuple[Operation, ...]
    donor: Donor | None

    def spelled(self) -> str:
        """What it does, as far as words go: the same in every process."""
        what = f"{self.operation} {self.layer} {self.source_layer} {self.seed} {spelled(self.operations)}"
        if self.donor is None:
            return what
        donors = digest(map(prompt_digest, self.donor.injection.donors))
        return f"{what} {donors} {self.donor.places} {self.donor.donor_places} {self.donor.targets}"

    def run(
        self,
        model: Any,
        prompts: Sequence[CompiledPrompt],
        own: Sequence[tuple[int, ...]],
        batch: range,
        metric: str | Metric,
        backend: Backend,
    ) -> dict[str, list[float]]:
        """``{"own": one value per prompt of the batch}``, and the same for ``"donor"`` where there are donor's targets."""
        made: Sequence[Operation] = self.operations
        asked = {"own": own}
        if self.donor is not None:
            assert self.source_layer is not None
            assert self.layer is not None
            made = self.donor.operations(self.source_layer, self.layer, batch)
            if self.donor.targets is not None:
                asked["donor"] = self.donor.targets
        found = {}
        for whose, answers in asked.items():
            some = [answers[p] for p in batch]
            logits = target_logits(model, [prompts[p] for p in batch], some, made, backend=backend)
            found[whose] = [_measured(metric, one, answer) for one, answer in zip(logits, some, strict=True)]
        return found

    def rows(self, batch: range, values: Mapping[str, Sequence[float]]) -> list[SweepRow]:
        return [
            SweepRow(self.operation, self.layer, self.source_layer, self.seed, p, whose, value)
            for whose, column in values.items()
            for p, value in zip(batch, column, strict=True)
        ]


def _measured(metric: str | Metric, logits: torch.Tensor, target: tuple[int, ...]) -> float:
    if callable(metric):
        return float(metric(logits, target))
    if metric == "loss":
        return float(token_losses(logits, target).sum())
    return float(tuple(logits.argmax(-1).tolist()) == target)


def _checked_prompts(prompts: Sequence[CompiledPrompt]) -> list[CompiledPrompt]:
    if isinstance(prompts, CompiledPrompt) or not prompts or not all(isinstance(p, CompiledPrompt) for p in prompts):
        raise LeattnError("sweep takes a list of at least one compiled prompt; call leattn.compile_prompt on each")
    return list(prompts)


def _makers(operations: Mapping[str, Maker | Injection] | Sequence[str], count: int) -> dict[str, Maker | Injection]:
    if isinstance(operations, Mapping):
        for label, given in operations.items():
            if not callable(given) and not isinstance(given, Injection):
                raise LeattnError(f"operation {label!r} is {given!r}; give a function (layer, seed) → operations, or Injection")
        if UNTOUCHED in operations:
            raise LeattnError(f"{UNTOUCHED!r} is the name of the baseline, which every sweep measures; choose another")
        return dict(operations)
    names = [operations] if isinstance(operations, str) else list(operations)
    for label in names:
        if label not in READY:
            raise LeattnError(choices("operation", label, READY) + ", or map names to functions")
    return {label: _ready(label, count) for label in names}


def _ready(label: str, count: int) -> Maker:
    return lambda layer, seed: READY[label](layer, seed, count)
