"""Gradients through a graph prompt, compared with the plain model under the same mask and with sub-graphs run alone."""

from __future__ import annotations

import copy

import pytest
import torch
from models import make_model
from test_attend import fan

import leattn
from leattn import BackendError


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def target_loss(logits, prompt):
    """Cross-entropy of the question's own tokens, which depend on every document."""
    start, end = prompt.spans[prompt.graph["Q"]]
    return torch.nn.functional.cross_entropy(logits[0, start : end - 1], prompt.input_ids[0, start + 1 : end])


def by_hand(model, prompt):
    """The same mask given to the plain model, eager, without leattn's machinery."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    reference.gradient_checkpointing_disable()
    logits = reference(
        prompt.input_ids, position_ids=prompt.position_ids, attention_mask=prompt.additive_mask(), use_cache=False
    ).logits
    return gradients(reference, target_loss(logits, prompt))


def assert_same(given, expected, **tolerance):
    assert given.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_gradients_also_when_backward_runs_after_the_block(family, backend, checkpointing):
    model, prompt = make_model(family, backend), fan()
    model.train()
    for module in model.modules():  # gpt2 has dropout by default; the reference could not draw the same
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    expected = by_hand(model, prompt)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if checkpointing == "reentrant":
            model.enable_input_require_grads()
    with leattn.attend(model, prompt, backend=backend) as attention:
        loss = target_loss(model(**attention.inputs, use_cache=False).logits, prompt)
        inside = loss.detach()
    assert inside.isfinite()
    assert_same(gradients(model, loss), expected, rtol=1e-3, atol=1e-5)


def test_checkpointing_with_another_implementation_is_refused():
    """Recomputed after the block, eager layers would add a boolean mask: a wrong gradient in silence."""
    model, prompt = make_model("llama", "eager"), fan()
    leattn.forward(model, prompt, backend="sdpa")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(BackendError, match=r"back on 'eager'; call model.set_attn_implementation\('sdpa'\) first"):
        leattn.forward(model, prompt, backend="sdpa")
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gradients_through_the_sparse_backend(family):
    model, prompt = make_model(family), fan()
    expected = by_hand(model, prompt)
    with leattn.attend(model, prompt, backend="sparse") as attention:
        loss = target_loss(model(**attention.inputs, use_cache=False).logits, prompt)
    assert_same(gradients(model, loss), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_autocast(backend):
    model, prompt = make_model("llama", backend), fan()
    expected = by_hand(model, prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16), leattn.attend(model, prompt, backend=backend) as attention:
        loss = target_loss(model(**attention.inputs, use_cache=False).logits.float(), prompt)
    given = gradients(model, loss)
    for name in expected:  # bf16 matmuls: the direction must be right, digits are not
        cosine = torch.nn.functional.cosine_similarity(given[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_no_gradient_flows_to_what_is_not_seen():
    model, prompt = make_model("llama"), fan()
    cut = prompt.without_edge("Q", "doc1")
    with leattn.attend(model, cut):
        embeddings = model.get_input_embeddings()(cut.input_ids).detach().requires_grad_()
        loss = target_loss(model(inputs_embeds=embeddings, use_cache=False).logits, cut)
    loss.backward()
    start, end = cut.spans[cut.graph["doc1"]]
    assert not embeddings.grad[0, start:end].any()
    start, end = cut.spans[cut.graph["doc0"]]
    assert embeddings.grad[0, start:end].any()


def test_a_batch_has_the_gradients_of_its_prompts():
    model, prompts = make_model("llama"), [fan(seed=1, siblings=1), fan(seed=2, siblings=3)]
    with leattn.attend(model, prompts, backend="sdpa") as attention:
        logits = model(**attention.inputs, use_cache=False).logits
        loss = sum(target_loss(row[None, -len(prompt) :], prompt) for row, prompt in zip(logits, prompts, strict=True))
        together = gradients(model, loss)
    single = [by_hand(model, prompt) for prompt in prompts]
    assert_same(together, {name: single[0][name] + single[1][name] for name in single[0]}, rtol=1e-3, atol=1e-5)
