"""``python -m studies documents --model smollm2 --data FOLDER --n 40``: a study, its rows and its page."""

from __future__ import annotations

import ctypes
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import leattn
from leattn.comparison.comparison import Comparison
from studies import demonstrations as demonstration_study
from studies import documents as document_study

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Option(help="A folder, a name of the Hugging Face Hub, 'smollm2', 'gemma3-270m' or 'tiny'.")]
Data = Annotated[Path | None, typer.Option(help="A folder of JSON lines (studies/data.py); a few made-up rows without one.")]
N = Annotated[int, typer.Option(help="Questions, or items of each draw.")]
Out = Annotated[Path, typer.Option(help="Where rows and pages go.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
Timed = Annotated[int, typer.Option(help="Examples on which time is measured; nothing else should run meanwhile.")]


@app.command()
def documents(
    model: Model = "smollm2",
    data: Data = None,
    n: N = 40,
    documents: Annotated[int, typer.Option(help="Documents of each question.")] = 8,
    seed: Seed = 0,
    timed: Timed = 0,
    out: Out = Path("out/studies"),
) -> None:
    """Loss and answers on open questions."""

    def study(loaded: object, tokenizer: object, folder: Path) -> Comparison:
        return document_study.run(loaded, tokenizer, data, folder, n=n, documents=documents, seed=seed, timed=timed)

    _run(f"documents_{documents}", model, out, study)


@app.command()
def demonstrations(
    model: Model = "smollm2",
    data: Data = None,
    task: Annotated[str, typer.Option(help="sst2, trec or agnews.")] = "sst2",
    n: N = 40,
    shots: Annotated[int, typer.Option(help="Demonstrations.")] = 8,
    draws: Annotated[int, typer.Option(help="Draws of demonstrations.")] = 3,
    orders: Annotated[int, typer.Option(help="Orders of each draw.")] = 1,
    seed: Seed = 0,
    timed: Timed = 0,
    out: Out = Path("out/studies"),
) -> None:
    """Accuracy of classification behind demonstrations."""

    def study(loaded: object, tokenizer: object, folder: Path) -> Comparison:
        given = {"task": task, "n": n, "shots": shots, "draws": draws, "orders": orders, "seed": seed, "timed": timed}
        return demonstration_study.run(loaded, tokenizer, data, folder, **given)  # type: ignore[arg-type]

    _run(f"demonstrations_{task}_{shots}_{orders}", model, out, study)


def _give_memory_back() -> None:
    """Have glibc map what is larger than a megabyte by itself, so that it is given back.

    By default it keeps freed memory between what is still held: with keys and values in a store, and large tensors that come
    and go between them, the heap of a process grew to sixteen gigabytes.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def _run(name: str, model: str, out: Path, study: Callable[[object, object, Path], Comparison]) -> None:
    """Load the model, run, print the table and write the page."""
    _give_memory_back()
    loaded, tokenizer = leattn.load(model)
    folder = out / Path(model).name
    folder.mkdir(parents=True, exist_ok=True)
    found = study(loaded, tokenizer, folder)
    print(found)
    page = folder / f"{name}.md"
    page.write_text(_page(name, found), encoding="utf-8")
    for metric in [metric for metric in found.metrics if not metric.startswith(("tokens", "seconds"))]:
        leattn.viz.plot_comparison(found, metric, path=folder / f"{name}_{metric}.png")
        if any(row.gold is not None for row in found.rows):
            leattn.viz.plot_places(found, metric, path=folder / f"{name}_{metric}_by_place.png")
    print(f"\n{page}")


def _page(name: str, found: Comparison) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in found.settings["versions"].items())
    command = shlex.join(["python", "-m", "studies", *_of_everybody(sys.argv[1:])])
    count = len({row.example for row in found.rows})
    return "\n".join(
        [
            f"# {name.replace('_', ' ').capitalize()}",
            "",
            f"`{command}`: {found.settings['model']}, {found.settings['dtype']}, {count} examples; {versions}; "
            f"{platform.machine()}, {torch.get_num_threads()} threads. Means and 95 % intervals (Wilson's for shares, else "
            "bootstrap); differences to plain text on the same examples, paired bootstrap.",
            "",
            found.markdown("plain"),
            "",
        ]
    )


def _of_everybody(arguments: list[str]) -> list[str]:
    """The arguments without what is of one machine alone: where the data are, and where results go."""
    found = list(arguments)
    for option, instead in (("--out", []), ("--data", ["--data", "DATA"])):
        if option in found:
            at = found.index(option)
            found[at : at + 2] = instead
    return found


if __name__ == "__main__":
    app()
