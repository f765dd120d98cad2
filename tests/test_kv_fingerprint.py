"""The fingerprint differs between models that compute different keys and values, and only between those."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from forks import in_another_process
from models import make_model

from leattn import BackendError
from leattn.kv.fingerprint import fingerprint


def edit_in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5


def swap_data(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data * 2


def edit_behind_autograd(model):
    model.model.norm.weight.data.add_(1)


def replace_parameter(model):
    projection = model.model.layers[2].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight + 1)


def add_adapter(model):
    projection = model.model.layers[0].self_attn.v_proj
    projection.lora = torch.nn.Linear(4, 4)


def edit_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def change_config(model):
    model.config.sliding_window = 7


def lower_precision(model):
    model.to(torch.bfloat16)


def start_training(model):
    model.train()


CHANGES = [
    edit_in_place,
    swap_data,
    edit_behind_autograd,
    replace_parameter,
    add_adapter,
    edit_buffer,
    change_config,
    lower_precision,
    start_training,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change):
    model = make_model("llama")
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


def test_an_undone_change_gives_the_old_one():
    model = make_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight += 1
        changed = fingerprint(model)
        model.model.norm.weight -= 1
    assert changed != before
    assert fingerprint(model) == before


class Adapted(torch.nn.Linear):
    """What PEFT's layers tell about themselves, without PEFT."""

    active_adapters = ("default",)
    disable_adapters = False


def test_active_adapters_are_part_of_it():
    model = make_model("llama")
    model.model.layers[0].self_attn.adapted = layer = Adapted(4, 4)
    seen = {fingerprint(model)}
    layer.active_adapters = ("default", "other")
    seen.add(fingerprint(model))
    layer.disable_adapters = True
    seen.add(fingerprint(model))
    layer.scaling = {"default": 2.0}
    seen.add(fingerprint(model))
    assert len(seen) == 4


def test_equal_models_share_one():
    first, second = make_model("llama"), make_model("llama")
    assert fingerprint(first) == fingerprint(second) == fingerprint(copy.deepcopy(first)) == fingerprint(first.model)
    assert fingerprint(first) != fingerprint(make_model("llama", seed=1))


def test_the_head_has_no_part_in_keys_and_values():
    model = make_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    assert fingerprint(model) == before
    model.set_attn_implementation("sdpa")
    assert fingerprint(model) == before


def fingerprint_of_another():
    return fingerprint(make_model("qwen3"))


def test_it_is_the_same_in_another_process():
    assert in_another_process(fingerprint_of_another) == fingerprint(make_model("qwen3"))


def test_all_weights_are_read_once(monkeypatch):
    model = make_model("llama")
    fingerprint(model)
    monkeypatch.setattr(sys.modules["leattn.model.digest"], "_checksum", lambda tensor: pytest.fail("read again"))
    fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_dtype(dtype):
    model = make_model("llama")
    model.model.norm.weight.data = torch.ones(47, dtype=dtype)  # not a multiple of eight bytes
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight.data = torch.cat([torch.ones(46), torch.zeros(1)]).to(dtype)
    assert fingerprint(model) != before


def test_weights_that_are_not_in_memory_are_refused():
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(BackendError, match=r"the weights of 'layers.0.mlp.up_proj.weight' are not in memory"):
        fingerprint(model)


def test_nothing_keeps_a_model_alive():
    model = make_model("llama")
    fingerprint(model)
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None
