"""Importing leattn is cheap and changes nothing: looked at in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import leattn

HEAVY = ("transformers", "matplotlib", "daft", "networkx", "tokenizers", "safetensors", "yaml", "typer")


def in_a_fresh_interpreter(source):
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loaded():
    """The heavy modules that are there after each of these steps, taken one after the other."""
    steps = f"""
import json, sys
loaded = {{}}
def now(step):
    loaded[step] = [name for name in {HEAVY} if name in sys.modules]
import leattn
dir(leattn)
now("leattn")
import torch.nn.attention.flex_attention
now("torch")
import leattn.viz, leattn.viz.fold
now("viz")
import leattn.tiny
now("tiny")
from leattn import ICLNode, ICLGraph, compile_prompt
a = ICLNode([1, 2], id="a")
prompt = compile_prompt(ICLGraph(ICLNode([3], [a], id="b")))
str(prompt), prompt.dense_mask(), prompt.block_mask(), prompt.without_edge("b", "a")
now("a graph")
print(json.dumps(loaded))
"""
    return in_a_fresh_interpreter(steps)


def test_importing_loads_nothing_heavy(loaded):
    assert loaded["leattn"] == []


@pytest.mark.parametrize("step", ["viz", "tiny", "a graph"])
def test_pictures_the_bundled_model_and_compiling_a_graph_load_nothing_heavy(step, loaded):
    # torch itself may bring what it likes.
    assert loaded[step] == loaded["torch"]
    assert not {"transformers", "matplotlib", "daft"} & set(loaded[step])


@pytest.fixture(scope="module")
def with_transformers():
    source = """
import json, sys
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
def state():
    return {name: id(registry[name]) for registry in (masks, functions) for name in registry.keys()}, len(masks), len(functions)
before = state()
import leattn.analysis
pictures = [name for name in ("matplotlib", "daft", "pandas") if name in sys.modules]
for name in leattn.__all__:
    try:
        getattr(leattn, name)
    except ModuleNotFoundError:
        pass
print(json.dumps([pictures, state() == before]))
"""
    return in_a_fresh_interpreter(source)


def test_the_analysis_needs_no_pictures(with_transformers):
    assert with_transformers[0] == []


def test_importing_registers_nothing_with_transformers(with_transformers):
    assert with_transformers[1] is True


def test_all_is_the_table_of_homes():
    assert sorted(leattn.__all__) == sorted([*leattn._HOME, *leattn._MODULES])
    assert len(set(leattn.__all__)) == len(leattn.__all__)
    assert dir(leattn) == leattn.__all__


@pytest.mark.parametrize("name", leattn.__all__)
def test_every_public_name_resolves(name):
    value = getattr(leattn, name)
    if name in leattn._HOME:
        assert value.__name__ == name
        assert value.__module__.startswith("leattn.")
    assert value.__doc__


def test_an_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match=r"has no 'compile_promt'; it has .*\bcompile_prompt\b"):
        _ = leattn.compile_promt
