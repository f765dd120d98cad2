"""``intervene``: operations on hidden states and attention scores, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from leattn.attention.attend import prepare
from leattn.attention.block import Block, innermost, running
from leattn.attention.follow import follow
from leattn.attention.request import Backend, MaskMode
from leattn.attention.roots import warn_of_roots
from leattn.errors import BackendError, LeattnError
from leattn.interventions.operation import Operation, State, Subject, doing
from leattn.interventions.scores import ChangedScores
from leattn.interventions.shown import Shown
from leattn.model.record import Model
from leattn.prompt.compiled import CompiledPrompt


@contextmanager
def intervene(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt],
    operations: Sequence[Operation],
    *,
    backend: str | Backend = "auto",
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
    before: bool = False,
) -> Iterator[Block]:
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
        Of :class:`Suppress`, :class:`Freeze`, :class:`RandomNoise`, :class:`Shuffle`, :class:`SkipAttention`,
        :class:`Inject`, :class:`Average`, :class:`Recorded`, or of one's own (:class:`Operation`).
    before
        ``output_hidden_states`` inside the block shows the input of each layer after the edits of that layer, as the published
        code of *Attend First, Consolidate Later* does; True: before them.

    Raises
    ------
    LeattnError
        An unknown node, layer, head or row, factors that do not fit their tokens; before anything runs.
    BackendError
        A backend or a model that cannot carry an operation, and training with gradient checkpointing.

    Examples
    --------
    >>> import leattn
    >>> from leattn.interventions import Suppress
    >>> model, tokenizer = leattn.tiny.load()
    >>> a = leattn.ICLNode("The sky is", id="a")
    >>> prompt = leattn.compile_prompt(leattn.ICLNode(" blue.", [a], id="b"), tokenizer)
    >>> with intervene(model, prompt, [Suppress("a", 0.1, layers=[0, 1])]) as attention:
    ...     logits = model(**attention.inputs).logits
    """
    for operation in operations:
        if isinstance(operation, type) or not hasattr(operation, "bind"):
            raise LeattnError(
                "an operation is Suppress, Freeze, RandomNoise, Shuffle, SkipAttention, Inject, Average, Recorded or one of "
                f"your own with a method bind(subject), not {operation!r}"
            )
    record = Model.of(model)
    around = innermost(record)
    everything = (*(() if around is None else around.operations), *operations)
    attention = prepare(model, record, prompts, backend=backend, mask=mask, mask_mode=mask_mode)
    if not attention.replaces:
        warn_of_roots(model, record, attention.prompts)
    with _applied(attention, everything, before=before):
        yield attention


@contextmanager
def _applied(attention: Block, operations: tuple[Operation, ...], *, before: bool) -> Iterator[Block]:
    """Follow the graph with these operations, resolved against its prompts."""
    record = attention.record
    if record.checkpoints:
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, after the operations are gone; "
            "call model.gradient_checkpointing_disable() first"
        )
    attention.operations = operations
    attention.reenter = partial(_applied, operations=operations, before=before)
    layers = record.layers
    subject = Subject(attention.prompts, attention.columns, len(layers), record.base.config.num_attention_heads)
    bound = [operation.bind(subject) for operation in operations]
    if changing := doing(bound, "scores"):
        attention.wrap(ChangedScores(changing), "a change of attention scores", "scores")
    with ExitStack() as stack:
        if editors := doing(bound, "edit"):
            shown = Shown(attention, before=before)
            shown.hook(stack)
            for number, layer in enumerate(layers):
                hook = layer.register_forward_pre_hook(_edit(attention, number, editors, shown), with_kwargs=True)
                stack.callback(hook.remove)
        if changers := doing(bound, "attended"):
            for number, module in enumerate(record.attentions):
                stack.callback(module.register_forward_hook(_change_output(attention, number, changers)).remove)
        yield stack.enter_context(follow(attention))


def _edit(attention: Block, layer: int, editors: Sequence[Any], shown: Shown) -> Any:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if running(attention.record) is not attention:
            return None  # another thread's forward, or that of a block inside this one
        hidden = args[0] if args else kwargs["hidden_states"]
        state = State(layer, attention.queries, attention.columns, attention.columns.repeats(len(hidden)))
        edited = hidden
        for editor in editors:
            edited = editor.edit(state, edited)
        shown.keep(layer, hidden, edited)
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return before


def _change_output(attention: Block, layer: int, changers: Sequence[Any]) -> Any:
    def after(_module: Any, _args: tuple[Any, ...], output: Any) -> Any:
        if running(attention.record) is not attention:
            return None
        changed = output if isinstance(output, torch.Tensor) else output[0]
        for changer in changers:
            changed = changer.attended(layer, changed)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    return after
