"""The collator: loss and gradients against every labelled node run alone on its own sub-graph, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from random import Random

import oracles
import pytest
import torch
from models import WINDOW, WINDOWED, make_model, shared_model
from test_training import assert_same, gradients

import leattn
from leattn import BackendError, ICLNode, LeattnError, compile_prompt, training
from leattn.training import Collator, Example

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2"]
SERVED = [(f, b) for f in FAMILIES for b in ("eager", "sdpa") if (f, b) != ("gemma2", "sdpa")]


def ids(rng, n):
    return [rng.randrange(2, 100) for _ in range(n)]


def question_with_answers(seed, answers):
    """Documents that see some of each other, a question, and answers of one or more tokens that continue it, side by side."""
    rng = Random(seed)
    docs = []
    for _ in range(rng.randint(1, 4)):
        docs.append(ICLNode(ids(rng, rng.randint(1, 6)), [d for d in docs if rng.random() < 0.5]))
    sees = [d for d in docs if rng.random() < 0.8] or docs[-1:]
    question = ICLNode(ids(rng, rng.randint(1, 4)), sees, id="Q")
    labelled = [ICLNode(ids(rng, length), [*sees, question], id=f"A{i}") for i, length in enumerate(answers)]
    return docs, question, labelled


def example(seed, answers):
    docs, _, labelled = question_with_answers(seed, answers)
    return Example([*docs, *labelled], labels=[node.id for node in labelled])


def run_alone(model, node):
    """Logits of everything below ``node``, run by hand: loops over tokens and sets of nodes, eager, no padding."""
    nodes = leattn.ICLGraph(node).nodes
    sees = oracles.relation(nodes)
    position = oracles.positions(nodes, sees)
    total = len(position)

    def additive(window):
        mask = torch.tensor(oracles.row_mask(nodes, sees, total, 0, position, window))
        return torch.zeros(1, 1, total, total).masked_fill(~mask, torch.finfo(torch.float32).min)

    kinds = sorted(set(getattr(model.config, "layer_types", None) or ["full_attention"]))
    masks = {kind: additive(WINDOW if kind == "sliding_attention" else None) for kind in kinds}
    if model.config.model_type == "mistral":
        masks = {"": additive(WINDOW)}
    tokens = torch.tensor([[token for one in nodes for token in one.content]])
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    logits = model(tokens, position_ids=torch.tensor([position]), attention_mask=mask, use_cache=False).logits[0]
    start = {one: sum(len(other.content) for other in nodes[:i]) for i, one in enumerate(nodes)}
    return logits, start


def oracle_losses(model, labelled, question):
    """Cross-entropy of each token of each labelled node, the first predicted by the question's last."""
    losses = []
    for node in labelled:
        logits, start = run_alone(model, node)
        before = [start[question] + len(question.content) - 1, *range(start[node], start[node] + len(node.content) - 1)]
        for row, token in zip(before, node.content, strict=True):
            losses.append(-logits[row].float().log_softmax(-1)[token])
    return losses


