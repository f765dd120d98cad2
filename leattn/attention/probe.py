"""Whether a model can follow a graph on a backend: read off its config where possible, and tried out with tiny forwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leattn.attention.backends import refusal
from leattn.attention.block import Block, check_not_in_use, follow
from leattn.attention.request import NEEDS, Backend
from leattn.dag.node import ICLNode
from leattn.errors import BackendError
from leattn.model.record import Model
from leattn.model.registry import OURS
from leattn.prompt.compile import CompiledPrompt, columns_of, compile_prompt

CLASHES = (TypeError, AttributeError, LookupError, NotImplementedError, RuntimeError, ValueError)
"""What a family's code raises when a mask is not what it calculates with."""

LENGTHS = {"root": 4, "left": 5, "right": 3, "other": 2, "child": 4, "tail": 3}
"""Tokens of the nodes of :func:`sample`."""


def sample_tokens(vocabulary: int) -> dict[str, list[int]]:
    """Random tokens for the nodes of :func:`sample`."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, vocabulary, (n,), generator=generator).tolist() for name, n in LENGTHS.items()}


def sample(
    tokens: Mapping[str, Sequence[int]], *, start: int = 0, gap: int = 0, swap: bool = False, only: str | None = None
) -> CompiledPrompt:
    """A graph on which much can be told of a model, or one of its nodes with its ancestors.

    A root, two siblings and a node that nobody sees, which see it; a child of the first three; and a node that sees the child
    alone. Everyone's position is relative to the root's, which is ``start``; ``gap`` moves the child further on.
    """
    nodes = {"root": ICLNode(tokens["root"], id="root", start_pos_id=start)}
    siblings = ("right", "left") if swap else ("left", "right")
    parents = {name: ["root"] for name in (*siblings, "other")} | {"child": ["root", "left", "right"], "tail": ["child"]}
    for name, seen in parents.items():
        at = start + len(tokens["root"]) + max(map(len, tokens.values())) + gap if gap and name == "child" else None
        nodes[name] = ICLNode(tokens[name], [nodes[parent] for parent in seen], id=name, start_pos_id=at)
    return compile_prompt([nodes["tail"], nodes["other"]] if only is None else nodes[only])


@contextmanager
def probing(model: Any, record: Model) -> Iterator[None]:
    """Inside the block a model is in evaluation mode, without gradients, autocast or compilation; afterwards as it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Uncompiled: the question is what the model does, not what torch's compiler makes of it. Torch warns that it is slow.
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            torch.autocast(record.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            yield
    finally:
        for module in was_training:
            module.training = True


def route(model: Any, record: Model, backend: Backend) -> tuple[str | None, bool]:
    """Why ``backend`` cannot run ``model``, or None if it can; and whether the model has to keep transformers' implementation.

    Found out once per model and backend.
    """
    with record.lock:
        if id(backend) not in record.routes:
            # The backend itself is kept, so that its id stays its own.
            record.routes[id(backend)] = (backend, *_found_out(model, record, backend))
        _, reason, native = record.routes[id(backend)]
        return reason, native


def _found_out(model: Any, record: Model, backend: Backend) -> tuple[str | None, bool]:
    reason = refusal(backend, record)
    if reason is not None:
        return reason, False
    if record.facts.can_switch:
        reason = _probe(model, record, backend, native=False)
        if reason is None:
            return None, False
    if backend.implementation is not None:
        # Families that compare the name of the implementation, or calculate with the mask.
        reason = _probe(model, record, backend, native=True)
    return reason, reason is None


def _probe(model: Any, record: Model, backend: Backend, *, native: bool) -> str | None:
    """Five tiny forwards on graphs whose answers are known, whatever the weights are."""
    vocabulary = record.facts.vocabulary
    tokens = sample_tokens(vocabulary)

    # Weights that the config asks for are of no use here, and no reason to refuse.
    willing = replace(backend, carries=tuple(NEEDS))

    def changed(name: str) -> dict[str, list[int]]:
        return {**tokens, name: [(token + 1) % vocabulary for token in tokens[name]]}

    def logits(prompt: CompiledPrompt) -> dict[str, Tensor]:
        block = Block(record, columns_of([prompt], record.device), [willing], native=native)
        with follow(block) as attention:
            output = model(**attention.inputs, use_cache=False)
        found = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return {node.id or "": found[0].float()[slice(*span)] for node, span in prompt.spans.items()}

    check_not_in_use(record, str(backend.implementation) if native else OURS)
    try:
        with probing(model, record):
            base = logits(sample(tokens))
            swapped = logits(sample(tokens, swap=True))
            moved = logits(sample(tokens, gap=5))
            unrelated = logits(sample(changed("other")))
            related = logits(sample(changed("left")))
    except torch.OutOfMemoryError:
        raise
    except BackendError as error:
        return str(error)
    except CLASHES as error:
        hint = "" if native else " (its code may calculate with the mask, which is no tensor on this backend)"
        return f"a forward on a small graph fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}{hint}"

    # What must not change may change by rounding; what must change moves by more than that.
    scale = float(base["child"].abs().max()) or 1.0
    rounding = 64 * torch.finfo(record.dtype).eps * scale

    def change(other: dict[str, Tensor], names: Sequence[str]) -> float:
        return max(float((base[name] - other[name]).abs().max()) for name in names)

    if not all(torch.isfinite(value).all() for value in base.values()):
        return "its logits are not finite on a small graph; check its weights and dtype"
    if change(swapped, ("left", "child")) > rounding:
        return (
            "swapping two siblings changed what their child computes: its positions follow the index in the sequence "
            "(ALiBi and the like); use a model with rotary or learned positions"
        )
    if change(moved, ["child"]) == 0:
        return "moving a node to other positions changed nothing: the model does not use position_ids"
    if change(unrelated, ("left", "child")) > rounding:
        return (
            "changing a node changed one that does not see it: state leaks outside attention (a recurrent or convolutional "
            "layer); use a model whose layers are all attention"
        )
    if change(related, ["child"]) == 0:
        return "changing a parent changed nothing at its child: the mask does not reach the model's attention"
    return None
