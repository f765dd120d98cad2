"""Graphs as plain data: dict, YAML and JSON files, networkx."""

from __future__ import annotations

import copy
import heapq
import json
import os
import secrets
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from leattn.dag.builders import as_root
from leattn.dag.gennode import GenNode
from leattn.dag.node import ICLNode, regrouped
from leattn.dag.reading import Read, Reading
from leattn.dag.reading import read as read_group
from leattn.errors import GraphError, LeattnError

if TYPE_CHECKING:
    import networkx

OPTIONAL = ("start_pos_id", "end_pos_id", "special_tokens", "max_new_tokens", "stop", "sampling")
FIELDS = ("id", "content", "parents", *OPTIONAL)
READING = tuple(field.name for field in fields(Reading))

Group: TypeAlias = tuple[list[Hashable], dict[str, Any]]
"""Members of a group of parents, and how they are read."""


def _fields(node: ICLNode) -> dict[str, Any]:
    fields: dict[str, Any] = {"content": node.content if isinstance(node.content, str) else list(node.content)}
    if node.start_pos_id is not None:
        fields["start_pos_id"] = node.start_pos_id
    if node.end_pos_id is not None:
        fields["end_pos_id"] = node.end_pos_id
    if node.special_tokens != "parse":
        fields["special_tokens"] = node.special_tokens
    if isinstance(node, GenNode):
        fields["max_new_tokens"] = node.max_new_tokens
        if node.stop:
            fields["stop"] = list(node.stop)
        if node.sampling:
            fields["sampling"] = copy.deepcopy(dict(node.sampling))
    return fields


def to_dict(nodes: Sequence[ICLNode], names: Mapping[ICLNode, str]) -> dict[str, Any]:
    return {"nodes": [{"id": names[node], "parents": _parents(node, names), **_fields(node)} for node in nodes]}


def _parents(node: ICLNode, names: Mapping[ICLNode, str]) -> list[Any]:
    """Names, and for each group that is read in another way a mapping of its names under ``"read"`` and what is changed."""
    return [
        names[each] if isinstance(each, ICLNode) else {"read": [names[one] for one in each.nodes], **each.reading.changed()}
        for each in regrouped(node)
    ]


def from_dict(data: Mapping[str, Any]) -> list[ICLNode]:
    if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), Sequence) or isinstance(data["nodes"], str):
        raise GraphError("a prompt is a mapping with a list 'nodes', each with 'content' and optionally 'id' and 'parents'")
    beside = [field for field in data if field not in ("nodes", "root")]
    if beside:
        raise GraphError(f"unknown field {beside[0]!r} beside 'nodes'; only 'root' is known there")
    records: dict[Hashable, dict[str, Any]] = {}
    parents: dict[Hashable, list[Hashable]] = {}
    groups: dict[Hashable, list[Group]] = {}
    for number, record in enumerate(data["nodes"]):
        if not isinstance(record, Mapping) or "content" not in record:
            raise GraphError(f"node number {number} has no 'content': {record!r}")
        unknown = sorted(set(record) - set(FIELDS), key=str)
        if unknown:
            raise GraphError(f"node number {number} has an unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}")
        key = record.get("id")
        key = ("unnamed", number) if key is None else str(key)
        if key in records:
            raise GraphError(f"id {key!r} is given to two nodes; ids are unique")
        records[key] = dict(record)
        given = record.get("parents") or []
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise GraphError(f"'parents' of node {key!r} is a list of ids, not {given!r}")
        groups[key] = [_group(key, parent) for parent in given if isinstance(parent, Mapping)]
        alone = [str(parent) for parent in given if not isinstance(parent, Mapping)]
        parents[key] = [*alone, *(name for names, _ in groups[key] for name in names)]
    for root in as_root(data.get("root")):
        if "root" in records:
            raise GraphError(
                "id 'root' is given to a node, and the field 'root' makes a node of that name; rename one, or leave it out"
            )
        records = {"root": {"id": "root", "content": root.content}, **records}
        parents = {key: seen if "root" in seen else ["root", *seen] for key, seen in parents.items()} | {"root": []}
        groups["root"] = []
    return _build(records, parents, groups)


def _group(key: Hashable, group: Mapping[Any, Any]) -> Group:
    names = group.get("read")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise GraphError(f"a group among the parents of node {key!r} has a list of ids under 'read', not {names!r}")
    options = {name: group[name] for name in group if name != "read"}
    unknown = sorted(set(options) - set(READING), key=str)
    if unknown:
        raise GraphError(f"node {key!r} reads a group with an unknown {unknown[0]!r}; known are {', '.join(READING)}")
    return [str(name) for name in names], options


def to_networkx(nodes: Sequence[ICLNode], names: Mapping[ICLNode, str]) -> networkx.DiGraph[str]:
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for node in nodes:
        graph.add_node(names[node], **_fields(node))
    graph.add_edges_from((names[parent], names[node]) for node in nodes for parent in node.parents)
    for node in nodes:
        for number, group in enumerate(node.readings):
            attributes = {"read": number, **group.reading.changed()}
            graph.add_edges_from((names[parent], names[node], attributes) for parent in group.nodes)
    return graph


