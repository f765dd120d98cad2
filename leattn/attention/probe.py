"""Whether a model can follow a graph: read off its config where possible, and tried out with five tiny forwards."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from leattn.attention.batch import Batch
from leattn.attention.block import Attention, NotAsked, follow
from leattn.attention.kinds import Backend, ModelFacts
from leattn.attention.sparse import NoPlan
from leattn.dag.node import ICLNode
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt, compile_prompt


def static_refusal(facts: ModelFacts) -> str | None:
    """Why no backend can serve such a model, as far as its config tells."""
    if facts.stateful:
        return (
            "it carries a recurrent state from token to token, which leaks past any attention mask; "
            "use a model whose layers are all attention"
        )
    if not facts.takes_positions or facts.family == "gpt_neo":
        return (
            "its attention depends on the index in the sequence (ALiBi, or windows by index), which a graph's positions cannot "
            "reach; use a model with rotary or learned positions"
        )
    if facts.chunked:
        return "its chunked attention cuts by index, not by position; use a model with full or sliding-window attention"
    return None


_lock = threading.Lock()
_reasons: WeakKeyDictionary[Any, dict[str, str | None]] = WeakKeyDictionary()


def refusal(model: Any, backend: Backend) -> str | None:
    """Why ``backend`` cannot run ``model``, or None if it can. Found out once per model and backend."""
    base = hf.backbone(model)
    with _lock:
        known = _reasons.setdefault(base, {})
    if backend.name not in known:
        facts = hf.read_facts(model)
        reason = static_refusal(facts) or backend.refusal(facts)
        if reason is None and not facts.can_switch and facts.implementation != backend.implementation:
            reason = (
                f"{facts.family} fixes its attention implementation when it is loaded, here {facts.implementation!r}; "
                f"load it with attn_implementation={backend.implementation!r}"
            )
        known[backend.name] = reason or _probe(model, facts, backend)
    return known[backend.name]


def _probe(model: Any, facts: ModelFacts, backend: Backend) -> str | None:
    """Five tiny forwards on graphs whose answers are known, whatever the weights are."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, facts.vocabulary, (count,), generator=generator).tolist()

    root, left, right, child = tokens(4), tokens(3), tokens(3), tokens(4)
    other_left, other_right = _other(left, facts.vocabulary), _other(right, facts.vocabulary)

    def logits(
        first: Sequence[int], second: Sequence[int], *, swap: bool = False, gap: int = 0, seen: str = "both"
    ) -> dict[str, torch.Tensor]:
        r = ICLNode(root, id="root")
        make = {
            "left": lambda: ICLNode(first, [r], id="left"),
            "right": lambda: ICLNode(second, [r], id="right"),
        }
        made = {name: make[name]() for name in (("right", "left") if swap else ("left", "right"))}
        parents = [r, *made.values()] if seen == "both" else [r, made["left"]]
        c = ICLNode(child, parents, id="child", start_pos_id=len(root) + len(left) + gap)
        prompt = compile_prompt([c, *made.values()])
        output = _run(model, facts, prompt, backend).float()
        return {node.id or "": output[slice(*prompt.spans[node])] for node in prompt.graph.nodes}

    try:
        with probing(model, facts):
            base = logits(left, right)
            swapped = logits(left, right, swap=True)
            moved = logits(left, right, gap=5)
            unrelated = logits(left, other_right, seen="left")
            related = logits(other_left, right, seen="left")
            unrelated_base = logits(left, right, seen="left")
    except NotAsked:
        return "it never asks transformers for a mask, so its layers are not (all) attention that a mask reaches"
    except NoPlan:
        return "its layers run without the mask that they are to be given"

    # What must not change may change by rounding; what must change moves by more than that.
    scale = float(base["child"].abs().max()) or 1.0
    rounding = 64 * torch.finfo(_dtype(model)).eps * scale

    def change(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    if not all(torch.isfinite(value).all() for value in base.values()):
        return "its logits are not finite on a small graph; check its weights and dtype"
    if change(base["child"], swapped["child"]) > rounding or change(base["left"], swapped["left"]) > rounding:
        return (
            "swapping two siblings changed what their child computes: its positions follow the index in the sequence "
            "(ALiBi and the like); use a model with rotary or learned positions"
        )
    if change(base["child"], moved["child"]) == 0:
        return "moving a node to other positions changed nothing: the model does not use position_ids"
    if (
        change(unrelated_base["child"], unrelated["child"]) > rounding
        or change(unrelated_base["left"], unrelated["left"]) > rounding
    ):
        return (
            "changing a node changed one that does not see it: state leaks outside attention (a recurrent or convolutional "
            "layer); use a model whose layers are all attention"
        )
    if change(unrelated_base["child"], related["child"]) == 0:
        return "changing a parent changed nothing at its child: the mask does not reach the model's attention"
    return None


@contextmanager
def probing(model: Any, facts: ModelFacts) -> Iterator[None]:
    """Inside the block a model is in evaluation mode, without gradients, autocast or compilation; afterwards as it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Uncompiled: the question is what the model does, not what torch's compiler makes of it. Torch warns that it is slow.
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            torch.autocast(facts.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            yield
    finally:
        for module in was_training:
            module.training = True


def _run(model: Any, facts: ModelFacts, prompt: CompiledPrompt, backend: Backend) -> torch.Tensor:
    """One unchecked forward for the probe, ``[S, V]``."""
    with follow(Attention(hf.backbone(model), Batch([prompt], facts.device), backend, facts)) as attention:
        output = model(**attention.inputs, use_cache=False)
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return logits[0]


def _other(ids: Sequence[int], vocabulary: int) -> list[int]:
    return [(token + 1) % vocabulary for token in ids]


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return dtype
