"""``attend`` and ``forward``: what happens inside the block, and that nothing is left after it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SERVED, WINDOWED, make_model, shared_model
from strategies import graphs
from transformers import DynamicCache, StaticCache

import leattn
from leattn import BackendError, CompileError, ICLNode, LeattnError, LeattnWarning, attend, causal, compile_prompt


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"):
        yield


def fan(*, length=3, siblings=3, seed=0):
    """A root, siblings that see it, and a question that sees them all."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(2, 100, (count,), generator=generator).tolist()

    root = ICLNode(ids(2), id="root")
    documents = [ICLNode(ids(length + i), [root], id=f"doc{i}") for i in range(siblings)]
    return compile_prompt(ICLNode(ids(3), [root, *documents], id="Q"))


def plain_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def traces(model):
    """Everything of ours, or anybody's, that could be found on a model: hooks, config, implementation."""
    found = []
    for name, module in model.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
            found += [(name, kind, key) for key in getattr(module, kind)]
        found.append((name, "forward" in vars(module), sorted(vars(module))))
    return found, model.config.to_dict(), model.config._attn_implementation, sorted(vars(model.config))


class Boom(Exception):
    pass


@pytest.mark.parametrize(("family", "backend"), SERVED)
@pytest.mark.parametrize("exception", [None, Boom, KeyboardInterrupt])
def test_nothing_is_left_after_any_exit(family, backend, exception):
    model = shared_model(family)
    ids = torch.arange(2, 14)[None]
    before, state = plain_logits(model, ids), copy.deepcopy(traces(model))
    backbone = model.get_decoder()
    if exception is None:
        with torch.no_grad():
            leattn.forward(model, fan(), backend=backend)
    else:
        # Raised from the middle of the model's own forward, not politely between two calls.
        handle = backbone.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(exception()))
        with pytest.raises(exception):
            leattn.forward(model, fan(), backend=backend)
        handle.remove()
    assert traces(model) == state
    assert torch.equal(plain_logits(model, ids), before)


def test_an_exception_deep_in_the_model_leaves_it_clean():
    model = make_model("llama")
    ids = torch.arange(2, 14)[None]
    before, state = plain_logits(model, ids), copy.deepcopy(traces(model))
    for exception in (Boom, KeyboardInterrupt):
        handle = model.model.layers[1].register_forward_hook(lambda *_, e=exception: (_ for _ in ()).throw(e()))
        with pytest.raises(exception):
            leattn.generate(model, fan(), backend="sdpa", max_new_tokens=3)
        handle.remove()
        assert traces(model) == state
        assert torch.equal(plain_logits(model, ids), before)


def test_other_peoples_hooks_survive():
    model = make_model("llama")
    calls = []
    handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    leattn.forward(model, fan())
    model(torch.arange(2, 6)[None])
    assert len(calls) >= 2
    handle.remove()


def test_the_models_own_forward_follows_the_graph_inside_the_block_only():
    model, prompt = shared_model("llama"), fan()
    plain = plain_logits(model, prompt.input_ids)
    with attend(model, prompt), torch.no_grad():
        inside = model(prompt.input_ids).logits
        backbone = model.model(prompt.input_ids).last_hidden_state
    with torch.no_grad():
        reference = model(**leattn.model_inputs(model, prompt)).logits
    torch.testing.assert_close(inside, reference)
    torch.testing.assert_close(model.lm_head(backbone), reference)
    assert not torch.allclose(inside, plain)
    assert torch.equal(plain_logits(model, prompt.input_ids), plain)


@pytest.mark.parametrize(("family", "backend"), [pair for pair in SERVED if pair[1] != "sparse"])
def test_inputs_run_the_graph_without_attend(family, backend):
    """The masks for loops of one's own, a dict where layers differ."""
    model = make_model(family, "flex_attention" if backend == "flex" else backend)
    prompt = fan(length=6)
    inputs = leattn.model_inputs(model, prompt)
    assert isinstance(inputs["attention_mask"], dict) == (family in ("gemma2", "gemma3_text", "qwen2"))
    with torch.no_grad():
        own = model(**inputs, use_cache=False).logits
        reference = leattn.forward(shared_model(family), prompt, backend="eager", use_cache=False).logits
    torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-4)


