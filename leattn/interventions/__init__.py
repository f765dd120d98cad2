"""Operations on a model while it runs a prompt: exact, composable, undone when their block ends."""

from leattn.interventions.average import Average
from leattn.interventions.capture import States, capture
from leattn.interventions.draws import RandomNoise, Shuffle
from leattn.interventions.hidden import Freeze, Inject, SkipAttention
from leattn.interventions.intervene import intervene
from leattn.interventions.operation import Operation, Selection, State, Subject, Tokens
from leattn.interventions.recorded import Edit, Recorded
from leattn.interventions.scores import Suppress

__all__ = [
    "Average",
    "Edit",
    "Freeze",
    "Inject",
    "Operation",
    "RandomNoise",
    "Recorded",
    "Selection",
    "Shuffle",
    "SkipAttention",
    "State",
    "States",
    "Subject",
    "Suppress",
    "Tokens",
    "capture",
    "intervene",
]
