"""transformers' own ``Trainer`` and accelerate on collated graphs: what is learnt, and by how much each step moves."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from forks import in_another_process
from models import make_model
from test_training_collator import example, loss_of, without_dropout
from torch.utils.data import DataLoader

import leattn
from leattn import training
from leattn.training import Collator

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

EXAMPLES = [example(seed, answers) for seed, answers in enumerate([(3,), (1, 2), (4,), (2, 2, 1)])]


def trainer(model, tmp_path, examples=EXAMPLES, collate=None, **options):
    """A Trainer that takes plain SGD steps over the examples in their order, and neither logs nor saves."""
    evaluation = {name: options.pop(name) for name in ("compute_metrics", "eval_dataset") if name in options}
    given = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **options,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), **given),
        train_dataset=examples,
        data_collator=collate or Collator(model),
        compute_loss_func=training.loss,
        preprocess_logits_for_metrics=training.predictions,
        **evaluation,
    )


def after_one_step(model, rate=0.1):
    """The weights after a step of plain gradient descent on all examples, by hand."""
    model = copy.deepcopy(model)
    loss = loss_of(model, Collator(model)(EXAMPLES))
    loss.backward()
    return loss, {name: p.detach() - rate * p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "accumulated", "checkpointed", "workers"],
)
def test_a_step_is_the_step_on_the_mean_over_all_labelled_tokens(family, backend, options, tmp_path):
    """Examples have one to five of them: a mean of means would be another step."""
    model = without_dropout(make_model(family, backend))
    loss, expected = after_one_step(model)
    found = trainer(model, tmp_path, **options).train()
    assert found.training_loss == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_mixed_precision(backend, tmp_path):
    model = without_dropout(make_model("llama", backend))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, expected = after_one_step(model)
    found = trainer(model, tmp_path, bf16=True, gradient_checkpointing=True).train()
    assert found.training_loss == pytest.approx(loss.item(), rel=0.02)
    for name, parameter in model.named_parameters():
        step, exact = (parameter.detach() - before[name]).flatten(), (expected[name] - before[name]).flatten()
        assert torch.nn.functional.cosine_similarity(step, exact, dim=0) > 0.98, name


def test_evaluation_of_batches_of_different_widths(tmp_path):
    model = make_model("llama", "sdpa")
    seen = []

    def compute_metrics(result):
        there = result.label_ids != -100
        assert np.array_equal(there, result.predictions != -100)
        seen.append(int(there.sum()))
        return {"right": float((result.predictions == result.label_ids)[there].mean())}

    runner = trainer(model, tmp_path, eval_dataset=EXAMPLES, compute_metrics=compute_metrics, per_device_eval_batch_size=2)
    found = runner.evaluate()
    assert seen == [3 + 1 + 2 + 4 + 2 + 2 + 1]
    batches = [Collator(model)(EXAMPLES[i : i + 2]) for i in (0, 2)]
    with torch.no_grad():
        each = [float(loss_of(model, batch)) for batch in batches]
    assert found["eval_loss"] == pytest.approx(sum(each) / 2, rel=1e-4)
    assert 0 <= found["eval_right"] <= 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_accelerate_moves_every_part_of_a_batch(family):
    batch = Collator(make_model(family, "sdpa"))(EXAMPLES)
    moved = accelerate.utils.send_to_device(batch, torch.device("meta"))
    masks = moved["attention_mask"]
    tensors = [*(masks.values() if isinstance(masks, dict) else [masks]), moved["input_ids"], moved["position_ids"]]
    assert {tensor.device.type for tensor in [*tensors, moved["labels"]]} == {"meta"}


def test_a_loop_of_ones_own_with_accelerate():
    model = make_model("gemma3_text", "sdpa")
    _, expected = after_one_step(model)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = DataLoader(EXAMPLES, batch_size=4, collate_fn=Collator(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        labels = batch.pop("labels")
        accelerator.backward(training.loss(model(**batch), labels))
        optimizer.step()
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-3, atol=1e-6)


def test_rows_of_a_table_that_the_trainer_would_empty(tmp_path):
    """Columns that the model's forward does not name are dropped before the collator sees them."""
    model = make_model("llama", "sdpa")
    with pytest.raises(leattn.LeattnError, match=r"not dict; .* set remove_unused_columns=False"):
        trainer(model, tmp_path, examples=[{"document": "a", "answer": "b"}] * 4).train()


