"""The sparse backend in whole models: equal to eager in prefill, decoding, training and in half precision."""

from __future__ import annotations

import resource

import pytest
import torch
from forks import in_another_process
from hypothesis import given, settings
from models import make_model, shared_model
from strategies import VISIBILITIES, graphs
from transformers import DynamicCache, StaticCache

import leattn
from leattn import ICLNode, attend, causal, compile_prompt, parallel
from leattn.attention.request import Request
from leattn.attention.sparse import SparseAttention

FOUR = ["llama", "qwen3", "gpt_neox", "gpt2"]


def scattered(*, seed=0, documents=5):
    """A question that sees every other document whole and the rest through a summary: its keys lie apart in the cache."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(2, 100, (count,), generator=generator).tolist()

    root = ICLNode(ids(3))
    nodes = parallel([ids(3 + i) for i in range(documents)], [root])
    summary = ICLNode(ids(4), nodes[1::2])
    return compile_prompt(ICLNode(ids(3), [*nodes[::2], summary]))


def both(model, call):
    with torch.no_grad():
        return call(model, "sparse"), call(model, "eager")


@pytest.mark.parametrize("family", FOUR)
@settings(max_examples=15)
@given(graph=graphs(max_nodes=7, max_tokens=9), visibility=VISIBILITIES)
def test_prefill_equals_eager(family, graph, visibility):
    prompt = compile_prompt(graph, visibility=visibility)
    ours, eager = both(shared_model(family), lambda m, b: leattn.forward(m, prompt, backend=b, use_cache=False).logits)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def steps(model, prompts, backend, *, rows=1, make_cache=DynamicCache, chunks=(1, 1, 3, 1), crop=0, reorder=None):
    """Logits of the prompt and of tokens behind it, fed in chunks; optionally cropping or reordering the cache between."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    with attend(model, prompts, backend=backend) as attention, torch.no_grad():
        cache = make_cache()
        inputs = attention.inputs["input_ids"].repeat_interleave(rows, 0)
        outputs.append(model(inputs, past_key_values=cache, use_cache=True).logits[:, -1])
        for chunk in chunks:
            tokens = torch.randint(2, 100, (len(inputs), chunk), generator=generator)
            outputs.append(model(tokens, past_key_values=cache, use_cache=True).logits.flatten(0, 1))
            if crop and chunk > 1:
                cache.crop(-crop)
            if reorder is not None:
                cache.reorder_cache(torch.tensor(reorder))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": 3},
        {"rows": 3, "reorder": [1, 1, 0, 5, 3, 4]},
        {"chunks": (2, 4, 1, 5), "crop": 1},
    ],
    ids=["steps", "return sequences", "beams", "crop"],
)
def test_decoding_equals_eager(family, options):
    prompts = [scattered(), scattered(seed=1, documents=3)]
    ours, eager = both(shared_model(family), lambda m, b: steps(m, prompts, b, **options))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_decoding_with_a_static_cache_equals_eager():
    model = shared_model("llama")

    def static():
        return StaticCache(config=model.config, max_cache_len=64)

    ours, eager = both(model, lambda m, b: steps(m, scattered(), b, make_cache=static))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}, {"assistant": True}],
    ids=["beams", "samples", "assisted"],
)
def test_generate_equals_eager(options):
    prompts = [scattered(), scattered(seed=1, documents=3)]
    options = dict(options)
    if options.pop("assistant", False):
        prompts, options["assistant_model"] = prompts[:1], shared_model("llama", "sdpa")
    ours, eager = (
        leattn.generate(shared_model("llama"), prompts, backend=backend, max_new_tokens=8, seed=0, **options)
        for backend in ("sparse", "eager")
    )
    for one, two in zip(ours, eager, strict=True):
        assert [s.token_ids.tolist() for s in one.sequences] == [s.token_ids.tolist() for s in two.sequences]


