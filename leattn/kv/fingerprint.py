"""What a model computes keys and values with, as 32 bytes: its weights of all kinds, its config, and what it does."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch

from leattn.attention.attend import prepare
from leattn.attention.backends import named
from leattn.attention.follow import follow
from leattn.attention.probe import route
from leattn.attention.sample import probing
from leattn.dag.node import ICLNode
from leattn.errors import BackendError, LeattnWarning
from leattn.kv.entry import node_kv
from leattn.model.cache import full_length_cache
from leattn.model.digest import bits, digest, glance
from leattn.model.record import Model
from leattn.model.weights import weights
from leattn.prompt.compile import compile_prompt

FORMAT = b"leattn-kv-2"
"""Changes with everything that makes old keys mean something else."""

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
    seen = glance(weights(record.base), record.base)
    with record.lock:
        known = record.fingerprint
        if known is None or known[0] != seen:
            try:
                tried = _try_out(model, record)
            except BackendError:  # it follows no graph, or not while another thread has it: nothing is stored
                return digest(weights(record.base), record.base, FORMAT)
            # Looked at afterwards: a forward takes a merged adapter that was disabled out of the weights.
            found = weights(record.base)
            known = record.fingerprint = glance(found, record.base), digest(found, record.base, FORMAT + tried)
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
    return b"".join(bits(tensor).cpu().numpy().tobytes() for tensor in (*kv.keys, *kv.values))
