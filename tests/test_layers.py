"""The arrows of DESIGN.md, section 10: a file imports only from lines above its own. Read from the source, not from a run."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

import leattn

PACKAGE = Path(leattn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    ["errors", "table"],
    ["dag"],
    ["visible", "positions", "masks", "text", "compile"],
    ["backends"],
    ["kv"],
    ["check"],
    ["generation"],
    ["patterns"],
    ["training"],
    ["interventions"],
    ["analysis"],
    ["viz"],
    ["tiny"],
    ["legacy", "cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The method belongs to the prompt, its knowledge to the backends.
EXCEPTIONS = {("compile.py", "leattn.attention.inputs"), ("kv/store.py", "leattn.generation.fill")}


@dataclass(frozen=True)
class Import:
    file: str
    module: str
    line: int
    for_types: bool  # under `if TYPE_CHECKING:`, so never executed

    def __str__(self):
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path, source=None):
    """Every import of a file, at module level and inside functions, as absolute module names."""
    file = path.relative_to(PACKAGE).as_posix()
    package = ["leattn", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from leattn import masks` and `from leattn.attention import hf` import modules, other names come from one.
            names = [f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names]
            if module == "leattn":
                names = [home(alias.name) for alias in node.names]
        found += [Import(file, name, node.lineno, id(node) in for_types) for name in names]
    return found


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("leattn.") and (path.is_dir() or path.with_suffix(".py").exists())


def home(name):
    """The module that ``from leattn import name`` gets its name from."""
    if is_module(f"leattn.{name}"):
        return f"leattn.{name}"
    return f"leattn.{leattn._HOME[name]}" if name in leattn._HOME else "leattn"


def layer(dotted):
    return dotted.split(".")[1] if dotted.startswith("leattn.") else None


def breaks_the_arrows(item):
    own = item.file.split("/")[0].removesuffix(".py")
    other = layer(item.module)
    if other is None or other == own or (item.file, item.module) in EXCEPTIONS:
        return False
    if own == "viz":
        # Results come as data: their classes may be named in annotations, nothing else.
        return not item.for_types and RANK[other] > RANK["compile"]
    if RANK[own] == RANK["legacy"]:
        return False
    return RANK[other] > RANK[own]


ALL = [item for path in FILES for item in imports_of(path) if path != PACKAGE / "__init__.py"]


def test_every_file_has_a_layer():
    tops = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert tops <= set(RANK), f"give {sorted(tops - set(RANK))} a place in DESIGN.md's list and in this one"


@pytest.mark.parametrize("file", sorted({item.file for item in ALL}))
def test_a_file_imports_only_from_lines_above_its_own(file):
    assert [str(item) for item in ALL if item.file == file and breaks_the_arrows(item)] == []


def test_exceptions_are_still_needed():
    assert {(item.file, item.module) for item in ALL} >= EXCEPTIONS


def test_the_package_itself_imports_nothing_of_its_own_at_run_time():
    items = imports_of(PACKAGE / "__init__.py")
    assert [str(item) for item in items if item.module.startswith("leattn") and not item.for_types] == []


def test_only_pictures_import_matplotlib_and_daft():
    for item in ALL:
        if item.module.split(".")[0] in ("matplotlib", "daft") and not item.for_types:
            assert item.file.startswith("viz/"), str(item)


def test_the_language_imports_no_transformers():
    low = ("dag/", "compile.py", "visible.py", "positions.py", "masks.py", "text.py", "errors.py")
    for item in ALL:
        if item.file.startswith(low) and item.module.split(".")[0] == "transformers":
            assert item.for_types, str(item)


def test_one_file_touches_the_registries_of_transformers():
    registries = {
        "ALL_ATTENTION_FUNCTIONS",
        "ALL_MASK_ATTENTION_FUNCTIONS",
        "AttentionInterface",
        "AttentionMaskInterface",
    }
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert path == PACKAGE / "backends" / "hf.py" or not names & registries, path


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dag/node.py", "from leattn.prompt.compile import compile_prompt"),
        ("dag/node.py", "def f():\n    import leattn.model.hf"),
        ("dag/node.py", "from leattn import masks"),
        ("masks.py", "from leattn import compile_prompt, generate"),
        ("masks.py", "def f():\n    from .generation import generate"),
        ("dag/node.py", "from ..compile import compile_prompt"),
        ("backends/hf.py", "if TYPE_CHECKING:\n    from leattn.generation.result import Generation"),
        ("viz/mask.py", "from leattn.generation.result import Generation"),
        ("compile.py", "from leattn.model.hf import read_facts"),
    ],
)
def test_the_check_finds_what_it_is_for(file, source):
    assert any(breaks_the_arrows(item) for item in imports_of(PACKAGE / file, source))
