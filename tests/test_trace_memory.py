"""A trace that has no room says so before it starts, with the figures."""

from __future__ import annotations

import re

import pytest
import torch
from models import shared_model
from test_attend import fan

import leattn
from leattn import ICLNode, LeattnError, compile_prompt
from leattn.analysis import memory, trace
from leattn.analysis.memory import Footprint


def nbytes(found):
    kept = [found.mass, found.first_tokens, found.hidden_norms, found.key_norms, found.value_norms]
    kept += [found.mean_key_norms, found.mean_value_norms, found.scores]
    kept += [part for pair in found.tokens.values() for part in (pair.weights, pair.scores)]
    return sum(one.nbytes for one in kept if one is not None)


@pytest.fixture
def free(monkeypatch):
    def set_to(size):
        monkeypatch.setattr(memory, "free_memory", lambda: size)

    return set_to


@pytest.mark.parametrize(
    "asked",
    [{}, {"tokens": ("Q", "doc1")}, {"tokens": [("Q", "doc1"), ("Q", "Q")], "scores": True}, {"scores": True}],
)
def test_it_runs_where_it_just_fits_and_not_below(asked, free):
    """To the byte for what is kept, but for norms of keys and values, of which a model may have one per head."""
    model, prompt = shared_model("llama"), fan()
    found = trace(model, prompt, **asked)
    heads, groups, layers, nodes = 4, found.key_norms.shape[1], 3, len(prompt.graph)
    kept = nbytes(found) + layers * 2 * (heads - groups) * len(prompt) * 4
    work = 2 * heads * nodes**2 * 4
    free(kept + work)
    assert nbytes(trace(model, prompt, **asked)) == nbytes(found)
    free(kept + work - 1)
    with pytest.raises(LeattnError, match=r"trace at most 2 at a time, layers=\[…\], or a prompt of fewer"):
        trace(model, prompt, **asked)
    trace(model, prompt, **asked, layers=[0, 2])
    free(work)
    with pytest.raises(LeattnError, match=r"not even layers=\[0\] has room"):
        trace(model, prompt, **asked, layers=0)
    free(None)
    trace(model, prompt, **asked)


def test_more_than_any_machine_has_is_refused_before_anything_runs():
    model, tokenizer = leattn.tiny.load()
    prompt = compile_prompt([ICLNode([7], id=f"n{i}") for i in range(100_000)], tokenizer)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    runs = []
    handle = model.model.register_forward_pre_hook(lambda *_: runs.append(1))
    words = "this trace would keep 640.0 GB, in each of 4 layers 160.0 GB for 4 heads × 100,000² pairs of nodes, and take "
    try:
        with pytest.raises(LeattnError, match=re.escape(words)):
            trace(model, prompt)
    finally:
        handle.remove()
    assert runs == []
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_on_a_gpu_a_layer_at_a_time_is_on_the_device_and_all_of_them_are_kept_on_the_cpu(free, monkeypatch):
    foot = Footprint.of(layers=10, heads=8, nodes=1000, length=2000, pairs=[], item=4)
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000_000, 80_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000_000)
    free(10**9)
    with pytest.raises(
        LeattnError, match=r"a layer of this trace takes 0\.1 GB on cuda:0, for 8 heads × 1,020² pairs of nodes"
    ):
        Footprint.of(10, 8, 1020, 2000, [], 4).check(gpu)
    foot.check(gpu)
    free(10 * foot.layer)
    foot.check(gpu)
    with pytest.raises(LeattnError, match="trace at most 8 at a time"):
        foot.check(torch.device("cpu"))
    free(10 * foot.layer - 1)
    with pytest.raises(LeattnError, match="trace at most 9 at a time"):
        foot.check(gpu)


def test_free_memory_is_that_of_the_machine_and_of_its_container(tmp_path, monkeypatch):
    found = memory.free_memory()
    assert found is None or found > 10**6
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "stat").write_text("anon 1200\nfile 3000\n")
    group = (str(tmp_path / "max"), str(tmp_path / "stat"), "anon")
    monkeypatch.setattr(memory, "_GROUPS", (group,))
    assert memory.free_memory() == 3800
    (tmp_path / "max").write_text("max\n")
    assert memory.free_memory() == memory._free_of_machine()
    monkeypatch.setattr(memory, "_number_in", lambda path, name: None)
    assert memory._free_of_machine() > 10**6
