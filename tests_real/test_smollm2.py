"""What only a model of the real kind shows, on SmolLM2-135M-Instruct as `leattn.load` brings it: ``make test-real``.

Oracles are the model's own forward and generate, a mask written down by loops over tokens (that of ``tests/``), and attention
done by hand.
"""

from __future__ import annotations

import pytest
import torch
from oracles import dense, positions, relation, tokens_of
from test_notebooks import NEEDS_SMOLLM2, NOTEBOOKS, SMALLER, complaints, execute
from transformers.models.llama import modeling_llama

import leattn
from leattn import GenNode, ICLNode, KVStore, cli, compile_prompt

DOCUMENTS = [
    "The capital of Zarvia is Moville.",
    "The capital of Genia is Lumo.",
    "The ferry to Brannoch leaves at seven in the morning.",
]


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    """Compiling needs a C++ compiler, which a machine may not have."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loaded():
    return leattn.load("smollm2")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def graph(tokenizer):
    """Token ids: a root, documents side by side, a question."""
    root = ICLNode([tokenizer.bos_token_id], id="root")
    documents = [ICLNode(ids(tokenizer, "\n" + text), [root], id=f"document {i}") for i, text in enumerate(DOCUMENTS)]
    ask = "\nQuestion: When does the ferry to Brannoch leave?\nAnswer: The ferry leaves at"
    return ICLNode(ids(tokenizer, ask), [root, *documents], id="Q")


def by_hand(model, nodes):
    """The model's own forward, under a mask and positions from loops over tokens."""
    sees = relation(nodes)
    mask = torch.tensor(dense(nodes, sees))[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    tokens = torch.tensor([[token for node in nodes for token in node.content]])
    return model(tokens, position_ids=torch.tensor([positions(nodes, sees)]), attention_mask=additive).logits


def test_every_line_of_the_report_is_yes(model):
    report = leattn.check_model(model)
    assert report.ok
    assert str(report).count(" yes") == len(str(report).splitlines()) - 1, report


def test_a_chat_with_documents_is_answered_from_them(model, tokenizer):
    """A fact and an unrelated document. Two capitals side by side are too much for this model; it mixes them up."""
    messages = [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "What is the capital of Zarvia?"},
    ]
    for first, named in (("The capital of Zarvia is Lumo.", True), (DOCUMENTS[1], False)):
        chat = leattn.from_chat(tokenizer, messages, documents=[first, DOCUMENTS[2]], document_separator="\n")
        assert ("capital of Zarvia is Lumo" in leattn.generate(model, chat, tokenizer, max_new_tokens=12).text) == named


def test_a_chat_without_documents_is_the_plain_prompt(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**plain, max_new_tokens=8, do_sample=False)[0, plain["input_ids"].shape[1] :].tolist()
    if expected[-1] == tokenizer.eos_token_id:  # left out of what `generate` returns
        expected.pop()
    found = leattn.generate(model, leattn.from_chat(tokenizer, messages), tokenizer, max_new_tokens=8)
    assert found.token_ids.tolist() == expected
    assert "Paris" in found.text


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex", "sparse", "auto"])
def test_a_graph_gives_what_the_mask_by_hand_gives(model, graph, backend):
    prompt = compile_prompt(graph)
    expected = by_hand(model, prompt.graph.nodes)
    found = leattn.forward(model, prompt, backend=backend, use_cache=False).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4


def read_by_hand(graph, temperature, scale):
    """Attention on eager's interface, whole rows at a time: the question reads its documents as docs/readings.md says."""
    nodes = [*graph.parents, graph]
    seen = torch.tensor(dense(nodes, relation(nodes)))
    owners = [node for node, _ in tokens_of(nodes)]
    reads = torch.tensor([node is graph for node in owners])[:, None]
    group = torch.tensor([node in graph.parents[1:] for node in owners])[None]

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
        inside = (scores / temperature).masked_fill(~group, -torch.inf)
        total = inside.logsumexp(-1, keepdim=True)  # L
        logs = torch.where(reads & group, scale * temperature * total + inside - total, scores)
        return (logs.softmax(-1) @ value).transpose(1, 2), None

    return attention


def test_a_reading_gives_what_attention_by_hand_gives(model, graph, monkeypatch):
    root, *documents = graph.parents
    plain = leattn.forward(model, compile_prompt(graph), use_cache=False).logits
    read = ICLNode(graph.content, [root, *leattn.read(documents, temperature=0.7, scale=0.9)], id="Q")
    found = leattn.forward(model, compile_prompt(read), use_cache=False).logits
    eager, _ = leattn.load("smollm2", attn_implementation="eager")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", read_by_hand(graph, 0.7, 0.9))
    expected = by_hand(eager, [*graph.parents, graph])
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4
    assert (plain - expected).abs().max() / expected.abs().max() > 1e-2


