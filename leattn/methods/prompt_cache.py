"""Prompt Cache: modules at pinned places of a schema, alternatives that share one, and slots that arguments fill."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leattn.dag.builders import Content
from leattn.dag.node import ICLNode
from leattn.errors import CompileError, GraphError
from leattn.methods.parts import header_of, listed_documents, tokens_of
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_cache(
    header: Content | None,
    documents: Sequence[Content],
    question: Content,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    use: Iterable[int] | None = None,
    unions: Iterable[Sequence[int]] = (),
    parameters: Mapping[str, tuple[int, Content]] | None = None,
    slot_token: int | None = None,
) -> CompiledPrompt:
    """Prompt Cache (Gim et al., arXiv 2311.04934): modules of a schema, each at its place whatever else is used.

    The schema is the header and all documents, one after another. Every module sees itself alone, so that it is computed once
    for all prompts of the schema (give them one ``KVStore``). The question starts behind the whole schema and sees what is
    used. The header, a module that is always used, may be empty.

    Parameters
    ----------
    header, documents, question, tokenizer
        As for every method; the documents are all modules that the schema has.
    use
        The modules that this prompt uses, as indices from 0; all of them by default. The others leave a gap.
    unions
        Groups of modules, as indices, of which a prompt uses one at most. They share a place, where the first of them stands;
        the longest decides the room.
    parameters
        Name → (tokens, argument): ``{name}`` in a document's text is a slot of that many tokens. The module is computed with
        ``slot_token`` in it. The argument, which may be shorter, or empty, stands in the slot's place instead for everyone
        else: it sees all modules that are used, and the arguments before it.
    slot_token
        The token that fills slots; by default the tokenizer's unknown token, as published.

    Raises
    ------
    GraphError
        Indices that are none or are twice there, two used modules of one union, a name that is not once in the documents.
    CompileError
        An argument longer than its slot; slots, and no token to fill them.

    Examples
    --------
    >>> print(prompt_cache([1], [[2, 3], [4], [5, 6, 7]], [8, 9], use=[0, 2], unions=[(1, 2)]))
    4 nodes, 8 tokens, density 0.69
      0  header      tokens 0:1  positions 0:1  ■⬚⬚⬚
      1  document 1  tokens 1:3  positions 1:3  ⬚■⬚⬚
      2  document 3  tokens 3:6  positions 3:6  ⬚⬚■⬚
      3  question    tokens 6:8  positions 6:8  ■■■■
    """
    first = header_of(header, tokenizer, "prompt_cache", may_be_empty=True)
    slots = {name: _Slot(name, *_slot(name, given, tokenizer)) for name, given in (parameters or {}).items()}
    modules = [_pieces(document, slots, tokenizer, i) for i, document in enumerate(listed_documents(documents), 1)]
    _check_each_once(modules, slots)
    partners = _partners(unions, len(modules))
    used = _used(use, partners, len(modules))
    rooms = [sum(map(len, pieces)) for pieces in modules]
    starts: dict[int, int] = {}
    end = sum(len(node.tokenize(tokenizer)) for node in first)
    for i in range(len(modules)):
        if i not in starts:
            together = partners.get(i, (i,))
            starts.update(dict.fromkeys(together, end))
            end += max(rooms[j] for j in together)
    seen, filled = list(first), []
    for i in used:
        texts, places = _module(modules[i], starts[i], f"document {i + 1}", tokenizer, slot_token)
        seen += texts
        filled += places
    stand: dict[ICLNode, int] = {}  # no pins: an argument sees modules that stand behind it, which is meant here
    for slot, start in filled:
        if slot.argument:
            seen.append(ICLNode(slot.argument, seen, slot.name))
            stand[seen[-1]] = start
    last = ICLNode(question, seen, "question", start_pos_id=end)
    return compile_prompt(last, tokenizer, positions=lambda graph, _lengths: {node: stand.get(node, 0) for node in graph})


@dataclass(frozen=True)
class _Slot:
    """A place of ``length`` tokens for an argument, given as token ids."""

    name: str
    length: int
    argument: tuple[int, ...]

    def __len__(self) -> int:
        return self.length


def _slot(name: str, given: tuple[int, Content], tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, tuple[int, ...]]:
    try:
        length, argument = given
    except (TypeError, ValueError):
        raise GraphError(f"parameter {name!r} is {given!r}; give (tokens of the slot, argument)") from None
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise GraphError(f"the slot of parameter {name!r} has {length!r} tokens; give a whole number from 1 up")
    ids = tokens_of(argument, tokenizer, name) if len(argument) else []
    if len(ids) > length:
        raise CompileError(f"the argument of {name!r} has {len(ids)} tokens and its slot {length}; make the slot longer")
    return length, tuple(ids)


def _pieces(
    document: Content, slots: Mapping[str, _Slot], tokenizer: PreTrainedTokenizerBase | None, number: int
) -> list[list[int] | _Slot]:
    """A document's token ids, cut where slots are; each text between two of them is tokenized by itself."""
    if not isinstance(document, str) or not slots:
        return [tokens_of(document, tokenizer, f"document {number}", is_document=True)]
    pattern = "|".join(re.escape("{" + name + "}") for name in slots)
    found = re.split(f"({pattern})", document)
    texts = [tokens_of(text, tokenizer, f"document {number}", is_document=True) if text else [] for text in found[::2]]
    between = [slots[name[1:-1]] for name in found[1::2]]
    ordered: list[list[int] | _Slot] = [texts[0]]
    for slot, text in zip(between, texts[1:], strict=True):
        ordered += [slot, text]
    return [piece for piece in ordered if len(piece)]


