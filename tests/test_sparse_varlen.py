"""The sparse backend's CUDA path, on an emulation of torch's variable-length kernel: no GPU has run it yet."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model, shared_model
from strategies import VISIBILITIES, graphs
from torch._subclasses.fake_tensor import FakeTensorMode

import leattn
from leattn import BackendError, ICLNode, attend, causal, compile_prompt, parallel
from leattn.attention import varlen
from leattn.attention.request import Backend, Request
from leattn.attention.sparse import SparseAttention
from leattn.prompt.columns import columns_of
from leattn.prompt.stretch import Stretch
from leattn.prompt.visible import merge

CPU = torch.device("cpu")
PACKED = Backend("packed", partial(SparseAttention, packs=True))
"""The varlen backend, on any device."""


class Emulated:
    """``varlen_attn`` as torch 2.13 documents it, query by query and head by head, with what its kernel insists on."""

    def __init__(self):
        self.calls = []

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert key.shape == value.shape
        assert (query.dim(), key.dim(), key.shape[2]) == (3, 3, query.shape[2])
        assert (enable_gqa, return_aux.lse) == (True, True)
        for tokens, cuts, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
            assert (int(cuts[0]), int(cuts[-1]), int(cuts.diff().max())) == (0, len(tokens), longest)
            assert (cuts.diff() > 0).all()  # what an empty sequence gives is not said
        assert window_size in ((-1, -1), (-1, 0))
        is_causal = window_size == (-1, 0)
        if is_causal:  # no question of which corner is aligned
            assert torch.equal(cu_seq_q, cu_seq_k)
        self.calls.append((is_causal, len(cu_seq_q) - 1, len(key)))
        tokens, heads, _ = query.shape
        output, lse = torch.empty_like(query), torch.empty(heads, tokens)
        for i in range(len(cu_seq_q) - 1):
            start, stop = int(cu_seq_q[i]), int(cu_seq_q[i + 1])
            first, last = int(cu_seq_k[i]), int(cu_seq_k[i + 1])
            for head in range(heads):
                group = head * key.shape[1] // heads
                for token in range(start, stop):
                    end = first + token - start + 1 if is_causal else last
                    scores = key[first:end, group].float() @ query[token, head].float() * scale
                    lse[head, token] = scores.logsumexp(0)
                    output[token, head] = (scores.softmax(0) @ value[first:end, group].float()).to(query.dtype)
        return output, lse


@pytest.fixture
def emulated(monkeypatch):
    """The whole path runs as on a GPU that serves everything."""
    kernel = Emulated()
    monkeypatch.setattr(varlen, "kernel_for", lambda *_: kernel)
    return kernel


def request(columns, rows, first, stop):
    return Request(columns, rows, range(first, stop), stop, None, torch.float32, CPU)


def dense(query, key, value, mask):
    """Softmax attention by hand, ``[B, Q, H, D]``; mask ``[B, Q, K]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ value).transpose(1, 2)


