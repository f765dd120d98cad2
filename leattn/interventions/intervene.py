"""``intervene``: operations on hidden states and attention scores, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from leattn.attention.attend import prepare
from leattn.attention.batch import MaskMode
from leattn.attention.block import Attention, follow, innermost, running
from leattn.errors import BackendError, LeattnError
from leattn.interventions.hidden import Freeze, Inject, RandomNoise, Shuffle, SkipAttention
from leattn.interventions.operation import Editor, State
from leattn.interventions.scores import Suppress, Suppression
from leattn.model import hf
from leattn.prompt.compile import CompiledPrompt

Operation: TypeAlias = Freeze | RandomNoise | Shuffle | SkipAttention | Inject | Suppress


@contextmanager
def intervene(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    operations: Sequence[Operation],
    *,
    backend: str = "auto",
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
) -> Iterator[Attention]:
    """Follow the graph with operations applied, inside the block and nowhere else. Includes :func:`leattn.attend`.

    Operations on one layer happen in the order given. ``leattn.generate``, ``leattn.forward`` and further blocks inside this
    one do its operations too, before their own, and look for its names in their own prompts. All of it holds under a cached
    ``generate``: the prompt is edited in prefill, generated tokens only where an operation names them; SkipAttention and
    Suppress hold at every step.

    Parameters
    ----------
    model, prompts, backend, mask, mask_mode
        As in :func:`leattn.attend`.
    operations
        Of :class:`Suppress`, :class:`Freeze`, :class:`RandomNoise`, :class:`Shuffle`, :class:`SkipAttention`, :class:`Inject`.

    Raises
    ------
    LeattnError
        An unknown node, layer, head or row, factors that do not fit their tokens; before anything runs.
    BackendError
        A backend or a model that cannot carry an operation, and training with gradient checkpointing.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.tiny.load()
    >>> a = leattn.ICLNode("The sky is", id="a")
    >>> prompt = leattn.compile_prompt(leattn.ICLNode(" blue.", [a], id="b"), tokenizer)
    >>> with intervene(model, prompt, [Suppress("a", 0.1, layers=[0, 1])]) as attention:
    ...     logits = model(**attention.inputs).logits
    """
    for operation in operations:
        if not isinstance(operation, Operation):
            raise LeattnError(
                f"an operation is Suppress, Freeze, RandomNoise, Shuffle, SkipAttention or Inject, not {operation!r}"
            )
    scores = any(isinstance(operation, Suppress) for operation in operations)
    attention = prepare(model, prompts, backend=backend, mask=mask, mask_mode=mask_mode, scores=scores)
    around = innermost(attention.base)
    inherited: tuple[Any, ...] = () if around is None else around.operations
    with _applied(attention, (*inherited, *operations)):
        yield attention


@contextmanager
def _applied(attention: Attention, operations: tuple[Any, ...]) -> Iterator[Attention]:
    """Follow the graph with these operations, resolved against its prompts."""
    base = attention.base
    if base.training and getattr(base, "is_gradient_checkpointing", False):
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, after the operations are gone; "
            "call model.gradient_checkpointing_disable() first"
        )
    attention.operations = operations
    attention.reenter = partial(_applied, operations=operations)
    layers = hf.decoder_layers(base)
    editors: list[Editor] = []
    skipped: frozenset[int] = frozenset()
    suppressions = []
    for operation in operations:
        if isinstance(operation, Suppress):
            suppressions.append(operation.bind(attention.batch, len(layers), base.config.num_attention_heads))
        elif isinstance(operation, SkipAttention):
            skipped |= operation.bind(len(layers))
        else:
            editors.append(operation.bind(attention.batch, len(layers)))
    if suppressions:
        _check_scores(attention, layers)
        attention.wrapped = Suppression(suppressions)
    with ExitStack() as stack:
        if editors:
            for number, layer in enumerate(layers):
                stack.enter_context(_hook(layer.register_forward_pre_hook(_edit(attention, number, editors), with_kwargs=True)))
        for number in skipped:
            stack.enter_context(_hook(hf.attention_of(layers[number]).register_forward_hook(_silence(attention))))
        yield stack.enter_context(follow(attention))


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _check_scores(attention: Attention, layers: Sequence[torch.nn.Module]) -> None:
    if attention.backend.name not in ("eager", "sdpa"):
        raise BackendError(
            f"Suppress changes attention scores, which backend {attention.backend.name!r} cannot carry; use backend='eager' or "
            "'sdpa'"
        )
    if not attention.facts.can_switch:
        raise BackendError(
            f"Suppress goes through transformers' attention interface, which {attention.facts.family} does not use"
        )
    for layer in layers:
        hf.attention_function(hf.attention_of(layer), attention.backend.implementation)


def _edit(attention: Attention, layer: int, editors: Sequence[Editor]) -> Any:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if running(attention.base) is not attention:
            return None  # another thread's forward, or that of a block inside this one
        hidden = args[0] if args else kwargs["hidden_states"]
        batch = attention.batch
        state = State(layer, attention.columns, batch, batch.repeats(len(hidden)))
        edited = hidden
        for editor in editors:
            edited = editor.edit(state, edited)
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return before


def _silence(attention: Attention) -> Any:
    def after(_module: Any, _args: tuple[Any, ...], output: Any) -> Any:
        if running(attention.base) is not attention:
            return None
        if isinstance(output, torch.Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    return after
