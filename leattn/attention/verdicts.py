"""What was found out about a model by trying, kept on disk: another process that loads the same weights need not try again.

A verdict holds for weights, config, adapter, wrapper, attention implementation, kind of device, and the releases of everything
that computes. Models that are more than their weights, with hooks or with code of their own, are tried in every process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import nn

from leattn.errors import BackendError
from leattn.model.digest import digest
from leattn.model.record import Model, unwrapped, variant
from leattn.model.weights import weights

KNOWN_CODE = {"torch", "transformers", "peft"}
"""Whose modules do the same in every process."""
HELPERS = {"accelerate", "huggingface_hub", "numpy", "safetensors"}
"""Whose functions those modules import."""


def folder() -> Path | None:
    """Where verdicts are kept: ``LEATTN_CACHE``, or the user's cache folder; None where that is ``off``."""
    named = os.environ.get("LEATTN_CACHE")
    if named == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "leattn"


class Failure(str):
    """A reason that was raised, not measured: perhaps of this process alone, so that it is not kept."""


class Verdicts:
    """The verdicts of one model, as one JSON file; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __getitem__(self, name: str) -> Any:
        """A verdict, or None."""
        return self._read().get(name)

    def __setitem__(self, name: str, verdict: Any) -> None:
        if self.path is None:
            return
        text = json.dumps({**self._read(), name: verdict})
        with suppress(OSError):  # a disk that is full or read-only: it is tried again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, self.path)

    def _read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def verdicts(model: Any, record: Model) -> Verdicts:
    """What is kept about a model, as it is at the moment."""
    which = variant(model)
    with record.lock:
        if which not in record.verdicts:
            record.verdicts[which] = Verdicts(_path(model, record))
        found: Verdicts = record.verdicts[which]
        return found


def _path(model: Any, record: Model) -> Path | None:
    home = folder()
    modules = list(unwrapped(model).modules())
    if home is None or record.blocks or not all(_is_known(module) for module in modules):
        return None
    if not all(_is_original(library) for library in {type(module).__module__ for module in modules}):
        return None
    about = (variant(model), record.implementation, record.device_type, record.facts.can_switch, _releases())
    try:
        name = digest(weights(record.base), record.base, repr(about).encode()).hex()
    except BackendError:  # weights that cannot be read
        return None
    return home / "verdicts" / f"{name}.json"


def _is_known(module: nn.Module) -> bool:
    """Whether a module does what its class says, and that class is known."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    homes = {str(one.__module__).partition(".")[0] for one in (type(module), type(module).forward)}
    return homes <= KNOWN_CODE and not any(hooks) and "forward" not in vars(module)


def _is_original(library: str) -> bool:
    """Whether nobody put functions of his own into a module of Python, as packages of faster kernels do."""
    # What torch.compile leaves there begins with two underscores.
    held = vars(sys.modules[library]).items()
    functions = [value for name, value in held if isinstance(value, FunctionType) and not name.startswith("__")]
    homes = {str(function.__module__).partition(".")[0] for function in functions}
    return homes <= {*KNOWN_CODE, *HELPERS, *sys.stdlib_module_names}


@cache
def _releases() -> tuple[str, ...]:
    """Of Python, torch, transformers, and of what computes here: its own source, so that no change of it goes unnoticed."""
    source = hashlib.blake2b(digest_size=16)
    for room in ("prompt", "model", "attention", "kv"):
        for path in sorted((Path(__file__).parents[1] / room).glob("*.py")):
            source.update(path.read_bytes())
    return sys.version, torch.__version__, transformers.__version__, source.hexdigest()
