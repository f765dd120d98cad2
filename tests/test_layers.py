"""The rooms of the house, top to bottom: a file imports only from rooms above its own, nothing goes in circles, and one room
alone names what transformers keeps to itself. Read from the source, not from a run."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

import leattn

PACKAGE = Path(leattn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS = [
    ["errors"],
    ["table", "intervals"],
    ["dag"],
    ["prompt"],
    ["model"],
    ["attention"],
    ["kv"],
    ["check"],
    ["generation"],
    ["patterns"],
    ["training"],
    ["interventions"],
    ["analysis"],
    ["methods"],
    ["comparison"],
    ["viz"],
    ["tiny"],
    ["loading"],
    ["compat"],
    ["__init__"],  # a bare `import leattn` reaches everything above
    ["cli"],
]
"""The README lists them in this order."""
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}

INTERNALS = {
    # how attention and masks are registered and switched
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_can_set_attn_implementation",
    "_global_mapping",
    "_supports_flex_attn",
    "_supports_sdpa",
    "eager_attention_forward",
    "masking_utils",
    "modeling_utils",
    "set_attn_implementation",
    # how caches are built
    "DynamicSlidingWindowLayer",
    "DynamicCache",
    "DynamicLayer",
    "cache_utils",
    "get_seq_length",
    "is_sliding",
    "layer_class_to_replicate",
    "lazy_initialization",
    # how a model is put together
    "PreTrainedModel",
    "_is_stateful",
    "_orig_mod",
    "active_peft_config",
    "get_base_model",
    "get_decoder",
    "is_gradient_checkpointing",
    "logits_to_keep",
    # how families differ
    "apply_rotary_pos_emb",
    "attn_logit_softcapping",
    "create_position_ids_from_input_ids",
    "embed_positions",
    "get_rope_index",
    "index_topk",
    "is_encoder_decoder",
    "layer_types",
    "rope_parameters",
    "sliding_window",
}
"""What only ``model/`` may name."""
OF_GENERATE = {"_get_logits_processor", "_prepare_generation_config", "_prepare_special_tokens"}
"""Private helpers of transformers' ``generate``, which only ``generation/options.py`` may name."""


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
            # `from leattn import viz` and `from leattn.prompt import masks` import modules, other names come from one.
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


def room(item):
    """The room that a file stands in, or that a module is imported from; None for other people's modules."""
    first, *rest = item.split("/") if item.endswith(".py") else item.split(".")
    if item.endswith(".py"):
        return first.removesuffix(".py")
    return None if first != "leattn" else rest[0] if rest else "__init__"


def goes_down(item):
    """Whether an import is from a room below the file's own, or beside it."""
    own, other = room(item.file), room(item.module)
    return other is not None and other != own and RANK[other] >= RANK[own]


def circles(items):
    """Groups of modules that import each other, at module level or inside functions."""
    graph = nx.DiGraph()
    for item in items:
        if not item.for_types and item.module.startswith("leattn"):
            own = ".".join(["leattn", *Path(item.file).with_suffix("").parts]).removesuffix(".__init__")
            graph.add_edge(own, item.module)
    groups = (sorted(group) for group in nx.strongly_connected_components(graph))
    return sorted(group for group in groups if len(group) > 1 or graph.has_edge(group[0], group[0]))


def names_in(path, source=None):
    """``(name, line)`` of everything that code names: variables, attributes, imports, keywords, what getattr is asked for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        names = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.keyword):
            yield node.arg, node.value.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            dotted = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names = [part for name in dotted for part in name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        for name in names:
            yield name, node.lineno


def strangers(path, source=None):
    """What a file names of transformers' internals, although it is not their home."""
    file = path.relative_to(PACKAGE).as_posix()
    foreign = set() if file.startswith("model/") else INTERNALS
    if file != "generation/options.py":
        foreign = foreign | OF_GENERATE
    return [f"{file}:{line} names {name}" for name, line in names_in(path, source) if name in foreign]


ALL = [item for path in FILES for item in imports_of(path) if path != PACKAGE / "__init__.py"]


def test_every_file_has_a_room():
    tops = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__main__"}
    assert tops == set(RANK), f"give {sorted(tops ^ set(RANK))} a place in the README's list and in this one"


@pytest.mark.parametrize("file", sorted({item.file for item in ALL}))
def test_a_file_imports_only_from_rooms_above_its_own(file):
    assert [str(item) for item in ALL if item.file == file and goes_down(item)] == []


def test_no_two_files_import_each_other():
    assert circles(ALL) == []


def test_the_package_itself_imports_nothing_of_its_own_at_run_time():
    items = imports_of(PACKAGE / "__init__.py")
    assert [str(item) for item in items if item.module.startswith("leattn") and not item.for_types] == []