def test_what_ape_writes_is_what_attention_by_hand_goes_on_with(graph, tokenizer, monkeypatch):
    """With the published defaults; what is generated reads the documents as the question does."""
    root, *documents = graph.parents
    eager, _ = leattn.load("smollm2", attn_implementation="eager")
    prompt = leattn.methods.ape(root.content, [document.content for document in documents], graph.content, tokenizer)
    new = leattn.generate(eager, prompt, max_new_tokens=5).token_ids.tolist()
    grown = ICLNode([*graph.content, *new], graph.parents, id="Q")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", read_by_hand(grown, 0.9, 0.9))
    expected = by_hand(eager, [*grown.parents, grown])[0]
    assert expected[-6:-1].argmax(-1).tolist() == new
    scores = leattn.score(eager, prompt, [new]).token_logprobs[0]
    assert (scores - expected[-6:-1].double().log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]).abs().max() < 1e-4


def test_scores_are_those_of_the_plain_model(model, tokenizer, graph):
    texts = [" seven", " noon.", " seven in the morning"]
    found = leattn.score(model, graph, texts, tokenizer)
    for text, scores in zip(texts, found.token_logprobs, strict=True):
        more = ids(tokenizer, text)
        grown = ICLNode([*graph.content, *more], graph.parents, id="Q")
        rows = by_hand(model, [*graph.parents, grown])[0, -len(more) - 1 : -1].double().log_softmax(-1)
        assert (scores - rows.gather(1, torch.tensor(more)[:, None])[:, 0]).abs().max() < 1e-4
    assert found.best() in (0, 2)


def test_what_is_reused_is_what_is_computed(model, graph):
    store = KVStore()
    root, *documents = graph.parents
    leattn.generate(model, compile_prompt(graph), kv_store=store, max_new_tokens=4)
    other = compile_prompt(ICLNode(graph.content, [root, *reversed(documents[1:])], id="Q"))
    warm = leattn.generate(model, other, kv_store=store, max_new_tokens=6)
    assert warm.stats.reused == sum(len(node.content) for node in (root, *documents[1:]))
    assert warm.token_ids.tolist() == leattn.generate(model, other, max_new_tokens=6).token_ids.tolist()
    last = leattn.forward(model, other, kv_store=store).logits[0, -1]
    expected = by_hand(model, other.graph.nodes)[0, -1]
    assert (last - expected).abs().max() / expected.abs().max() < 1e-4


def test_a_program_writes_what_plain_text_goes_on_with(model, tokenizer, graph):
    """A branch sees root, one document and its own header, in this order: plain text."""
    root, *documents = graph.parents
    header = ids(tokenizer, "\nIn short, the text above says that")
    readers = [GenNode(header, [root, document], id=f"reader {i}", max_new_tokens=6) for i, document in enumerate(documents)]
    judge = GenNode(ids(tokenizer, "\nAll in all,"), [root, *readers], id="judge", max_new_tokens=4)
    written = leattn.generate(model, judge, tokenizer)
    for reader, document in zip(readers, documents, strict=True):
        text = torch.tensor([[*root.content, *document.content, *header]])
        expected = model.generate(text, max_new_tokens=6, do_sample=False)[0, text.shape[1] :].tolist()
        assert written.token_ids[reader.id].tolist() == expected
    nodes = compile_prompt(written.realised).graph.nodes
    says = by_hand(model, nodes)[0].argmax(-1).tolist()
    new = written.token_ids["judge"].tolist()
    assert len(new) == 4
    assert says[-5:-1] == new


def test_the_demo_follows_the_edge(loaded, tmp_path, capsys):
    cli.demo(out=tmp_path, model="smollm2")
    answers = [line.split() for line in capsys.readouterr().out.splitlines() if "right answer:" in line]
    assert [(words[words.index("answer:") + 1], words[-1]) for words in answers] == [("Moville",) * 2, ("Pardan",) * 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "dag.png", "mask.png"]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem in NEEDS_SMOLLM2], ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(loaded, path, tmp_path):
    executed = execute(path, tmp_path, SMALLER.get(path.stem))
    assert complaints(executed) == []
    assert list(tmp_path.iterdir()) == []
