"""The command line: ``leattn demo``, ``render``, ``generate``, ``report`` and ``check``."""

from __future__ import annotations

import io
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import leattn
from leattn.dag.bos import bos
from leattn.dag.graph import ICLGraph
from leattn.dag.node import ICLNode
from leattn.errors import LeattnError
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

app = typer.Typer(
    help="Prompts as graphs of text chunks.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

PromptFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A prompt file, YAML or JSON: nodes with id, content, parents.")
]
Model = Annotated[
    str, typer.Option(help="A folder; 'tiny', the bundled model; 'smollm2', from the package index; or a name on the Hub.")
]
Scheme = Annotated[str, typer.Option(help="after_parents, sequential or restart.")]
Sees = Annotated[str, typer.Option(help="What a node sees: parents or ancestors.")]


class Kind(str, Enum):
    mask = "mask"
    dag = "dag"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main() -> None:
    """The console script. What a user's input can cause is one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show ■ and └ gets question marks, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        app()
    except LeattnError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _fail(message: str) -> None:
    typer.echo("leattn: " + " ".join(message.split()), err=True)
    raise SystemExit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(leattn.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Prompts as graphs of text chunks."""


@app.command()
def render(
    file: PromptFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture; its suffix (png, svg, pdf) is the format.")],
    kind: Annotated[Kind, typer.Option(help="The mask over tokens, or the graph.")] = Kind.mask,
    tokenizer: Annotated[str | None, typer.Option(help="As --model; a mask of text needs one.")] = None,
    positions: Scheme = "after_parents",
    visibility: Sees = "parents",
) -> None:
    """Draw a prompt file."""
    from leattn.loading.load import load_tokenizer

    graph = ICLGraph.from_file(file)
    if kind is Kind.dag:
        leattn.viz.plot_dag(graph, path=output)
    else:
        text = next((node for node in graph if isinstance(node.content, str)), None)
        if tokenizer is None and text is not None:
            raise LeattnError(
                f"node {graph.name(text)!r} holds text, and how many tokens that is depends on the tokenizer; "
                "give --tokenizer (a folder, a name on the Hub, or 'tiny')"
            )
        loaded = None if tokenizer is None else load_tokenizer(tokenizer)
        prompt = compile_prompt(graph, loaded, positions=positions, visibility=visibility)  # type: ignore[arg-type]
        leattn.viz.plot_mask(prompt, path=output)
    typer.echo(str(output))


@app.command()
def generate(
    file: PromptFile,
    model: Model,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most, where a node does not say.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed; greedy without.")] = None,
    backend: Annotated[str, typer.Option(help="auto, eager, sdpa, flex or sparse.")] = "auto",
    positions: Scheme = "after_parents",
    visibility: Sees = "parents",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="auto: as the model was saved.")] = Dtype.auto,
) -> None:
    """Continue a prompt file, or write its nodes that have max_new_tokens, and print the text."""
    graph = ICLGraph.from_file(file)
    loaded, tokenizer = _load(model, device, dtype)
    result = leattn.generate(
        loaded,
        graph,
        tokenizer,
        positions=positions,
        visibility=visibility,
        backend=backend,
        seed=seed,
        max_new_tokens=max_new_tokens,
        do_sample=seed is not None,
    )
    several = len(result.texts) > 1
    for name, text in result.texts.items():
        typer.echo(f"[{name}]{text}" if several else text)


@app.command()
def report(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A prompt file, or a chat: a YAML or JSON list of messages with role and content."),
    ],
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pictures.")],
    layers: Annotated[str | None, typer.Option(help="Which, such as 0,1,5; the first ten without.")] = None,
    backend: Annotated[str, typer.Option(help="auto, eager, sdpa, flex or sparse.")] = "auto",
    positions: Scheme = "after_parents",
    visibility: Sees = "parents",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="auto: as the model was saved.")] = Dtype.auto,
) -> None:
    """Run a prompt or a chat once and draw attention between nodes, attention sinks, and norms of states, by layer."""
    try:
        chosen = None if layers is None else [int(number) for number in layers.split(",")]
    except ValueError as error:
        raise LeattnError(f"--layers takes numbers with commas between them, such as 0,1,5, not {layers!r}") from error
    chat = _messages(file)
    graph = ICLGraph.from_file(file) if chat is None else None
    loaded, tokenizer = _load(model, device, dtype)
    if graph is None:
        graph = leattn.from_chat(tokenizer, chat or [])
    prompt = compile_prompt(graph, tokenizer, positions=positions, visibility=visibility)  # type: ignore[arg-type]
    traced = leattn.analysis.trace(loaded, prompt, layers=chosen, backend=backend)
    for path in leattn.viz.save_report(traced, output, layers=chosen):
        typer.echo(str(path))


