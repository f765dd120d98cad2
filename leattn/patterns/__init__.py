"""Programs with a name: a vote, the best of several, map and reduce, an ensemble of phrasings.

Each is a function over nodes that calls :func:`leattn.generate` and returns a result with the whole generation in it, to plot,
trace or extend. What a pattern writes is described by a :class:`leattn.GenNode` of yours: header, limit, stops, sampling.
"""

from leattn.patterns.best_of_n import Best, best_of_n
from leattn.patterns.map_reduce import MapReduce, map_reduce
from leattn.patterns.paraphrase_ensemble import Ensemble, paraphrase_ensemble
from leattn.patterns.self_consistency import Vote, self_consistency

__all__ = [
    "Best",
    "Ensemble",
    "MapReduce",
    "Vote",
    "best_of_n",
    "map_reduce",
    "paraphrase_ensemble",
    "self_consistency",
]
