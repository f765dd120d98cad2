"""The weights and the config of a model as a few bytes: a glance that is cheap, and a digest that tells any two apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from leattn.model.weights import Weights, unpacked, version

# Says nothing about how keys and values come about. What is not listed counts, a new release of transformers included.
_IRRELEVANT = {
    "_name_or_path",
    "_attn_implementation",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GLANCE, _SAMPLE = 8, 64


def glance(found: Weights, base: Any) -> bytes:
    """Cheap to make, and different after almost any change."""
    summed = hashlib.blake2b(_settings(base))
    summed.update(repr((found.facts, found.state, [(name, same) for name, same, _ in found.opaque])).encode())
    for name, tensor in found.tensors:
        summed.update(repr((name, tensor.data_ptr(), version(tensor), tensor.shape, tensor.dtype)).encode())
    summed.update(_samples((tensor for _, tensor in found.tensors), _GLANCE))
    return summed.digest()


def digest(found: Weights, base: Any, besides: bytes) -> bytes:
    """32 bytes of all weights and the config, and of what is given besides; the same in every process."""
    summed = hashlib.blake2b(besides + _settings(base), digest_size=32)
    for line in sorted(_lines(found)):
        summed.update(line)
    return summed.digest()


def _lines(found: Weights) -> Iterator[bytes]:
    """What was found, one piece each; what is packed is unpacked."""
    yield from (repr(fact).encode() for fact in found.facts)
    for name, tensor in found.tensors:
        yield repr((name, tuple(tensor.shape), str(tensor.dtype), _checksum(tensor))).encode() + _samples([tensor], _SAMPLE)
    for name, _, unpack in found.opaque:
        yield from _lines(unpacked(name, unpack()))


def _settings(base: Any) -> bytes:
    """The config as far as it alters the computation."""
    config = {name: value for name, value in base.config.to_dict().items() if name not in _IRRELEVANT}
    return json.dumps(config, sort_keys=True, default=repr).encode()


def bits(tensor: Tensor) -> Tensor:
    """The values as integers of the same width, flat."""
    flat = tensor.detach().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()]) if flat.element_size() in _INTEGERS else flat.view(torch.int64)


def _samples(tensors: Iterable[Tensor], count: int) -> bytes:
    """Every n-th value of each tensor, about ``count`` of them; one transfer per dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        step = max(1, tensor.numel() // count)
        if tensor.is_contiguous():
            size = min(count, tensor.numel())
            values = tensor.as_strided((size,), (step,))
        else:
            values = tensor.reshape(-1)[::step][:count]
        groups.setdefault((tensor.dtype, tensor.device), []).append(values)
    return b"".join(bits(torch.cat(group)).cpu().numpy().tobytes() for group in groups.values())


def _checksum(tensor: Tensor) -> int:
    """The sum of all bits as integers: exact, so the same in every order, and different after the edit of one element."""
    flat = bits(tensor)
    per_word = 8 // flat.element_size()
    words = len(flat) // per_word * per_word
    if flat.storage_offset() % per_word:
        words = 0
    # Read as 64-bit words where possible: tens of times faster than widening each value.
    return int(flat[:words].view(torch.int64).sum()) + int(flat[words:].sum(dtype=torch.int64))
