"""``compare``: examples × methods, measured alike."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, TypeAlias

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from leattn.attention.request import Backend
from leattn.comparison.comparison import Comparison, Row
from leattn.comparison.example import Example
from leattn.comparison.journal import Journal
from leattn.comparison.metrics import Metric, as_metric
from leattn.errors import LeattnError, choices
from leattn.generation.generate import generate
from leattn.generation.score import score
from leattn.generation.scores import Score
from leattn.kv.certify import certificate
from leattn.kv.store import KVStore
from leattn.methods import METHODS
from leattn.prompt.compiled import CompiledPrompt

STORE = 2**31
"""Bytes of keys and values that are kept of the examples which are measured together."""
Method: TypeAlias = Callable[..., CompiledPrompt]
"""From header, documents, question and tokenizer to a prompt; with a parameter ``model``, from the model too."""


def compare(
    model: Any,
    examples: Sequence[Example],
    methods: Sequence[str | Method] | Mapping[str, Method],
    metrics: Sequence[str | Metric] = ("loss",),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_new_tokens: int = 16,
    timed: int = 0,
    chunk: int = 8,
    path: str | os.PathLike[str] | None = None,
    backend: str | Backend = "auto",
    progress: bool = True,
) -> Comparison:
    """Measure methods of encoding prompts on the same examples.

    Parameters
    ----------
    model, tokenizer
        A model with a language-model head in evaluation mode, and its tokenizer.
    examples
        Questions with documents, see :class:`Example`.
    methods
        Names of :data:`leattn.methods.METHODS`, or functions of that signature, also as ``{name: function}``:
        ``{"ape 0.8": functools.partial(leattn.methods.ape, temperature=0.8)}``.
    metrics
        ``"loss"``, ``"right"``, ``"accuracy"``, ``"accuracy_by_token"``, or a :class:`leattn.comparison.metrics.Metric`.
    max_new_tokens
        Of what is generated, greedily, for ``"right"``.
    timed
        For this many of the examples, the time and the tokens that the first token takes: cold, with an empty store, and warm,
        with one that knows the documents. Methods take turns; nothing else should run meanwhile.
    chunk
        Examples that are measured together, and then written to the file.
    path
        A file of JSON lines. A run that was broken off goes on from it; what is there is not measured again.
    backend, progress
        As in :func:`leattn.score`.

    Returns
    -------
    Comparison
        Prints as a table; ``.summary``, ``.difference``, ``.by_place``, ``.to_pandas``.

    Raises
    ------
    LeattnError
        Unknown names, examples that lack what a metric needs, or that share an id; a file of another run.

    Examples
    --------
    >>> import leattn
    >>> from leattn.comparison.example import Example
    >>> model, tokenizer = leattn.tiny.load()
    >>> facts = ["\\nThe capital of Zarvia is Lumo.", "\\nThe capital of Genia is Pardan."]
    >>> ask = Example("\\nQ: What is the capital of Zarvia?\\nA:", facts, answers=[" Lumo"], gold=0)
    >>> found = leattn.compare(model, [ask], ["plain", "pcw"], ["right"], tokenizer, progress=False)
    >>> [(method, found.summary(method, "right").mean) for method in found.methods]
    [('plain', 1.0), ('pcw', 1.0)]
    """
    wanted = [as_metric(metric) for metric in metrics]
    named = dict(_named(methods))
    given = _identified(examples, wanted)
    settings = {
        "model": type(model).__name__ if not model.config.name_or_path else os.path.basename(str(model.config.name_or_path)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "versions": {"leattn": version("leattn"), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    journal = Journal(path, settings)
    done = {(row["method"], row["example"], row["metric"]) for row in journal.rows}
    with tqdm(total=len(named) * len(given), unit="prompt", disable=not progress) as bar:
        for begin in range(0, len(given), chunk):
            # Methods that encode a document alike share it, and what is generated finds what was scored.
            store = KVStore(max_bytes=STORE) if certificate(model).reuse is None else None
            measure = partial(_measured, model, tokenizer, wanted, max_new_tokens, backend, store)
            for name, method in named.items():
                part = dict(list(given.items())[begin : begin + chunk])
                missing = {
                    example: part[example]
                    for example in part
                    if any((name, example, metric.name) not in done for metric in wanted)
                }
                if missing:
                    journal.add(_as_rows(name, missing, measure(method, list(missing.values()))))
                bar.update(len(part))
    for example in list(given)[:timed]:
        for name, method in named.items():
            if (name, example, "seconds_warm") not in done:
                prompt = build(method, given[example], model, tokenizer)
                journal.add(_as_rows(name, {example: given[example]}, [_costs(model, prompt, backend)]))
    known = {(name, example) for name in named for example in given}
    rows = [Row(**row) for row in journal.rows if (row["method"], row["example"]) in known]
    order = {name: i for i, name in enumerate(named)}
    shares = frozenset(metric.name for metric in wanted if metric.is_share)
    return Comparison(tuple(sorted(rows, key=lambda row: order[row.method])), settings, shares)


def build(method: Method, example: Example, model: Any, tokenizer: Any) -> CompiledPrompt:
    """The prompt that a method makes of an example; the model is given to those that take it."""
    takes = inspect.signature(method).parameters
    more = {"model": model} if "model" in takes and takes["model"].kind is not inspect.Parameter.VAR_KEYWORD else {}
    return method(example.header, example.documents, example.question, tokenizer, **more)


def _named(methods: Sequence[str | Method] | Mapping[str, Method]) -> Iterator[tuple[str, Method]]:
    if isinstance(methods, Mapping):
        yield from methods.items()
        return
    for method in methods:
        if not isinstance(method, str):
            yield getattr(method, "__name__", None) or repr(method), method
        elif method in METHODS:
            yield method, METHODS[method]
        else:
            raise LeattnError(choices("method", method, METHODS))


def _identified(examples: Sequence[Example], metrics: Sequence[Metric]) -> dict[str, Example]:
    """The examples by id, each of which has what the metrics need."""
    if not examples:
        raise LeattnError("there is nothing to compare on: the list of examples is empty")
    found: dict[str, Example] = {}
    for i, example in enumerate(examples):
        name = str(i) if example.id is None else example.id
        if name in found:
            raise LeattnError(f"two examples have the id {name!r}; give each its own, or none")
        found[name] = example
        for metric in metrics:
            lacks = (not example.choices or example.right is None) if metric.needs == "choices" else not example.answers
            if lacks:
                what = "choices and right" if metric.needs == "choices" else "answers"
                raise LeattnError(f"example {name!r} has no {what}, which metric {metric.name!r} needs")
    return found


def _measured(
    model: Any,
    tokenizer: Any,
    metrics: Sequence[Metric],
    max_new_tokens: int,
    backend: str | Backend,
    store: KVStore | None,
    method: Method,
    examples: Sequence[Example],
) -> list[dict[str, float]]:
    """All metrics of each example."""
    prompts = [build(method, example, model, tokenizer) for example in examples]
    needs = {metric.needs for metric in metrics}
    texts, scores = [""] * len(examples), [dict[str, list[Score]]() for _ in examples]
    continuations = [
        [*(example.answers[:1] if "answer" in needs else ()), *(example.choices if "choices" in needs else ())]
        for example in examples
    ]
    if any(continuations):
        found = score(model, prompts, continuations, tokenizer, backend=backend, kv_store=store, progress=False)
        for p, example in enumerate(examples):
            rows = [row for row in found.rows if row.prompt == p]
            first = len(example.answers[:1]) if "answer" in needs else 0
            scores[p] = {"answer": rows[:first], "choices": rows[first:]}
    if "text" in needs:
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "stop_strings": ["\n"]}
        results = generate(model, prompts, tokenizer, backend=backend, kv_store=store, **options)
        texts = [result.text for result in results]
    return [
        {metric.name: metric.value(example, scores[p].get(metric.needs, []), texts[p]) for metric in metrics}
        for p, example in enumerate(examples)
    ]


def _costs(model: Any, prompt: CompiledPrompt, backend: str | Backend) -> dict[str, float]:
    """What the first token takes, with an empty store and with one that knows what the last node sees."""
    store, found = KVStore(), dict[str, float]()
    for state in ("cold", "warm"):
        started = time.perf_counter()
        result = generate(model, prompt, backend=backend, kv_store=store, max_new_tokens=1, do_sample=False)
        found |= {f"tokens_{state}": float(result.stats.computed), f"seconds_{state}": time.perf_counter() - started}
    return found


def _as_rows(method: str, examples: Mapping[str, Example], values: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    for (name, example), of_example in zip(examples.items(), values, strict=True):
        for metric, value in of_example.items():
            yield {"method": method, "example": name, "metric": metric, "value": value, "gold": example.gold}
