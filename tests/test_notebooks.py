"""The notebooks run from top to bottom, and what is committed is what a reader wants to see.

After a change that shows in them, ``python tests/test_notebooks.py`` runs them all again and writes them in place.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import FORKS, enter

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 700_000
# Of Unix, of Windows, in the home directory; preceded by nothing that makes it part of a word, an address or a fraction.
ABSOLUTE_PATH = re.compile(r"(?<![\w./~:])(/(home|root|tmp|usr|opt|var|work|mnt|Users|private|content)/\w|[A-Z]:\\\w|~/\w)")

SMALLER = {
    "03_paraphrase_groups": {"N = 48": "N = 6"},
    "04_information_injection": {"N = 24": "N = 2"},
    "05_attend_first": {"N = 32": "N = 3"},
    "06_attention_sinks": {"N = 16": "N = 4", "M = 32": "M = 4"},
    "07_which_document": {"N = 32": "N = 4", "range(8)]\ncurves": "range(2)]\ncurves", "range(16)": "range(4)"},
    "08_reuse": {
        "hidden_size=512, intermediate_size=1408": "hidden_size=64, intermediate_size=96",
        "for turn in range(5)": "for turn in range(2)",
        "for seed in range(12)": "for seed in range(3)",
        "both = [started(folder), started(folder)]": "both = [started(folder)]",
    },
    "09_programs": {"range(60)": "range(12)"},
    "10_training": {"STEPS, BATCH = 120, 16": "STEPS, BATCH = 12, 8", "range(100)": "range(8)"},
    "11_readings": {
        "temperatures = [0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0]": "temperatures = [0.5, 1.0]",
        "watched = [0.35, 0.5, 1.0, 2.0]": "watched = [0.5, 1.0]",
        "max_new_tokens=16": "max_new_tokens=2",
        "\n\n\ndef ask(": "\nquestions = dict(list(questions.items())[-2:])\n\n\ndef ask(",
    },
}
"""What the test runs of the longest ones: all that they do, on fewer prompts. What is committed was run on all of them."""

NEEDS_SMOLLM2 = {"11_readings"}
"""Those that run on SmolLM2, which would have to be downloaded: ``make test-real`` runs them instead of the test here."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ForkedKernel(jupyter_client.AsyncKernelManager):
    """A kernel as a notebook finds it, but torch and transformers need not be imported again."""

    has_kernel = True

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        super().__init__()
        self.write_connection_file()
        self.process = FORKS.Process(target=serve, args=(self.connection_file, env, str(folder)), daemon=True)
        self.process.start()

    async def is_alive(self) -> bool:
        return self.process.is_alive()

    _async_is_alive = is_alive  # what its clients ask

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        self.process.terminate()
        self.process.join()


def serve(connection_file: str, env: dict[str, str], folder: str) -> None:
    from ipykernel.kernelapp import IPKernelApp

    enter(env, folder)
    IPKernelApp.launch_instance(["-f", connection_file])


def execute(path: Path, folder: Path, smaller: dict[str, str] | None = None, *, forked: bool = False) -> Any:
    """The notebook with fresh outputs; ``path`` stays as it is, and what a cell writes goes to ``folder``.

    ``smaller`` are replacements in its code. A ``forked`` kernel starts at once, but what imports print is not seen in it.
    """
    notebook = nbformat.read(path, as_version=4)
    for old, new in (smaller or {}).items():
        assert any(old in cell.source for cell in notebook.cells), f"{path.stem} has no {old!r} any more"
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new) if cell.cell_type == "code" else cell.source
    # The kernel draws inline only if no other backend is asked for, as the tests do.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])}
    # Without timing, a second run changes nothing but what it shows.
    options = {
        "kernel_name": "python3",
        "timeout": 300,
        "record_timing": False,
        "coalesce_streams": True,  # else what is printed in one cell may fall into several outputs
        "resources": {"metadata": {"path": str(folder)}},
    }
    client = nbclient.NotebookClient(notebook, km=ForkedKernel(env, folder) if forked else None, **options)
    executed = client.execute(env=env, cleanup_kc=True)
    executed.metadata.pop("widgets", None)
    executed.metadata["language_info"] = {"name": "python"}  # the kernel adds its Python's version
    return executed


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def complaints(notebook: Any) -> list[str]:
    """What no reader wants to see in outputs."""
    found = []
    for output in outputs(notebook):
        if output.output_type == "error":
            found.append(f"an error: {output.ename}: {output.evalue}")
        # `leattn.load` says in one line what it took.
        if output.output_type == "stream" and output.name == "stderr" and not re.fullmatch(r"leattn: .*\n", output.text):
            found.append(f"something on stderr: {output.text[:200]}")
        data = output.get("data", {})
        if "application/vnd.jupyter.widget-view+json" in data:
            found.append("a widget, which shows nothing on a page")
        if "text/plain" in data and len(data) == 1 and re.match(r"<\w+[ :].* at 0x|<Axes", data["text/plain"]):
            found.append(f"the repr of an object: {data['text/plain'][:80]}")
        for text in (output.get("text", ""), *(value for mime, value in data.items() if mime.startswith("text/"))):
            for match in ABSOLUTE_PATH.finditer(text):
                found.append(f"a path of some machine: {text[match.start() : match.start() + 60]!r}")
    return found


def test_the_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_build_a_dag",
        "02_mask_gallery",
        "03_paraphrase_groups",
        "04_information_injection",
        "05_attend_first",
        "06_attention_sinks",
        "07_which_document",
        "08_reuse",
        "09_programs",
        "10_training",
        "11_readings",
    ]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in NEEDS_SMOLLM2], ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path):
    # The first one in a kernel as a reader starts it. Raises CellExecutionError, which shows the cell.
    executed = execute(path, tmp_path, SMALLER.get(path.stem), forked=path != NOTEBOOKS[0])
    assert complaints(executed) == []
    assert list(tmp_path.iterdir()) == []


@every_notebook
def test_its_outputs_are_on_the_page(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert complaints(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    silent = {cell.id for cell in code if not cell.outputs}
    ends_with_result = {cell.id for cell in code if re.search(r"print\(|show\(|plot_\w+\(", cell.source)}
    assert silent & ends_with_result <= {cell.id for cell in code if "def " in cell.source}


@every_notebook
def test_it_is_light_and_its_pictures_are_pictures(path):
    assert path.stat().st_size < MAX_BYTES
    images = [
        output.data["image/png"]
        for output in outputs(nbformat.read(path, as_version=4))
        if "image/png" in output.get("data", {})
    ]
    assert images
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)


@every_notebook
def test_its_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


def lighten(notebook: Any) -> None:
    """Pictures with 128 colours, a third of the size: they hold flat areas and text."""
    from PIL import Image

    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            small = io.BytesIO()
            picture.quantize(128).save(small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def main(names: list[str]) -> None:
    """Run the named notebooks, or all, and write them in place."""
    import tempfile

    for path in NOTEBOOKS:
        if not names or path.stem in names or path.name in names:
            with tempfile.TemporaryDirectory() as folder:
                executed = execute(path, Path(folder))
            lighten(executed)
            nbformat.write(executed, path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
