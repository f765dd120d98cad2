"""What hidden states a block shows, what an edit changed, and states averaged across phrasings: by hand in plain loops."""

from __future__ import annotations

import threading

import pytest
import torch
from llama_by_hand import run
from models import shared_model
from test_attend import fan
from test_interventions import TOLERANCE, default_tokens, edited_at, logits

import leattn
from leattn import BackendError, ICLNode, LeattnError, compile_prompt
from leattn.analysis import trace
from leattn.interventions import Average, Freeze, Inject, RandomNoise, Recorded, Shuffle, Suppress, capture, intervene

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox"]  # transformers collects their states in different ways
CHANGE = 3.0


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Tripled:
    """An operation of one's own that adds the same to every state before some layers."""

    def __init__(self, *layers):
        self.layers = layers

    def bind(self, subject):
        return self

    def edit(self, state, hidden):
        return hidden * CHANGE if state.layer in self.layers else hidden


def shown(model, prompt, operations, **options):
    with intervene(model, prompt, operations, backend="eager", **options) as attention:
        return model(**attention.inputs, use_cache=False, output_hidden_states=True).hidden_states


def inputs_by_hooks(model, prompt, operations, *, prepend):
    """Inputs of every layer in front of, or behind, everything else that is hooked there."""
    seen = {}

    def see(layer):
        def before(_module, args, kwargs):
            seen[layer] = args[0] if args else kwargs["hidden_states"]

        return before

    with intervene(model, prompt, operations, backend="eager") as attention:
        handles = [
            layer.register_forward_pre_hook(see(i), with_kwargs=True, prepend=prepend)
            for i, layer in enumerate(attention.record.layers)
        ]
        model(**attention.inputs, use_cache=False)
        for handle in handles:
            handle.remove()
    return [seen[i] for i in range(len(seen))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)])
def test_hidden_states_are_those_after_the_edit_of_their_layer(family, layers):
    """As in the published code, which edits in place what its model has just put into the tuple."""
    model, prompt = shared_model(family), fan()
    operations = [Tripled(*layers)]
    after = shown(model, prompt, operations)
    before = shown(model, prompt, operations, before=True)
    plain = leattn.forward(model, prompt, backend="eager", output_hidden_states=True, use_cache=False).hidden_states
    assert len(after) == len(before) == len(plain)
    for layer, (new, old) in enumerate(zip(after[:-1], before[:-1], strict=True)):
        torch.testing.assert_close(new, old * CHANGE if layer in layers else old)
    torch.testing.assert_close(before[layers[0]], plain[layers[0]])
    for states, prepend in ((after, False), (before, True)):
        for state, seen in zip(states[:-1], inputs_by_hooks(model, prompt, operations, prepend=prepend), strict=True):
            assert torch.equal(state, seen)
    assert torch.equal(after[-1], before[-1])
    norms = trace(model, prompt, operations=operations, backend="eager").hidden_norms
    torch.testing.assert_close(norms, torch.stack(after[:-1])[:, 0].norm(dim=-1))


@pytest.mark.parametrize("layer", [1, 2])
def test_the_published_freeze_shows_what_is_held(layer):
    model, prompt, taken, held = shared_model("llama"), fan(), [], {}

    def states(number, h):
        if number == layer - 1:
            held["h"] = h
        if number < layer:
            return h
        return torch.stack([held["h"][t] if t in default_tokens(prompt) else row for t, row in enumerate(h)])

    run(model, prompt, states=states, hidden_states=taken)
    for state, expected in zip(shown(model, prompt, [Freeze(layer, source="previous")])[:-1], taken, strict=True):
        torch.testing.assert_close(state[0], expected, **TOLERANCE)


def test_capture_gives_the_states_after_the_edit_and_before_on_request():
    model, prompt = shared_model("llama"), fan()
    taken = []
    run(model, prompt, states=edited_at({1}, {3, 4}, lambda _l, _t, v: v * CHANGE), hidden_states=taken)
    plain = capture(model, prompt, layer=1).hidden
    nothing = capture(model, prompt, layer=1, before=True).hidden
    assert torch.equal(plain, nothing)
    changed = Inject(1, {3: plain[3] * CHANGE, 4: plain[4] * CHANGE})
    with intervene(model, prompt, [changed], backend="eager"):
        after, before = (capture(model, prompt, layer=1, before=early).hidden for early in (False, True))
        later = capture(model, prompt, layer=2).hidden
    torch.testing.assert_close(after, taken[1], **TOLERANCE)
    torch.testing.assert_close(before, plain, **TOLERANCE)
    torch.testing.assert_close(later, taken[2], **TOLERANCE)