def _messages(file: Path) -> list[Any] | None:
    """The messages of a chat file; None for anything else, which is then read, or refused, as a prompt file."""
    import json

    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return None
    return data if isinstance(data, list) else None


@app.command()
def check(
    model: Model,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="auto: as the model was saved.")] = Dtype.auto,
) -> None:
    """Say what a model can do with graphs, and why not where it cannot."""
    typer.echo(str(leattn.check_model(_load(model, device, dtype)[0])))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the three pictures.")] = Path("out"),
    model: Model = "tiny",
) -> None:
    """Build a graph, print it, run a model on it and draw what it saw."""
    loaded, tokenizer = _load(model, "cpu", Dtype.auto)
    root = bos(tokenizer)
    texts = {
        "atlas": "\nThe capital of Zarvia is Moville.",
        "rumour": "\nThe capital of Zarvia is Pardan.",
        "other": "\nThe capital of Genia is Lumo.",
    }
    documents = [ICLNode(text, parents=[root], id=name) for name, text in texts.items()]
    # The bundled model answers in a word; others talk, unless their answer is begun for them.
    asked = "\nQ: {}\nA:" if model == "tiny" else "\nQuestion: {}\nAnswer: The capital of Zarvia is"
    question = ICLNode(asked.format("What is the capital of Zarvia?"), parents=[root, *documents], id="Q")

    graph = ICLGraph(question)
    typer.echo(f"The graph: Q sees three documents, which do not see one another.\n\n{graph}\n")
    prompt = compile_prompt(graph, tokenizer)
    typer.echo(f"Compiled:\n\n{prompt}\n")

    typer.echo(f"{documents[0].content}{documents[1].content}{documents[2].content}{question.content}".strip() + " …\n")
    typer.echo("Two documents contradict each other. Cut one edge, and the answer follows the document that is left:\n")
    atlas_only = prompt.without_edge("Q", "rumour")
    for label, edited, right in (
        ("Q sees atlas, not rumour", atlas_only, "Moville"),
        ("Q sees rumour, not atlas", prompt.without_edge("Q", "atlas"), "Pardan"),
        ("Q sees neither", atlas_only.without_edge("Q", "atlas"), None),
    ):
        answer = leattn.generate(loaded, edited, max_new_tokens=6).text.partition(".")[0].strip()
        verdict = f"right answer: {right}" if right else "nothing in sight says it: a guess"
        typer.echo(f"  {label:<26}answer: {answer:<10}{verdict}")

    out.mkdir(parents=True, exist_ok=True)
    pictures = {"dag.png": "who sees whom", "mask.png": "the same on tokens", "attention.png": "where the model looked"}
    leattn.viz.plot_dag(atlas_only, path=out / "dag.png")
    leattn.viz.plot_mask(atlas_only, path=out / "mask.png")
    _plot_attention(loaded, atlas_only, out / "attention.png")
    typer.echo("\nPictures of the first of these:")
    width = max(len(str(out / name)) for name in pictures)
    for name, what in pictures.items():
        typer.echo(f"  {out / name!s:<{width}}  {what}")


def _plot_attention(model: Any, prompt: CompiledPrompt, path: Path) -> None:
    """Only eager attention returns its weights; the picture is the same whatever ran before."""
    import torch

    with torch.no_grad():
        output = leattn.forward(model, prompt, backend="eager", output_attentions=True)
    leattn.viz.plot_attention(output.attentions, prompt, layer=-1, path=path)


def _load(name: str, device: str, dtype: Dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to run."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, tokenizer = leattn.load(name, dtype=dtype.value)
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise LeattnError(f"device {device!r} cannot be used: {error}; give --device cpu, or another") from error


if __name__ == "__main__":
    main()