def test_loss_falls(tmp_path):
    model = make_model("llama", "sdpa")
    options = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 3e-3, "logging_strategy": "steps", "logging_steps": 1}
    runner = trainer(model, tmp_path, **options)
    runner.train()
    losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 10


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{name: given for name, given in batch.items() if name != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}], ids=["", "acc"])
def test_smoothed_labels_take_the_step_that_transformers_own_loss_takes(options, tmp_path):
    """Without branches, transformers' own smoother takes the collator's labels as they are."""
    examples = [example(seed, (answers,)) for seed, answers in enumerate([3, 1, 4, 2])]
    models = [without_dropout(make_model("llama", "sdpa")) for _ in range(3)]
    models[1].load_state_dict(models[0].state_dict())
    models[2].load_state_dict(models[0].state_dict())
    losses = []
    for model, smoothing, own in zip(models, (0.3, 0.3, 0.0), (True, False, True), strict=True):
        runner = trainer(model, tmp_path, examples, label_smoothing_factor=smoothing, eval_dataset=examples, **options)
        if not own:
            runner.compute_loss_func = None
        losses.append((runner.evaluate()["eval_loss"], runner.train().training_loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_smoothed_labels_of_branches_are_smoothed_one_by_one(tmp_path):
    """Each predicted id by itself through transformers' smoother, and the mean over all of them."""
    model = without_dropout(make_model("llama", "sdpa"))
    batch = Collator(model)(EXAMPLES)
    logits, found = logits_of(model, batch), training.targets(batch["labels"], batch["input_ids"].shape[1])
    smooth = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    each = [smooth({"logits": logits[r, c][None, None]}, id[None, None]) for r, c, id in zip(*found, strict=True)]
    loss = trainer(model, tmp_path, label_smoothing_factor=0.2).train().training_loss
    assert loss == pytest.approx(float(torch.stack(each).mean()), rel=1e-4)


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = training.loss(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_is_called_by_ones_own_is_smoothed_too_and_a_loop_of_ones_own_is_not(tmp_path):
    model = without_dropout(make_model("llama", "sdpa"))
    losses = []
    for kind in (transformers.Trainer, OwnLoss):
        copied = copy.deepcopy(model)
        runner = trainer(copied, tmp_path, label_smoothing_factor=0.3)
        runner.__class__ = kind
        if kind is OwnLoss:
            runner.compute_loss_func = None
        losses.append(runner.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain = []

    class Ask(transformers.TrainerCallback):
        def on_step_end(self, *args, **options):
            batch = Collator(model)(EXAMPLES)
            plain.append(float(training.loss({"logits": logits_of(model, batch)}, batch["labels"])))

    runner = trainer(copy.deepcopy(model), tmp_path, label_smoothing_factor=0.3)
    runner.add_callback(Ask())
    runner.train()
    assert plain == [pytest.approx(after_one_step(model)[0].item(), rel=1e-5)]
    assert losses[0] != pytest.approx(plain[0], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("evaluates", [False, True])
def test_several_ids_per_token_without_our_loss_are_refused_in_words(smoothing, evaluates, tmp_path):
    runner = trainer(make_model("llama", "sdpa"), tmp_path, label_smoothing_factor=smoothing, eval_dataset=EXAMPLES)
    runner.compute_loss_func = None
    with pytest.raises(leattn.LeattnError, match=r"several ids, .*; give the Trainer compute_loss_func=leattn\.training\.loss"):
        runner.evaluate() if evaluates else runner.train()


def a_step_of_two(rank, folder):
    """What ``torchrun`` starts twice. The other process is found by a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/both", rank=rank, world_size=2)
    model = without_dropout(make_model("gemma3_text", "sdpa"))
    _, expected = after_one_step(model)
    trainer(model, folder / str(rank), per_device_train_batch_size=2, ddp_backend="gloo").train()
    assert torch.distributed.get_world_size() == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-3, atol=1e-6)


def test_two_processes_take_the_step_of_one(tmp_path):
    """Data parallel: two of the four examples in each process, with different numbers of labelled tokens."""
    with ThreadPoolExecutor(2) as both:
        for step in [both.submit(in_another_process, a_step_of_two, rank, tmp_path) for rank in range(2)]:
            step.result(timeout=240)