def test_inputs_refuse_an_implementation_without_settable_masks():
    model = make_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(BackendError, match=r"masks of 'flash_attention_2' cannot be set; call model.set_attn_implementation"):
        leattn.model_inputs(model, fan())


def test_a_flash_model_is_moved_under_auto_and_refused_by_name():
    model = make_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"  # as if it were loaded so; no kernel is needed here
    expected = leattn.forward(shared_model("llama"), fan(), backend="sdpa").logits
    for mask, chosen in ((None, "sparse"), (torch.ones(1, 1, 17, 17, dtype=torch.bool), "sdpa")):
        with attend(model, fan(), mask=mask) as attention:
            assert attention.backend.name == chosen
            torch.testing.assert_close(model(**attention.inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "flash_attention_2"
    with pytest.raises(
        BackendError, match="unknown backend 'flash_attention_2'; choose one of 'auto', 'eager', 'sdpa', 'flex', 'sparse'"
    ):
        leattn.forward(model, fan(), backend="flash_attention_2")


def test_nested_blocks_follow_the_innermost_and_restore_the_outer():
    model, outer, inner = make_model("llama"), fan(seed=1), fan(seed=2)
    expected = [leattn.forward(model, prompt, backend="eager").logits for prompt in (outer, inner)]
    with attend(model, outer, backend="eager") as one:
        with attend(model, inner, backend="sdpa") as two:
            torch.testing.assert_close(model(**two.inputs).logits, expected[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**one.inputs).logits, expected[0])
        assert (one.backend.name, two.backend.name) == ("eager", "sdpa")
    assert model.config._attn_implementation == "eager"


def test_another_model_inside_the_block_is_left_alone():
    model, other = make_model("llama"), make_model("llama", seed=1)
    ids = torch.arange(2, 12)[None]
    expected = plain_logits(other, ids)
    with attend(model, fan()):
        assert torch.equal(plain_logits(other, ids), expected)


@pytest.mark.parametrize(
    ("family", "backend"), [pair for pair in SERVED if pair[0] in ("llama", "mistral", "gpt2", "gemma3_text")]
)
@settings(max_examples=4)
@given(several=st.lists(graphs(max_nodes=5), min_size=2, max_size=3))
def test_a_batch_equals_one_by_one(family, backend, several):
    model, prompts = shared_model(family), [compile_prompt(graph) for graph in several]
    with torch.no_grad():
        rows = leattn.forward(model, prompts, backend=backend, use_cache=False).logits
        for row, prompt in zip(rows, prompts, strict=True):
            single = leattn.forward(model, prompt, backend=backend, use_cache=False).logits[0]
            torch.testing.assert_close(row[-len(prompt) :], single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_measured_in_positions(family):
    """A sibling far away in the layout is near in positions, so its question sees it whole; one far in positions is cut."""
    model = shared_model(family)
    near = fan(length=3, siblings=4)
    far = compile_prompt(near.graph, positions="sequential")
    with torch.no_grad():
        one, two = (leattn.forward(model, prompt, backend="eager").logits[0, -1] for prompt in (near, far))
    assert not torch.allclose(one, two, atol=1e-3)
    # The attention weights themselves say what was seen.
    with torch.no_grad():
        weights = leattn.forward(model, far, backend="eager", output_attentions=True).attentions
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    layer = kinds.index("sliding_attention")
    position = far.position_ids[0]
    distance = position[:, None] - position
    seen = weights[layer][0].amax(0) > 0
    assert torch.equal(seen, far.dense_mask() & (distance < model.config.sliding_window))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_users_additive_mask_is_combined_per_head(backend):
    model, prompt = shared_model("llama"), fan()
    size, heads = len(prompt), 4
    mask = torch.zeros(1, heads, size, size)
    mask[:, 1, :, 3] = -2.5
    mask[:, 2, 4:, 1] = torch.finfo(torch.float32).min
    with torch.no_grad():
        ours = leattn.forward(model, prompt, backend=backend, mask=mask).logits
        by_hand = model(
            prompt.input_ids,
            position_ids=prompt.position_ids,
            attention_mask=(prompt.additive_mask() + mask).clamp(min=torch.finfo(torch.float32).min),
        ).logits
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("mode", ["combine", "replace"])
def test_a_users_boolean_mask(backend, mode):
    model, prompt = shared_model("llama"), fan()
    size = len(prompt)
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(1, 4, size, size, generator=generator) < 0.5) | torch.eye(size, dtype=torch.bool)
    allowed = mask & prompt.dense_mask() if mode == "combine" else mask
    with torch.no_grad():
        ours = leattn.forward(model, prompt, backend=backend, mask=mask, mask_mode=mode).logits
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        by_hand = model(prompt.input_ids, position_ids=prompt.position_ids, attention_mask=additive).logits
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 1, 40, 40), "inverted form: 0 where a token may attend .* this one has maximum 1"),
        (torch.full((1, 1, 40, 40), -1.0), "so its maximum is 0; this one has maximum -1"),
        (torch.ones(1, 1, 40, 40, dtype=torch.long), "dtype torch.int64; give a boolean mask"),
        (torch.ones(40, 40, dtype=torch.bool), r"4D tensor \[B, 1 or H, Q, K\], not \[40, 40\]"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), r"mask has shape \[1, 1, 2, 2\]; these 1 prompts of at most 17 tokens"),
    ],
)
def test_a_users_mask_in_the_wrong_form_is_refused(mask, words):
    with pytest.raises(BackendError, match=words):
        leattn.forward(shared_model("llama"), fan(), mask=mask)