def test_states_are_shown_while_decoding_and_only_where_they_are_asked_for():
    model, prompt = shared_model("llama"), fan()
    with intervene(model, prompt, [Tripled(1)], backend="eager") as attention:
        made = model.generate(
            **attention.inputs, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        assert model(**attention.inputs).hidden_states is None
        one = model(**attention.inputs, output_hidden_states=[2]).hidden_states
    plain = [capture_of(model, prompt, made.sequences[0, : len(prompt) + step]) for step in range(3)]
    for step, states in enumerate(made.hidden_states):
        torch.testing.assert_close(states[1][0, -1], plain[step] * CHANGE, **TOLERANCE)
    assert [state is None for state in one] == [layer != 2 for layer in range(4)]


def capture_of(model, prompt, ids):
    """The input of layer 1 at the last token, nothing edited: what layer 0 makes of the ids."""
    taken = []
    new = ids[len(prompt) :].tolist()
    run(model, prompt.continued(new) if new else prompt, hidden_states=taken)
    return taken[1][-1]


def test_a_tuple_has_no_place_for_edited_states():
    model, prompt = shared_model("llama"), fan()
    with intervene(model, prompt, [Tripled(1)], backend="eager") as attention:
        inner = attention.record.base
        with pytest.raises(BackendError, match="put into the output by name; leave return_dict out"):
            inner(**attention.inputs, output_hidden_states=True, return_dict=False)


def test_other_threads_see_states_of_their_own():
    model, prompt, seen = shared_model("llama"), fan(), {}

    def work():
        with torch.no_grad():
            seen["plain"] = leattn.forward(model, prompt, backend="eager", output_hidden_states=True).hidden_states

    with intervene(model, prompt, [Tripled(1)], backend="eager"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    plain = leattn.forward(model, prompt, backend="eager", output_hidden_states=True).hidden_states
    assert all(map(torch.equal, seen["plain"], plain))


# What an edit changed


def test_the_old_and_new_vectors_of_an_edit_are_kept():
    """The published code keeps them by token: {token: {'og_vector', 'switch_vector'}}."""
    model, prompt, taken = shared_model("llama"), fan(), []

    def change(layer, token, vector):
        return vector[torch.randperm(len(vector), generator=torch.Generator().manual_seed(layer * token))]

    states = edited_at({2}, default_tokens(prompt), change)
    run(model, prompt, states=states, hidden_states=taken)
    shuffle = Recorded(Shuffle(2, seeding="published"))
    found = logits(model, prompt, [shuffle])
    assert torch.equal(found, logits(model, prompt, [Shuffle(2, seeding="published")]))
    before = []
    run(model, prompt, hidden_states=before)
    kept = {edit.token: edit for edit in shuffle.edits}
    assert list(kept) == list(default_tokens(prompt))
    for token, edit in kept.items():
        assert (edit.layer, edit.row) == (2, 0)
        torch.testing.assert_close(edit.old, before[2][token], **TOLERANCE)
        torch.testing.assert_close(edit.new, taken[2][token], **TOLERANCE)


def test_edits_of_a_batch_are_told_by_row_and_what_is_no_edit_is_refused():
    model, prompts = shared_model("llama"), [fan(seed=1, siblings=2), fan(seed=2)]
    noise = Recorded(RandomNoise([0, 2], "doc1"))
    logits(model, prompts, [noise])
    spans = [range(*prompt["doc1"].span) for prompt in prompts]
    expected = [(layer, row, token) for layer in (0, 2) for row, span in enumerate(spans) for token in span]
    assert [(edit.layer, edit.row, edit.token) for edit in noise.edits] == expected
    with pytest.raises(LeattnError, match="Recorded keeps edits of hidden states alone; give Suppress"):
        logits(model, prompts[0], [Recorded(Suppress("doc0", 0.1))])


# Averages


def test_states_of_phrasings_are_averaged_at_a_layer():
    model = shared_model("llama")
    root = ICLNode([5, 6], id="root")
    asks = [ICLNode(ids, [root], id=f"Q{i}") for i, ids in enumerate([[11, 12, 13], [21, 22], [31, 32, 33]])]
    prompt = compile_prompt(asks)
    lasts = [prompt.spans[ask][1] - 1 for ask in asks]

    def mean_of(groups):
        def states(number, h):
            if number != 1:
                return h
            new = h.clone()
            for group in groups:
                new[group] = sum(h[token] for token in group) / len(group)
            return new

        return states

    expected = run(model, prompt, states=mean_of([lasts]))
    torch.testing.assert_close(logits(model, prompt, [Average(1)]), expected, **TOLERANCE)
    whole = compile_prompt(ICLNode([41, 42], [root, *asks], id="answer"))
    spans = [range(*whole["Q0"].span), range(*whole["Q2"].span)]
    expected = run(model, whole, states=mean_of([list(pair) for pair in zip(*spans, strict=True)]))
    torch.testing.assert_close(logits(model, whole, [Average(1, ["Q0", "Q2"])]), expected, **TOLERANCE)
    with intervene(model, whole, [Average(1, ["Q0", "Q2"])], backend="eager"):
        cached = model.generate(whole.input_ids, max_new_tokens=4, do_sample=False)
        stepwise = model.generate(whole.input_ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert cached.tolist() == stepwise.tolist()
    with pytest.raises(LeattnError, match="Average: the places in prompt 0 name 3, 2 tokens; choose equally many"):
        logits(model, whole, [Average(1, ["Q0", "Q1"])])
    with pytest.raises(LeattnError, match="unknown across 'rows'; choose one of 'places', 'prompts'"):
        logits(model, whole, [Average(1, across="rows")])


def test_states_of_phrasings_in_a_batch_are_averaged():
    model, prompts = shared_model("llama"), [fan(seed=1, siblings=2), fan(seed=2)]
    mean = sum(capture(model, prompt, layer=1)[len(prompt) - 1] for prompt in prompts) / 2
    expected = [run(model, p, states=edited_at({1}, {len(p) - 1}, lambda *_: mean)) for p in prompts]
    with intervene(model, prompts, [Average(1, across="prompts")], backend="eager") as attention:
        found = model(**attention.inputs, use_cache=False).logits
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(found[row, -len(prompt) :], expected[row], **TOLERANCE)
