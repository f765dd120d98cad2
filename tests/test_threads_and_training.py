"""One model in several threads, each with a graph and a backend of its own; and a model in training, on every backend."""

from __future__ import annotations

import threading

import pytest
import torch
from models import make_model, shared_model
from oracles import dense, positions, relation
from test_attend import fan
from test_training import assert_same, gradients, target_loss

import leattn
from leattn import BackendError, attend, generate


def by_hand(model, prompt, **options):
    """A plain forward of an eager model, with a mask and positions from loops over nodes."""
    nodes = prompt.graph.nodes
    sees = relation(nodes)
    allowed = torch.tensor(dense(nodes, sees))
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    if "gemma" in model.config.model_type:  # a window as long as these prompts cuts nothing
        assert len(prompt) <= model.config.sliding_window
        mask = dict.fromkeys(("full_attention", "sliding_attention"), mask)
    place = torch.tensor([positions(nodes, sees)])
    return model(prompt.input_ids, position_ids=place, attention_mask=mask, use_cache=False, **options)


def run(*works):
    """Each in a thread of its own, all begun together; what any of them raised is raised here."""
    failures, start = [], threading.Barrier(len(works))

    def guarded(work):
        try:
            start.wait()
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("one", "two"), [("eager", "sdpa"), ("sdpa", "sparse"), ("sparse", "eager")])
def test_two_threads_have_each_their_own_backend_and_graph(family, one, two):
    model, prompts = make_model(family), [fan(seed=1, siblings=2), fan(seed=2, siblings=4)]
    for prompt, backend in zip(prompts, (one, two), strict=True):
        leattn.forward(model, prompt, backend=backend)
    with torch.no_grad():
        expected = [by_hand(shared_model(family), prompt).logits for prompt in prompts]

    def work(prompt, backend, logits):
        for _ in range(6):
            with torch.no_grad(), attend(model, prompt, backend=backend) as attention:
                for _ in range(2):
                    torch.testing.assert_close(model(**attention.inputs).logits, logits, rtol=1e-4, atol=1e-4)
                assert attention.backend.name == backend

    run(*(lambda a=a: work(*a) for a in zip(prompts, (one, two), expected, strict=True)))
    assert model.config._attn_implementation == "eager"
    assert not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("backend", ["sparse", "sdpa"])
def test_one_thread_generates_while_another_traces(backend):
    model, written, traced = make_model("llama"), fan(seed=1), fan(seed=2, siblings=4)
    alone = generate(model, written, backend=backend, max_new_tokens=12).token_ids.tolist()
    with torch.no_grad():
        weights = torch.cat(by_hand(shared_model("llama"), traced, output_attentions=True).attentions)
    spans = [slice(*traced.spans[node]) for node in traced.graph.nodes]
    mass = torch.stack([torch.stack([weights[..., q, k].sum(-1).mean(-1) for k in spans], -1) for q in spans], -2)

    def write():
        for _ in range(4):
            assert generate(model, written, backend=backend, max_new_tokens=12).token_ids.tolist() == alone

    def trace():
        for _ in range(8):
            found = leattn.analysis.trace(model, traced, backend=backend)
            torch.testing.assert_close(found.mass, mass, rtol=1e-3, atol=1e-5)

    run(write, trace)