def _check_each_once(modules: Sequence[Sequence[list[int] | _Slot]], slots: Mapping[str, _Slot]) -> None:
    found = [piece.name for pieces in modules for piece in pieces if isinstance(piece, _Slot)]
    for name in slots:
        if found.count(name) != 1:
            raise GraphError(
                f"the documents hold {{{name}}} {found.count(name)} times; a parameter has one slot, in a document that is text"
            )


def _partners(unions: Iterable[Sequence[int]], count: int) -> dict[int, tuple[int, ...]]:
    """Each module of a union → the whole union."""
    partners: dict[int, tuple[int, ...]] = {}
    for union in unions:
        together = tuple(union)
        _check_indices("unions", together, count)
        twice = next((i for i in together if i in partners), None)
        if twice is not None:
            raise GraphError(f"module {twice} is in two unions; a module has one place")
        partners.update(dict.fromkeys(together, together))
    return partners


def _used(use: Iterable[int] | None, partners: Mapping[int, tuple[int, ...]], count: int) -> list[int]:
    """The modules in use, in the schema's order."""
    used = list(range(count)) if use is None else list(use)
    _check_indices("use", used, count)
    for i in sorted(used):
        other = next((j for j in partners.get(i, ()) if j != i and j in used), None)
        if other is not None:
            raise GraphError(f"modules {i} and {other} share a place, and both are used; say with use= which one is")
    return sorted(used)


def _check_indices(what: str, given: Sequence[int], count: int) -> None:
    for i in given:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count:
            raise GraphError(f"{what} names module {i!r}; give indices from 0 to {count - 1}, in the order of the documents")
    if len(set(given)) < len(given):
        raise GraphError(f"{what} names a module twice: {list(given)}; give each once")


def _module(
    pieces: Sequence[list[int] | _Slot],
    start: int,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    slot_token: int | None,
) -> tuple[list[ICLNode], list[tuple[_Slot, int]]]:
    """A module's own texts, computed with empty slots between them, and where the slots are."""
    alone: list[ICLNode] = []
    texts: list[ICLNode] = []
    places: list[tuple[_Slot, int]] = []
    for j, piece in enumerate(pieces, 1):
        if isinstance(piece, _Slot):
            places.append((piece, start))
            if j < len(pieces):  # what stands last in a module, nothing of it was computed with
                filling = [_filling(tokenizer, slot_token, piece.name)] * len(piece)
                alone.append(ICLNode(filling, alone, f"{piece.name} empty", start_pos_id=start))
        else:
            node = ICLNode(piece, alone, name if len(pieces) == 1 else f"{name}.{j}", start_pos_id=start)
            alone.append(node)
            texts.append(node)
        start += len(piece)
    return texts, places


def _filling(tokenizer: PreTrainedTokenizerBase | None, slot_token: int | None, name: str) -> int:
    if slot_token is not None:
        return slot_token
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        raise CompileError(f"this tokenizer has no unknown token to fill the slot {name!r} with; give slot_token=")
    return int(unknown)
