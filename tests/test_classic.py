"""The arguments of AtMan and of Attend First, against what their code computes, written from its meaning in plain loops.

Where the published code is wrong, a test says what it does.
"""

from __future__ import annotations

import math

import pytest
import torch
from llama_by_hand import run
from models import shared_model
from test_attend import fan
from test_interventions import TOLERANCE, default_tokens, edited_at, logits, suppression

from leattn import LeattnError
from leattn.compat import from_atman, from_attend_first
from leattn.interventions import Freeze, Inject, RandomNoise, Shuffle, SkipAttention, Suppress, intervene


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return shared_model("llama")


# AtMan


def atman_matrix(size, indices, factors):
    """AtMan's matrix over the keys ``[S]``: 1 everywhere, the factor at each index but −1 and None; the last wins."""
    row = torch.ones(size)
    for index, factor in zip(indices, factors, strict=True):
        if index is not None and index != -1:
            row[index] = factor
    return row


def test_atmans_factors(model):
    prompt = fan()
    indices, factors = [2, 3, -1, 5, None, 3], [0.1, 9.0, 9.0, 0.5, 9.0, 2.0]
    given = from_atman(model, suppression_token_indices=[indices], suppression_factors=[factors], layers=[0, 1])
    matrix = atman_matrix(len(prompt), indices, factors)

    def scores(layer, head, query, row, visible):
        return (row - row.min()) * matrix if layer < 2 else row  # over all keys, masked ones too

    torch.testing.assert_close(logits(model, prompt, given), run(model, prompt, scores=scores), **TOLERANCE)


@pytest.mark.parametrize("after_scaling", [False, True])
def test_atmans_additive_mode_adds_its_matrix_of_ones(model, after_scaling):
    prompt = fan()
    indices, factors = [2, 3, -1, 5], [-3.0, 0.1, 9.0, 2.0]
    given = from_atman(
        model,
        suppression_token_indices=[indices],
        suppression_factors=[factors],
        multiplicative=False,
        manipulate_attn_scores_after_scaling=after_scaling,
    )
    matrix = atman_matrix(len(prompt), indices, factors)
    root = math.sqrt(12)

    def scores(layer, head, query, row, visible):
        return row + matrix if after_scaling else (row * root + matrix) / root

    torch.testing.assert_close(logits(model, prompt, given), run(model, prompt, scores=scores), **TOLERANCE)
    added = dict(zip(given[0].tokens, given[0].factor, strict=True))
    wanted = {2: -4.0, 3: -0.9, 5: 1.0}  # f − 1, and not f
    assert added == pytest.approx(wanted if after_scaling else {token: b / root for token, b in wanted.items()})
    by_hand = run(model, prompt, scores=suppression(added, "additive"))
    torch.testing.assert_close(logits(model, prompt, given), by_hand, **TOLERANCE)


def test_flat_lists_hold_for_every_row(model):
    prompts = [fan(seed=1), fan(seed=2)]
    flat = from_atman(model, suppression_token_indices=[2, None, 2], suppression_factors=[0.5, 7.0, 0.1])
    assert flat == [Suppress([2], [0.1], shift="all")]
    nested = from_atman(model, suppression_token_indices=[[2], [2]], suppression_factors=[[0.1], [0.1]])
    assert [one.rows for one in nested] == [[0], [1]]
    torch.testing.assert_close(logits(model, prompts, flat), logits(model, prompts, nested))


@pytest.mark.parametrize("layers", [None, [], [None]])
def test_atmans_ways_to_say_all_layers(model, layers):
    (found,) = from_atman(model, suppression_token_indices=[[2]], suppression_factors=[[0.1]], layers=layers)
    assert found.layers is None


def test_atman_rows_of_which_nothing_is_asked(model):
    assert from_atman(model, suppression_token_indices=[[-1], [None], []], suppression_factors=[[1.0], [0.5], []]) == []
    assert from_atman(model, suppression_token_indices=[], suppression_factors=[]) == []


@pytest.mark.parametrize(
    ("indices", "factors", "words"),
    [
        ([[1]], [[1.0, 2.0]], "row 0 has 1 indices and 2 factors"),
        ([[1]], [[1.0], [2.0]], "has 1 rows and suppression_factors 2"),
        ([1, 2], [0.1], "has 2 indices and suppression_factors 1"),
        ([[1], [2]], [0.1, 0.2], "give two flat lists, or both as one list per batch row"),
    ],
)
def test_lists_that_do_not_fit(model, indices, factors, words):
    with pytest.raises(LeattnError, match=words):
        from_atman(model, suppression_token_indices=indices, suppression_factors=factors)


def test_the_docstring_says_what_the_modified_llama_does_instead():
    assert from_atman.__doc__ is not None
    for words in ("This follows AtMan", "not causal at all", "leaves the suppression out", "never read"):
        assert words in " ".join(from_atman.__doc__.split())


# Attend First


def published_noise(model, prompt, layer, tokens, angle=None):
    """One draw per token, in the order given, from the global generator; in degrees at an angle to the old state."""

    def states(number, h):
        if number != layer:
            return h
        h = h.clone()
        for token in tokens:
            old = h[token].clone()
            v = torch.randn_like(old)
            if angle is not None:
                v = v - (torch.dot(old, v) / old.norm() ** 2) * old
            v = v / v.norm() * old.norm()
            if angle is not None:
                v = math.cos(math.radians(angle)) * old + math.sin(math.radians(angle)) * v
            h[token] = v
        return h

    return run(model, prompt, states=states)