def test_what_sparse_cannot_carry_is_refused():
    model, prompt = make_model("llama"), fan()
    with pytest.raises(BackendError, match="sparse takes no mask of your own"):
        leattn.forward(model, prompt, backend="sparse", mask=torch.ones(1, 1, 17, 17, dtype=torch.bool))
    hidden = torch.ones(1, 17, dtype=torch.long)
    hidden[0, 2] = 0
    with attend(model, prompt, backend="sparse"), pytest.raises(BackendError, match="hides tokens of a prompt"):
        model(prompt.input_ids, attention_mask=hidden)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(BackendError, match=r"no attention dropout; use model.eval"):
        leattn.forward(model.train(), prompt, backend="sparse")


@pytest.mark.parametrize("loaded", ["eager", "sdpa"])
def test_auto_takes_sparse_where_it_serves(loaded):
    model, prompt = make_model("llama", loaded), fan()
    plain = compile_prompt(causal([[5, 6, 7], [8, 9]]))
    for prompts, chosen in ((prompt, "sparse"), ([prompt, plain], "sparse"), (plain, loaded), ([plain, plain], loaded)):
        with attend(model, prompts) as attention:
            assert attention.backend.name == chosen
    with attend(make_model("gemma2", "eager"), prompt) as attention:  # soft-capped
        assert attention.backend.name == "eager"
    with leattn.interventions.intervene(model, prompt, [leattn.interventions.Suppress("doc0", 0.5)]) as attention:
        assert attention.backend.name == loaded
    with attend(model, prompt) as outer:
        assert outer.backend.name == "sparse"
        with attend(model, prompt, mask=torch.ones(1, 1, 17, 17, dtype=torch.bool)) as inner:
            assert inner.backend.name == loaded
        with attend(model, plain) as inner:
            assert inner.backend.name == loaded


def test_auto_moves_on_where_a_call_asks_for_more_than_sparse_has():
    model, prompt = make_model("llama", "eager"), fan()
    expected = leattn.forward(model, prompt, backend="eager", output_attentions=True)
    state = copy.deepcopy(traces(model))
    with attend(model, prompt) as attention:
        assert attention.backend.name == "sparse"
        found = model(**attention.inputs, output_attentions=True)
        assert attention.backend.name == "eager"
    torch.testing.assert_close(found.attentions, expected.attentions)
    assert traces(model) == state

    hidden = torch.ones(1, 17, dtype=torch.long)
    hidden[0, 2] = 0
    logits = []
    for backend in ("auto", "eager"):
        with attend(model, prompt, backend=backend) as attention, torch.no_grad():
            logits.append(model(prompt.input_ids, attention_mask=hidden).logits)
            assert attention.backend.name == "eager"
    torch.testing.assert_close(*logits)
    with attend(model, prompt, backend="sparse"), pytest.raises(BackendError, match="no attention weights to return"):
        model(prompt.input_ids, output_attentions=True)
    assert traces(model) == state


