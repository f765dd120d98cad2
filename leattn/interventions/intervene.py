"""``intervene``: operations on hidden states and attention scores, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from leattn.attention.around import Call
from leattn.attention.attend import block_for, prepare
from leattn.attention.block import Block, innermost, running
from leattn.attention.follow import follow
from leattn.attention.request import Backend, MaskMode
from leattn.attention.roots import warn_of_roots
from leattn.errors import BackendError, LeattnError
from leattn.interventions.operation import Operation, State, Subject, Tokens, doing
from leattn.interventions.scores import ChangedScores
from leattn.interventions.shown import Shown
from leattn.model.record import Model
from leattn.prompt.columns import Columns, Row
from leattn.prompt.compiled import CompiledPrompt
from leattn.prompt.slots import text_of
from leattn.prompt.visible import Visible

ABSENT = (
    "this intervene block has no prompt of its own to call the model with; call leattn.generate, leattn.forward or "
    "leattn.attend inside it, or give intervene the prompts"
)


@contextmanager
def intervene(
    model: Any,
    prompts: CompiledPrompt | Sequence[CompiledPrompt] | None,
    operations: Sequence[Operation],
    *,
    backend: str | Backend = "auto",
    mask: torch.Tensor | None = None,
    mask_mode: MaskMode = "combine",
    before: bool = False,
) -> Iterator[Block]:
    """Follow the graph with operations applied, inside the block and nowhere else. Includes :func:`leattn.attend`.

    Operations on one layer happen in the order given. ``leattn.generate``, ``leattn.forward`` and further blocks inside this
    one do its operations too, before their own, and look for its names in their own prompts, programs among them. All of it
    holds under a cached ``generate``: the prompt is edited in prefill, generated tokens only where an operation names them;
    SkipAttention and Suppress hold at every step.

    In a program, a node that the model writes is named like any other, and is its header and what is written; tokens have an
    index up to the first header. What continues a sink is called ``"… (continued)"``, as in ``realised``. What each operation
    does is what it does, by the same names, to the prompt of ``realised``.

    Parameters
    ----------
    model, backend, mask, mask_mode
        As in :func:`leattn.attend`.
    prompts
        As in :func:`leattn.attend`, or None: there is nothing to look names up in now, and nothing to call the model with; what
        runs inside brings its own. A program is intervened on in this way.
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
    if prompts is None:
        if backend != "auto" or mask is not None or mask_mode != "combine":
            raise LeattnError("backend, mask and mask_mode are about prompts, and here are none; give them to what runs inside")
        _check_outlives(record)
        attention = block_for(model, record, Columns([Row(Visible(()))], record.device), backend)
        attention.absent = ABSENT
        attention.operations, attention.reenter = everything, partial(_applied, operations=everything, before=before)
        with follow(attention):
            yield attention
        return
    attention = prepare(model, record, prompts, backend=backend, mask=mask, mask_mode=mask_mode)
    if not attention.replaces:
        warn_of_roots(model, record, attention.prompts)
    with _applied(attention, everything, before=before):
        yield attention


@contextmanager
def _applied(attention: Block, operations: tuple[Operation, ...], *, before: bool) -> Iterator[Block]:
    """Follow the graph with these operations, resolved against its prompts."""
    record = attention.record
    _check_outlives(record)
    attention.operations = operations
    attention.reenter = partial(_applied, operations=operations, before=before)
    layers = record.layers
    texts = attention.texts or tuple(text_of(prompt, row) for row, prompt in enumerate(attention.prompts))
    subject = Subject(texts, attention.columns, len(layers), record.base.config.num_attention_heads)
    bound = [operation.bind(subject) for operation in operations]

    def state(layer: int, like: torch.Tensor, call: Call | None = None) -> State:
        """``like`` is on the device of what is changed, and has a row for each of the model's."""

        def tokens(columns: range) -> Tokens:
            return subject.tokens(attention.forwards, columns, len(like), like.device)

        queries = attention.queries
        stop = queries.stop if call is None else call.key.shape[2]
        return State(layer, tokens(queries), call, lambda: tokens(range(stop)))

    if changing := doing(bound, "scores"):
        changed = ChangedScores(changing, lambda call: state(call.layer, call.query, call))
        attention.wrap(changed, "a change of attention scores", "scores")
    with ExitStack() as stack:
        if editors := doing(bound, "edit"):
            shown = Shown(attention, before=before)
            shown.hook(stack)
            for number, layer in enumerate(layers):
                hook = layer.register_forward_pre_hook(_edit(attention, state, number, editors, shown), with_kwargs=True)
                stack.callback(hook.remove)
        if changers := doing(bound, "attended"):
            for number, module in enumerate(record.attentions):
                stack.callback(module.register_forward_hook(_change_output(attention, state, number, changers)).remove)
        yield stack.enter_context(follow(attention))


def _check_outlives(record: Model) -> None:
    if record.checkpoints:
        raise BackendError(
            "gradient checkpointing runs the layers again in backward, after the operations are gone; "
            "call model.gradient_checkpointing_disable() first"
        )


def _edit(attention: Block, state_of: Callable[..., State], layer: int, editors: Sequence[Any], shown: Shown) -> Any:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if running(attention.record) is not attention:
            return None  # another thread's forward, or that of a block inside this one
        hidden = args[0] if args else kwargs["hidden_states"]
        state, edited = state_of(layer, hidden), hidden
        for editor in editors:
            edited = editor.edit(state, edited)
        shown.keep(layer, hidden, edited)
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return before


def _change_output(attention: Block, state_of: Callable[..., State], layer: int, changers: Sequence[Any]) -> Any:
    def after(_module: Any, _args: tuple[Any, ...], output: Any) -> Any:
        if running(attention.record) is not attention:
            return None
        changed = output if isinstance(output, torch.Tensor) else output[0]
        state = state_of(layer, changed)
        for changer in changers:
            changed = changer.attended(state, changed)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    return after
