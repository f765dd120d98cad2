"""What others find in transformers' registries, on models and in torch's compiler, before, while and after we are at work."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from models import make_model, shared_model
from test_attend import Boom, fan, traces
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import leattn
from leattn import attend, generate

IDS = torch.arange(2, 14)[None]
BACKENDS = ["eager", "sdpa", "sparse", "auto"]


def registries():
    """Every name in transformers' two registries, in order, with its function."""
    both = (ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS)
    return [[(name, registry[name]) for name in registry] for registry in both]


@pytest.fixture(autouse=True)
def before():
    """The registries are after each test what they were before it, and nothing in them is ours."""
    torch._dynamo.reset()
    found = registries()
    assert not [name for registry in found for name, function in registry if function.__module__.startswith("leattn")]
    yield found
    assert_identical(registries(), found)
    torch._dynamo.reset()


def assert_identical(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]
        assert all(function is was for (_, function), (_, was) in zip(one, other, strict=True))


def assert_clean(model, state, before):
    assert_identical(registries(), before)
    assert traces(model) == state


def checkpointing(implementation):
    """In training with gradient checkpointing: the model keeps its implementation, and we stand in front of its masks."""
    model = make_model("llama", implementation).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exception", [None, Boom, KeyboardInterrupt])
def test_the_registries_are_as_before_when_a_block_closes(before, backend, exception):
    model = make_model("llama")  # not probed yet: the probe opens blocks of its own
    state = copy.deepcopy(traces(model))
    if exception is None:
        with attend(model, fan(), backend=backend) as attention:
            assert [name for name, _ in registries()[1]] != [name for name, _ in before[1]]
            model(**attention.inputs)
    else:
        with pytest.raises(exception), attend(model, fan(), backend=backend):
            raise exception
    assert_clean(model, state, before)
    generate(model, fan(), backend=backend, max_new_tokens=2)
    assert_clean(model, state, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("exception", [None, Boom])
def test_the_registries_are_as_before_when_a_checkpointing_block_closes(before, implementation, exception):
    model = checkpointing(implementation)
    state = copy.deepcopy(traces(model))
    try:
        with attend(model, fan(), backend=implementation) as attention:
            assert attention.native
            assert ALL_MASK_ATTENTION_FUNCTIONS[implementation] is not dict(before[0])[implementation]
            loss = model(**attention.inputs, use_cache=False).logits.mean()
            if exception is not None:
                raise exception
    except Boom:
        pass
    assert_clean(model, state, before)
    loss.backward()
    assert_clean(model, state, before)


def test_nested_blocks_leave_the_registries_when_the_outermost_closes(before):
    one, two, three = make_model("llama"), make_model("llama", "sdpa", seed=1), checkpointing("sdpa")
    states = [copy.deepcopy(traces(model)) for model in (one, two, three)]

    def nested():
        with attend(one, fan(), backend="eager"):
            inside = registries()
            with attend(two, fan(), backend="sparse"), attend(one, fan(seed=1), backend="sdpa"), attend(three, fan()):
                assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not dict(before[0])["sdpa"]
            assert_clean(two, states[1], inside)
            assert_clean(three, states[2], inside)
            raise Boom

    with pytest.raises(Boom):
        nested()
    for model, state in zip((one, two, three), states, strict=True):
        assert_clean(model, state, before)


def test_the_registries_are_as_before_when_many_threads_are_done(before):
    """Blocks of several models, checkpointing ones among them, that open and close in any order."""
    models = [make_model("llama"), make_model("qwen3", "sdpa"), checkpointing("sdpa"), checkpointing("eager")]
    states = [copy.deepcopy(traces(model)) for model in models]
    backends = ("eager", "sparse", "sdpa", "eager")
    for model, backend in zip(models, backends, strict=True):
        leattn.forward(model, fan(), backend=backend)
    failures, start = [], threading.Barrier(8)

    def work(i):
        model, backend = models[i % 4], backends[i % 4]
        try:
            start.wait()
            for turn in range(6):
                try:
                    with attend(model, fan(seed=i), backend=backend) as attention:
                        if turn % 3 == 2:
                            raise Boom
                        model(**attention.inputs, use_cache=False)
                except Boom:
                    pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for model, state in zip(models, states, strict=True):
        assert_clean(model, state, before)


def fullgraph(model):
    with torch.no_grad():
        return torch.compile(model, backend="eager", fullgraph=True)(IDS, use_cache=False).logits


def plain(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_model_compiles_in_one_graph_while_a_block_is_open(implementation, backend):
    model, other = shared_model("llama"), make_model("llama", implementation, seed=1, num_hidden_layers=1)
    expected = plain(other)
    with attend(model, fan(), backend=backend) as attention:
        torch.testing.assert_close(fullgraph(other), expected)
        model(**attention.inputs)
        torch.testing.assert_close(fullgraph(other), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_model_compiles_in_one_graph_while_a_checkpointing_block_is_open(implementation):
    model, other = checkpointing(implementation), make_model("llama", implementation, seed=1)
    expected = plain(other)
    with attend(model, fan(), backend=implementation):
        torch.testing.assert_close(fullgraph(other), expected)
    torch.testing.assert_close(fullgraph(other), expected)


@pytest.mark.parametrize(
    ("implementation", "backend"), [("eager", "eager"), ("eager", "sdpa"), ("sdpa", "sdpa"), ("sdpa", "sparse")]
)
def test_after_use_every_model_compiles_in_one_graph(implementation, backend):
    model, other = (make_model("llama", implementation, seed=seed, num_hidden_layers=2) for seed in (0, 1))
    expected = [plain(one) for one in (model, other)]
    generate(model, fan(), backend=backend, max_new_tokens=2)
    torch.testing.assert_close([fullgraph(one) for one in (model, other)], expected)


@pytest.mark.parametrize(("implementation", "backend"), [("eager", "auto"), ("sdpa", "sdpa")])
def test_a_used_model_exports(implementation, backend):
    model = make_model("llama", implementation, num_hidden_layers=1)
    expected = plain(model)
    generate(model, fan(), backend=backend, max_new_tokens=2)
    exported = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=True).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=IDS, use_cache=False).logits, expected)


BREAKS = {"eager": (15, 9), "sdpa": (15, 9), "sparse": (24, 15), "auto": (24, 15)}
"""Graph breaks that are allowed for a first prompt, and for one of another length after it."""


@pytest.mark.parametrize(("implementation", "backend"), [("sdpa", "sdpa"), ("sdpa", "sparse")])
def test_a_compiled_model_follows_each_graph_and_none_after_the_block(implementation, backend):
    model, reference = (make_model("llama", one, num_hidden_layers=2) for one in (implementation, "eager"))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = plain(model)
        leattn.forward(model, fan(), backend=backend)  # the probe has run
        torch._dynamo.reset()
        for prompt, allowed in zip((fan(), fan(siblings=4, seed=1)), BREAKS[backend], strict=True):
            by_hand = reference(
                prompt.input_ids, position_ids=prompt.position_ids, attention_mask=prompt.additive_mask(), use_cache=False
            ).logits
            torch._dynamo.utils.counters.clear()
            with attend(compiled, prompt, backend=backend) as attention:
                found = compiled(**attention.inputs, use_cache=False).logits
            assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= allowed
            torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


def test_a_compiled_model_generates_what_the_model_does():
    model = make_model("llama", "sdpa", num_hidden_layers=1)
    expected = generate(model, fan(), backend="eager", max_new_tokens=3).token_ids.tolist()
    compiled = torch.compile(model, backend="eager")
    assert generate(compiled, fan(), max_new_tokens=3).token_ids.tolist() == expected
