"""What a trace takes, and whether there is room for it: asked before it starts, as it may be many gigabytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from leattn.analysis.fold import Pair
from leattn.errors import LeattnError

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss"),
)
"""Of a container: its limit, and where its use is told without files that are merely cached."""


@dataclass(frozen=True)
class Footprint:
    """How large a trace is, in bytes: L layers, H heads, N nodes, S tokens.

    Attributes
    ----------
    mass
        Attention between nodes in one layer, kept in float32.
    tokens
        Attention between the tokens of pairs of nodes in one layer, kept in float32.
    norms
        Norms in one layer, kept in float32.
    work
        What one layer takes while it runs, where the model is: attention between nodes, twice.
    """

    layers: int
    heads: int
    nodes: int
    mass: int
    tokens: int
    norms: int
    work: int

    @property
    def layer(self) -> int:
        """What is kept of one layer."""
        return self.mass + self.tokens + self.norms

    @classmethod
    def of(cls, layers: int, heads: int, nodes: int, length: int, pairs: Sequence[Pair], item: int) -> Footprint:
        """Of so many layers; ``item`` are the bytes of a number that attention is summed up in."""
        cells = sum(pair.shape[0] * pair.shape[1] for pair in pairs)
        return cls(
            layers=layers,
            heads=heads,
            nodes=nodes,
            mass=4 * heads * nodes * (nodes + 1),
            tokens=4 * heads * cells,
            norms=4 * length * (3 + 2 * heads),
            work=2 * item * heads * nodes**2,
        )

    def check(self, device: torch.device) -> None:
        """Raise LeattnError if this does not fit into what is free on the CPU, where it is kept, and on the model's device."""
        on_device = device.type == "cuda"
        if on_device and self.work > (free := _free_on(device)):
            raise LeattnError(
                f"a layer of this trace takes {_gb(self.work)} on {device}, for {self._pairs}, and {_gb(free)} are free there, "
                "whatever layers= are traced; trace a prompt of fewer, larger nodes, or a model on the CPU"
            )
        work, room = 0 if on_device else self.work, free_memory()
        if room is None or self.layers * self.layer + work <= room:
            return
        most = (room - work) // self.layer
        fix = f"trace at most {most} at a time, layers=[…], or" if most > 0 else "not even layers=[0] has room, so trace"
        tokens = f" and {_gb(self.tokens)} for tokens=" if self.tokens else ""
        raise LeattnError(
            f"this trace would keep {_gb(self.layers * self.layer)}, in each of {self.layers} layers {_gb(self.mass)} for "
            f"{self._pairs}{tokens}, and take {_gb(work)} more while it runs, but {_gb(room)} of memory are free; {fix} a "
            "prompt of fewer, larger nodes"
        )

    @property
    def _pairs(self) -> str:
        return f"{self.heads} heads × {self.nodes:,}² pairs of nodes"


def free_memory() -> int | None:
    """The bytes that are free on the machine and in its container; None where nothing says so."""
    known = [_free_of_machine(), *(_free_of_group(*group) for group in _GROUPS)]
    return min((free for free in known if free is not None), default=None)


def _free_of_machine() -> int | None:
    available = _number_in("/proc/meminfo", "MemAvailable:")
    if available is not None:
        return 1024 * available
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _free_of_group(limit: str, stat: str, name: str) -> int | None:
    try:
        most = int(Path(limit).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    used = _number_in(stat, name)
    return None if used is None else max(0, most - used)


def _number_in(path: str, name: str) -> int | None:
    """The number beside a name, in a file of names and numbers."""
    try:
        rows = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return None
    return next((int(row[1]) for row in rows if row[:1] == [name]), None)


def _free_on(device: torch.device) -> int:
    """What is free on a CUDA device, with what torch holds there without using it."""
    return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
