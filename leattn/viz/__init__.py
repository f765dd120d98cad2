"""Pictures: data in, matplotlib axes out. The only part of leattn that imports matplotlib and daft, when first used.

Every function is called as ``plot_…(data, *, ax=None, path=None, …)``. Without ``ax`` it makes a figure of its own, which
no pyplot window holds on to; a notebook shows it as usual. A file is written only where ``path`` names one, PNG, SVG or
PDF by its suffix. A node has the same colour in every picture of its prompt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {"plot_mask": "mask", "plot_dag": "dag", "plot_attention": "attention", "fold_attention": "fold"}

__all__ = ["fold_attention", "plot_attention", "plot_dag", "plot_mask"]

if TYPE_CHECKING:
    from leattn.viz.attention import plot_attention
    from leattn.viz.dag import plot_dag
    from leattn.viz.fold import fold_attention
    from leattn.viz.mask import plot_mask


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"leattn.viz.{_HOMES[name]}"), name)
    raise AttributeError(f"leattn.viz has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