def test_auto_leaves_training_with_dropout_or_checkpointing_to_the_current_implementation():
    model, prompt = make_model("llama", "sdpa", attention_dropout=0.1), fan()
    with attend(model, prompt) as attention:
        assert attention.backend.name == "sparse"
        model.train()  # inside of the block
        model(prompt.input_ids)
        assert attention.backend.name == "sdpa"
    with attend(model, prompt) as attention:
        assert attention.backend.name == "sdpa"
    model = make_model("llama", "eager").train()
    model.gradient_checkpointing_enable()
    loss = leattn.forward(model, prompt, use_cache=False).logits.pow(2).mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_auto_goes_along_with_what_another_thread_runs_on():
    model, graph, plain = make_model("llama", "sdpa"), fan(), compile_prompt(causal([[5, 6, 7], [8, 9]]))
    expected = [leattn.forward(model, prompt).logits for prompt in (graph, plain)]
    failures, start = [], threading.Barrier(6)

    def work(prompt, logits):
        try:
            start.wait()
            for _ in range(20):
                torch.testing.assert_close(leattn.forward(model, prompt).logits, logits, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=((graph, plain)[i % 2], expected[i % 2])) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert model.config._attn_implementation == "sdpa"


def test_an_additive_mask_is_refused_by_flex():
    mask = torch.zeros(1, 1, 17, 17)
    with pytest.raises(BackendError, match="flex takes a boolean mask only"):
        leattn.forward(shared_model("llama"), fan(), backend="flex", mask=mask)


def test_other_input_ids_inside_the_block_are_refused():
    model, prompt = shared_model("llama"), fan()
    ids = prompt.input_ids.clone()
    ids[0, 4] = (ids[0, 4] + 1) % 100
    with attend(model, prompt), pytest.raises(BackendError, match=r"other input_ids than the prompt's .* column 4 is"):
        model(ids)
    with attend(model, [prompt, prompt]), pytest.raises(BackendError, match="rows come in equal numbers per prompt"):
        model(prompt.input_ids.repeat(3, 1))
    with attend(model, prompt), pytest.raises(BackendError, match="the attention_mask is 2D padding; give a 4D mask"):
        model(prompt.input_ids, attention_mask=prompt.additive_mask())


def test_vocabularies_that_do_not_match_are_refused():
    prompt = compile_prompt(ICLNode([5, 130], id="too large"))
    with pytest.raises(BackendError, match="node 'too large' holds token id 130, but the model has 100 embeddings"):
        leattn.forward(shared_model("llama"), prompt)


def test_positions_past_a_learned_table_are_refused_and_past_rope_warned_about():
    prompt = compile_prompt(ICLNode([5, 6], start_pos_id=600))
    with pytest.raises(BackendError, match="the last position is 601, but gpt2 has a table of 512 positions"):
        leattn.forward(shared_model("gpt2"), prompt)
    with pytest.warns(LeattnWarning, match="the last position is 601; llama was trained for 512"):
        leattn.forward(shared_model("llama"), prompt)
    near = compile_prompt(ICLNode([5, 6], start_pos_id=509))
    leattn.forward(shared_model("gpt2"), near)
    with pytest.raises(BackendError, match="the last position is 513 with 4 new tokens"):
        leattn.generate(shared_model("gpt2"), near, max_new_tokens=4)


