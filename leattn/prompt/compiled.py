"""What a prompt is once it is compiled: ids, positions, spans and the visible relation, frozen; edits are copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.dag.reading import Read, read
from leattn.dag.tokens import tokenize_all
from leattn.errors import BackendError, GraphError
from leattn.prompt import masks
from leattn.prompt.columns import Columns, Row, columns_of
from leattn.prompt.stretch import fill
from leattn.prompt.text import aligned, node_rows
from leattn.prompt.visible import Visible
from leattn.table import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class CompiledPrompt:
    """One prompt, ready to run. S tokens, N nodes.

    Attributes
    ----------
    graph : ICLGraph
        What was compiled. Its node order is the layout.
    tokenizer
        As given; None if every node holds token ids.
    input_ids : LongTensor
        ``[1, S]``.
    position_ids : LongTensor, or in float64 where not all are whole numbers
        ``[1, S]``. Positions need not grow along the layout: parallel siblings share them.
    offsets : tuple of int
        Node i of the layout holds the tokens ``offsets[i]`` to ``offsets[i + 1]``; N + 1 entries.
    visible : Visible
        Which nodes each node sees. Everything that attends is derived from it.

    Examples
    --------
    >>> from leattn import compile_prompt
    >>> a = ICLNode([5, 6], id="a")
    >>> b = ICLNode([7], parents=[a], id="b")
    >>> prompt = compile_prompt(b)
    >>> prompt.spans[b], prompt["b"].positions.tolist()
    ((2, 3), [2])
    >>> prompt.dense_mask().int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    graph: ICLGraph
    tokenizer: PreTrainedTokenizerBase | None
    input_ids: Tensor
    position_ids: Tensor
    offsets: tuple[int, ...]
    visible: Visible

    def __len__(self) -> int:
        return self.offsets[-1]

    @cached_property
    def spans(self) -> dict[ICLNode, tuple[int, int]]:
        """Node → ``(start, end)`` in tokens, end exclusive."""
        return dict(zip(self.graph.nodes, zip(self.offsets, self.offsets[1:], strict=False), strict=True))

    @cached_property
    def node_index(self) -> Tensor:
        """The layout index of each token's node, ``[S]`` int64."""
        lengths = torch.tensor(self.offsets).diff()
        return torch.repeat_interleave(torch.arange(len(self.graph)), lengths).to(self.input_ids.device)

    @cached_property
    def pairs(self) -> int:
        """How many (query token, key token) pairs attend."""
        bounds = np.asarray(self.offsets)
        lengths = np.diff(bounds)
        node, start, stop = self.visible.flat()
        return int((lengths * (lengths + 1) // 2).sum() + (lengths[node] * (bounds[stop] - bounds[start])).sum())

    @property
    def density(self) -> float:
        """Attending pairs over the pairs of a plain causal prompt of the same length: 1.0 if everyone sees everything."""
        return self.pairs / (len(self) * (len(self) + 1) // 2)

    @cached_property
    def columns(self) -> Columns:
        """The tokens as columns, on the prompt's device: what every mask is made of."""
        return columns_of([self], self.input_ids.device)

    def dense_mask(self) -> Tensor:
        """Who may attend, however it is read, boolean ``[S, S]``; rows are queries.

        The only thing here, with :meth:`additive_mask`, that takes S × S memory.
        """
        mask = torch.zeros(len(self), len(self), dtype=torch.bool)
        fill(mask, Row(self.visible, self.offsets).stretches(range(len(self))), 0)
        return mask.to(self.input_ids.device)

    def additive_mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[1, 1, S, S]``: 0 where a token may attend and the smallest number of ``dtype`` elsewhere."""
        self.check_masks_say_all()
        return masks.additive(self.dense_mask(), dtype)[None, None]

    def check_masks_say_all(self) -> None:
        """Refuse what a mask cannot carry: a node that reads in another way than as it is.

        Raises
        ------
        BackendError
            Which node, and what to do.
        """
        if self.visible.readings:
            name = self.graph.names[self.graph.nodes[next(iter(self.visible.readings))]]
            raise BackendError(
                f"node {name!r} reads some of what it sees in another way (leattn.read), which no mask can carry; run "
                "the prompt with leattn.forward, leattn.generate or inside leattn.attend"
            )

    @property
    def mask_mod(self) -> masks.MaskMod:
        """The mask as a function ``(b, h, q_idx, kv_idx)`` for flex_attention; the same for every row and head."""
        self.check_masks_say_all()
        mask_mod = masks.column_mask_mod(self.columns, range(len(self)), len(self))

        def dag_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b * 0, h, q_idx, kv_idx)

        return dag_mask

    def block_mask(self, block_size: int = 128, device: torch.device | str | None = None) -> BlockMask:
        """The ``BlockMask`` of flex_attention, ``[1, 1, S, S]`` in blocks, straight from node spans."""
        size = len(self)
        prompt = self if device is None else self.to(device)
        (stretches,) = prompt.columns.stretches(range(size))
        counts = torch.from_numpy(masks.block_counts(stretches, range(size), size, block_size))
        return masks.block_mask_from_counts(counts[None].to(prompt.input_ids.device), (size, size), block_size, prompt.mask_mod)

    def to(self, device: torch.device | str) -> CompiledPrompt:
        """A copy with its tensors on ``device``."""
        if self.input_ids.device == torch.device(device):
            return self
        return replace(self, input_ids=self.input_ids.to(device), position_ids=self.position_ids.to(device))

    def without_edge(self, node: ICLNode | str, seen: ICLNode | str) -> CompiledPrompt:
        """A copy in which ``node`` no longer sees ``seen``; layout, tokens and positions stay.

        Raises
        ------
        GraphError
            ``node`` does not see ``seen`` in the first place.
        """
        return replace(self, visible=self.visible.without_edge(*self._check_edge(node, seen)))

    def _check_edge(self, node: ICLNode | str, seen: ICLNode | str) -> tuple[int, int]:
        """The layout indices of a node and of one that it sees."""
        row, column = self.graph.index[self.graph[node]], self.graph.index[self.graph[seen]]
        if not self.visible.sees(row, column):
            raise GraphError(f"{self.graph.name(node)!r} does not see {self.graph.name(seen)!r}, so there is no such edge")
        return row, column

    def without_node(self, node: ICLNode | str) -> CompiledPrompt:
        """A copy in which nobody else sees ``node``; it stays in the layout, with its tokens and positions."""
        return replace(self, visible=self.visible.without_node(self.graph.index[self.graph[node]]))

    def with_reading(
        self,
        node: ICLNode | str,
        seen: ICLNode | str | Iterable[ICLNode | str],
        *,
        temperature: float = 1.0,
        scale: float = 1.0,
        log_weight: float = 0.0,
        shift: float = 0,
        layers: int | Collection[int] | None = None,
        heads: int | Collection[int] | None = None,
    ) -> CompiledPrompt:
        """A copy in which ``node`` reads ``seen`` as one group, in the way of :func:`leattn.read`; with its defaults, as it is.

        Raises
        ------
        GraphError
            ``node`` does not see all of it, or :func:`leattn.read` refuses the numbers.
        """
        several = [seen] if isinstance(seen, ICLNode | str) else list(seen)
        for one in several:
            self._check_edge(node, one)
        group = read(
            [self.graph[one] for one in several],
            temperature=temperature,
            scale=scale,
            log_weight=log_weight,
            shift=shift,
            layers=layers,
            heads=heads,
        )
        row, columns = self.graph.index[self.graph[node]], [self.graph.index[one] for one in group.nodes]
        return replace(self, visible=self.visible.with_reading(row, columns, group.reading))

    def continued(self, content: str | Iterable[int] | Tensor, id: str | None = None) -> CompiledPrompt:
        """A copy with one more node at the end, which sees the last one and what that one sees, edits included.

        It starts where the last node ends, as generated tokens do: this is how a target, or what was generated, becomes part
        of a prompt.

        Raises
        ------
        GraphError
            Several sinks: which of them should go on?
        """
        if len(self.graph.sinks) > 1:
            names = ", ".join(repr(self.graph.names[sink]) for sink in self.graph.sinks[:6])
            raise GraphError(
                f"a prompt with several sinks ({names}) has no single end to continue; compile the one to go on from alone, "
                "or give one last node the others as parents and cut those edges with without_edge"
            )
        last = self.graph.nodes[-1]
        end = self.position_ids[0, -1].item() + 1
        node = ICLNode(content, [*self.parents(last), last], id, start_pos_id=end)
        ids = torch.as_tensor(tokenize_all([node], self.tokenizer)[0], device=self.input_ids.device)
        return replace(
            self,
            graph=ICLGraph(*self.graph.sinks, node),
            input_ids=torch.cat([self.input_ids, ids[None]], 1),
            position_ids=torch.cat(
                [self.position_ids, (torch.arange(len(ids), device=ids.device) + end).to(self.position_ids)[None]], 1
            ),
            offsets=(*self.offsets, self.offsets[-1] + len(ids)),
            visible=self.visible.continued(),
        )

    def __getitem__(self, key: ICLNode | str) -> NodeView:
        node = self.graph[key]
        return NodeView(self, node, self.spans[node])

    def sees(self, node: ICLNode | str) -> tuple[ICLNode, ...]:
        """The nodes that ``node`` sees in this prompt, in layout order, itself not included."""
        return tuple(self.graph.nodes[i] for i in self.visible.nodes_seen(self.graph.index[self.graph[node]]))

    def parents(self, node: ICLNode | str) -> list[ICLNode | Read]:
        """What ``node`` sees in this prompt, as it reads it: parents for another node that is to do the same."""
        groups = self.visible.readings.get(self.graph.index[self.graph[node]], ())
        members = [[self.graph.nodes[i] for first, last in runs for i in range(first, last)] for runs, _ in groups]
        grouped = {one for each in members for one in each}
        reads = [Read(tuple(each), reading) for each, (_, reading) in zip(members, groups, strict=True)]
        return [*(one for one in self.sees(node) if one not in grouped), *reads]

    def decode(self, ids: Tensor) -> str:
        """The text of some token ids; the ids themselves in brackets if the prompt has no tokenizer."""
        if self.tokenizer is None:
            return str(ids.tolist())
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def __str__(self) -> str:
        return "\n".join([self._summary(), *aligned(self._rows())])

    def __repr__(self) -> str:
        return f"CompiledPrompt({len(self.graph)} nodes, {len(self)} tokens, density {self.density:.2f})"

    def _repr_html_(self) -> str:
        rows = []
        for row in self._rows():
            if len(row) > 1:
                text = self[self.graph.nodes[int(row[0])]].text
                row = (*row[:4], repr(text if len(text) <= 80 else text[:77] + "…"), row[4])
            rows.append(row)
        return html_table(["", "node", "tokens", "positions", "text", "sees"], rows, caption=self._summary(), pre=[5])

    def _summary(self) -> str:
        count = len(self.graph)
        return f"{count} node{'s' * (count != 1)}, {len(self)} tokens, density {self.density:.2f}"

    def _rows(self) -> list[tuple[str, ...]]:
        names = [self.graph.names[node] for node in self.graph.nodes]
        return node_rows(names, self.offsets, self.position_ids[0].tolist(), self.visible)


@dataclass(frozen=True, eq=False)
class NodeView:
    """What one node became: ``prompt[node_or_id]``."""

    prompt: CompiledPrompt
    node: ICLNode
    span: tuple[int, int]

    @property
    def input_ids(self) -> Tensor:
        """Token ids, ``[n]``."""
        return self.prompt.input_ids[0, slice(*self.span)]

    @property
    def positions(self) -> Tensor:
        """Position ids, ``[n]``."""
        return self.prompt.position_ids[0, slice(*self.span)]

    @property
    def text(self) -> str:
        """The tokens decoded."""
        return self.prompt.decode(self.input_ids)
