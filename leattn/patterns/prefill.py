"""The first forward of a pattern that reads logits itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from leattn.generation.workspace import Feed, Workspace


def prefill(work: Workspace, wanted: Sequence[int]) -> tuple[list[Feed], dict[int, int]]:
    """What to feed for logits of the wanted units, all of it at once; and for each of them the row of its last token."""
    work.demand(wanted, compute=wanted)
    feeds = work.take_all()
    ends = accumulate(len(feed.ids) for feed in feeds)
    last = {feed.unit: end - 1 for feed, end in zip(feeds, ends, strict=True)}
    return feeds, {i: last[i] for i in wanted}