def test_only_pictures_import_matplotlib_and_daft():
    for item in ALL:
        if item.module.split(".")[0] in ("matplotlib", "daft") and not item.for_types:
            assert item.file.startswith("viz/"), str(item)


def test_pictures_take_results_as_data():
    """What found them may be named in annotations, and is not imported: a picture needs no model."""
    for item in ALL:
        if item.file.startswith("viz/") and room(item.module) not in (None, "viz") and not item.for_types:
            assert RANK[room(item.module)] <= RANK["prompt"], str(item)


def test_graphs_and_prompts_import_no_transformers():
    for item in ALL:
        if RANK[room(item.file)] < RANK["model"] and item.module.split(".")[0] == "transformers":
            assert item.for_types, str(item)


def test_one_room_imports_from_inside_transformers():
    for item in ALL:
        if item.module.startswith("transformers.") and not item.file.startswith("model/"):
            assert item.module == "transformers.utils", str(item)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_internals_of_transformers_are_named_where_they_are_at_home(path):
    assert strangers(path) == []


def test_what_is_guarded_is_used():
    """A name that its home has no use for any more guards nothing."""
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    of_models = "".join(text for file, text in texts.items() if file.startswith("model/"))
    assert {name for name in INTERNALS if name not in of_models} == set()
    assert {name for name in OF_GENERATE if name not in texts["generation/options.py"]} == set()


def test_the_readme_lists_the_rooms_in_this_order():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    listed = readme.partition("```\nleattn/\n")[2].partition("bundled_model/")[0]
    names = [line.split()[0].rstrip("/").removesuffix(".py") for line in listed.splitlines() if line[2:3].strip()]
    assert set(names) == set(RANK) - {"__init__"}
    assert [RANK[name] for name in names] == sorted(RANK[name] for name in names)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dag/node.py", "from leattn.prompt.compile import compile_prompt"),
        ("dag/node.py", "def f():\n    import leattn.model.record"),
        ("dag/node.py", "from leattn import viz"),
        ("dag/node.py", "import leattn"),
        ("dag/node.py", "from ..prompt.compile import compile_prompt"),
        ("errors.py", "from leattn.table import html_table"),
        ("prompt/masks.py", "from leattn import compile_prompt, generate"),
        ("prompt/masks.py", "def f():\n    from ..generation import generate"),
        ("prompt/compile.py", "from leattn.model.facts import read_facts"),
        ("model/record.py", "from leattn.attention import block"),
        ("attention/probe.py", "if TYPE_CHECKING:\n    from leattn.generation.result import Generation"),
        ("kv/store.py", "def f():\n    from leattn.generation.forward import warm"),
        ("analysis/trace.py", "from leattn.viz.mask import plot_mask"),
    ],
)
def test_an_import_from_below_is_found(file, source):
    assert any(goes_down(item) for item in imports_of(PACKAGE / file, source))


@pytest.mark.parametrize(
    "sources",
    [
        {"kv/keys.py": "from leattn.kv.node import NodeKV", "kv/node.py": "from leattn.kv import keys"},
        {"kv/keys.py": "def f():\n    from leattn.kv.node import NodeKV", "kv/node.py": "def f():\n    import leattn.kv.keys"},
        {
            "dag/node.py": "from .graph import ICLGraph",
            "dag/graph.py": "from .draw import draw",
            "dag/draw.py": "from leattn import ICLNode",
        },
        {"patterns/__init__.py": "from .drafts import f", "patterns/drafts.py": "from leattn.patterns import vote"},
        {"dag/node.py": "from leattn.dag.node import ICLNode"},
    ],
)
def test_a_circle_is_found(sources):
    items = [item for file, source in sources.items() for item in imports_of(PACKAGE / file, source)]
    assert len(circles(items)) == 1
    assert circles([Import(item.file, item.module, item.line, for_types=True) for item in items]) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("attention/block.py", "from transformers.masking_utils import create_causal_mask"),
        ("attention/block.py", "import transformers.modeling_utils as inside"),
        ("attention/block.py", "from transformers import AttentionInterface"),
        ("attention/dense.py", "model.set_attn_implementation('sdpa')"),
        ("kv/entry.py", "held = cache.get_seq_length()"),
        ("generation/session.py", "output = model(input_ids=ids, logits_to_keep=rows)"),
        ("generation/sink.py", "processors = model._get_logits_processor(config)"),
        ("interventions/where.py", "base = getattr(model, '_orig_mod', model)"),
        ("model/record.py", "config, unknown = model._prepare_generation_config(None)"),
    ],
)
def test_an_internal_away_from_home_is_found(file, source):
    assert len(strangers(PACKAGE / file, source)) == 1


def test_advice_to_users_is_no_use_of_an_internal():
    source = "raise BackendError('call model.set_attn_implementation(...) first')\nREFUSED = ('logits_to_keep', 'labels')"
    assert strangers(PACKAGE / "attention" / "attend.py", source) == []
