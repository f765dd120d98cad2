"""Caches of a fixed size and guessed tokens, on graphs. The oracle decodes without a cache, from masks written down by hand."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from models import BACKENDS, REFUSED, make_model, shared_model
from oracles import positions, relation, row_mask, row_positions
from test_generation import assert_equal_up_to_ties
from transformers import StaticCache

from leattn import GenNode, ICLNode, KVStore, LeattnError, attend, compile_prompt, generate

NEW = 4
FULL = ["llama", "qwen3", "gpt_neox", "gpt2", "phi3"]
WINDOWED = ["mistral", "gemma3_text"]
SERVED = [(f, b) for f in FULL + WINDOWED for b in [*BACKENDS, "auto"] if (f, b) not in REFUSED]
DROPS_KEYS = r"a StaticCache with sliding-window layers drops keys by index, but windows on a graph are measured in positions"


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"):
        yield


def fan(ids, cuts):
    """A root, documents that see it, the last one also the one before it, which the question at the end does not see."""
    root, *documents, question = (ids[first:last] for first, last in itertools.pairwise((0, *cuts, len(ids))))
    root = ICLNode(root, id="root")
    documents = [ICLNode(part, [root], id=f"doc{i}") for i, part in enumerate(documents[:-1])] + [documents[-1]]
    documents[-1] = ICLNode(documents[-1], [root, documents[-2]], id="last")
    return compile_prompt(ICLNode(question, [root, *documents[:-2], documents[-1]], id="Q"))


@functools.cache
def every_token():
    """A fan that holds each of the model's tokens, so that whatever is generated can be looked up in it."""
    return fan(torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist(), (9, 30, 60, 92))


@functools.cache
def small_fan(seed=0, documents=3):
    cuts = list(itertools.accumulate([2, *range(3, 3 + documents)]))
    return fan(torch.randint(2, 100, (cuts[-1] + 3,), generator=torch.Generator().manual_seed(seed)).tolist(), cuts)


def next_logits(model, prompt, new):
    """Logits ``[V]`` after some new tokens: one plain forward of an eager model, with mask and positions written by hand."""
    nodes, config = prompt.graph.nodes, model.config
    sees, size = relation(nodes), len(prompt)
    position = row_positions(positions(nodes, sees), size, len(new))
    types = set(getattr(config, "layer_types", None) or [])
    windows = {kind: config.sliding_window if kind == "sliding_attention" else None for kind in types}
    if len(types) < 2:
        windows = {"": getattr(config, "sliding_window", None)}
    masks = {}
    for kind, window in windows.items():
        allowed = torch.tensor(row_mask(nodes, sees, size, len(new), position, window))
        masks[kind] = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    ids = torch.tensor([[token for node in nodes for token in node.content] + list(new)])
    mask = masks[""] if list(masks) == [""] else masks
    with torch.no_grad():
        return model(ids, position_ids=torch.tensor([position]), attention_mask=mask, use_cache=False).logits[0, -1]


@functools.cache
def greedy(family, prompt, count=NEW):
    chosen, margins = [], []
    for _ in range(count):
        logits = next_logits(shared_model(family), prompt, tuple(chosen))
        best = logits.topk(2).values
        margins.append(float(best[0] - best[1]))
        chosen.append(int(logits.argmax()))
    return chosen, margins


def best_beam(model, prompt, beams, count):
    """The likeliest continuation that a beam of this width finds, and by how much it beats the next one."""
    found = [(0.0, ())]
    for _ in range(count):
        longer = []
        for score, new in found:
            step = next_logits(model, prompt, new).log_softmax(-1).topk(2 * beams)
            longer += [(score + float(s), (*new, int(t))) for s, t in zip(step.values, step.indices, strict=True)]
        found = sorted(longer, reverse=True)[:beams]
    return list(found[0][1]), found[0][0] - found[1][0]