def test_what_is_kept_belongs_to_one_cache():
    """Two caches in one block, filled before it with other values: each continuation sees its own."""
    model, prompt = shared_model("llama"), scattered()
    caches = []
    for shift in (0, 1):
        cache = DynamicCache()
        with attend(model, prompt, backend="eager"), torch.no_grad():
            embeddings = model.get_input_embeddings()(prompt.input_ids) + shift
            model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        caches.append(cache)
    outputs = {"sparse": [], "eager": []}
    for backend, found in outputs.items():
        with attend(model, prompt, backend=backend), torch.no_grad():
            for turn in range(4):
                cache = caches[turn % 2]
                found.append(model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits)
                cache.crop(-1)
    torch.testing.assert_close(outputs["sparse"], outputs["eager"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs["eager"][0], outputs["eager"][1], atol=1e-2)


def test_rows_that_differ_keep_nothing():
    """Each row's prompt is noised by somebody else, and beams trade places."""
    model, prompt = make_model("llama"), scattered()
    noise = torch.randn(3, len(prompt), 48, generator=torch.Generator().manual_seed(2))

    def noised(_module, _args, output):
        return output + noise if output.shape[1] == len(prompt) else output

    handle = model.get_input_embeddings().register_forward_hook(noised)
    ours, eager = both(model, lambda m, b: steps(m, prompt, b, rows=3, reorder=[2, 0, 0]))
    handle.remove()
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FOUR)
def test_half_precision_is_as_near_as_sdpa(family):
    """bf16 rounds: sparse may be as far from fp32 as sdpa is, times two."""
    prompt = scattered(documents=7)
    exact = leattn.forward(shared_model(family), prompt, backend="eager").logits
    model = make_model(family).to(torch.bfloat16)
    with torch.no_grad():
        off = {
            backend: float((leattn.forward(model, prompt, backend=backend).logits.float() - exact).abs().max())
            for backend in ("eager", "sdpa", "sparse")
        }
    assert off["sparse"] <= 2 * max(off["sdpa"], off["eager"])


@pytest.mark.parametrize("family", FOUR)
def test_gradients_equal_eagers(family):
    prompt = scattered()
    gradients = {}
    for backend in ("sparse", "eager"):
        model = make_model(family)
        leattn.forward(model, prompt, backend=backend).logits.pow(2).mean().backward()
        gradients[backend] = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients["sparse"], gradients["eager"], rtol=1e-3, atol=1e-5)


def test_plain_text_is_one_causal_call(monkeypatch):
    """The path that costs nothing: one call per layer, of the whole prompt."""
    model, prompt = shared_model("llama"), compile_prompt(causal([[5, 6, 7], [8, 9], [10]]))
    calls = []
    original = leattn.attention.kernels.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        calls.append((query.shape[2], kwargs.get("is_causal", False)))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(leattn.attention.kernels, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        leattn.forward(model, prompt, backend="sparse", use_cache=False)
    assert calls == [(6, True)] * 3


def kilobytes_of_attention():
    """By how much the peak of a process's memory grows in one layer's attention on 32k tokens."""
    prompt = compile_prompt(ICLNode([1] * 64, parallel([[1] * 512] * 64)))
    size = len(prompt)
    query, key, value = (torch.randn(1, heads, size, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        attention = SparseAttention(Request(prompt.columns, 1, range(size), size, None, torch.float32, query.device))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attention(None, query, key, value)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_memory_grows_with_the_prompt_and_not_with_its_square():
    """Far below the 1 GB of one boolean S × S mask."""
    assert in_another_process(kilobytes_of_attention) < 100_000


def test_what_is_kept_of_a_prompt_is_of_the_run_that_decodes():
    """In one block: decode, change the weights, run the prompt again and decode. What was gathered before is of no use now."""
    model = make_model("llama")
    documents = parallel([[5, 6, 7], [8, 9], [3] * 4], [ICLNode([2], id="root")])
    prompt = compile_prompt(ICLNode([4, 5], documents, id="Q")).without_edge("Q", documents[1])

    def decoded():
        prefill = model(**attention.inputs, use_cache=True)
        return model(torch.tensor([[7]]), past_key_values=prefill.past_key_values, use_cache=True).logits

    with torch.no_grad():
        with leattn.attend(model, prompt, backend="sparse") as attention:
            first = decoded()
            model.model.embed_tokens.weight.mul_(-0.5)
            second = decoded()
        with leattn.attend(model, prompt, backend="eager") as attention:
            torch.testing.assert_close(second, decoded(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)
