"""leattn: a prompt is a graph of text chunks, and an edge is what lets one chunk attend to another.

>>> import leattn
>>> from leattn import ICLNode
>>> x = ICLNode("example1.", id="X")
>>> print(leattn.ICLGraph(ICLNode("What does the fox say?", parents=[x], id="Q")))
└── Q
    └── X

Importing leattn loads neither transformers nor matplotlib and patches nothing: names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "errors": ["LeattnError", "GraphError", "CompileError", "BackendError", "LeattnWarning"],
    "dag.bos": ["bos"],
    "dag.node": ["ICLNode"],
    "dag.reading": ["read"],
    "dag.gennode": ["GenNode"],
    "dag.graph": ["ICLGraph"],
    "dag.builders": ["chain", "parallel", "causal"],
    "dag.segments": ["from_segments"],
    "dag.split": ["split_text"],
    "dag.chat": ["from_chat"],
    "dag.paraphrase": ["paraphrase_group", "paraphrase_segments"],
    "prompt.compile": ["compile_prompt"],
    "prompt.compiled": ["CompiledPrompt"],
    "attention.attend": ["attend"],
    "check": ["check_model"],
    "kv.store": ["KVStore"],
    "attention.inputs": ["model_inputs"],
    "attention.request": ["Backend"],
    "generation.forward": ["forward", "warm"],
    "generation.generate": ["generate"],
    "generation.score": ["score"],
    "generation.scores": ["Scores"],
    "generation.result": ["Generation"],
    "comparison.compare": ["compare"],
    "comparison.comparison": ["Comparison"],
    "comparison.example": ["Example"],
    "loading.load": ["load"],
    "compat.le_attention": [
        "upstream_nodes",
        "print_dag",
        "build_attention_matrix",
        "prepare_inputs",
        "visualize_attention_matrix",
        "generate_flex_attention_mask_mod",
    ],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("analysis", "compat", "interventions", "methods", "patterns", "tiny", "training", "viz")

# Spelled out for type checkers; a test holds it equal to the table above.
__all__ = [
    "Backend",
    "BackendError",
    "Comparison",
    "CompileError",
    "CompiledPrompt",
    "Example",
    "GenNode",
    "Generation",
    "GraphError",
    "ICLGraph",
    "ICLNode",
    "KVStore",
    "LeattnError",
    "LeattnWarning",
    "Scores",
    "analysis",
    "attend",
    "bos",
    "build_attention_matrix",
    "causal",
    "chain",
    "check_model",
    "compare",
    "compat",
    "compile_prompt",
    "forward",
    "from_chat",
    "from_segments",
    "generate",
    "generate_flex_attention_mask_mod",
    "interventions",
    "load",
    "methods",
    "model_inputs",
    "parallel",
    "paraphrase_group",
    "paraphrase_segments",
    "patterns",
    "prepare_inputs",
    "print_dag",
    "read",
    "score",
    "split_text",
    "tiny",
    "training",
    "upstream_nodes",
    "visualize_attention_matrix",
    "viz",
    "warm",
]

if TYPE_CHECKING:
    from leattn import analysis, compat, interventions, methods, patterns, tiny, training, viz
    from leattn.attention.attend import attend
    from leattn.attention.inputs import model_inputs
    from leattn.attention.request import Backend
    from leattn.check import check_model
    from leattn.comparison.compare import compare
    from leattn.comparison.comparison import Comparison
    from leattn.comparison.example import Example
    from leattn.compat.le_attention import (
        build_attention_matrix,
        generate_flex_attention_mask_mod,
        prepare_inputs,
        print_dag,
        upstream_nodes,
        visualize_attention_matrix,
    )
    from leattn.dag.bos import bos
    from leattn.dag.builders import causal, chain, parallel
    from leattn.dag.chat import from_chat
    from leattn.dag.gennode import GenNode
    from leattn.dag.graph import ICLGraph
    from leattn.dag.node import ICLNode
    from leattn.dag.paraphrase import paraphrase_group, paraphrase_segments
    from leattn.dag.reading import read
    from leattn.dag.segments import from_segments
    from leattn.dag.split import split_text
    from leattn.errors import BackendError, CompileError, GraphError, LeattnError, LeattnWarning
    from leattn.generation.forward import forward, warm
    from leattn.generation.generate import generate
    from leattn.generation.result import Generation
    from leattn.generation.score import score
    from leattn.generation.scores import Scores
    from leattn.kv.store import KVStore
    from leattn.loading.load import load
    from leattn.prompt.compile import compile_prompt
    from leattn.prompt.compiled import CompiledPrompt


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"leattn.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"leattn.{name}")
    raise AttributeError(f"leattn {__version__} has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