@pytest.mark.parametrize("angle", [None, 0.0, 30.0, 90.0, 180.0])
@pytest.mark.parametrize("tokens", [None, [4, 1, 0, 9]])
def test_the_published_noise_draws_from_the_global_generator(model, tokens, angle):
    prompt = fan()
    kind = {"distrupt_type": "random_switch"} if angle is None else {"distrupt_type": "angle_switch", "angle": angle}
    given = from_attend_first(model, distrupt_layer=1, distrupt_tokens=tokens, **kind)
    assert given == [RandomNoise(1, tokens, seeding="published", angle=angle)]
    torch.manual_seed(7)
    expected = published_noise(model, prompt, 1, default_tokens(prompt) if tokens is None else tokens, angle)
    torch.manual_seed(7)
    found = logits(model, prompt, given)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert torch.allclose(found, logits(model, prompt, []), atol=1e-3) == (angle == 0.0)
    assert not torch.equal(logits(model, prompt, given), found) or angle in (0.0, 180.0), "every forward draws anew"


@pytest.mark.parametrize("angle", [0.0, 45.0, 120.0])
def test_noise_at_an_angle_with_seeds_of_its_own(model, angle):
    prompt, before, after = fan(), [], []
    run(model, prompt, hidden_states=before)
    one, two = (logits(model, prompt, [RandomNoise(1, "doc0", angle=angle, seed=3)]) for _ in range(2))
    assert torch.equal(one, two)
    with intervene(model, prompt, [RandomNoise(1, "doc0", angle=angle, seed=3)]) as attention:
        handle = model.model.layers[1].register_forward_pre_hook(lambda _m, args: after.append(args[0][0]))
        model(**attention.inputs, use_cache=False)
        handle.remove()
    span = slice(*prompt["doc0"].span)
    cosine = torch.nn.functional.cosine_similarity(before[1][span], after[0][span])
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.radians(angle))), **TOLERANCE)
    torch.testing.assert_close(before[1][span].norm(dim=-1), after[0][span].norm(dim=-1), **TOLERANCE)


def test_the_published_noise_of_some_rows_of_a_batch(model):
    """Their code edits the first row of a batch and leaves the others; ours edits the rows that are named."""
    prompts = [fan(seed=1, siblings=2), fan(seed=2)]
    torch.manual_seed(3)
    found = logits(model, [prompts[1], prompts[0]], [RandomNoise(1, "doc2", seeding="published", rows=[0])])
    torch.manual_seed(3)
    alone = logits(model, prompts[1], [RandomNoise(1, "doc2", seeding="published")])
    torch.testing.assert_close(found, alone, **TOLERANCE)


def test_the_published_shuffle_seeds_by_layer_and_token(model):
    """Their code seeds torch's global generator with it, so that all that is drawn afterwards is fixed; ours leaves it."""
    prompt = fan()

    def change(layer, token, vector):
        return vector[torch.randperm(len(vector), generator=torch.Generator().manual_seed(layer * token))]

    expected = run(model, prompt, states=edited_at({2}, default_tokens(prompt), change))
    given = from_attend_first(model, manipulation_type="shuffle", manipulation_layer=2)
    torch.manual_seed(11)
    wanted = torch.randn(4)
    torch.manual_seed(11)
    torch.testing.assert_close(logits(model, prompt, given), expected, **TOLERANCE)
    assert torch.equal(torch.randn(4), wanted)


def test_information_injection_is_the_codes_only_spelling(model):
    prompt, state = fan(), torch.linspace(-1, 1, 48)
    arguments = {"manipulation_layer": 2, "injection_dict": {4: state}}
    (found,) = given = from_attend_first(model, manipulation_type="information_injection", **arguments)
    assert isinstance(found, Inject)
    expected = run(model, prompt, states=edited_at({2}, {4}, lambda *_: state))
    torch.testing.assert_close(logits(model, prompt, given), expected, **TOLERANCE)
    for kind in ("switch_dict", "inject", None):
        (other,) = from_attend_first(model, manipulation_type=kind, **arguments)
        assert (other.layer, dict(other.states)) == (found.layer, dict(found.states))
    with pytest.raises(LeattnError, match="an injection needs injection_dict"):
        from_attend_first(model, manipulation_type="information_injection", manipulation_layer=1)


def test_attend_firsts_arguments_are_translated(model):
    assert from_attend_first(model, distrupt_type="freeze", distrupt_layer=2) == [Freeze(2, source="previous")]
    assert from_attend_first(model, manipulation_type="random", manipulation_layer=1) == [RandomNoise(1, seeding="published")]
    assert from_attend_first(model, distrupt_type="random_shuffle", distrupt_layer=1, distrupt_tokens=range(3)) == [
        Shuffle(1, [0, 1, 2], seeding="published")
    ]
    assert from_attend_first(model, skip_attention_layers=range(1, 100)) == [SkipAttention([1, 2])]
    assert from_attend_first(model, distrupt_type="skip", distrupt_layer=1) == [SkipAttention(range(1, 3))]
    assert from_attend_first(model, distrupt_type="shuffle", distrupt_layer=50) == []
    with pytest.raises(LeattnError, match="unknown manipulation_type 'melt'; choose one of 'freeze', 'random'"):
        from_attend_first(model, manipulation_type="melt", manipulation_layer=1)
    with pytest.raises(LeattnError, match="needs manipulation_layer"):
        from_attend_first(model, manipulation_type="freeze")
    with pytest.raises(LeattnError, match="manipulation_type='angle_switch' needs angle, in degrees"):
        from_attend_first(model, manipulation_type="angle_switch", manipulation_layer=1)
    with pytest.raises(LeattnError, match="unknown seeding 'theirs'; choose one of 'own', 'published'"):
        logits(model, fan(), [RandomNoise(1, seeding="theirs")])