def from_networkx(graph: networkx.DiGraph[Any]) -> list[ICLNode]:
    if not graph.is_directed() or graph.is_multigraph():
        raise GraphError(f"a prompt is a networkx.DiGraph, not a {type(graph).__name__}; an edge (a, b) makes b see a")
    records: dict[Hashable, dict[str, Any]] = {}
    for key, attributes in graph.nodes(data=True):
        if "content" not in attributes:
            raise GraphError(f"node {key!r} of the networkx graph has no attribute 'content'")
        records[key] = {"id": str(key), **{name: attributes[name] for name in ("content", *OPTIONAL) if name in attributes}}
    parents = {key: list(graph.predecessors(key)) for key in records}
    return _build(records, parents, {key: _groups_of(graph, key, parents[key]) for key in records})


def _groups_of(graph: networkx.DiGraph[Any], key: Hashable, parents: Sequence[Hashable]) -> list[Group]:
    """Edges with the same number ``read`` are one group; what they say beside it must be the same."""
    groups: dict[Hashable, Group] = {}
    for parent in parents:
        attributes = {name: value for name, value in graph.edges[parent, key].items() if name in ("read", *READING)}
        if not attributes:
            continue
        number = attributes.pop("read", None)
        members, options = groups.setdefault(number, ([], attributes))
        if options != attributes:
            raise GraphError(
                f"edges into node {key!r} with read={number!r} differ: {options} and {attributes}; number them apart"
            )
        members.append(parent)
    return list(groups.values())


def _build(
    records: Mapping[Hashable, Mapping[str, Any]],
    parents: Mapping[Hashable, Sequence[Hashable]],
    groups: Mapping[Hashable, Sequence[Group]],
) -> list[ICLNode]:
    """Make the nodes in topological order; every tie goes to the record that comes first."""
    built: dict[Hashable, ICLNode] = {}
    for key in _topological(records, parents):
        record = records[key]
        options = {name: record[name] for name in OPTIONAL if record.get(name) is not None}
        name = None if record.get("id") is None else str(record["id"])
        ungrouped = list(parents[key])
        for parent in (parent for names, _ in groups[key] for parent in names):
            ungrouped.remove(parent)
        seen: list[ICLNode | Read] = [built[parent] for parent in ungrouped]
        seen += [read_group([built[parent] for parent in names], **options) for names, options in groups[key]]
        if "max_new_tokens" in options:
            built[key] = _gen_node(record["content"], seen, name, **options)
            continue
        alone = next((option for option in ("stop", "sampling") if option in options), None)
        if alone is not None:
            raise GraphError(
                f"node {key!r} has {alone!r}, which is for nodes that the model writes; give it 'max_new_tokens', or remove it"
            )
        built[key] = ICLNode(record["content"], seen, name, **options)
    return list(built.values())


def _gen_node(
    content: Any, parents: list[ICLNode | Read], name: str | None, *, sampling: Any = None, **options: Any
) -> GenNode:
    """A node that the model writes. Its ``sampling`` holds names of GenerationConfig, none of the node's own fields."""
    if not isinstance(sampling, Mapping | None) or not all(isinstance(option, str) for option in sampling or {}):
        raise GraphError(f"'sampling' of node {name!r} is a mapping of names, such as temperature, to values, not {sampling!r}")
    twice = next((option for option in sampling or {} if option in FIELDS), None)
    if twice is not None:
        raise GraphError(f"{twice!r} of node {name!r} is a field of the node; move it out of 'sampling'")
    return GenNode(content, parents, name, **options, **(sampling or {}))


def _topological(keys: Iterable[Hashable], parents: Mapping[Hashable, Sequence[Hashable]]) -> list[Hashable]:
    rank = {key: i for i, key in enumerate(keys)}
    by_rank = list(rank)
    children: dict[Hashable, list[Hashable]] = {key: [] for key in rank}
    for key in rank:
        for parent in parents[key]:
            if parent not in rank:
                raise GraphError(f"node {key!r} names the parent {parent!r}, which is not in the graph")
            children[parent].append(key)
    missing = {key: len(parents[key]) for key in rank}
    ready = [rank[key] for key in rank if not missing[key]]
    order: list[Hashable] = []
    while ready:
        key = by_rank[heapq.heappop(ready)]
        order.append(key)
        for child in children[key]:
            missing[child] -= 1
            if not missing[child]:
                heapq.heappush(ready, rank[child])
    if len(order) < len(rank):
        raise GraphError("the graph has a cycle: " + " → ".join(str(key) for key in _cycle(set(rank) - set(order), parents)))
    return order


def _cycle(stuck: set[Hashable], parents: Mapping[Hashable, Sequence[Hashable]]) -> list[Hashable]:
    """A cycle among nodes that all wait for one another, along the direction in which information would flow."""
    key = min(stuck, key=str)
    path: list[Hashable] = []
    while key not in path:
        path.append(key)
        key = next(parent for parent in parents[key] if parent in stuck)
    return [key, *reversed(path[path.index(key) :])]


def write(data: Mapping[str, Any], path: str | Path) -> None:
    path = Path(path).resolve()
    if path.suffix == ".json":
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    else:
        import yaml

        text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
    # A rename replaces the old file whole: an interrupted write leaves it as it was. Not tempfile, whose files are private.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | Path) -> list[ICLNode]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        # JSON first: every JSON file is YAML in theory, but not to every YAML parser (tabs, long keys).
        data = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        return from_dict(data)
    except LeattnError as error:
        raise type(error)(f"{path}: {error}") from error
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GraphError(f"{path} is not a prompt file: {error}") from error
