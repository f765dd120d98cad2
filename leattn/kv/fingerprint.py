"""What a model computes keys and values with, as 32 bytes: weights, buffers, config and active adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leattn.errors import BackendError
from leattn.model.record import Model

FORMAT = b"leattn-kv-1"
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


def fingerprint(model: Any) -> bytes:
    """32 bytes that differ between models that compute different keys and values, and survive a restart.

    Covers name, shape, dtype, a strided sample and an integer checksum of every parameter and buffer below the language-model
    head, the config, and which adapters are active. Reading all weights takes about as long as one forward pass; it is done
    once, and again after a change: of storage, shape, dtype, version counter, or of a few values of every tensor, looked at on
    each call. What slips through is an edit of single elements behind autograd's back (``weight.data[i] = x``).

    Raises
    ------
    BackendError
        Weights that are not in memory (on the meta device).

    Examples
    --------
    >>> import leattn
    >>> model, _ = leattn.tiny.load()
    >>> len(fingerprint(model)), fingerprint(model) == fingerprint(model)
    (32, True)
    """
    record = Model.of(model)
    base = record.base
    tensors = [*base.named_parameters(), *base.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise BackendError(
                f"the weights of {name!r} are not in memory (meta device), so stored keys and values cannot be told to be of "
                "this model; load the model without offloading, or run without kv_store"
            )
    settings = _settings(base)
    glance = _glance(tensors, settings)
    known = record.fingerprint
    if known is None or known[0] != glance:
        known = record.fingerprint = glance, _digest(tensors, settings)
    return known[1]


def _glance(tensors: list[tuple[str, Tensor]], settings: bytes) -> bytes:
    """Cheap to make, and different after almost any change."""
    digest = hashlib.blake2b(settings)
    for name, tensor in tensors:
        digest.update(repr((name, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype)).encode())
    digest.update(_samples((tensor for _, tensor in tensors), _GLANCE))
    return digest.digest()


def _digest(tensors: list[tuple[str, Tensor]], settings: bytes) -> bytes:
    digest = hashlib.blake2b(FORMAT + settings, digest_size=32)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), _checksum(tensor))).encode())
        digest.update(_samples([tensor], _SAMPLE))
    return digest.digest()


def _settings(base: torch.nn.Module) -> bytes:
    """The config as far as it alters the computation, whether dropout is on, and each module's active adapters."""
    config = {name: value for name, value in base.config.to_dict().items() if name not in _IRRELEVANT}  # type: ignore[union-attr,operator]
    adapters = [
        (name, repr(module.active_adapters), repr(module.disable_adapters), repr(getattr(module, "scaling", None)))
        for name, module in base.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters")
    ]
    return json.dumps([config, base.training, adapters], sort_keys=True, default=repr).encode()


def _bits(tensor: Tensor) -> Tensor:
    """The values as integers of the same width, flat."""
    flat = tensor.detach().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()]) if flat.element_size() in _INTEGERS else flat.view(torch.int64)


def _samples(tensors: Iterable[Tensor], count: int) -> bytes:
    """Every n-th value of each tensor, about ``count`` of them; one transfer per dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bits = _bits(tensor)
        groups.setdefault((bits.dtype, bits.device), []).append(bits[:: max(1, len(bits) // count)][:count])
    return b"".join(torch.cat(group).cpu().numpy().tobytes() for group in groups.values())


def _checksum(tensor: Tensor) -> int:
    """The sum of all bits as integers: exact, so the same in every order, and different after the edit of one element."""
    bits = _bits(tensor)
    per_word = 8 // bits.element_size()
    words = len(bits) // per_word * per_word
    if bits.storage_offset() % per_word:
        words = 0
    # Read as 64-bit words where possible: tens of times faster than widening each value.
    return int(bits[:words].view(torch.int64).sum()) + int(bits[words:].sum(dtype=torch.int64))
