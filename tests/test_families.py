"""A sample of ``python -m families``, drawn across kinds: nothing wrong, nothing crashes, and served what is to be served."""

from __future__ import annotations

import json

import pytest
import torch

from families.catalogue import families
from families.oracle import mask_of, positions_of, split
from families.outcome import Mismatch, judged, worst
from families.prompts import Chunk, alone, ancestors, everyone, fan, is_plain
from families.scan import COLUMNS, check
from families.softmax import masked_softmax
from families.table import page
from leattn import LeattnError

# Per column (eager, sdpa, flex, sparse, generate, reuse, shift, readings): e exact, r refused, - not looked at here.
# Everything is looked at for a few of each kind; flex, sdpa and shift are left out of the rest, which cost the time.
EXPECTED = {
    # plain
    "llama": "eeeeeeee",
    "llama (yarn RoPE)": "e--ee-e-",
    "llama (dynamic RoPE)": "e--eeer-",
    "cohere": "e--eee--",
    "gpt_neox": "e--eeee-",
    "phi": "e--ee---",
    "stablelm": "e-reee--",
    "smollm3": "e--ee-e-",
    # windows
    "mistral": "eeeeeee-",
    "gemma2": "ereree-e",
    "gemma3_text": "e--eeeee",
    "gemma4_text (shared keys)": "ee-ree--",
    "gemma3n_text (shared keys)": "e--eee--",
    "cohere2": "e--ee-e-",
    "qwen2 (window)": "e--ee---",
    "phi3 (longrope)": "e--eee--",
    # experts
    "mixtral": "e--eee-e",
    "qwen3_moe": "e--ee---",
    "granitemoehybrid (attention only)": "e--ee---",
    # latent attention, indexers
    "deepseek_v2": "ee-ee---",
    "deepseek_v3": "e--ee-ee",
    "deepseek_v32": "eerrerr-",
    "dots3_note_text": "e-rrerr-",
    # sinks, soft-caps, two attentions a layer, cycles
    "gpt_oss": "errreeee",
    "diffllama": "e--eee-e",
    "hrm_text": "e--ee---",
    "doge (a mask that binds)": "e-rre---",
    # learned positions, ALiBi, positions by index
    "gpt2": "eereeere",
    "opt": "e--eee--",
    "biogpt": "e--ee---",
    "whisper": "e--eee--",
    "bart": "rrrrrrr-",
    "bloom": "rrrrrrrr",
    "falcon (ALiBi)": "rrrrrrr-",
    "gpt_neo": "rrrrrrr-",
    "xlnet": "rrrrrrr-",
    # an implementation fixed when the model is loaded
    "falcon": "eerreeer",
    "gptj": "errreee-",
    "xglm": "errree--",
    # encoders as decoders, and as encoders
    "bert": "ee-ee---",
    "roberta": "e--eee--",
    "bert (an encoder)": "rrrrrrr-",
    "gemma3_text (bidirectional)": "rrrrrrr-",
    # states past attention
    "jamba": "rrrrrrr-",
    "qwen3_next": "rrrrrrr-",
    "mamba": "rrrrrrr-",
    # chunks, thresholds
    "llama4_text": "rrrrrrr-",
    "llama4_text (no chunks, scaled early)": "rrrrrrr-",
    "ministral3 (queries scaled early)": "e--ee---",
    # pictures and sound
    "llava": "e--eee--",
    "qwen2_vl": "e--ee---",
    "gemma3": "e--ee---",
    "mllama": "e--ee---",
    "paligemma": "errrrrr-",
    "musicgen": "rrrrrrr-",
}
MEANING = {"e": "exact", "r": "refused"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_is_exact_or_refused_as_expected(name):
    letters = dict(zip(COLUMNS, EXPECTED[name], strict=True))
    found = check(families()[name], [column for column in COLUMNS if letters[column] != "-"])
    assert "unbuilt" not in found, found.get("unbuilt")
    wrong = {
        column: [each for each in one["checks"] if each["status"] not in (MEANING[letters[column]], "unchecked")]
        for column, one in found["columns"].items()
        if one["status"] != MEANING[letters[column]]
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_every_type_is_in_the_table():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(families())


def test_the_mask_by_hand():
    graph = (Chunk("a", (5, 6)), Chunk("b", (7,), ("a",)), Chunk("c", (8, 9), ("b",)))
    assert [[int(x) for x in row] for row in mask_of(graph)] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert positions_of(graph) == [0, 1, 2, 3, 4]
    assert positions_of(alone(fan(2, 3, 4, 1, 1, 1), "b")) == [0, 1, 2, 3, 4, 5]
    assert ancestors(fan(), "tail") == {"question", "root", "a", "b"}
    assert [chunk.name for chunk in fan() if is_plain(fan(), chunk.name)] == ["root", "a", "b", "c"]
    assert all(is_plain(everyone((2, 3, 4)), f"part {i}") for i in range(3))
    assert [len(part) for part in split(graph, torch.zeros(5, 2)).values()] == [2, 1, 2]


def test_a_softmax_is_masked_inside_the_block_alone():
    allowed = torch.ones(3, 3).tril().bool()
    scores = torch.zeros(1, 2, 3, 4)  # the last column is a sink
    with masked_softmax([allowed]):
        inside = torch.softmax(scores, -1)
        experts = torch.zeros(5, 3).softmax(-1)
    assert inside[0, 0].tolist() == [[0.5, 0, 0, 0.5], pytest.approx([1 / 3, 1 / 3, 0, 1 / 3]), [0.25] * 4]
    assert experts.tolist() == [pytest.approx([1 / 3] * 3)] * 5
    assert torch.softmax(scores, -1).eq(0.25).all()


def test_what_a_check_can_find():
    def refuse():
        raise LeattnError("no")

    def mismatch():
        raise Mismatch("other tokens")

    def crash():
        raise KeyError("x")

    outcomes = [
        judged("a", 1e-4, lambda: 1e-6),
        judged("b", 1e-4, lambda: 0.1),
        judged("c", 1e-4, lambda: float("nan")),
        judged("d", 1e-4, lambda: None),
    ]
    outcomes += [judged("e", 1e-4, refuse), judged("f", 1e-4, mismatch), judged("g", 1e-4, crash)]
    assert [each.status for each in outcomes] == ["exact", "WRONG", "WRONG", "unchecked", "refused", "WRONG", "CRASH"]
    assert "KeyError" in outcomes[-1].text
    assert [worst(outcomes), worst(outcomes[4:5]), worst([outcomes[0], outcomes[4]])] == ["WRONG", "refused", "exact"]


def test_the_page_says_what_was_found():
    exact = {"status": "exact", "checks": [{"check": "a chain", "status": "exact", "error": 3e-7}]}
    text = "backend 'flex' cannot run this model: transformers does not run gpt2 through flex_attention; use backend='eager'"
    refused = {"status": "refused", "checks": [{"check": "a chain", "status": "refused", "text": text}]}
    crash = {"status": "CRASH", "checks": [{"check": "a chain", "status": "CRASH", "text": "KeyError: x"}] * 2}
    state = {"leattn": "1", "transformers": "2", "torch": "3", "sources": "4"}
    columns = dict.fromkeys(COLUMNS, exact)
    one = {"family": "gpt2", "names": ["gpt2"], "oracle": "one 4-D mask", "state": state, "loaded": None}
    other = {"family": "odd", "unbuilt": "it reads no text", "state": state, "loaded": None}
    written = page([{**one, "columns": {**columns, "flex": refused, "shift": crash}}, other])
    assert "| gpt2 | 3e-07 | 3e-07 | refused [1] | 3e-07 | 3e-07 | 3e-07 | **CRASH** | 3e-07 | mask |" in written
    assert "1. transformers does not run this model through flex_attention; use backend='eager' *(gpt2)*" in written
    assert "- gpt2: CRASH, KeyError: x: shift (a chain), shift (a chain)" in written
    assert "- odd: it reads no text" in written
    assert "transformers 2" in written
