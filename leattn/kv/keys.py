"""The name of a node's keys and values: a hash over everything they depend on, and over nothing else."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from leattn.dag.node import Position
from leattn.dag.reading import Reading
from leattn.errors import LeattnError
from leattn.prompt.positions import Place, place_of

if TYPE_CHECKING:
    from leattn.prompt.compiled import CompiledPrompt

KEY_BYTES = 32


Groups: TypeAlias = Sequence[tuple[Sequence[int], Reading]]
"""Groups of what a node sees, as indices into the list of that, and how each is read."""


def node_key(
    fingerprint: bytes, ids: Any, seen: Sequence[tuple[bytes, Position]], place: Place, *, absolute: bool, groups: Groups = ()
) -> bytes:
    """The key of one node, 32 bytes.

    Parameters
    ----------
    fingerprint
        Of the model, :func:`leattn.kv.fingerprint.fingerprint`.
    ids
        The node's token ids, ``[n]``.
    seen
        For each node it sees, in any order, that node's key and its first position minus this node's first position. A
        multiset: two equal siblings count twice.
    place
        Where its tokens stand: how far apart and, where its keys hold at that position only (``absolute``), from where on.
    groups
        What of ``seen``, by index, the node reads in another way than as it is.

    Raises
    ------
    LeattnError
        A key in ``seen`` that is not 32 bytes long.

    Examples
    --------
    >>> a = node_key(b"model", [5, 6], [], Place(0), absolute=False)
    >>> b = node_key(b"model", [7], [(a, -2)], Place(2), absolute=False)
    >>> b == node_key(b"model", [7], [(a, -3)], Place(3), absolute=False)
    False
    """
    for key, _ in seen:
        if len(key) != KEY_BYTES:
            raise LeattnError(
                f"a key has {KEY_BYTES} bytes, but one of the seen nodes came with {len(key)}; use node_key's own"
            )
    ordered = sorted(seen)
    distances = np.array([distance for _, distance in ordered], dtype="<f8")
    read = [([seen[i] for i in members], reading) for members, reading in groups]
    start = place.start if absolute else None
    return _hash(fingerprint, np.asarray(ids, "<i8"), b"".join(key for key, _ in ordered), distances, start, place.apart, read)


def prompt_keys(prompt: CompiledPrompt, fingerprint: bytes, *, shifting: bool) -> list[bytes]:
    """The key of every node of a prompt, in layout order, after edits (``without_edge``, ``without_node``).

    ``shifting`` says whether the model's keys can be moved to other positions (:func:`leattn.kv.certify.certificate`); without
    it, a key carries the node's first position.

    Examples
    --------
    >>> import leattn
    >>> a = leattn.ICLNode([5, 6])
    >>> twice = leattn.compile_prompt([leattn.ICLNode([7], [a]), leattn.ICLNode([7], [a])])
    >>> keys = prompt_keys(twice, b"model", shifting=True)
    >>> keys[1] == keys[2] != keys[0]
    True
    """
    bounds = np.asarray(prompt.offsets)
    ids = prompt.input_ids[0].cpu().numpy()
    positions = prompt.position_ids[0].cpu().numpy()
    starts = positions[bounds[:-1]].astype("<f8")
    count = len(bounds) - 1
    apart = {i: place_of(positions[bounds[i] : bounds[i + 1]].tolist()).apart for i in _not_by_one(positions, bounds)}
    keys: list[bytes] = []
    known = np.zeros((count, KEY_BYTES), np.uint8)
    # Distances from one node sort as first positions do. So the nodes are kept sorted once for all, and what a node sees is
    # picked out in that order: 1000 nodes that each see all before take milliseconds, not half a million comparisons.
    ordered: list[tuple[bytes, float, int]] = []
    order = np.zeros(0, np.int64)
    for i in range(count):
        visible = np.zeros(count, bool)
        for first, last in prompt.visible.runs[i]:
            visible[first:last] = True
        seen = order[visible[order]]
        start = float(starts[i])
        tokens = ids[bounds[i] : bounds[i + 1]].astype("<i8")
        read = [
            ([(keys[j], float(starts[j]) - start) for first, last in runs for j in range(first, last)], reading)
            for runs, reading in prompt.visible.readings.get(i, ())
        ]
        held = None if shifting else start
        key = _hash(fingerprint, tokens, known[seen].tobytes(), starts[seen] - start, held, apart.get(i), read)
        keys.append(key)
        known[i] = np.frombuffer(key, np.uint8)
        entry = (key, start, i)
        place = bisect_left(ordered, entry)
        ordered.insert(place, entry)
        order = np.insert(order, place, i)
    return keys


def _not_by_one(positions: npt.NDArray[Any], bounds: npt.NDArray[np.int64]) -> list[int]:
    """The nodes whose tokens do not count by one."""
    uneven = np.flatnonzero(np.diff(positions) != 1) + 1
    inside = np.setdiff1d(uneven, bounds)
    return sorted(set((np.searchsorted(bounds, inside, side="right") - 1).tolist()))


def _hash(
    fingerprint: bytes,
    ids: npt.NDArray[np.int64],
    keys: bytes,
    distances: npt.NDArray[np.float64],
    start: Position | None,
    apart: Sequence[Position] | None,
    read: Sequence[tuple[list[tuple[bytes, float]], Reading]],
) -> bytes:
    """All lengths come before what they measure, so that no two inputs are written alike."""
    head = np.array([len(fingerprint), len(ids), len(distances), start is not None, apart is not None], dtype="<i8")
    digest = hashlib.blake2b(head.tobytes(), digest_size=KEY_BYTES, person=b"leattn-kv-node")
    digest.update(np.array([start or 0, *(apart or ())], dtype="<f8").tobytes())
    for part in (fingerprint, ids.tobytes(), keys, distances.tobytes()):
        digest.update(part)
    if read:
        digest.update(repr(sorted((sorted(members), _spelled(reading)) for members, reading in read)).encode())
    return digest.digest()


def _spelled(reading: Reading) -> str:
    """A reading in words that are the same in every process."""
    changed = reading.changed()
    return repr([(name, value if isinstance(value, list) else float(value)) for name, value in sorted(changed.items())])
