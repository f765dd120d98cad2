"""Pictures: data in, matplotlib axes out. The only part of leattn that imports matplotlib and daft, when first used.

Every function is called as ``plot_…(data, *, ax=None, path=None, …)``. Without ``ax`` it makes a figure of its own, which
no pyplot window holds on to; a notebook shows it as usual. A file is written only where ``path`` names one, PNG, SVG or
PDF by its suffix. A node has the same colour in every picture of its prompt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {"plot_mask": "mask", "plot_dag": "dag", "plot_attention": "attention", "fold_attention": "fold"}
_HOMES |= {"plot_attribution": "attribution", "plot_sweep": "sweep"}
_HOMES |= {"plot_norms": "norms", "plot_sinks": "sinks", "plot_tokens": "tokens", "plot_scores": "scores"}
_HOMES |= {"plot_comparison": "comparison", "plot_places": "comparison"}
_HOMES |= {"save_report": "report", "PLOTS": "report"}

__all__ = [
    "PLOTS",
    "fold_attention",
    "plot_attention",
    "plot_attribution",
    "plot_comparison",
    "plot_dag",
    "plot_mask",
    "plot_norms",
    "plot_places",
    "plot_scores",
    "plot_sinks",
    "plot_sweep",
    "plot_tokens",
    "save_report",
]

if TYPE_CHECKING:
    from leattn.viz.attention import plot_attention
    from leattn.viz.attribution import plot_attribution
    from leattn.viz.comparison import plot_comparison, plot_places
    from leattn.viz.dag import plot_dag
    from leattn.viz.fold import fold_attention
    from leattn.viz.mask import plot_mask
    from leattn.viz.norms import plot_norms
    from leattn.viz.report import PLOTS, save_report
    from leattn.viz.scores import plot_scores
    from leattn.viz.sinks import plot_sinks
    from leattn.viz.sweep import plot_sweep
    from leattn.viz.tokens import plot_tokens


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"leattn.viz.{_HOMES[name]}"), name)
    raise AttributeError(f"leattn.viz has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
