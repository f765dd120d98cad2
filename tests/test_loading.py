"""However a model is loaded, a graph gives what the model itself gives under a mask written down by hand, or is refused."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
from models import make_model
from oracles import dense, positions, relation

import leattn
from leattn import BackendError, ICLNode, KVStore, compile_prompt
from leattn.prompt.masks import additive


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def adapted(config, std=0.4):
    tuned = peft.get_peft_model(make_model("llama"), config).eval()
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "ia3_" in name:
            parameter.normal_(0, std)
    return tuned


def lora(std=0.4):
    return adapted(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"), std)


def ia3():
    modules = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return adapted(peft.IA3Config(**modules, task_type="CAUSAL_LM"))


def offloaded():
    return accelerate.cpu_offload(make_model("llama"), execution_device=torch.device("cpu"))


def dispatched(folder):
    model = make_model("llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, {**places, **rest}, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def on_disk(folder):
    return accelerate.disk_offload(make_model("llama"), str(folder), execution_device=torch.device("cpu"))


LOADED = {
    "fp32": lambda folder: make_model("llama"),
    "bf16": lambda folder: make_model("llama").to(torch.bfloat16),
    "fp16": lambda folder: make_model("llama").to(torch.float16),
    "tied": lambda folder: make_model("llama", tie_word_embeddings=True),
    "lora": lambda folder: lora(),
    "lora in bf16": lambda folder: lora(std=0.1).to(torch.bfloat16),
    "ia3": lambda folder: ia3(),
    "training": lambda folder: make_model("llama").train(),
    "compiled": lambda folder: torch.compile(make_model("llama"), backend="eager"),
    "cpu_offload": lambda folder: offloaded(),
    "disk_offload": on_disk,
    "dispatch_model": dispatched,
}


def graph():
    root = ICLNode([5, 6, 7], id="root")
    documents = [
        ICLNode([7, 23, 75, 90], [root], id="a"),
        ICLNode([54, 89, 46], [root], id="b"),
        ICLNode([12, 13], [root], id="c"),
    ]
    return compile_prompt([ICLNode([42, 54, 13], [root, *documents[:2]], id="q"), documents[2]])


def by_hand(model, prompt):
    """The model's own forward on eager, under a mask and positions from loops over tokens."""
    nodes, dtype = prompt.graph.nodes, next(p.dtype for p in model.parameters() if p.is_floating_point())
    mask = torch.tensor(dense(nodes, relation(nodes)))[None, None]
    where = torch.tensor([positions(nodes, relation(nodes))])
    ids = torch.tensor([[token for node in nodes for token in node.content]])
    additive_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return model(input_ids=ids, position_ids=where, attention_mask=additive_mask, use_cache=False).logits.float()


@pytest.mark.parametrize("loaded", LOADED)
def test_what_a_graph_gives(loaded, tmp_path):
    model, prompt = LOADED[loaded](tmp_path), graph()
    allowed = {"bf16": 4e-2, "fp16": 5e-3, "lora in bf16": 1e-1}.get(loaded, 1e-5)
    expected = by_hand(model, prompt)
    report = leattn.check_model(model)
    for backend in ("eager", "sdpa", "flex", "sparse", "auto"):
        assert backend == "auto" or report[backend].works, report[backend].reason
        found = leattn.forward(model, prompt, backend=backend, use_cache=False).logits.float()
        assert (found - expected).abs().max() / expected.abs().max() < allowed, backend


@pytest.mark.parametrize("loaded", [name for name in LOADED if name not in ("bf16", "fp16", "lora in bf16")])
def test_what_it_writes_and_keeps(loaded, tmp_path):
    model = LOADED[loaded](tmp_path)
    prompt = compile_prompt(graph().graph["q"])
    ids, expected = list(prompt.graph.nodes), []
    last = [*ids[-1].content]
    for _ in range(4):  # the question goes on, token by token
        nodes = ICLNode([*last, *expected], ids[-1].parents, id="q")
        expected.append(int(by_hand(model, compile_prompt(nodes))[0, -1].argmax()))
    store = KVStore()
    for options in ({}, {"use_cache": False}, {"kv_store": store}, {"kv_store": store}):
        assert leattn.generate(model, prompt, max_new_tokens=4, eos_token_id=None, **options).token_ids.tolist() == expected
    assert store.stats.hits > 0


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged|sdpa", "paged|eager", "flash_attention_3"])
def test_an_implementation_without_masks_is_left_under_auto_and_refused_by_name(implementation):
    model, prompt = make_model("llama"), graph()
    expected = by_hand(model, prompt)
    model.config._attn_implementation_internal = implementation
    found = leattn.forward(model, prompt, use_cache=False).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    assert model.config._attn_implementation == implementation
    with pytest.raises(BackendError, match=r"the masks of .* cannot be set"):
        leattn.model_inputs(model, prompt)


def test_an_attention_of_the_users_own(monkeypatch):
    """Registered with transformers, as its documentation says; ``auto`` leaves it: nobody knows what it does with masks."""
    from transformers import AttentionInterface

    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register("mine", lambda *args, **kwargs: 1 / 0)
    model, prompt = make_model("llama"), graph()
    expected = by_hand(model, prompt)
    model.config._attn_implementation_internal = "mine"
    found = leattn.forward(model, prompt, use_cache=False).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_weights_on_no_device_are_refused_everywhere():
    model, prompt = copy.deepcopy(make_model("llama")).to("meta"), graph()
    question = compile_prompt(prompt.graph["q"])
    assert not leattn.check_model(model).ok
    for call in (
        lambda: leattn.forward(model, prompt),
        lambda: leattn.forward(model, question, kv_store=KVStore()),
        lambda: leattn.generate(model, question, max_new_tokens=2),
        lambda: leattn.generate(model, question, max_new_tokens=2, kv_store=KVStore()),
        lambda: leattn.generate(model, leattn.GenNode([5, 6], max_new_tokens=2)),
        lambda: leattn.warm(model, question, kv_store=KVStore()),
        lambda: leattn.model_inputs(model, question),
        lambda: leattn.analysis.trace(model, question),
    ):
        with pytest.raises(BackendError):
            call()


def test_an_adapter_that_is_switched_off_and_another_one():
    model, prompt = lora(), graph()
    with_adapter = leattn.forward(model, prompt, use_cache=False).logits
    with model.disable_adapter():
        without = leattn.forward(model, prompt, use_cache=False).logits
        assert (without - by_hand(model, prompt)).abs().max() < 1e-4
    assert (with_adapter - without).abs().max() > 1e-2
    assert torch.equal(leattn.forward(model, prompt, use_cache=False).logits, with_adapter)


def test_additive_is_what_the_hand_writes():
    """The oracle's mask and the one we add are the same numbers, so the comparison above is about everything else."""
    prompt = graph()
    mask = torch.tensor(dense(prompt.graph.nodes, relation(prompt.graph.nodes)))
    assert torch.equal(
        additive(mask, torch.float32), torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    )
