"""Lessons become tensors, in a process beside the one that trains."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from random import Random
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from leattn.compile import CompiledPrompt, compile_prompt
from leattn.tiny.curriculum import PHASES, Lesson, lesson
from leattn.tiny.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Array = npt.NDArray[np.generic]
PER_JOB = 4
AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """B texts of up to S tokens with A trained tokens in all; numpy, to travel between processes.

    Attributes
    ----------
    phase
        Index into ``PHASES``.
    input_ids, position_ids
        ``[B, S]``.
    attention_mask
        Bool ``[B, 1, S, S]``; padding sees itself.
    row, column
        ``[A]``: the tokens whose successors are trained.
    label
        ``[A]``: those successors.
    is_value
        ``[A]``: whether the successor is the answer itself, and not the stop after it.
    """

    phase: int
    input_ids: Array
    position_ids: Array
    attention_mask: Array
    row: Array
    column: Array
    label: Array
    is_value: Array


def side_by_side(prompts: Sequence[CompiledPrompt]) -> dict[str, torch.Tensor]:
    """Prompts of different lengths as one input, padded on the right, for a model that runs sdpa.

    Returns
    -------
    dict
        ``input_ids`` and ``position_ids`` ``[B, S]``, ``attention_mask`` bool ``[B, 1, S, S]``; padding sees itself.
    """
    size = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), size, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    mask = torch.eye(size, dtype=torch.bool).repeat(len(prompts), 1, 1, 1)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        input_ids[row, :n] = prompt.input_ids[0]
        position_ids[row, :n] = prompt.position_ids[0]
        mask[row, 0, :n, :n] = prompt.dense_mask()
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}


def stack(phase: int, lessons: Sequence[tuple[Lesson, CompiledPrompt]]) -> Batch:
    """Lessons side by side, and where their answers stand."""
    inputs = {name: tensor.numpy() for name, tensor in side_by_side([prompt for _, prompt in lessons]).items()}
    trained: list[tuple[int, int, bool]] = []
    for row, (text, prompt) in enumerate(lessons):
        for node, count in text.answers:
            end = prompt.spans[node][1]
            trained += [(row, end - count + i - 1, i == 0) for i in range(count)]
    rows, columns, is_value = (np.array(column) for column in zip(*trained, strict=True))
    labels = inputs["input_ids"][rows, columns + 1]
    return Batch(phase, **inputs, row=rows, column=columns, label=labels, is_value=is_value)


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    torch.set_num_threads(1)
    return build_tokenizer()


def make_batches(seed: str, phase: int, batch_size: int) -> list[Batch]:
    """`PER_JOB` batches of one phase; texts of similar length share a batch, to waste little on padding."""
    rng = Random(seed)
    lessons = [lesson(rng, PHASES[phase]) for _ in range(PER_JOB * batch_size)]
    pairs = [(text, compile_prompt(text.targets, _tokenizer(), positions=text.positions)) for text in lessons]
    pairs.sort(key=lambda pair: len(pair[1]))
    batches = [stack(phase, pairs[i : i + batch_size]) for i in range(0, len(pairs), batch_size)]
    rng.shuffle(batches)
    return batches


def stream(seed: int, batch_size: int, phase: Callable[[], int], replay: float = 1 / 6) -> Generator[Batch, None, None]:
    """Batches without end, made ahead of time in another process.

    Parameters
    ----------
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
                    jobs.append(pool.submit(make_batches, f"{seed} {number}", now, batch_size))
                    number += 1
                yield from jobs.popleft().result()
        finally:
            for job in jobs:
                job.cancel()


def _prepare_worker() -> None:
    """Give way to the process that trains, and end with it however it ends."""
    os.nice(5)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    trainer = parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
