"""Processes that need not import torch and transformers again: forked from a server that has imported them and run nothing.

For tests that are about another process. Those about what an import does need a fresh interpreter instead.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["leattn.analysis", "leattn.generation.generate", "leattn.tiny", "transformers.models.llama.modeling_llama", "pytest"]
)


def in_another_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function of a test module returns, or raises, in a process of its own."""
    with ProcessPoolExecutor(1, FORKS, initializer=enter, initargs=(dict(os.environ), os.getcwd())) as pool:
        return pool.submit(function, *args).result()


def enter(environment: dict[str, str], folder: str) -> None:
    """The server may have been started from another environment."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
