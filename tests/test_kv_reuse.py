"""Stored keys and values equal the recomputed ones: where they were, and at other positions; what cannot is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import COMMON, FAMILIES, HEADS_OF_12, OPTIONS, WINDOW, make_model
from transformers import DynamicCache

import leattn
from leattn import BackendError, ICLNode, compile_prompt
from leattn.kv.certify import certificate
from leattn.kv.entry import node_kv
from leattn.kv.rotary import shifted

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
MORE = {
    "cohere": {},
    "cohere2": {"sliding_window": WINDOW},
    "glm4": HEADS_OF_12,
    "phi": {},
    "stablelm": {"hidden_size": 64},
    "smollm3": {"no_rope_layer_interval": 2},
    "deepseek_v3": LATENT,
    "ministral3": {},
    # Turned by complex numbers, in either layout.
    "llama4_text": {
        **HEADS_OF_12,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "layer_types": ["full_attention"] * 3,
        "no_rope_layers": [1, 0, 1],
    },
    "deepseek_v2": LATENT,
    # More layers in the cache than in the model: two attentions in each, stacks that run in turns.
    "longcat_flash": {
        **{name: value for name, value in LATENT.items() if name not in ("n_group", "topk_group", "n_shared_experts")},
        "num_hidden_layers": 4,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "hrm_text": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "num_layers_per_stack": 1,
        "H_cycles": 2,
        "L_cycles": 1,
        "head_dim": 12,
    },
    # Its config names a width of 256, which might be a length.
    "lfm2": {"layer_types": ["full_attention"] * 3},
}


@pytest.fixture(autouse=True)
def _more_families(monkeypatch):
    for family, options in MORE.items():
        monkeypatch.setitem(OPTIONS, family, options)


def rope(kind, **options):
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **options}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
MODELS = [
    *((family, {}, torch.float32) for family in [*FAMILIES, *MORE, "gptj", "gpt_oss"] if family != "gpt2"),
    ("llama", YARN, torch.float32),
    ("llama", LLAMA3, torch.float32),
    ("llama", rope("linear", factor=4.0), torch.float32),
    ("llama", {}, torch.bfloat16),
    ("gemma3_text", {}, torch.bfloat16),
    ("llama", {}, torch.float16),
]


def named(model):
    family, options, dtype = model
    kind = options.get("rope_parameters", {}).get("rope_type", "")
    return " ".join(filter(None, [family, kind, str(dtype).removeprefix("torch.")]))


def ids(count, seed):
    return torch.randint(0, COMMON["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def nodes_at(start):
    """A root, two siblings, and one that sees all; with windows of six, and not everything within one."""
    root = ICLNode(ids(5, 1), id="root", start_pos_id=start)
    left = ICLNode(ids(7, 2), [root], id="left")
    right = ICLNode(ids(3, 3), [root], id="right")
    return [root, left, right, ICLNode(ids(4, 4), [root, left, right], id="last")]


def computed(model, target):
    """Keys and values of all nodes, by name, from a plain forward pass."""
    prompt = compile_prompt(target)
    cache = DynamicCache()
    with torch.no_grad():
        leattn.forward(model, prompt, use_cache=True, past_key_values=cache)
    return {
        node.id: node_kv(cache, torch.arange(*span), int(prompt.position_ids[0, span[0]]))
        for node, span in prompt.spans.items()
    }


def error(found, expected):
    pairs = zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


@pytest.mark.parametrize("case", MODELS, ids=named)
def test_moved_equals_recomputed(case):
    """In every layer, there and back, near and far."""
    family, options, dtype = case
    model = make_model(family, **options).to(dtype)
    assert certificate(model).reuse is None
    assert certificate(model).shift is None
    limit = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    stored = computed(model, nodes_at(0)[-1])
    for start in (1, 19, 400):
        expected = computed(model, nodes_at(start)[-1])
        for name, kv in stored.items():
            moved = shifted(model, kv, kv.start + start)
            assert moved.start == expected[name].start
            assert error(moved, expected[name]) < limit, (name, start)
            assert error(shifted(model, expected[name], kv.start), kv) < limit, (name, -start)
            assert all(a.dtype == b.dtype for a, b in zip(moved.keys, kv.keys, strict=True))


def test_moving_leaves_the_entry_alone_and_no_way_is_no_work():
    model = make_model("llama")
    kv = computed(model, nodes_at(0)[-1])["left"]
    before = [tensor.clone() for tensor in kv.keys]
    moved = shifted(model, kv, 100)
    assert all(torch.equal(a, b) for a, b in zip(kv.keys, before, strict=True))
    assert not torch.equal(moved.keys[0], kv.keys[0])
    assert all(a is b for a, b in zip(moved.values, kv.values, strict=True))
    assert shifted(model, kv, kv.start) is kv


def test_layers_without_rotary_embedding_are_not_turned():
    model = make_model("smollm3")
    kv = computed(model, nodes_at(0)[-1])["left"]
    moved = shifted(model, kv, 100)
    turned = [a is not b for a, b in zip(moved.keys, kv.keys, strict=True)]
    assert turned == [bool(rope) for rope in model.config.no_rope_layers]
    assert set(turned) == {True, False}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_node_with_its_ancestors_alone(family):
    model = make_model(family)
    assert certificate(model).reuse is None
    nodes = nodes_at(0)
    whole = computed(model, nodes[-1])
    for node in nodes[:-1]:
        assert error(computed(model, node)[node.id], whole[node.id]) < 1e-5


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gpt2", {}, "its positions are learned: moved by 3 positions, the keys of layer 0 are off by"),
        ("opt", {}, "its positions are learned"),
        ("llama", rope("dynamic", factor=4.0), "its rotary angles depend on the length of the input"),
    ],
)
def test_reuse_without_moving(family, options, words):
    model = make_model(family, **options)
    assert certificate(model).reuse is None
    assert certificate(model).shift.startswith(words)
    kv = computed(model, nodes_at(0)[-1])["left"]
    assert shifted(model, kv, kv.start) is kv
    with pytest.raises(BackendError, match=f"keys of .* cannot be moved to other positions: {words}"):
        shifted(model, kv, kv.start + 1)


def test_angles_that_change_far_away_are_noticed():
    """Past position 300 they grow twice as fast: a node there still turns as one, but its distances mean something else."""

    def faster(module, args, kwargs, output):
        positions = kwargs["position_ids"]
        return type(module).forward(module, *args, torch.where(positions > 300, 2 * positions - 300, positions))

    model = make_model("llama")
    model.model.rotary_emb.register_forward_hook(faster, with_kwargs=True)
    assert "moved by 496 positions, the keys of layer 1 are off by" in certificate(model).shift


def test_positions_that_scale_the_queries_are_noticed():
    """Ministral 3 makes attention sharper past some position, so that what it computes there is no shift of what it was."""
    scaling = rope("yarn", factor=4.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("ministral3", **scaling).to(dtype)
        assert "no rotation of its family gives what is recomputed" in certificate(model).shift


def test_what_goes_on_otherwise_from_a_cache_is_noticed():
    """Something that the probe for masks does not see: a layer that computes otherwise once keys are there."""
    model = make_model("llama")

    def goes_on(module, args, kwargs):
        if kwargs["past_key_values"] is not None and kwargs["past_key_values"].get_seq_length() > 0:
            kwargs["hidden_states"] = kwargs["hidden_states"] * 1.5
        return args, kwargs

    model.model.layers[0].self_attn.register_forward_pre_hook(goes_on, with_kwargs=True)
    assert "differs from a cold run" in certificate(model).reuse
    assert certificate(model).shift == certificate(model).reuse


def test_a_layer_that_depends_on_the_length_of_the_input_follows_no_graph():
    model = make_model("llama")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, output: output * args[0].shape[1])
    assert "plain text as a graph differs" in certificate(model).reuse


def test_a_model_that_cannot_follow_a_graph_has_its_reason():
    assert "cannot follow a graph" in certificate(make_model("bloom")).reuse


def test_it_is_found_out_once_and_nothing_keeps_the_model_alive():
    model = make_model("llama").train()
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    certificate(model)
    count = len(calls)
    certificate(model)
    assert len(calls) == count > 0
    assert model.training
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None


def test_the_report_says_both():
    report = leattn.check_model(make_model("gpt2"))
    assert report["reuse"].works
    assert not report["shifted reuse"].works
    assert "learned" in report["shifted reuse"].reason
    assert leattn.check_model(make_model("llama"))["shifted reuse"].works
    report = leattn.check_model(make_model("mamba"))
    assert not report["reuse"].works
    assert "recurrent state" in report["reuse"].reason
