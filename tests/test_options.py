"""Every option of ``generate`` means the same wherever it was set; what reaches the model never makes an entry of a store.

The prompt is a chain, which is plain text, so the oracle is transformers' own ``generate`` with the option in the call.
"""

from __future__ import annotations

import pytest
import torch
from models import make_model, shared_model
from test_programs import ids
from transformers import GenerationConfig, TextStreamer

import leattn
from leattn import BackendError, GenNode, ICLGraph, ICLNode, KVStore, LeattnError, compile_prompt, forward, generate

PLACES = ["call", "generation_config=", "model.generation_config"]
WAYS = ["one sink", "store", "program"]
TOKENS = ids(7, 3)
ALL = {"one sink", "store", "program"}
TABLE = [
    # option, value, what else is said in the call, which ways refuse it
    ("max_new_tokens", 3, {}, set()),
    ("max_length", 10, {}, set()),
    ("min_new_tokens", 6, {"eos_token_id": [31, 7, 42]}, set()),
    ("eos_token_id", "third", {}, set()),
    ("pad_token_id", 9, {}, set()),
    ("repetition_penalty", 1.7, {}, set()),
    ("no_repeat_ngram_size", 1, {}, set()),
    ("bad_words_ids", "third", {}, set()),
    ("suppress_tokens", "third", {}, set()),
    ("forced_eos_token_id", 5, {}, set()),
    ("exponential_decay_length_penalty", (2, 1.5), {"eos_token_id": 31}, set()),
    ("return_dict_in_generate", True, {}, set()),
    ("disable_compile", True, {}, set()),
    ("cache_implementation", "dynamic", {}, set()),
    ("cache_implementation", "static", {}, {"store"}),
    ("max_cache_len", 64, {}, set()),
    ("prefill_chunk_size", 3, {}, set()),
    ("use_cache", False, {}, {"store", "program"}),
    ("prompt_lookup_num_tokens", 2, {}, {"store", "program"}),
    ("num_beams", 3, {}, {"program"}),
    ("num_return_sequences", 2, {"num_beams": 2}, {"program"}),
    ("max_time", 60.0, {}, {"program"}),
    ("guidance_scale", 1.0, {}, set()),
    ("guidance_scale", 1.5, {}, ALL),
    ("token_healing", True, {}, ALL),
    ("output_scores", True, {"return_dict_in_generate": True}, ALL),
    ("output_logits", True, {"return_dict_in_generate": True}, ALL),
    ("output_attentions", True, {"return_dict_in_generate": True}, ALL),
    ("output_hidden_states", True, {"return_dict_in_generate": True}, ALL),
]


def plain(model, **options):
    """What transformers writes after the prompt, by itself."""
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    if "max_length" in options:
        del options["max_new_tokens"]
    out = model.generate(torch.tensor([TOKENS]), attention_mask=torch.ones(1, len(TOKENS)), **options)
    rows = out if isinstance(out, torch.Tensor) else out.sequences
    return rows[0, len(TOKENS) :].tolist()


def until_end(tokens, end):
    """Without an end and what follows."""
    ends = [] if end is None else [end] if isinstance(end, int) else end
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def written(model, way, **options):
    sink = ICLNode(TOKENS, id="Q")
    if way == "program":
        return generate(model, ICLGraph(sink, ICLNode(ids(3, 9), id="aside")), **options).branches["Q"][0].token_ids.tolist()
    store = {"kv_store": KVStore()} if way == "store" else {}
    return generate(model, sink, **store, **options).sequences[0].token_ids.tolist()


