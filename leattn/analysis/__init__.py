"""What a model did with a graph: attention and norms by node, and what each node and edge was worth."""

from leattn.analysis.attribution import attribute
from leattn.analysis.attribution_result import Attribution, Importance
from leattn.analysis.injection import Injection
from leattn.analysis.sweep import sweep
from leattn.analysis.sweep_result import SweepResult, SweepRow
from leattn.analysis.trace import TokenWeights, Trace, trace

__all__ = [
    "Attribution",
    "Importance",
    "Injection",
    "SweepResult",
    "SweepRow",
    "TokenWeights",
    "Trace",
    "attribute",
    "sweep",
    "trace",
]
