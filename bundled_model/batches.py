"""Lessons become batches, in a process beside the one that trains."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from random import Random
from threading import Thread

import numpy as np
import numpy.typing as npt
import torch

from bundled_model.curriculum import PHASES, Lesson, lesson
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt
from leattn.training import Collator, Example

Array = npt.NDArray[np.generic]
PER_JOB = 4
AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """What the collator made of some lessons of one phase (an index into ``PHASES``); numpy, to travel between processes."""

    phase: int
    arrays: dict[str, Array]

    def tensors(self) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``position_ids`` ``[B, S]``, ``attention_mask`` ``[B, 1, S, S]``, ``labels``."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


def make_batches(collate: Collator, seed: str, phase: int, batch_size: int) -> list[Batch]:
    """`PER_JOB` batches of one phase; texts of similar length share a batch, to waste little on padding."""
    rng = Random(seed)
    lessons = [lesson(rng, PHASES[phase]) for _ in range(PER_JOB * batch_size)]
    pairs = [(text, compile_prompt(text.targets, collate.tokenizer, positions=text.positions)) for text in lessons]
    pairs.sort(key=lambda pair: len(pair[1]))
    batches = [_batch(collate, phase, pairs[i : i + batch_size]) for i in range(0, len(pairs), batch_size)]
    rng.shuffle(batches)
    return batches


def _batch(collate: Collator, phase: int, lessons: list[tuple[Lesson, CompiledPrompt]]) -> Batch:
    batch = collate([Example(prompt, labels=dict(text.answers)) for text, prompt in lessons])
    return Batch(phase, {name: tensor.numpy() for name, tensor in batch.items()})


def stream(
    collate: Collator, seed: int, batch_size: int, phase: Callable[[], int], replay: float = 1 / 6
) -> Generator[Batch, None, None]:
    """Batches without end, made ahead of time in another process.

    Parameters
    ----------
    collate
        Of the model to train.
    seed
        With the answers of `phase`, decides every batch.
    phase
        Called once per job for the phase to make batches of; `replay` of the jobs come from an earlier one.
    """
    rng = Random(seed)
    # A fresh interpreter, as forking a process that runs torch's threads may hang.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare_worker) as pool:
        jobs: deque[Future[list[Batch]]] = deque()
        number = 0
        try:
            while True:
                while len(jobs) <= AHEAD:
                    now = phase()
                    if now and rng.random() < replay:
                        now = rng.randrange(now)
                    jobs.append(pool.submit(make_batches, collate, f"{seed} {number}", now, batch_size))
                    number += 1
                yield from jobs.popleft().result()
        finally:
            for job in jobs:
                job.cancel()


def _prepare_worker() -> None:
    """Give way to the process that trains, and end with it however it ends."""
    os.nice(5)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    trainer = parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
