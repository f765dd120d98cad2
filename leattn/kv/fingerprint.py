"""What a model computes keys and values with, as 32 bytes: its weights of all kinds, its config, and what it does."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from leattn.attention.attend import prepare
from leattn.attention.backends import named
from leattn.attention.block import follow
from leattn.attention.probe import probing, route
from leattn.dag.node import ICLNode
from leattn.errors import BackendError, LeattnWarning
from leattn.kv.entry import node_kv
from leattn.kv.weights import Weights, unpacked, version, weights
from leattn.model.cache import full_length_cache
from leattn.model.record import Model
from leattn.prompt.compile import compile_prompt

FORMAT = b"leattn-kv-2"
"""Changes with everything that makes old keys mean something else."""

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
_TOKENS = 12
"""How many tokens the model is tried with."""


def fingerprint(model: Any) -> bytes:
    """32 bytes that differ between models that compute different keys and values, and survive a restart.

    Covers the config, name, shape, dtype, a strided sample and an integer checksum of every tensor that the modules below the
    language-model head compute with (parameters, buffers, packed and quantised weights in attributes, offloaded ones, active
    adapters), and the keys and values of a few tokens, for what is kept elsewhere. Reading all weights takes about as long as
    one forward pass; it is done once, and again after a change: of storage, shape, dtype, version counter, of hooks and numbers
    on modules, or of a few values of every tensor, looked at on each call. What slips through is an edit of single elements
    behind autograd's back (``weight.data[i] = x``).

    Raises
    ------
    BackendError
        Weights that are not in memory (on the meta device) or that cannot be read.

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> len(fingerprint(model)), fingerprint(model) == fingerprint(model)
    (32, True)
    """
    record = Model.of(model)
    glance = _glance(weights(record.base), record.base)
    with record.lock:
        known = record.fingerprint
        if known is None or known[0] != glance:
            try:
                tried = _try_out(model, record)
            except BackendError:  # it follows no graph, or not while another thread has it: nothing is stored
                return _digest(weights(record.base), record.base, b"")
            # Looked at afterwards: a forward takes a merged adapter that was disabled out of the weights.
            found = weights(record.base)
            known = record.fingerprint = _glance(found, record.base), _digest(found, record.base, tried)
    return known[1]


def in_this_context(name: bytes, device: torch.device) -> bytes:
    """The fingerprint of what a model computes here and now: under autocast it is another than without."""
    if not torch.is_autocast_enabled(device.type):
        return name
    return hashlib.blake2b(name + str(torch.get_autocast_dtype(device.type)).encode(), digest_size=32).digest()


def _try_out(model: Any, record: Model) -> bytes:
    """The keys and values of fixed tokens: of the model as it is, without autocast, dropout or any block around."""
    if record.facts.cached_beside is not None:
        raise BackendError(record.facts.cached_beside)
    ids = [(7919 * i + 5) % record.facts.vocabulary for i in range(_TOKENS)]
    prompt, cache = compile_prompt(ICLNode(ids, id="tokens")), full_length_cache(None)
    with probing(record.base, record), warnings.catch_warnings():
        warnings.simplefilter("ignore", LeattnWarning)
        # On one backend, where it serves: the implementation that a model was loaded with makes no other model of it.
        serves = route(model, record, named("eager"))[0] is None
        with follow(prepare(model, record, prompt, backend="eager" if serves else "auto")) as attention:
            record.base(**attention.inputs, use_cache=True, past_key_values=cache)
    kv = node_kv(cache, slice(0, _TOKENS), 0)
    return b"".join(_bits(tensor).cpu().numpy().tobytes() for tensor in (*kv.keys, *kv.values))


def _glance(found: Weights, base: Any) -> bytes:
    """Cheap to make, and different after almost any change."""
    digest = hashlib.blake2b(_settings(base))
    digest.update(repr((found.facts, found.state, [(name, same) for name, same, _ in found.opaque])).encode())
    for name, tensor in found.tensors:
        digest.update(repr((name, tensor.data_ptr(), version(tensor), tensor.shape, tensor.dtype)).encode())
    digest.update(_samples((tensor for _, tensor in found.tensors), _GLANCE))
    return digest.digest()


def _digest(found: Weights, base: Any, tried: bytes) -> bytes:
    digest = hashlib.blake2b(FORMAT + _settings(base) + tried, digest_size=32)
    for line in sorted(_lines(found)):
        digest.update(line)
    return digest.digest()


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


def _bits(tensor: Tensor) -> Tensor:
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
    return b"".join(_bits(torch.cat(group)).cpu().numpy().tobytes() for group in groups.values())


def _checksum(tensor: Tensor) -> int:
    """The sum of all bits as integers: exact, so the same in every order, and different after the edit of one element."""
    bits = _bits(tensor)
    per_word = 8 // bits.element_size()
    words = len(bits) // per_word * per_word
    if bits.storage_offset() % per_word:
        words = 0
    # Read as 64-bit words where possible: tens of times faster than widening each value.
    return int(bits[:words].view(torch.int64).sum()) + int(bits[words:].sum(dtype=torch.int64))