def run(packed, rows, length, keys, mask, *, heads=4, groups=2):
    """Compare against a dense mask ``[B, Q, K]`` where a query sees anything; returns the emulation's calls."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, length, 8, generator=generator)
    # Longer than what is used, as a static cache is.
    key, value = (torch.randn(rows, groups, keys + 3, 8, generator=generator) for _ in range(2))
    kernel = Emulated()
    output = packed.attention(kernel, query, key, value, 8**-0.5)
    expected = dense(query, key[:, :, :keys], value[:, :, :keys], mask)
    real = mask.any(2)
    assert output.isfinite().all()
    torch.testing.assert_close(output[real], expected[real], rtol=1e-4, atol=1e-5)
    return kernel.calls


def check(prompts, first=0, beyond=0, repeats=1, **heads):
    columns = columns_of(prompts, CPU)
    stop = columns.width + beyond
    rows = len(prompts) * repeats
    mask = columns.dense(range(first, stop), stop).repeat_interleave(repeats, 0)
    padding = torch.tensor(columns.padding).repeat_interleave(repeats)
    mask &= (torch.arange(first, stop) >= padding[:, None])[:, :, None]
    attention = SparseAttention(request(columns, rows, first, stop))
    return run(attention.packed, rows, stop - first, stop, mask, **heads)


@settings(max_examples=40)
@given(graph=graphs(max_nodes=8, max_tokens=6), visibility=VISIBILITIES, groups=st.sampled_from([1, 2, 4]))
def test_random_graphs_in_two_calls(graph, visibility, groups):
    calls = check([compile_prompt(graph, visibility=visibility)], groups=groups)
    assert [is_causal for is_causal, *_ in calls] in ([True], [True, False])


@settings(max_examples=20)
@given(one=graphs(max_nodes=5, max_tokens=5), two=graphs(max_nodes=5, max_tokens=5))
def test_batches_beams_continuations_and_decoding(one, two):
    prompts = [compile_prompt(ICLNode([1, 2], graph.sinks)) for graph in (one, two)]
    check(prompts, beyond=2, repeats=2)
    columns = max(len(prompt) for prompt in prompts)
    check(prompts, first=columns, beyond=1, repeats=2)
    check(prompts, first=columns + 1, beyond=3)


@settings(max_examples=20)
@given(graph=graphs(max_nodes=5, max_tokens=5))
def test_chunked_prefill(graph):
    prompt = compile_prompt(graph)
    for first in range(0, len(prompt), 3):
        check([prompt], first=first)


@settings(max_examples=40)
@given(data=st.data())
def test_any_stretches(data):
    first = data.draw(st.integers(0, 9))
    stretches, start = [], first
    for _ in range(data.draw(st.integers(1, 6))):
        stop = start + data.draw(st.sampled_from([1, 1, 1, 2, 4]))
        seen = data.draw(st.sets(st.integers(0, start - 1))) if start else ()
        stretches.append(Stretch(start, stop, merge([(column, column + 1) for column in seen])))
        start = stop
    mask = torch.zeros(1, start - first, start, dtype=torch.bool)
    for stretch in stretches:
        for query in range(stretch.start, stretch.stop):
            mask[0, query - first, [column for a, b in stretch.seen for column in range(a, b)]] = True
            mask[0, query - first, stretch.start : query + 1] = True
    run(varlen.Packed([stretches], 1, range(first, start), CPU), 1, start - first, start, mask)


def test_plain_text_is_one_causal_call():
    assert check([compile_prompt(causal([[1] * 4] * 5))]) == [(True, 1, 20)]


def test_siblings_share_one_sequence_of_what_they_see():
    head = ICLNode([1] * 5)
    prompt = compile_prompt(ICLNode([1] * 4, [head, *parallel([[1] * 3] * 6, [head])]))
    # Head, six siblings and the question; the siblings see 5 keys as one sequence, the question 23 as another.
    assert check([prompt]) == [(True, 8, 27), (False, 2, 28)]


def test_no_call_gathers_more_than_its_share(monkeypatch):
    monkeypatch.setattr(varlen, "GATHERED", 12)
    nodes = parallel([[1] * 5] * 4)
    prompt = compile_prompt([ICLNode([1] * 2, nodes[i:]) for i in range(4)])
    calls = check([prompt])
    assert [keys for is_causal, _, keys in calls if not is_causal] == [20, 15, 10, 5]
    assert [keys for is_causal, _, keys in check([prompt], repeats=2) if not is_causal] == [20, 15, 10, 5] * 2


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_whole_models_equal_eager(family, emulated):
    documents = parallel([[5, 6, 7], [8, 9], [3] * 4])
    prompts = [compile_prompt(ICLNode([2, 3], documents)), compile_prompt(ICLNode([4, 5, 6], documents[::2]))]
    outputs = {}
    for backend in (PACKED, "eager"):
        with attend(shared_model(family), prompts, backend=backend) as attention, torch.no_grad():
            prefill = shared_model(family)(**attention.inputs, use_cache=True)
            step = shared_model(family)(torch.tensor([[7], [8]]), past_key_values=prefill.past_key_values)
            outputs[backend] = prefill.logits[:, -1], step.logits
    assert emulated.calls
    torch.testing.assert_close(outputs[PACKED], outputs["eager"], rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_near_as_eager(emulated):
    prompt = compile_prompt(ICLNode([2, 3], parallel([[5, 6, 7], [8, 9], [3] * 4])))
    exact = leattn.forward(shared_model("llama"), prompt, backend="eager").logits
    model = make_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        off = {
            backend: float((leattn.forward(model, prompt, backend=backend).logits.float() - exact).abs().max())
            for backend in ("eager", PACKED)
        }
    assert emulated.calls
    assert off[PACKED] <= 2 * off["eager"]


def test_another_layout_of_the_log_sum_exp_is_refused():
    packed = varlen.Packed([[Stretch(0, 3, ())]], 1, range(3), CPU)
    x = torch.zeros(1, 2, 3, 8)

    def transposed(*args, **kwargs):
        output, lse = Emulated()(*args, **kwargs)
        return output, lse.T

    with pytest.raises(BackendError, match=r"log-sum-exp of shape \[3, 2\] where sparse knows \[heads, tokens\] = \[2, 3\]"):
        packed.attention(transposed, x, x, x, 1.0)


def test_only_what_the_kernel_takes_goes_there(monkeypatch):
    monkeypatch.setattr(varlen, "_installed", lambda device: "the kernel")

    def kernel(head=64, values=None, *, dtype=torch.bfloat16, device="cuda", grad=False):
        query = torch.empty(1, 4, 3, head, dtype=dtype, device=device, requires_grad=grad)
        key = torch.empty(1, 2, 3, head, dtype=dtype, device=device)
        value = torch.empty(1, 2, 3, values or head, dtype=dtype, device=device)
        return varlen.kernel_for(query, key, value)

    with FakeTensorMode():
        assert kernel() == kernel(256) == kernel(dtype=torch.float16) == "the kernel"
        assert kernel(60) is kernel(264) is kernel(192, 128) is None
        assert kernel(dtype=torch.float32) is kernel(device="cpu") is kernel(grad=True) is None
        with torch.no_grad():
            assert kernel(grad=True) == "the kernel"


def test_what_is_called_exists_in_this_torch():
    """The arguments by name, and an answer to the question that ``_Aux`` asks."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    assert varlen.LSE.lse == AuxRequest(lse=True).lse
    with FakeTensorMode():
        query, key = torch.empty(5, 4, 64), torch.empty(6, 2, 64)
        cuts = [(torch.empty(3, dtype=torch.int32), 4)] * 2
        output, lse = varlen.call(varlen_attn, query, key, key, *cuts, 0.1)
    assert (output.shape, lse.shape) == ((5, 4, 64), (5, 4, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_real_kernel_does_what_the_emulation_does(dtype):
    """What to run first on a GPU: output and log-sum-exp of every call, causal and not, with grouped heads."""
    documents = parallel([[1] * 70, [1] * 3, [1] * 200, [1]])
    prompts = [compile_prompt(ICLNode([1] * 9, documents)), compile_prompt(ICLNode([1] * 5, documents[::2]))]
    columns = columns_of(prompts, CPU)
    on_gpu = Request(columns, 2, range(columns.width), columns.width, None, dtype, torch.device("cuda"))
    query, key, value = (torch.randn(2, heads, columns.width, 64, dtype=dtype, device="cuda") for heads in (8, 2, 2))
    real, emulation = varlen.kernel_for(query, key, value), Emulated()
    assert real is not None

    def compared(*args, **kwargs):
        output, lse = real(*args, **kwargs)
        expected = emulation(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in args), **kwargs)
        torch.testing.assert_close(output.cpu(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected[1], rtol=1e-2, atol=1e-2)
        return output, lse

    SparseAttention(on_gpu).packed.attention(compared, query, key, value, 64**-0.5)
    assert [is_causal for is_causal, *_ in emulation.calls] == [True, False]
