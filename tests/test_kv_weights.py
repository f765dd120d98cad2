"""What a model computes with counts, wherever it is kept and however it is packed; what it does not compute with does not.

The oracle of reuse is the cold run without any store.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import make_model
from test_generation import fan
from torch import nn
from torch.nn.functional import linear

import leattn
from leattn import BackendError, GenNode, ICLNode, KVStore, compile_prompt, forward, generate
from leattn.kv.fingerprint import fingerprint
from leattn.model.record import Model

GLOBAL: dict[str, torch.Tensor] = {}


class Packing:
    """Something like the quantisation state of a library: slots, and what stands beside them."""

    __slots__ = ("inside", "scale")

    def __init__(self, inside, scale):
        self.inside, self.scale = inside, scale


class Packed(torch.Tensor):
    """A tensor that is made of two, as quantised ones are: it holds half of the weight."""

    @staticmethod
    def __new__(cls, half, twos):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half, twos):
        self.half, self.twos = half, twos

    def __tensor_flatten__(self):
        return ["half", "twos"], (self.shape,)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(value):
            return value.half * value.twos if isinstance(value, Packed) else value

        if function is torch.ops.aten.detach.default:
            return cls(args[0].half, args[0].twos)
        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return function(*args, **kwargs)


class Elsewhere(nn.Module):
    """A projection whose weight is kept in some way; ``get`` finds it."""

    def __init__(self, **kept):
        super().__init__()
        vars(self).update({name: value for name, value in kept.items() if name != "get"})
        self.get = kept["get"]

    def forward(self, x):
        return linear(x, self.get(self))


def prepacked(weight):
    """In an object of torch's own C++ classes, which Python does not see into."""
    scale = float(weight.abs().max()) / 127
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, scale, 0, torch.qint8), None)
    return Elsewhere(packed=packed, get=lambda self: torch.ops.quantized.linear_unpack(self.packed)[0].dequantize())


def in_a_global(weight, name):
    GLOBAL[name] = weight
    return Elsewhere(name=name, get=lambda self: GLOBAL[self.name])