class Watch:
    """What the backbone is called with while it runs: how many tokens at a time, and on which kind of cache."""

    def __init__(self, model):
        self.base, self.lengths, self.caches, self.layers = model.get_decoder(), [], set(), 0

    def __enter__(self):
        layers = next(child for child in self.base.children() if isinstance(child, torch.nn.ModuleList))
        self.handles = [
            self.base.register_forward_pre_hook(self.call, with_kwargs=True),
            layers[0].register_forward_pre_hook(self.layer),
        ]
        return self

    def call(self, _module, _args, kwargs):
        self.lengths.append(kwargs["input_ids"].shape[1])
        self.caches.add(type(kwargs.get("past_key_values")).__name__)

    def layer(self, *_):
        self.layers += 1

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def check(family, backend, prompt, *, count=NEW, **options):
    """Greedy tokens equal the oracle's; how the model was called. Uncompiled flex is slow, and writes fewer."""
    model, count = shared_model(family), min(count, 3) if backend == "flex" else count
    with Watch(model) as watch:
        result = generate(model, prompt, backend=backend, max_new_tokens=count, do_sample=False, **options)
    assert result.backend == ("sparse" if backend == "auto" else backend)
    assert len(result.token_ids) == count
    assert_equal_up_to_ties(result.token_ids.tolist(), *greedy(family, prompt, count))
    return watch


@pytest.mark.parametrize("given", ["by name", "as an object"])
@pytest.mark.parametrize(("family", "backend"), SERVED)
def test_a_static_cache_gives_the_tokens_of_full_forwards_or_is_refused_before_any_layer_runs(family, backend, given):
    model, prompt = shared_model(family), small_fan()
    generate(model, prompt, backend=backend, max_new_tokens=1)  # the probe has run
    cache = StaticCache(config=model.config, max_cache_len=40)
    options = {"cache_implementation": "static"} if given == "by name" else {"past_key_values": cache}
    if family in WINDOWED:
        with Watch(model) as watch, pytest.raises(LeattnError, match=DROPS_KEYS):
            generate(model, prompt, backend=backend, max_new_tokens=NEW, **options)
        assert watch.layers == 0
        return
    assert check(family, backend, prompt, **options).caches == {"StaticCache"}
    if given == "as an object" and backend != "flex":
        assert int(cache.get_seq_length()) == len(prompt) + NEW - 1
        cache.reset()  # and again, for another graph
        check(family, backend, small_fan(1, 2), past_key_values=cache)


@pytest.mark.parametrize(("family", "backend"), SERVED)
def test_tokens_looked_up_in_the_prompt_change_nothing(family, backend):
    watch = check(family, backend, every_token(), prompt_lookup_num_tokens=3)
    assert max(watch.lengths[1:]) > 1


@pytest.mark.parametrize(
    ("family", "backend", "assistant"),
    [(*pair, who) for pair in SERVED for who in ("the same", "another") if (who, pair[1]) != ("another", "flex")],
)
def test_an_assistant_changes_nothing(family, backend, assistant):
    other = shared_model(family) if assistant == "the same" else make_model(family, seed=3, num_hidden_layers=3)
    watch = check(family, backend, small_fan(), assistant_model=other)
    assert max(watch.lengths[1:]) > 1