def reference(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.config.attention_dropout = 0.0
    return model.train()


def loss_of(model, batch):
    labels = batch["labels"]
    return training.loss(model(**{name: given for name, given in batch.items() if name != "labels"}, use_cache=False), labels)


# --- against the oracle


@pytest.mark.parametrize(("family", "backend"), SERVED)
def test_loss_and_gradients_equal_those_of_each_labelled_node_run_alone(family, backend):
    """A padded batch of different graphs, some with several answers that start from the same token."""
    model = make_model(family, backend)
    parts = [question_with_answers(seed, answers) for seed, answers in enumerate([(3,), (1, 2, 4), (2, 2)])]
    examples = [Example([*docs, *labelled], labels=labelled) for docs, _, labelled in parts]
    batch = Collator(model)(examples)
    assert batch["labels"].shape[1] == 3 * batch["input_ids"].shape[1]

    plain = reference(model)
    losses = [one for _, question, labelled in parts for one in oracle_losses(plain, labelled, question)]
    expected = torch.stack(losses).mean()
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert_same(gradients(model, loss), gradients(plain, expected), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_loss_of_transformers_itself_where_no_token_has_two_successors(family):
    model = shared_model(family, "sdpa")
    batch = Collator(model)([example(0, (3,)), example(1, (2,))])
    assert batch["labels"].shape == batch["input_ids"].shape
    torch.testing.assert_close(model(**batch, use_cache=False).loss, loss_of(model, batch))


def test_the_loss_of_transformers_refuses_branches():
    model = shared_model("llama", "sdpa")
    batch = Collator(model)([example(0, (3, 1))])
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch)


def test_only_the_last_tokens_and_other_predecessors():
    model = shared_model("llama", "sdpa")
    doc, other = ICLNode([5, 6, 7], id="doc"), ICLNode([8, 9], id="other")
    both = ICLNode([10, 11, 12], [doc, other], id="both")
    prompt = compile_prompt(both)
    assert Example(prompt, {"both": 2}).targets(prompt) == [(5, 11), (6, 12)]
    assert Example(prompt, "both", predicted_from={"both": "doc"}).targets(prompt) == [(2, 10), (5, 11), (6, 12)]
    assert Example(prompt, "both", predicted_from={"both": None}).targets(prompt) == [(5, 11), (6, 12)]
    assert Example(prompt, ["doc", {"other": other}["other"]]).targets(prompt) == [(0, 6), (1, 7), (3, 9)]
    logits = model(**leattn.model_inputs(model, prompt)).logits[0]
    batch = Collator(model)([Example(prompt, "both", predicted_from={"both": "doc"})])
    expected = torch.nn.functional.cross_entropy(logits[[2, 5, 6]], torch.tensor([10, 11, 12]))
    torch.testing.assert_close(loss_of(model, batch), expected)


def test_what_continues_a_prompt_is_predicted_as_generation_does():
    question = question_with_answers(3, ())[1]
    prompt = compile_prompt([question]).continued([50, 51], id="answer")
    last = prompt.spans[question][1] - 1
    assert Example(prompt, "answer").targets(prompt) == [(last, 50), (last + 1, 51)]
    cut = compile_prompt([question]).without_edge("Q", question.parents[0]).continued([50], id="answer")
    assert Example(cut, "answer").targets(cut) == [(last, 50)]


def test_padding_and_what_is_not_labelled_get_no_loss():
    model = make_model("llama", "sdpa")
    hidden = ICLNode([90, 91], id="hidden")
    question = ICLNode([5, 6], id="Q")
    answer = ICLNode([7], [question], id="A")
    batch = Collator(model)([Example([hidden, answer], "A"), example(2, (4,))])
    # The embedding of a token that only an unseen node has gets no gradient, padding's id 0 gets none either.
    untied = model.get_input_embeddings().weight
    loss_of(model, batch).backward()
    assert not untied.grad[[90, 91, 0]].any()
    assert untied.grad[5].any()


# --- inside of a step


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(family, backend, reentrant):
    model = without_dropout(make_model(family, backend))
    batch = Collator(model)([example(0, (2, 3)), example(1, (4,))])
    expected = gradients(model, loss_of(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(gradients(model, loss_of(model, batch)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_autocast(backend):
    model = make_model("llama", backend)
    batch = Collator(model)([example(0, (2, 3)), example(1, (4,))])
    exact = loss_of(model, batch)
    expected = gradients(model, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.02 * exact
    for name, given in gradients(model, loss).items():
        assert torch.nn.functional.cosine_similarity(given.flatten(), expected[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("family", ["llama", *WINDOWED])
def test_flex_masks(family):
    """Forward only: transformers' flex_attention has no backward on a CPU."""
    model = make_model(family, "eager")
    examples = [example(0, (2, 3)), example(1, (4,))]
    expected = loss_of(model, Collator(model)(examples))
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.testing.assert_close(loss_of(model, Collator(model)(examples)), expected, rtol=1e-4, atol=1e-5)


# --- predictions


def test_predictions_stand_where_the_labels_do():
    model = shared_model("llama", "sdpa")
    docs, question, labelled = question_with_answers(0, (2, 3))
    batch = Collator(model)([Example([*docs, *labelled], labels=labelled), example(1, (1,))])
    labels = batch.pop("labels")
    said = training.predictions(model(**batch).logits, labels)
    assert torch.equal(said == -100, labels == -100)
    found = training.targets(labels, batch["input_ids"].shape[1])
    expected = model(**batch).logits[found.row, found.column].argmax(-1)
    assert torch.equal(said[labels != -100], expected)
    logits, start = run_alone(reference(model), labelled[1])
    by_hand = logits[start[question] + len(question.content) - 1].argmax()
    second = labels[0].view(2, -1)[1]
    assert said[0].view(2, -1)[1][second != -100][0] == by_hand


# --- what is refused, and how


def graph():
    doc, other = ICLNode([5, 6], id="doc"), ICLNode([7, 8], id="other")
    question = ICLNode([9], [doc, other], id="Q")
    return doc, other, question


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d, o, q: Example(ICLNode([1, 2], [q], id="A"), "A"),
            r"no token predicts the first of 'A': .* last it sees is 'Q', but 'Q' sees 'doc' and 'A' does not; let 'A' see 'Q'",
        ),
        (
            lambda d, o, q: Example(ICLNode([1, 2], [d, o], id="A"), "A"),
            r"last it sees is 'other', but 'A' sees 'doc' and 'other' does not; .* predicted_from=\{'A': …\}",
        ),
        (
            lambda d, o, q: Example([ICLNode([1], [d, o, q], id=i) for i in "AB"], "B", positions="sequential"),
            r"'B' starts at position 6, but what continues 'Q' is generated from 5 on; .*start_pos_id=5",
        ),
        (lambda d, o, q: Example(q, "A"), r"no node is called 'A'"),
        (lambda d, o, q: Example(q, ["doc", d]), r"'doc' is labelled twice"),
        (lambda d, o, q: Example(q, {"doc": 3}), r"last 3 tokens of 'doc' are labelled, but it has 2; give a number from 1"),
        (lambda d, o, q: Example(q, []), r"nothing to learn: no node labelled"),
        (lambda d, o, q: Example(ICLNode([3], id="root"), "root"), r"nothing to learn: 'root' labelled, and no other token"),
        (lambda d, o, q: Example(q, "doc", predicted_from={"other": "doc"}), r"predicted_from names 'other', .* not labelled"),
        (
            lambda d, o, q: Example(q, "Q", predicted_from={"Q": q}),
            r"says 'Q' for 'Q', .* not see it; name one of 'doc'",
        ),
        (
            lambda d, o, q: Example(compile_prompt(q), "doc", positions="restart"),
            r"compiled already; give them to",
        ),
        (lambda d, o, q: {"input_ids": [1]}, r"not dict; make one of each row .*remove_unused_columns=False"),
    ],
)
def test_errors_state_the_fix(make, message):
    with pytest.raises(LeattnError, match=message):
        Collator(shared_model("llama"))([make(*graph())])


def test_an_empty_batch_and_labels_of_another_batch():
    with pytest.raises(LeattnError, match="no example in this batch"):
        Collator(shared_model("llama"))([])
    with pytest.raises(LeattnError, match="labels have 5 columns and the logits 4"):
        training.loss({"logits": torch.zeros(1, 4, 9)}, torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(LeattnError, match=r"no labels; use leattn\.training\.Collator"):
        training.loss({"logits": torch.zeros(1, 4, 9)}, None)
    with pytest.raises(LeattnError, match=r"where logits \[B, S, V\] belong"):
        training.predictions(torch.zeros(3), torch.zeros(1, 3, dtype=torch.long))


IDS = torch.tensor([[-100, -100, 7, 8], [-100, 3, -100, 2]])


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (
            torch.zeros(2, 8, 9),
            IDS,
            "labels have 4 columns and the logits 8, which are one prediction per token; take both",
        ),
        (torch.zeros(2, 3, 9), IDS, "labels have 4 columns and the logits 3"),
        (torch.zeros(2, 2, 9), IDS, r"labels of shape \[2, 4\] are not those of logits with 2 columns"),
        (torch.zeros(2, 1, 9), IDS, r"labels of shape \[2, 4\] are not those of logits with 1 columns"),
        (torch.zeros(2, 4, 9), IDS.clamp(min=0), r"have targets where the collator puts none, such as the first column"),
        (torch.zeros(4, 4, 9), IDS, "labels of 2 rows and logits of 4"),
        (
            torch.zeros(2, 4, 2, 9),
            IDS,
            r"logits of shape \[2, 4, 2, 9\] where logits \[B, S, V\] belong, one prediction per token",
        ),
        (torch.zeros(2, 2, 4, 9), IDS, r"logits of shape \[2, 2, 4, 9\] where logits"),
        ((torch.zeros(2, 4, 9),) * 2, IDS, r"several logits of shape \[2, 4, 9\] where logits"),
        (torch.zeros(2, 9), IDS, r"logits of shape \[2, 9\] where logits"),
    ],
)
def test_logits_of_other_than_one_prediction_per_token(logits, labels, words):
    for call in (lambda: training.loss({"logits": logits}, labels), lambda: training.predictions(logits, labels)):
        with pytest.raises(
            LeattnError, match=words if isinstance(logits, torch.Tensor) else r"where logits \[B, S, V\] belong"
        ):
            call()
    with pytest.raises(LeattnError, match=words):
        training.loss(logits if isinstance(logits, tuple) else (logits, None), labels)


def test_the_implementation_must_stay_what_it_was():
    model = make_model("llama", "sdpa")
    collate = Collator(model)
    model.set_attn_implementation("eager")
    for use in (lambda: collate([example(0, (1,))]), lambda: pickle.dumps(collate)):
        with pytest.raises(BackendError, match="made for 'sdpa' and the model runs 'eager' now"):
            use()
    model.set_attn_implementation("flex_attention")
    flex = pickle.loads(pickle.dumps(Collator(model)))
    with pytest.raises(BackendError, match="set dataloader_num_workers=0, or train with sdpa"):
        flex([example(0, (1,))])


def test_a_model_that_cannot_follow_a_graph_is_refused_at_once():
    with pytest.raises(BackendError, match="cannot run this model: its forward takes no position_ids"):
        Collator(make_model("bloom"))


def test_it_travels_without_the_model():
    model = shared_model("gemma3_text", "sdpa")
    collate = Collator(model)
    data = pickle.dumps(collate)
    assert len(data) < 20_000
    ours, theirs = collate([example(0, (2,))]), pickle.loads(data)([example(0, (2,))])
    assert torch.equal(ours["labels"], theirs["labels"])
    for kind, mask in ours["attention_mask"].items():
        assert torch.equal(mask, theirs["attention_mask"][kind])


def test_prompts_are_compiled_with_the_tokenizer(words):
    doc = ICLNode("example1", id="doc")
    answer = ICLNode("fox .", [doc], id="A")
    batch = Collator(shared_model("llama"), words)([Example(answer, "A", visibility="ancestors")])
    assert batch["labels"].tolist() == [[-100] * len(words("example1").input_ids) + words("fox .").input_ids]
