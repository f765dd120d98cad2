"""What a forward inside ``intervene`` shows as ``hidden_states``: the inputs of its layers after the edits, or before them."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import torch

from leattn.attention.block import Block, running
from leattn.errors import BackendError


class Shown:
    """The edited inputs of a forward that was asked for its hidden states, put into its output.

    transformers collects what comes out of the layer before, which for layer 0 is what went into it.
    """

    def __init__(self, attention: Block, *, before: bool) -> None:
        self.attention, self.before = attention, before
        self.states: dict[int, dict[int, torch.Tensor]] = {}
        """By thread, then by layer; a thread is in it while its forward runs."""

    def hook(self, stack: ExitStack) -> None:
        base = self.attention.record.base
        stack.callback(base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        stack.callback(base.register_forward_hook(self._end).remove)

    def keep(self, layer: int, hidden: torch.Tensor, edited: torch.Tensor) -> None:
        """The input of a layer of the running forward, before and after the edits."""
        states = self.states.get(threading.get_ident())
        if states is None or edited is hidden:
            return
        if not self.before:
            states[layer] = edited
        elif layer == 0:
            states[layer] = hidden

    def _begin(self, module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_hidden_states")
        asked = module.config.output_hidden_states if asked is None else asked
        if asked and running(self.attention.record) is self.attention:
            self.states[threading.get_ident()] = {}

    def _end(self, _module: Any, _args: tuple[Any, ...], output: Any) -> None:
        states = self.states.pop(threading.get_ident(), None)
        if not states:
            return
        if getattr(output, "hidden_states", None) is None:
            raise BackendError("edited hidden states are put into the output by name; leave return_dict out, or at True")
        collected = list(output.hidden_states)
        for layer, state in states.items():
            if collected[layer] is not None:  # one of those that output_hidden_states names
                collected[layer] = state
        output.hidden_states = tuple(collected)