class Replaced(nn.Module):
    """Its forward is another function, which holds the weight."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


KEPT = {
    "attribute": lambda w: Elsewhere(weight=w, get=lambda self: self.weight),
    "tuple": lambda w: Elsewhere(packed=(w, None), get=lambda self: self.packed[0]),
    "nested": lambda w: Elsewhere(packed={"all": [{"it": w}]}, get=lambda self: self.packed["all"][0]["it"]),
    "object": lambda w: Elsewhere(state=Packing([w], 1.0), get=lambda self: self.state.inside[0]),
    "attribute of a parameter": lambda w: _on_a_parameter(w),
    "unregistered module": lambda w: Elsewhere(below=[_linear(w)], get=lambda self: self.below[0].weight),
    "closure": lambda w: Replaced(lambda x: linear(x, w)),
    "partial": lambda w: Replaced(functools.partial(linear, weight=w)),
    "subclass": lambda w: Elsewhere(weight=Packed(w / 2, torch.full_like(w, 2.0)), get=lambda self: self.weight),
    "subclass as parameter": lambda w: _packed_parameter(w),
    "sparse": lambda w: Elsewhere(weight=w.to_sparse(), get=lambda self: self.weight.to_dense()),
    "quantised": lambda w: Elsewhere(
        weight=torch.quantize_per_tensor(w, 0.01, 0, torch.qint8), get=lambda self: self.weight.dequantize()
    ),
    "C++ object": prepacked,
}


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _on_a_parameter(weight):
    module = Elsewhere(get=lambda self: self.weight.quant_state["weight"])
    module.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
    module.weight.quant_state = {"weight": weight}
    return module


def _packed_parameter(weight):
    module = Elsewhere(get=lambda self: self.weight)
    module.weight = nn.Parameter(Packed(weight / 2, torch.full_like(weight, 2.0)), requires_grad=False)
    return module


def keeping(how, seed):
    """A model with fixed weights, but for one projection of the second layer, which is kept in another way."""
    model, other = (make_model("llama", "sdpa", seed=each, num_hidden_layers=3) for each in (0, seed))
    weight = other.model.layers[1].mlp.up_proj.weight.detach().clone()
    model.model.layers[1].mlp.up_proj = how(weight)
    return model, weight


def tokens(model, prompt, **options):
    return generate(model, prompt, max_new_tokens=6, **options).token_ids.tolist()


@pytest.mark.parametrize("kind", KEPT)
def test_weights_count_wherever_they_are_kept(kind):
    (one, _), (same, _), (other, _) = (keeping(KEPT[kind], seed) for seed in (1, 1, 2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)
    store, prompt = KVStore(), fan(0)
    generate(one, prompt, kv_store=store, max_new_tokens=1)
    warm = generate(other, prompt, kv_store=store, max_new_tokens=6)
    assert warm.stats.reused == 0
    assert warm.token_ids.tolist() == tokens(other, prompt)
    assert generate(same, prompt, kv_store=store, max_new_tokens=1).stats.reused > 0


@pytest.mark.parametrize("kind", ["attribute", "tuple", "nested", "object", "attribute of a parameter", "closure", "partial"])
def test_an_edit_in_place_is_noticed_wherever_it_happens(kind):
    model, weight = keeping(KEPT[kind], 1)
    before = fingerprint(model)
    weight[3, 4] *= 2
    assert fingerprint(model) != before
    weight[3, 4] /= 2
    assert fingerprint(model) == before


def test_what_no_module_holds_shows_in_what_the_model_does():
    one, _ = keeping(lambda w: in_a_global(w, "same name"), 1)
    of_one = fingerprint(one)
    other, _ = keeping(lambda w: in_a_global(w, "same name"), 2)  # and under the same name
    assert fingerprint(other) != of_one


def test_a_hook_is_noticed_when_it_comes_and_when_it_goes():
    model, store, prompt = make_model("llama"), KVStore(), fan(0)
    before = fingerprint(model)
    generate(model, prompt, kv_store=store, max_new_tokens=1)
    handle = model.model.layers[0].register_forward_hook(lambda _m, _a, output: output * 0.5)
    assert fingerprint(model) != before
    warm = generate(model, prompt, kv_store=store, max_new_tokens=6)
    assert (warm.stats.reused, warm.token_ids.tolist()) == (0, tokens(model, prompt))
    handle.remove()
    assert fingerprint(model) == before


def test_a_number_on_a_module_is_noticed():
    model = make_model("llama", "eager")
    before = fingerprint(model)
    model.model.layers[0].self_attn.scaling *= 2
    assert fingerprint(model) != before


def test_the_model_is_tried_as_it_is_whatever_is_around():
    prompt = fan(0)
    expected = fingerprint(make_model("llama", "sdpa"))
    model = make_model("llama", "sdpa")
    mask = torch.ones(1, 1, len(prompt), len(prompt), dtype=torch.bool).tril()
    with leattn.attend(model, prompt, mask=mask, mask_mode="replace", backend="sdpa"), torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(model) == expected
    model = make_model("llama", "eager")
    with leattn.interventions.intervene(model, prompt, [leattn.interventions.SkipAttention([0, 1])]):
        assert fingerprint(model) == expected
    with torch.inference_mode():
        assert fingerprint(make_model("llama", "sdpa")) == expected
    assert model.training is False


def test_it_is_tried_once_and_after_a_change():
    model, calls = make_model("llama"), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    store = KVStore()
    for _ in range(2):
        forward(model, fan(0), kv_store=store)
    before = len(calls)
    fingerprint(model)
    assert len(calls) == before
    with torch.no_grad():
        model.model.norm.weight += 1
    fingerprint(model)
    assert len(calls) == before + 1
    model.train()
    fingerprint(model)
    assert model.training
    assert all(module.training for module in model.modules())


def test_entries_made_under_autocast_are_for_autocast():
    model, store, prompt = make_model("llama", "sdpa"), KVStore(), fan(0)
    with torch.no_grad():
        cold = forward(model, prompt).logits[0, slice(*prompt.spans[prompt.graph["Q"]])]
    with torch.autocast("cpu", torch.bfloat16):
        forward(model, prompt, kv_store=store)
        hits = store.stats.hits
        forward(model, prompt, kv_store=store)
        assert store.stats.hits > hits
    hits = store.stats.hits
    warm = forward(model, prompt, kv_store=store).logits[0]
    assert store.stats.hits == hits
    torch.testing.assert_close(warm, cold, atol=1e-4, rtol=1e-4)


# Adapters.


def adapted(kind, names=("one",)):
    peft = pytest.importorskip("peft")
    layers = {"target_modules": ["k_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **layers),
        "dora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **layers),
        "embeddings": lambda: peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["embed_tokens"], **layers),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], init_ia3_weights=False, **layers),
    }
    model = peft.get_peft_model(make_model("llama", "sdpa"), configs[kind](), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[kind]())
    filled(model, names)
    return model.eval(), configs[kind]


def filled(model, names):
    for name, weight in model.named_parameters():
        for adapter in names:
            if f".{adapter}" in name:
                generator = torch.Generator().manual_seed(len(name) + sum(map(ord, adapter)))
                weight.data = 1 + 0.3 * torch.randn(weight.shape, generator=generator)


KINDS = ["lora", "dora", "embeddings", "ia3"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_counts_is_the_active_adapter(kind):
    model, config = adapted(kind)
    store, prompt = KVStore(), fan(0)
    with model.disable_adapter():
        without = fingerprint(model)
        cold = tokens(model, prompt)
        generate(model, prompt, kv_store=store, max_new_tokens=1)
    assert without == fingerprint(make_model("llama", "sdpa"))
    active = fingerprint(model)
    model.add_adapter("two", config())
    filled(model, ["two"])
    model.eval()
    assert fingerprint(model) == active
    with model.disable_adapter():
        warm = generate(model, prompt, kv_store=store, max_new_tokens=6)
    assert warm.stats.reused > 0
    assert warm.token_ids.tolist() == cold
    seen = {without, active}
    for names in ("two", "one"):
        model.set_adapter(names)
        model.eval()
        assert tokens(model, prompt, kv_store=store) == tokens(model, prompt)
        seen.add(fingerprint(model))
    assert len(seen) == 3
    assert fingerprint(model) == active


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters(kind):
    model, _ = adapted(kind)
    store, prompt = KVStore(), fan(0)
    cold = tokens(model, prompt)
    model.merge_adapter()
    assert tokens(model, prompt, kv_store=store) == tokens(model, prompt, kv_store=store) == cold
    with model.disable_adapter():  # a forward takes it out of the weights
        expected = tokens(copy.deepcopy(model), prompt)
        assert tokens(model, prompt, kv_store=store) == tokens(model, prompt, kv_store=store) == expected != cold
    assert tokens(model, prompt, kv_store=store) == cold


def test_a_scale_counts_and_an_adapter_per_row_is_refused():
    model, _ = adapted("lora", ["one", "two"])
    before, store, prompt = fingerprint(model), KVStore(), fan(0)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["two"] *= 2
    assert fingerprint(model) == before
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["one"] *= 2
    assert fingerprint(model) != before
    for call in (forward, generate):
        with pytest.raises(leattn.LeattnError, match="adapter_names"):
            call(model, prompt, kv_store=store, adapter_names=["two"])
    assert len(store) == 0


# Offloaded weights.


def offloaded(how, folder):
    accelerate = pytest.importorskip("accelerate")
    model, cpu = make_model("llama", "sdpa"), torch.device("cpu")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif how == "buffers":
        accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=True)
    elif how == "whole layers":
        accelerate.cpu_offload(model, execution_device=cpu, preload_module_classes=["LlamaDecoderLayer"])
    elif how == "disk":
        accelerate.disk_offload(model, folder, execution_device=cpu)
    elif how == "dispatched":
        parts = dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        places = {**parts, "model.layers.0": "disk", "model.layers.2": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    else:
        model, _ = accelerate.cpu_offload_with_hook(model, cpu)
    return model


OFFLOADED = ["cpu", "buffers", "whole layers", "disk", "dispatched", "by a hook"]


@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_models_do_what_they_did(how, tmp_path):
    plain, prompt, store = make_model("llama", "sdpa"), fan(0), KVStore()
    expected = tokens(plain, prompt)
    model = offloaded(how, tmp_path)
    assert leattn.check_model(model)["reuse"].works
    assert fingerprint(model) == fingerprint(plain)
    assert tokens(model, prompt) == expected
    assert tokens(model, prompt, kv_store=store) == expected
    warm = generate(model, prompt, kv_store=store, max_new_tokens=6)
    assert (warm.token_ids.tolist(), warm.stats.reused > 0) == (expected, True)
    question = prompt.graph["Q"]
    answer = GenNode(question.content, question.parents, "answer", max_new_tokens=6)
    assert generate(model, answer, kv_store=store).token_ids.tolist() == expected
    leattn.warm(model, prompt, kv_store=store, progress=False)
    expected_mass = leattn.analysis.trace(make_model("llama", "sdpa"), prompt).mass
    assert (leattn.analysis.trace(model, prompt).mass - expected_mass).abs().max() < 1e-5


def test_another_model_in_the_same_folder_is_another_one(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = offloaded("disk", tmp_path)
    before = fingerprint(model)
    accelerate.utils.offload_state_dict(tmp_path, make_model("llama", "sdpa", seed=1).state_dict())
    assert fingerprint(model) != before


def test_weights_on_the_meta_device_are_refused_in_words():
    whole, partly, prompt, store = make_model("llama").to("meta"), make_model("llama"), fan(0), KVStore()
    partly.model.layers[1].mlp.up_proj.to("meta")
    emptied = make_model("llama")
    tokens(emptied, prompt)
    emptied.to("meta")
    answer = GenNode([3, 4], prompt.graph["Q"].parents, max_new_tokens=2)
    for model in (whole, partly, emptied):
        report = leattn.check_model(model)
        assert not any(capability.works for capability in report.capabilities)
        assert all("meta device" in capability.reason for capability in report.capabilities)
        for run in (
            lambda m: forward(m, prompt),
            lambda m: forward(m, prompt, kv_store=store),
            lambda m: generate(m, prompt, max_new_tokens=2),
            lambda m: generate(m, prompt, kv_store=store, max_new_tokens=2),
            lambda m: generate(m, answer),
            lambda m: leattn.warm(m, prompt, kv_store=store, progress=False),
            lambda m: leattn.model_inputs(m, prompt),
            lambda m: leattn.analysis.trace(m, prompt),
            lambda m: leattn.patterns.paraphrase_ensemble(m, prompt, max_new_tokens=2),
            fingerprint,
        ):
            with pytest.raises(BackendError, match="meta device"):
                run(model)


# Quantised weights.


def quantised(how, seed=0):
    model = make_model("llama", "sdpa", seed=seed, hidden_size=64, head_dim=16)
    if how.startswith("torchao"):
        torchao = pytest.importorskip("torchao.quantization")
        weights, dynamic = torchao.Int8WeightOnlyConfig, torchao.Int8DynamicActivationInt8WeightConfig
        torchao.quantize_(model, dynamic() if "dynamic" in how else weights())
    else:
        quanto = pytest.importorskip("optimum.quanto")
        activations = quanto.qint8 if "activations" in how else None
        quanto.quantize(model, weights=quanto.qint8, activations=activations, exclude="lm_head")
        quanto.freeze(model)
    return model


@pytest.mark.parametrize("how", ["torchao", "torchao dynamic", "quanto", "quanto activations"])
def test_quantised_weights_are_served_exactly_or_refused_in_words(how):
    model, prompt, store = quantised(how), fan(0), KVStore()
    try:
        warm = [generate(model, prompt, kv_store=store, max_new_tokens=6) for _ in range(2)]
    except BackendError:
        assert len(store) == 0
        return
    assert warm[1].stats.reused > 0
    assert warm[0].token_ids.tolist() == warm[1].token_ids.tolist() == tokens(model, prompt)
    assert fingerprint(model) == fingerprint(quantised(how)) != fingerprint(quantised(how, seed=1))
    other = quantised(how, seed=1)
    assert tokens(other, prompt, kv_store=store) == tokens(other, prompt)


def test_keys_that_are_no_ordinary_tensors_are_refused_in_words():
    """As under quantised activations."""

    class Marked(torch.Tensor):
        pass

    model = make_model("llama")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _a, output: output.as_subclass(Marked))
    prompt, store = fan(0), KVStore()
    for run in (
        lambda: generate(model, prompt, kv_store=store, max_new_tokens=2),
        lambda: generate(model, GenNode([3, 4], prompt.graph["Q"].parents, max_new_tokens=2)),
    ):
        with pytest.raises(BackendError, match="Marked"):
            run()
    assert len(store) == 0


# Caches that keep more.


@pytest.mark.parametrize("family", ["axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_a_cache_that_keeps_more_than_keys_and_values_is_refused(family, monkeypatch):
    from models import OPTIONS
    from test_kv_reuse import LATENT

    monkeypatch.setitem(OPTIONS, family, {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64})
    try:
        model = make_model(family)
    except (ValueError, KeyError):
        pytest.skip(f"this transformers has no {family}")
    assert "DynamicIndexedLayer" in Model.of(model).facts.cached_beside
    prompt, store = compile_prompt(ICLNode([5, 6, 7], [ICLNode([3, 4])])), KVStore()
    for run in (
        lambda: generate(model, prompt, kv_store=store, max_new_tokens=2),
        lambda: forward(model, prompt, kv_store=store),
        lambda: leattn.warm(model, prompt, kv_store=store, progress=False),
        lambda: generate(model, GenNode([3, 4], max_new_tokens=2)),
    ):
        with pytest.raises(BackendError, match=r"its cache keeps more than keys and values \(DynamicIndexedLayer\)"):
            run()
    assert len(fingerprint(model)) == 32
    assert len(store) == 0


def test_usual_caches_keep_keys_and_values_alone():
    for family in ("llama", "mistral", "gemma3_text", "gpt2"):
        model = make_model(family)
        assert Model.of(model).facts.cached_beside is None
