"""One family in a child process, many of them side by side, results line by line as they come."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers.utils.logging import set_verbosity_error

import leattn
from families.backends import BACKENDS, check_backend
from families.build import Builder, Unbuilt
from families.catalogue import Family
from families.catalogue import families as catalogue
from families.decode import check_generate
from families.oracle import Oracle
from families.outcome import Outcome, first_line, place, worst
from families.readings import check_readings
from families.stores import check_reuse, check_shift

COLUMNS = (*BACKENDS, "generate", "reuse", "shift", "readings")
MEMORY = 12 * 2**30
"""Address space that one family may take, in bytes."""
PRINT = ("__main__.py", "table.py")
"""What only shows results, which does not make them old."""


def state() -> dict[str, str]:
    """What a result depends on: versions, and the sources of leattn and of these checks."""
    digest = hashlib.sha256()
    for folder in (Path(leattn.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            if file.name not in PRINT:
                digest.update(file.read_bytes())
    return {
        "leattn": leattn.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "sources": digest.hexdigest()[:16],
    }


def check(family: Family, columns: Sequence[str] = COLUMNS) -> dict[str, Any]:
    """Everything about one family, in this process, as it is written to the file."""
    torch.set_num_threads(1)
    os.environ["LEATTN_CACHE"] = "off"  # what is checked is what it finds out now
    started = time.process_time()
    found: dict[str, Any] = {"family": family.name, "loaded": family.loaded}
    # Uncompiled flex is the same mathematics, and is not compiled anew for every family.
    stance = "default" if family.loaded == "torch.compile" else "force_eager"
    with warnings.catch_warnings(), torch.compiler.set_stance(stance):
        warnings.simplefilter("ignore")
        try:
            builder = Builder(family)
            found["names"] = names_of(builder)
            oracle = Oracle(builder)
        except Unbuilt as reason:
            return found | {"unbuilt": str(reason)}
        except Exception as error:
            return found | {"unbuilt": f"{type(error).__name__}: {first_line(error)} ({place(error)})"}
        found |= {"oracle": oracle.how, "tried": oracle.tried, "power": oracle.power()}
        found["columns"] = {}
        for column in columns:
            begun = time.process_time()
            outcomes = _column(builder, oracle, column)
            found["columns"][column] = {
                "status": worst(outcomes),
                "seconds": round(time.process_time() - begun, 2),
                "checks": [each.to_dict() for each in outcomes],
            }
    return found | {"seconds": round(time.process_time() - started, 1)}


def names_of(builder: Builder) -> list[str]:
    """What a sentence about this model may call it, so that equal sentences about several can be told."""
    model = builder.fresh()
    text = builder.config.get_text_config(decoder=True)
    found = {type(each).__name__ for each in (model, getattr(model, "base_model", model), *model.children())}
    return sorted(
        found | {builder.family.model_type, str(builder.config.model_type), str(text.model_type)}, key=len, reverse=True
    )


def _column(builder: Builder, oracle: Oracle, column: str) -> list[Outcome]:
    if column in BACKENDS:
        return check_backend(builder, oracle, column)
    checks = {"generate": check_generate, "reuse": check_reuse, "shift": check_shift, "readings": check_readings}
    return checks[column](builder, oracle)


def _child(family: Family, columns: Sequence[str], pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    set_verbosity_error()  # type: ignore[no-untyped-call]
    pipe.send(check(family, columns))


def warm() -> None:
    """Import in the parent what every child would import by itself."""
    check(catalogue()["llama"], ["flex"])


def scan(
    families: Sequence[Family], *, columns: Sequence[str] = COLUMNS, jobs: int = 2, timeout: float = 300
) -> Iterator[dict[str, Any]]:
    """Results as they come, not in the order of the families."""
    warm()
    context = multiprocessing.get_context("fork")
    waiting = list(families)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(family, columns, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append(_Running(family, process, ours, time.monotonic() + timeout))
        wait([each.pipe for each in running], timeout=1)
        for each in list(running):
            found = each.result()
            if found is not None:
                running.remove(each)
                yield found


@dataclass(frozen=True)
class _Running:
    """A family in its process, which may take until ``deadline``."""

    family: Family
    process: BaseProcess
    pipe: Connection[Any, Any]
    deadline: float

    def result(self) -> dict[str, Any] | None:
        """What it found, or why there is nothing; None while it runs."""
        if not self.pipe.poll():
            if time.monotonic() < self.deadline:
                return None
            self.process.kill()
            self.process.join()
            return {"family": self.family.name, "unbuilt": "it was not done in the time that one family may take"}
        try:
            found: dict[str, Any] = self.pipe.recv()
        except EOFError:
            self.process.join()
            return {"family": self.family.name, "unbuilt": f"its process ended with code {self.process.exitcode}"}
        self.process.join()
        return found


def resume(file: Path, families: Iterable[Family], *, jobs: int, timeout: float, again: bool) -> list[dict[str, Any]]:
    """Scan what the file does not have yet for this state of the sources, and add it line by line."""
    now = state()
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() and not again else []
    done = {entry["family"]: entry for line in lines if (entry := json.loads(line))["state"] == now}
    wanted = list(families)
    missing = [family for family in wanted if family.name not in done]
    with file.open("w" if again else "a", encoding="utf-8") as out:
        for entry in tqdm(scan(missing, jobs=jobs, timeout=timeout), total=len(missing), unit="family"):
            entry["state"] = now
            done[entry["family"]] = entry
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
            out.flush()
    return [done[family.name] for family in wanted]
