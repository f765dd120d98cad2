"""What a backend is, and what it needs to know about a model. One file per backend beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from leattn.attention.batch import Batch, MaskRequest


@dataclass(frozen=True)
class ModelFacts:
    """What can be read off a model without running it.

    ``position_limit`` is how many positions a learned table holds, ``rope_limit`` up to where rotary angles do not depend on
    the length of the input, ``trained_length`` what the model was trained for; None where there is no such thing.
    """

    family: str
    implementation: str
    can_switch: bool
    takes_positions: bool
    stateful: bool
    windowed: bool
    chunked: bool
    softcap: bool
    sinks: bool
    supports_sdpa: bool
    supports_flex: bool
    vocabulary: int
    position_limit: int | None
    rope_limit: int | None
    trained_length: int | None
    device: torch.device


class Backend(Protocol):
    """A way to run the graph's attention through one of transformers' implementations."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def implementation(self) -> str:
        """What transformers calls it."""

    @property
    def function(self) -> Callable[..., Any] | None:
        """The attention function under that name, if it is ours and not transformers'."""

    def refusal(self, facts: ModelFacts) -> str | None:
        """Why this backend cannot serve such a model, in words that follow "backend 'name' cannot run this model: "."""

    def mask(self, batch: Batch, request: MaskRequest) -> Any:
        """The mask in the form that the implementation takes."""
