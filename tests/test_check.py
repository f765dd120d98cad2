"""``check_model``: what is accepted works, and each refusal comes with its words, before anything is generated."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, REFUSED, make_model, shared_model

import leattn
from leattn import BackendError, ICLNode, compile_prompt


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "gptj", "gpt_oss"])
def test_what_is_accepted(family):
    report = leattn.check_model(shared_model(family))
    assert report.ok
    assert report["eager"].works
    assert report["generate"].works


@pytest.mark.parametrize(
    ("family", "backend", "words"),
    [
        ("bloom", "eager", "its attention depends on the index in the sequence"),
        ("mpt", "sdpa", "its attention depends on the index in the sequence"),
        ("gpt_neo", "eager", "it cuts windows by index, not by position, in its local layers"),
        ("mamba", "eager", "it carries a recurrent state from token to token, which leaks past any attention mask"),
        ("falcon", "eager", "swapping two siblings changed what their child computes"),
        ("llama4_text", "eager", "its chunked attention cuts by index, not by position"),
        ("gemma2", "sdpa", "sdpa has no soft-cap on attention scores .* use backend='eager' or 'flex'"),
        ("gpt2", "flex", "transformers does not run gpt2 through flex_attention; use backend='eager'"),
        ("gpt_oss", "sdpa", "sdpa has no attention sinks and would leave them out; use backend='eager'"),
        ("gpt_oss", "flex", "transformers has no attention sinks for flex_attention on a CPU"),
        ("gemma2", "sparse", "it has no soft-cap on attention scores"),
        ("gpt_oss", "sparse", "it has no attention sinks"),
        ("gptj", "sdpa", "transformers does not run gptj through sdpa"),
        ("falcon", "sdpa", "swapping two siblings changed what their child computes"),  # loading it with sdpa would not help
    ],
)
def test_what_is_refused(family, backend, words):
    model = shared_model(family)
    prompt = compile_prompt(ICLNode([5, 6, 7]))
    assert not leattn.check_model(model)[backend].works
    with pytest.raises(BackendError, match=f"backend '{backend}' cannot run this model: .*{words}"):
        leattn.generate(model, prompt, backend=backend, max_new_tokens=2)


@pytest.mark.parametrize("family", ["bloom", "mamba", "falcon"])
def test_auto_refuses_a_model_that_no_backend_serves(family):
    with pytest.raises(BackendError, match=r"ForCausalLM cannot follow a graph: "):
        leattn.forward(shared_model(family), compile_prompt(ICLNode([5, 6])))


def test_an_encoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(BackendError, match="has an encoder; a graph is followed by decoder-only models"):
        leattn.check_model(model)


@pytest.mark.parametrize("family", sorted({family for family, _ in REFUSED}))
def test_auto_serves_through_another_backend(family):
    model = make_model(family, "eager")
    with leattn.attend(model, compile_prompt(ICLNode([5, 6]))) as attention:
        assert attention.backend.name == "eager"


def test_the_probe_catches_a_model_whose_mask_is_ignored():
    """An attention layer that drops the mask it is given: nothing in the config says so."""
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )
    with pytest.raises(BackendError, match=r"a later token of plain text changes an earlier one"):
        leattn.forward(model, compile_prompt(ICLNode([5, 6])))


def test_the_probe_catches_state_that_leaks_beside_attention():
    """A convolution over neighbouring tokens, as hybrid models have: information passes without an edge."""
    model = make_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + 0.3 * output.roll(1, 1))
    with pytest.raises(BackendError, match="cannot follow a graph"):
        leattn.forward(model, compile_prompt(ICLNode([5, 6])))


def test_the_probe_catches_a_model_that_builds_its_own_masks(monkeypatch):
    model = make_model("llama", "sdpa")  # which is causal without a mask
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **kwargs: None)
    with pytest.raises(BackendError, match="it never asks transformers for a mask"):
        leattn.forward(model, compile_prompt(ICLNode([5, 6])))


def test_a_model_that_stops_asking_for_masks_raises_instead_of_running_plain(monkeypatch):
    """Found out at run time, not only by the probe."""
    model = make_model("llama")
    prompt = compile_prompt(ICLNode([5, 6]))
    leattn.forward(model, prompt)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **kwargs: None)
    with pytest.raises(BackendError, match="runs without the mask that it is to be given"):
        leattn.forward(model, prompt)


def test_the_probe_runs_once_and_leaves_training_mode_as_it_was():
    model = make_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = leattn.check_model(model)
    probed = len(calls)
    assert probed > 0
    assert leattn.check_model(model).capabilities == first.capabilities
    assert len(calls) == probed
    assert [module.training for module in model.modules()] == modes


def test_low_precision_models_pass_the_probe():
    for dtype in (torch.bfloat16, torch.float16):
        model = make_model("llama").to(dtype)
        for backend in ("eager", "sdpa"):
            assert leattn.check_model(model)[backend].works


def test_a_report_prints_as_a_table():
    report = leattn.check_model(shared_model("gemma2"))
    lines = str(report).splitlines()
    assert lines[0].startswith("Gemma2ForCausalLM (gemma2), loaded with eager, can follow a graph (found out in ")
    assert max(map(len, lines[1:])) <= 100
    assert any(line.split()[:2] == ["sdpa", "no"] for line in lines)
    assert any(line.split()[:2] == ["windows", "yes"] for line in lines)
    assert "<table>" in report._repr_html_()

    with pytest.raises(
        BackendError, match="unknown capability 'dance'; choose one of 'eager', 'sdpa', 'flex', 'sparse', 'generate'"
    ):
        report["dance"]
