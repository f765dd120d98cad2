"""The first forward of a pattern that reads logits itself."""

from __future__ import annotations

from collections.abc import Sequence

from leattn.generation.workspace import Feed, Workspace


def prefill(work: Workspace, wanted: Sequence[int]) -> tuple[list[Feed], dict[int, int]]:
    """What to feed for logits of the wanted units, all of it at once; and for each of them the row of its last token."""
    work.demand(wanted, compute=wanted)
    feeds: list[Feed] = []
    last: dict[int, int] = {}
    fed = 0
    while work.queue:
        i, ids = work.queue.popleft()
        feeds.append(Feed(i, ids, True))
        fed += len(ids)
        last[i] = fed - 1
    return feeds, {i: last[i] for i in wanted}