def third_token():
    return plain(shared_model("llama"))[2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("option", "value", "beside", "refused"),
    TABLE,
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:30],
)
def test_an_option_means_the_same_wherever_it_is_set(option, value, beside, refused, place, way):
    if value == "third":
        value = [[third_token()]] if option == "bad_words_ids" else [third_token()]
    model = make_model("llama")
    # Nothing else has a word on the length, and nothing is said twice.
    rest = {name: said for name, said in {"do_sample": False, "max_new_tokens": 8, **beside}.items() if name != option}
    if option == "max_length":
        del rest["max_new_tokens"]
    if place == "call":
        call = {option: value, **rest}
    elif place == "generation_config=":
        call = {"generation_config": GenerationConfig(**{option: value}, **rest)}
    else:
        model.generation_config.num_beams = rest.pop("num_beams", None)
        setattr(model.generation_config, option, value)
        call = rest
    if way in refused:
        with pytest.raises(BackendError, match="num_beams" if "num_beams" in beside else option) as caught:
            written(model, way, **call)
        assert ("generation_config)" in str(caught.value)) == (place != "call")
        return
    end = {option: value, **beside}.get("eos_token_id")
    expected = until_end(plain(shared_model("llama"), **{option: value, **rest, **beside}), end)
    assert written(model, way, **call) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_stop_strings_wherever_they_are_set(place, way):
    model, tokenizer = leattn.tiny.load()
    text = "\nThe capital of Zarvia is Lumo.\nQ: What is the capital of Zarvia?\nA:"
    free = generate(model, ICLNode(text), tokenizer, max_new_tokens=4).text
    stop = free[-1]
    assert free.index(stop) > 0
    options = {"stop_strings": [stop], "max_new_tokens": 4}
    if place == "generation_config=":
        options = {"generation_config": GenerationConfig(**options)}
    elif place == "model.generation_config":
        model.generation_config.stop_strings = options.pop("stop_strings")
    sink = ICLNode(text, id="Q")
    target = ICLGraph(sink, ICLNode("\nA:", id="aside")) if way == "program" else sink
    store = {"kv_store": KVStore()} if way == "store" else {}
    try:
        assert generate(model, target, tokenizer, **store, **options).texts["Q"] == free[: free.index(stop)]
    finally:
        model.generation_config.stop_strings = None


def test_none_in_the_call_takes_back_what_the_model_has():
    model = make_model("llama")
    model.generation_config.prompt_lookup_num_tokens = 2
    for way in ("store", "program"):
        with pytest.raises(BackendError, match=r"give prompt_lookup_num_tokens=None in the call"):
            written(model, way, max_new_tokens=3)
        assert written(model, way, max_new_tokens=3, prompt_lookup_num_tokens=None) == plain(
            model, max_new_tokens=3, prompt_lookup_num_tokens=None
        )


def test_the_call_comes_before_a_generation_config_and_that_before_the_model():
    model = make_model("llama")
    model.generation_config.max_new_tokens = 2
    config = GenerationConfig(max_new_tokens=3)
    for way in WAYS:
        assert len(written(model, way)) == 2
        assert len(written(model, way, generation_config=config)) == 3
        assert len(written(model, way, generation_config=config, max_new_tokens=4)) == 4


def test_options_in_the_config_of_the_model_are_refused_as_transformers_refuses_them():
    model = make_model("llama")
    model.config.temperature = 0.5
    for way in WAYS:
        with pytest.raises(LeattnError, match="pretrained model configuration"):
            written(model, way, max_new_tokens=2)


# What would reach the model.

FOR_THE_MODEL = {
    "adapter_names": ["other"],
    "pixel_values": torch.zeros(1, 3, 4, 4),
    "token_type_ids": torch.zeros(1, 7, dtype=torch.long),
    "cache_position": torch.arange(7),
    "output_router_logits": True,
    "temprature": 0.5,
    "per_layer_inputs": None,
}
OURS = {
    "position_ids": torch.arange(7)[None],
    "inputs_embeds": torch.zeros(1, 7, 48),
    "attention_mask": torch.ones(1, 7),
    "input_ids": torch.tensor([TOKENS]),
}


def targets():
    q, aside = ICLNode(TOKENS, id="Q"), ICLNode(ids(3, 9), id="aside")
    return {
        "one sink": q,
        "several sinks": ICLGraph(q, aside),
        "a batch": [compile_prompt(q), compile_prompt(aside)],
        "a program": GenNode(ids(3, 1), [q], max_new_tokens=2),
    }


