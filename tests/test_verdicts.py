"""What was found out about a model is found again by another process, and by nobody for whom it does not hold."""

from __future__ import annotations

import functools
import json
import sys
import threading

import peft
import pytest
import torch
from forks import in_another_process
from models import make_model

import leattn
from leattn import ICLNode, KVStore, compile_prompt
from leattn.attention.verdicts import Verdicts

PROMPT = compile_prompt(ICLNode([42, 54, 13], [ICLNode([7, 23, 75], id="d")], id="q"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LEATTN_CACHE", str(tmp_path))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield tmp_path


def counted(model):
    """How many forwards of the backbone a call of ``check_model`` runs."""
    calls, plain = [], type(model.model).forward

    class Counting(type(model.model)):
        @functools.wraps(plain)
        def forward(self, *args, **kwargs):
            calls.append(1)
            return plain(self, *args, **kwargs)

    Counting.__module__ = type(model.model).__module__
    model.model.__class__ = Counting
    report = leattn.check_model(model)
    return len(calls), report


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_another_model_of_the_same_weights_is_not_tried_again(family, home):
    first = leattn.check_model(make_model(family))
    files = list(home.rglob("*.json"))
    assert len(files) == 1
    again = leattn.check_model(make_model(family))
    assert again.capabilities == first.capabilities
    assert list(home.rglob("*")) == [home / "verdicts", *files]


def test_no_forward_runs_for_what_is_known():
    runs, first = counted(make_model("llama"))
    assert runs > 20
    runs, again = counted(make_model("llama"))
    assert runs == 0
    assert again.capabilities == first.capabilities


def test_turns_of_readings_are_found_again():
    document = ICLNode([7, 23, 75, 90], id="d")
    prompt = compile_prompt(ICLNode([42, 54], [leattn.read(document, shift=31, temperature=0.7)], id="q"))
    elsewhere = ICLNode([7, 23, 75, 90], id="d", start_pos_id=31)
    there = compile_prompt(ICLNode([42, 54], [leattn.read(elsewhere, temperature=0.7)], id="q", start_pos_id=4))
    expected = leattn.forward(make_model("llama"), there).logits[0, -2:]
    for _ in range(2):
        found = leattn.forward(make_model("llama"), prompt).logits[0, -2:]
        assert (found - expected).abs().max() < 1e-4


def test_turns_are_found_again():
    """Keys are turned to other positions by what another process measured."""
    document = ICLNode([7, 23, 75, 90], id="d")
    here = compile_prompt(ICLNode([42, 54], [document], id="q"))
    there = compile_prompt(ICLNode([42, 54], [ICLNode([7, 23, 75, 90], id="d", start_pos_id=31)], id="q"))
    expected = leattn.forward(make_model("llama"), there).logits[:, -2:]
    for _ in range(2):
        model, store = make_model("llama"), KVStore()
        leattn.forward(model, here, kv_store=store)
        found = leattn.forward(model, there, kv_store=store).logits
        assert store.stats.hits == 1
        assert (found - expected).abs().max() < 1e-4


def small():
    return make_model("llama", num_hidden_layers=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.model.layers[0].self_attn.q_proj.weight.mul_(1.01) is None or model,
        lambda model: setattr(model.config, "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}) or model,
        lambda model: peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval(),
        lambda model: model.model,
    ],
    ids=["dtype", "weight", "config", "adapter", "without its head"],
)
def test_it_does_not_hold_for_anything_else(change, home):
    leattn.check_model(small())
    assert len(list(home.rglob("*.json"))) == 1
    leattn.check_model(change(small()))
    assert len(list(home.rglob("*.json"))) == 2


def leak(module, args, output):
    return output + 0.3 * output.roll(1, 1)


def with_a_hook(model):
    model.model.layers[0].register_forward_hook(leak)


def with_a_forward_of_its_own(model):
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: leak(None, None, plain(*args, **kwargs))


def with_a_class_of_its_own(model):
    layer = model.model.layers[0]
    kind = type(layer)

    class Leaking(kind):
        def forward(self, *args, **kwargs):
            return leak(self, args, kind.forward(self, *args, **kwargs))

    layer.__class__ = Leaking


@pytest.mark.parametrize("changed", [with_a_hook, with_a_forward_of_its_own, with_a_class_of_its_own])
def test_a_model_that_is_more_than_its_weights_is_tried(changed, home):
    assert leattn.check_model(small()).ok
    model = small()
    changed(model)
    assert not leattn.check_model(model).ok
    assert len(list(home.rglob("*.json"))) == 1


def test_what_fails_is_tried_again(monkeypatch, home):
    """No memory, no kernel, a driver that is gone: of this process, not of the model."""

    def fails(*args, **kwargs):
        raise RuntimeError("the driver is gone")

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", fails)
        assert "the driver is gone" in leattn.check_model(small())["eager"].reason
    assert not list(home.rglob("*.json"))
    assert leattn.check_model(small()).ok


def test_a_library_that_was_patched_is_tried(monkeypatch, home):
    """As packages of faster kernels do it."""
    assert leattn.check_model(small()).ok

    def apply_rotary_pos_emb(q, k, cos, sin, *args):
        by_index = 1 + torch.arange(q.shape[2])[:, None]
        return q * by_index, k * by_index

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply_rotary_pos_emb)
    assert "goes by the index" in leattn.check_model(small())["eager"].reason
    assert len(list(home.rglob("*.json"))) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"eager": '])
def test_a_damaged_file_is_as_none(text, home):
    first = leattn.check_model(small())
    (file,) = home.rglob("*.json")
    file.write_text(text)
    assert leattn.check_model(small()).capabilities == first.capabilities
    assert set(json.loads(file.read_text())) >= {"eager", "sdpa", "sparse", "certificate"}


def test_a_folder_that_cannot_be_written_is_as_none(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LEATTN_CACHE", str(blocked))
    assert leattn.check_model(small()).ok


def test_off_keeps_nothing(monkeypatch, home):
    monkeypatch.setenv("LEATTN_CACHE", "off")
    leattn.check_model(small())
    assert not list(home.iterdir())


def test_many_writers_leave_whole_files(tmp_path):
    path = tmp_path / "verdicts" / "one.json"

    def write(name):
        for i in range(50):
            Verdicts(path)[name] = [None, bool(i % 2)]

    threads = [threading.Thread(target=write, args=(f"backend {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            json.loads(path.read_text())
    for thread in threads:
        thread.join()
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


def sparse_works(known):
    """With ``known`` it may not try."""
    if known:

        def never(*args):
            raise AssertionError("tried again")

        sys.modules["leattn.attention.probe"]._found_out = never
    with torch.compiler.set_stance("force_eager"):
        return leattn.check_model(small())["sparse"].works


def test_it_survives_the_process():
    """Not tried again: the second process may not run the model at all."""
    assert in_another_process(sparse_works, False) is True
    assert in_another_process(sparse_works, True) is True