@pytest.mark.parametrize("backend", ["sdpa", "sparse"])
def test_an_assistant_that_guesses_right_saves_forwards(backend):
    """The other model has the same weights, and text in which everyone sees everything: all of its guesses are right."""
    root = ICLNode([5, 6, 7], id="root")
    prompt = compile_prompt(ICLNode([10, 11], [root, ICLNode([8, 9], [root])], id="Q"))
    watch = check("llama", backend, prompt, count=8, assistant_model=make_model("llama"))
    assert len(watch.lengths) < 8


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sparse", "auto"])
@pytest.mark.parametrize("family", FULL)
def test_a_static_cache_holds_a_padded_batch_of_graphs(family, backend):
    model, prompts = shared_model(family), [small_fan(1, 2), small_fan(2, 4)]
    with Watch(model) as watch:
        results = generate(model, prompts, backend=backend, max_new_tokens=NEW, cache_implementation="static")
    assert watch.caches == {"StaticCache"}
    for prompt, result in zip(prompts, results, strict=True):
        assert_equal_up_to_ties(result.token_ids.tolist(), *greedy(family, prompt))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sparse", "auto"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_static_cache_holds_beams(family, backend):
    model, prompt = shared_model(family), small_fan()
    expected, margin = best_beam(model, prompt, 3, NEW)
    assert margin > 1e-3
    with Watch(model) as watch:
        result = generate(model, prompt, backend=backend, max_new_tokens=NEW, num_beams=3, cache_implementation="static")
    assert watch.caches == {"StaticCache"}
    assert result.token_ids.tolist() == expected


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sparse", "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_models_own_generate_takes_a_static_cache_inside_the_block(family, backend):
    model, prompt = shared_model(family), small_fan()
    with attend(model, prompt, backend=backend) as attention:
        ids = model.generate(**attention.inputs, max_new_tokens=NEW, cache_implementation="static")
    assert_equal_up_to_ties(ids[0, len(prompt) :].tolist(), *greedy(family, prompt))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex", "sparse", "auto"])
def test_a_static_cache_that_the_checkpoint_asks_for(backend):
    """In the generation_config, as a checkpoint's own file may say."""
    model, prompt = make_model("llama"), small_fan()
    generate(model, prompt, backend=backend, max_new_tokens=1)
    model.generation_config.cache_implementation = "static"
    with Watch(model) as watch:
        result = generate(model, prompt, backend=backend, max_new_tokens=NEW)
    assert watch.caches == {"StaticCache"}
    assert_equal_up_to_ties(result.token_ids.tolist(), *greedy("llama", prompt))
    with Watch(model) as watch, pytest.raises(LeattnError, match=r"cache_implementation and kv_store .* generation_config\)"):
        generate(model, prompt, backend=backend, kv_store=KVStore(), max_new_tokens=NEW)
    assert watch.layers == 0
    with pytest.raises(LeattnError, match="cache_implementation and kv_store are two ways"):
        generate(shared_model("llama"), prompt, backend=backend, kv_store=KVStore(), cache_implementation="static")


@pytest.mark.parametrize("stored", [False, True])
def test_programs_have_a_cache_of_their_own_whatever_the_checkpoint_asks_for(stored):
    model, prompt = make_model("llama"), small_fan()
    model.generation_config.cache_implementation = "static"
    question = prompt.graph["Q"]
    answer = GenNode(question.content, question.parents, "answer", max_new_tokens=NEW)
    options = {"kv_store": KVStore()} if stored else {}
    for _ in range(2):
        written = generate(model, answer, **options)
        assert_equal_up_to_ties(written.token_ids.tolist(), *greedy("llama", prompt))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_model"])
def test_guessed_tokens_are_refused_with_a_store(family, option):
    model, prompt, store = shared_model(family), small_fan(), KVStore()
    generate(model, prompt, kv_store=store, max_new_tokens=1)
    options = {option: 3 if option == "prompt_lookup_num_tokens" else model}
    with Watch(model) as watch, pytest.raises(LeattnError, match=f"{option}: .* kv_store fills it before; give one of them"):
        generate(model, prompt, kv_store=store, max_new_tokens=NEW, **options)
    assert watch.layers == 0


def test_guessed_tokens_that_the_checkpoint_asks_for_are_refused_with_a_store():
    model, prompt, store = make_model("llama"), small_fan(), KVStore()
    generate(model, prompt, kv_store=store, max_new_tokens=1)
    model.generation_config.prompt_lookup_num_tokens = 3
    with Watch(model) as watch, pytest.raises(LeattnError, match=r"prompt_lookup_num_tokens: .* kv_store fills it"):
        generate(model, prompt, kv_store=store, max_new_tokens=NEW)
    assert watch.layers == 0