@pytest.mark.parametrize("name", [*FOR_THE_MODEL, *OURS])
@pytest.mark.parametrize("target", targets())
def test_with_a_store_nothing_reaches_the_model_but_the_prompt(name, target):
    store = KVStore()
    with pytest.raises(LeattnError, match=name):
        generate(
            shared_model("llama"),
            targets()[target],
            kv_store=store,
            max_new_tokens=2,
            **{name: {**FOR_THE_MODEL, **OURS}[name]},
        )
    assert (len(store), store.stats.misses) == (0, 0)


@pytest.mark.parametrize("name", [*FOR_THE_MODEL, *OURS, "labels", "logits_to_keep", "return_dict", "past_key_values"])
def test_forward_with_a_store_takes_nothing_but_the_prompt(name):
    store = KVStore()
    with pytest.raises(LeattnError, match=f"{name} does not go together with kv_store"):
        forward(
            shared_model("llama"),
            compile_prompt(ICLNode(TOKENS)),
            kv_store=store,
            **{name: {**FOR_THE_MODEL, **OURS}.get(name)},
        )
    assert len(store) == 0


@pytest.mark.parametrize("name", FOR_THE_MODEL)
@pytest.mark.parametrize("target", ["several sinks", "a program"])
def test_programs_swallow_nothing(name, target):
    with pytest.raises(LeattnError, match=f"'{name}': no such option"):
        generate(shared_model("llama"), targets()[target], max_new_tokens=2, **{name: FOR_THE_MODEL[name]})


@pytest.mark.parametrize("name", FOR_THE_MODEL)
def test_patterns_swallow_nothing(name):
    draft = GenNode(ids(3, 1), max_new_tokens=2, temperature=2.0)
    with pytest.raises(LeattnError, match=name):
        leattn.patterns.best_of_n(shared_model("llama"), draft, n=2, kv_store=KVStore(), **{name: FOR_THE_MODEL[name]})
    with pytest.raises(LeattnError, match=name):
        leattn.patterns.paraphrase_ensemble(shared_model("llama"), ICLNode(TOKENS), **{name: FOR_THE_MODEL[name]})


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_what_the_config_of_a_model_asks_for_is_as_if_the_call_did(name):
    model, prompt = make_model("llama"), compile_prompt(ICLNode(TOKENS))
    setattr(model.config, name, True)
    with pytest.raises(LeattnError, match=f"{name} does not go together with kv_store"):
        forward(model, prompt, kv_store=KVStore())
    for way in WAYS:  # no option of generation: what is written is the same
        assert written(model, way, max_new_tokens=4) == plain(shared_model("llama"), max_new_tokens=4)


def test_harmless_arguments_pass_with_a_store(capsys):
    model, tokenizer = leattn.tiny.load()
    sink = ICLNode("The sky is", id="Q")
    cold = generate(model, sink, tokenizer, max_new_tokens=3, prefix_allowed_tokens_fn=lambda _b, _i: [5, 6])
    for target in (sink, ICLGraph(sink, ICLNode("It", id="aside"))):
        streamer = {"streamer": TextStreamer(tokenizer)} if target is sink else {}
        warm = generate(
            model,
            target,
            tokenizer,
            kv_store=KVStore(),
            max_new_tokens=3,
            prefix_allowed_tokens_fn=lambda _b, _i: [5, 6],
            logits_processor=[],
            stopping_criteria=[],
            **streamer,
        )
        assert warm.texts["Q"] == cold.text
    assert set(cold.token_ids.tolist()) <= {5, 6}


def test_a_model_without_a_head_has_no_generate():
    base = shared_model("llama").model
    for target in targets().values():
        with pytest.raises(BackendError, match="LlamaModel has no generate; load it with its language-model head"):
            generate(base, target, max_new_tokens=2)