def test_length_dependent_rope_is_refused_past_its_original_length():
    model = make_model(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, max_position_embeddings=32
    )
    leattn.forward(model, compile_prompt(ICLNode([5, 6], start_pos_id=20)))
    with pytest.raises(BackendError, match="past 32 this model's rotary angles depend on the length"):
        leattn.forward(model, compile_prompt(ICLNode([5, 6], start_pos_id=40)))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_cache_built_step_by_step_equals_one_pass(family):
    model, prompt = shared_model(family), fan(length=6)
    with attend(model, prompt, backend="eager"), torch.no_grad():
        whole = model(prompt.input_ids, use_cache=False).logits
        cache, parts = DynamicCache(), []
        for part in prompt.input_ids.split(4, dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_static_cache_of_a_windowed_model_is_refused_before_anything_is_computed():
    model, prompt = shared_model("mistral"), fan()
    cache = StaticCache(config=model.config, max_cache_len=64)
    with (
        attend(model, prompt),
        pytest.raises(BackendError, match=r"StaticCache with sliding-window layers drops keys by index"),
    ):
        model(prompt.input_ids, past_key_values=cache, use_cache=True)


def test_what_is_not_a_model_or_a_prompt_is_refused():
    with pytest.raises(BackendError, match=r"transformers models \(PreTrainedModel\), not Linear"):
        leattn.forward(torch.nn.Linear(2, 2), fan())
    with pytest.raises(LeattnError, match="attend follows compiled prompts, not ICLNode"):
        leattn.forward(shared_model("llama"), [ICLNode([1])])
    with pytest.raises(LeattnError, match="there is no prompt"):
        leattn.forward(shared_model("llama"), [])
    with pytest.raises(LeattnError, match="unknown mask_mode 'add'; choose one of 'combine', 'replace'"):
        leattn.forward(shared_model("llama"), fan(), mask_mode="add")


def test_two_graphs_on_one_model_at_once_are_right():
    model = make_model("llama", "sdpa")
    prompts = [fan(seed=i, siblings=2 + i % 3) for i in range(6)]
    expected = [leattn.forward(model, prompt).logits for prompt in prompts]
    failures, start = [], threading.Barrier(len(prompts))

    def work(i):
        try:
            start.wait()
            for _ in range(8):
                with torch.no_grad():
                    torch.testing.assert_close(leattn.forward(model, prompts[i]).logits, expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not model.model._forward_pre_hooks


def test_a_thread_that_inherited_nothing_raises():
    model, prompt = make_model("llama"), fan()
    caught = []

    def work():
        try:
            model(prompt.input_ids)
        except BackendError as error:
            caught.append(str(error))

    with attend(model, prompt):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(caught) == 1
    assert "following a graph in another thread" in caught[0]


def test_two_threads_run_two_backends_on_one_model():
    model, prompt = make_model("llama"), fan()
    backends = ("eager", "sdpa", "flex", "sparse")
    expected = leattn.forward(model, prompt, backend="eager").logits
    failures, chosen, start = [], [], threading.Barrier(len(backends))

    def work(backend):
        try:
            start.wait()
            for _ in range(8):
                with torch.compiler.set_stance("force_eager"), torch.no_grad(), attend(model, prompt, backend=backend) as block:
                    logits = model(**block.inputs).logits
                chosen.append(block.backend.name)
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(chosen) == sorted(backends * 8)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_keeps_its_implementation_serves_one_at_a_time():
    """Checkpointing runs layers again when the block is over, so such a block cannot share the model with one on ours."""
    model, prompt = make_model("llama"), fan()
    caught = []
    leattn.forward(model, prompt, backend="eager")  # the probe has run

    def work():
        try:
            leattn.forward(model, prompt, backend="sdpa")
        except BackendError as error:
            caught.append(str(error))

    model.train().gradient_checkpointing_enable()
    with attend(model, prompt, backend="eager"):
        model.gradient_checkpointing_disable()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(caught) == 1
    assert "another thread is using this model on 'eager'" in caught[0]


def test_a_forced_other_implementation_inside_the_block_is_refused():
    model, prompt = make_model("llama"), fan()
    with attend(model, prompt, backend="eager"):
        model.set_attn_implementation("sdpa")
        with pytest.raises(BackendError, match="was switched to 'sdpa' inside attend"):
            model(prompt.input_ids)
    model.set_attn_implementation("eager")


def test_padding_that_a_caller_adds_is_honoured():
    """Zeros in the caller's own 2D mask hide those keys, as they do in plain transformers."""
    model, prompt = shared_model("llama"), compile_prompt(causal([[5, 6, 7], [8, 9], [10]]))
    keep = torch.ones(1, 6, dtype=torch.long)
    keep[0, 1] = 0
    with torch.no_grad():
        plain = model(prompt.input_ids, attention_mask=keep, position_ids=prompt.position_ids, use_cache=False).logits
        for backend in ("eager", "sdpa", "flex"):
            with attend(model, prompt.without_edge("ids 10", "ids 8 9"), backend=backend):
                cut = model(prompt.input_ids, attention_mask=keep, use_cache=False).logits
            torch.testing.assert_close(cut[:, 2:5], plain[:, 2:5], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(cut[:, 5], plain[:, 5], atol=1e-4)


def test_errors_are_value_errors():
    assert issubclass(BackendError, LeattnError)
    assert issubclass(CompileError, ValueError)