@pytest.mark.parametrize(
    ("family", "backend"),
    [(family, backend) for family in ("llama", "qwen3") for backend in ("eager", "sdpa", "sparse", "auto")]
    + [("gemma2", "eager"), ("gemma2", "auto")],
)
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_are_those_of_the_plain_model_under_the_same_mask(family, backend, inside):
    options = {"sliding_window": 64} if family == "gemma2" else {}
    model, reference, prompt = make_model(family, **options).train(), make_model(family, **options).train(), fan()
    expected = gradients(reference, target_loss(by_hand(reference, prompt).logits, prompt))
    with attend(model, prompt, backend=backend) as attention:
        loss = target_loss(model(**attention.inputs, use_cache=False).logits, prompt)
        if inside:
            found = gradients(model, loss)
    if not inside:
        found = gradients(model, loss)
    assert_same(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointed_gradients_under_auto_are_those_of_the_plain_model(family, implementation):
    model, reference, prompt = make_model(family, implementation).train(), make_model(family).train(), fan()
    expected = gradients(reference, target_loss(by_hand(reference, prompt).logits, prompt))
    model.gradient_checkpointing_enable()
    with attend(model, prompt) as attention:
        assert attention.backend.name == implementation
        loss = target_loss(model(**attention.inputs, use_cache=False).logits, prompt)
    assert_same(gradients(model, loss), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(BackendError, match="sparse cannot be used here"):
        leattn.forward(model, prompt, backend="sparse")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("backend", ["sparse", "auto"])
def test_autocast_runs_through_sparse_and_is_near(family, backend):
    model, reference, prompt = make_model(family), make_model(family), fan()
    logits = by_hand(reference, prompt).logits
    expected = gradients(reference, target_loss(logits, prompt))
    with torch.autocast("cpu", dtype=torch.bfloat16), attend(model, prompt, backend=backend) as attention:
        found = model(**attention.inputs, use_cache=False).logits
        assert attention.backend.name == "sparse"
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), logits.flatten(), dim=0) > 0.99
    given = gradients(model, target_loss(found.float(), prompt))
    for name in expected:
        cosine = torch.nn.functional.cosine_similarity(given[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.97, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_in_training_is_drawn_under_auto_and_refused_by_sparse(implementation):
    model, prompt = make_model("llama", implementation, attention_dropout=0.4), fan()
    reference = make_model("llama", attention_dropout=0.4)
    with torch.no_grad():
        still = by_hand(reference, prompt).logits
        with attend(model.train(), prompt) as attention:
            torch.manual_seed(5)
            found = model(**attention.inputs, use_cache=False).logits
            assert attention.backend.name == implementation
        assert not torch.allclose(found, still, atol=1e-2)
        if implementation == "eager":  # the same draws
            torch.manual_seed(5)
            torch.testing.assert_close(found, by_hand(reference.train(), prompt).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(BackendError, match=r"no attention dropout; use model.eval"):
            leattn.forward(model, prompt, backend="sparse")
        torch.testing.assert_close(leattn.forward(model.eval(), prompt, backend="sparse").logits, still, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_asked_for_under_auto_are_the_eager_ones(family, implementation):
    model, prompt = make_model(family, implementation), fan()
    with torch.no_grad():
        expected = by_hand(shared_model(family), prompt, output_attentions=True)
        found = leattn.forward(model, prompt, output_attentions=True)
    assert len(found.attentions) == 3
    torch.testing.assert_close(found.attentions, expected.attentions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == implementation


def test_weights_that_the_config_asks_for_come_with_every_forward():
    model, prompt = make_model("llama"), fan()
    model.config.output_attentions = True
    with torch.no_grad():
        expected = by_hand(shared_model("llama"), prompt, output_attentions=True).attentions
        torch.testing.assert_close(leattn.forward(model, prompt).attentions, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(BackendError, match="sparse has no attention weights to return"):
            leattn.forward(model, prompt, backend="sparse")


def test_a_first_use_with_weights_in_the_config_closes_no_backend_for_later():
    model, prompt = make_model("llama"), fan()
    model.config.output_attentions = True
    leattn.forward(model, prompt)
    with attend(model, prompt) as attention:
        assert model(**attention.inputs, output_attentions=False).attentions is None
        assert attention.backend.name == "sparse"
    model.config.output_attentions = False
    with torch.no_grad():
        expected = by_hand(shared_model("llama"), prompt).logits
        for backend in ("sparse", "sdpa"):
            found = leattn.forward(model, prompt, backend=backend).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
