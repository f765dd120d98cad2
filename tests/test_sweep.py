"""``sweep`` against each intervention run by hand, and its file against interruptions of every kind."""

from __future__ import annotations

import json
import sys
from random import Random

import numpy as np
import pytest
import torch
from models import make_model, shared_model

import leattn
from leattn import ICLNode, LeattnError, LeattnWarning, compile_prompt
from leattn.analysis import Injection, sweep
from leattn.intervals import wilson
from leattn.interventions import Freeze, Inject, RandomNoise, Shuffle, SkipAttention, Suppress, capture, intervene
from leattn.tiny.examples import make

LAYERS = 3
TARGETS = [[17], [5, 60], [9], [33, 2, 8], [70]]
READY = ["freeze", "noise", "shuffle", "shuffle_published", "skip"]


def prompts(count=5, *, seed=0):
    """Of different lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(2, 100, (12 + i,), generator=generator).tolist()
        root = ICLNode(ids[:2], id="root")
        documents = [ICLNode(ids[2:5], [root], id="a"), ICLNode(ids[5:8], [root], id="b")]
        found.append(compile_prompt(ICLNode(ids[8:], [root, *documents], id="Q")))
    return found


def by_hand(model, prompt, target, operations):
    """Summed cross-entropy of the target, fed behind the prompt, and whether greedy decoding would say it."""
    with intervene(model, prompt, operations) as attention, torch.no_grad():
        ids = torch.cat([attention.inputs["input_ids"], torch.tensor([target])], 1)
        chances = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    loss = -sum(float(row[token]) for row, token in zip(chances, target, strict=True))
    return loss, float(chances.argmax(-1).tolist() == target)


def made(name, layer, seed):
    return {
        "untouched": lambda: [],
        "freeze": lambda: [Freeze(layer - 1)],  # the published one holds what went into the layer before
        "noise": lambda: [RandomNoise(layer, seed=seed)],
        "shuffle": lambda: [Shuffle(layer, seed=seed)],
        "shuffle_published": lambda: [Shuffle(layer, seeding="published")],
        "skip": lambda: [SkipAttention(range(layer, LAYERS))],
    }[name]()


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_values_equal_each_intervention_run_by_hand(metric):
    model, some = shared_model("llama"), prompts()
    result = sweep(model, some, READY, metric=metric, targets=TARGETS, seeds=(3, 4), batch_size=2)
    assert len(result.rows) == (1 + len(READY) * LAYERS * 2 - 2) * len(some), "there is no layer before the first"
    for row in result.rows:
        assert row.target == "own"
        assert row.source_layer is None
        loss, right = by_hand(model, some[row.prompt], TARGETS[row.prompt], made(row.operation, row.layer, row.seed))
        assert row.value == pytest.approx(loss if metric == "loss" else right, abs=1e-4)
    assert {(row.operation, row.layer, row.seed) for row in result.rows} == {
        ("untouched", None, None),
        *((name, layer, seed) for name in READY for layer in range(name == "freeze", LAYERS) for seed in (3, 4)),
    }
    assert (result.measured("freeze"), result.measured("skip")) == ((1, 2), (0, 1, 2))
    assert [len(line.split()) for line in str(result).splitlines() if line.startswith("freeze")] == [3]
    with pytest.raises(LeattnError, match=r"nothing was measured for layer 0, .* its layers are \[1, 2\]"):
        result.mean("freeze", 0)
    leattn.viz.plot_sweep(result)


def test_accuracy_is_what_greedy_generation_says():
    model, tokenizer = leattn.tiny.load()
    examples = [make("parallel", Random(seed), n=4) for seed in range(6)]
    some = [example.compile(tokenizer) for example in examples]
    texts = [example.answer + "." for example in examples]
    result = sweep(model, some, {"late": lambda layer, seed: [RandomNoise(layer, seed=seed)]}, [2], targets=texts)
    for row in result.rows:
        target = some[row.prompt].continued(texts[row.prompt]).input_ids[0, len(some[row.prompt]) :].tolist()
        operations = [] if row.operation == "untouched" else [RandomNoise(2, seed=0)]
        with intervene(model, some[row.prompt], operations) as attention:
            said = model.generate(**attention.inputs, max_new_tokens=len(target), do_sample=False)
        assert row.value == float(said[0, len(some[row.prompt]) :].tolist() == target)


def test_an_own_metric_an_own_operation_and_chosen_layers():
    model, some = shared_model("llama"), prompts()

    def least(logits, target):
        assert logits.shape == (len(target), 100)
        return float(logits.min())

    def maker(layer, seed):
        return [Suppress("a", 0.2, layers=[layer]), SkipAttention(0)]

    result = sweep(model, some, {"both": maker}, [2, 0], least, targets=TARGETS)
    assert result.layers == (2, 0)
    assert "least" in result.metric
    for layer in (0, 2):
        with intervene(model, some[1], maker(layer, 0)) as attention, torch.no_grad():
            ids = torch.cat([attention.inputs["input_ids"], torch.tensor([TARGETS[1]])], 1)
            expected = float(model(ids, use_cache=False).logits[0, len(some[1]) - 1 : -1].min())
        (value,) = (row.value for row in result.rows if row.layer == layer and row.prompt == 1)
        assert value == pytest.approx(expected, abs=1e-4)


def test_seeds_are_honoured_and_what_draws_nothing_runs_once():
    model, some = make_model("llama"), prompts()
    sweep(model, some, ["noise"], [0], "loss", targets=TARGETS)  # the probe of a new model runs it too
    with counting(model) as calls:
        result = sweep(model, some, ["noise", "freeze"], [1], "loss", targets=TARGETS, seeds=(1, 2, 1))
    assert len(calls) == 1 + 2 + 1
    noise = {seed: [r.value for r in result.rows if r.operation == "noise" and r.seed == seed] for seed in (1, 2)}
    freeze = {seed: [r.value for r in result.rows if r.operation == "freeze" and r.seed == seed] for seed in (1, 2)}
    assert max(abs(a - b) for a, b in zip(noise[1], noise[2], strict=True)) > 1e-3
    assert freeze[1] == freeze[2]
    assert result.seeds == (1, 2)


def injection(some, donors, **options):
    return Injection(donors, lambda prompt: [prompt["a"].span, prompt["Q"].span[0]], **options)


def test_injection_equals_capture_and_inject_by_hand():
    model, some, donors = shared_model("llama"), prompts(), prompts(seed=1)
    answers = TARGETS[::-1]
    swap = injection(some, donors, targets=answers, source_layers=[0, 2])
    result = sweep(model, some, {"swap": swap}, [1, 2], "loss", targets=TARGETS, batch_size=2)
    assert result.source_layers("swap") == (0, 2)
    assert len(result.rows) == 5 + 2 * 2 * 2 * 5
    for row in result.rows:
        prompt = some[row.prompt]
        operations = []
        if row.operation == "swap":
            states = capture(model, donors[row.prompt], layer=row.source_layer)
            operations = [Inject(row.layer, {"a": states["a"], prompt["Q"].span[0]: states["Q"][0]})]
        target = (TARGETS if row.target == "own" else answers)[row.prompt]
        assert row.value == pytest.approx(by_hand(model, prompt, target, operations)[0], abs=1e-4)


def test_injecting_its_own_states_changes_nothing():
    model, some = shared_model("llama"), prompts()
    result = sweep(model, some, {"same": injection(some, some)}, metric="loss", targets=TARGETS)
    for layer in range(LAYERS):
        assert result.mean("same", layer, source_layer=layer) == pytest.approx(result.mean("untouched"), abs=1e-5)


class counting:
    """The forwards of a model, and the right to end one of them."""

    def __init__(self, model, stop_at=None, error=KeyboardInterrupt):
        self.model, self.stop_at, self.error, self.calls = model, stop_at, error, []

    def __enter__(self):
        def before(*_):
            self.calls.append(1)
            if len(self.calls) == self.stop_at:
                raise self.error

        self.handle = self.model.lm_head.register_forward_pre_hook(before)
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()


def settings(some):
    return {"prompts": some, "operations": READY, "metric": "loss", "targets": TARGETS, "seeds": (0, 1), "batch_size": 2}


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    model, some = make_model("llama"), prompts()
    file = tmp_path / "sweep.jsonl"
    with torch.no_grad():
        reference = sweep(model, **settings(some))
        with counting(model) as all_calls:
            sweep(model, **settings(some))
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        with counting(model, stop_at=20), pytest.raises(KeyboardInterrupt):
            sweep(model, **settings(some), file=file)
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert model.config._attn_implementation == "eager"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 19
    assert all(json.loads(line) for line in lines)
    with counting(model) as calls:
        resumed = sweep(model, **settings(some), file=file)
    assert len(calls) == len(all_calls) - 19
    assert resumed.rows == reference.rows
    with counting(model) as calls:
        again = sweep(model, **settings(some), file=file)
    assert not calls
    assert again.rows == reference.rows


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_run_again(tmp_path, cut):
    model, some = shared_model("llama"), prompts()
    file = tmp_path / "sweep.jsonl"
    reference = sweep(model, **settings(some), file=file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with pytest.warns(LeattnWarning, match="the last line of .* is torn"):
        assert sweep(model, **settings(some), file=file).rows == reference.rows
    assert file.read_bytes() == whole
    header = whole[:40]
    file.write_bytes(header)
    with pytest.warns(LeattnWarning, match="is torn"):
        assert sweep(model, **settings(some), file=file).rows == reference.rows
    assert file.read_bytes() == whole


def test_the_file_of_another_sweep_is_refused_and_kept(tmp_path):
    model, some = shared_model("llama"), prompts()
    file = tmp_path / "sweep.jsonl"
    sweep(model, **settings(some), file=file)
    before = file.read_bytes()
    others = {
        "layers": {"layers": [1]},
        "metric": {"metric": "accuracy"},
        "seeds": {"seeds": (0,)},
        "targets": {"targets": TARGETS[::-1]},
        "prompts": {"prompts": [prompt.without_edge("Q", "a") for prompt in some]},
        "batch_size": {"batch_size": 3},
        "operations": {"operations": READY[:2]},
        "made": {"operations": {name: lambda layer, seed: [Freeze(layer, ["a"])] for name in READY}},
    }
    for what, options in others.items():
        with pytest.raises(LeattnError, match=rf"is of another sweep: .*{what}.* differ"):
            sweep(model, **{**settings(some), **options}, file=file)
    with pytest.raises(LeattnError, match="is of another sweep: model differ"):
        sweep(make_model("llama", seed=1), **settings(some), file=file)
    assert file.read_bytes() == before
    for text in ("my notes", "my notes\nof today\n", '{"a": 1}\n'):
        file.write_text(text)
        with pytest.raises(LeattnError, match="is no file of a sweep"):
            sweep(model, **settings(some), file=file)
        assert file.read_text() == text
    file.write_bytes(before.replace(b'"layer": 0', b'"layer" 0', 1))
    with pytest.raises(LeattnError, match=r"is damaged in line \d+"):
        sweep(model, **settings(some), file=file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"operations": ["blur"]},
            "unknown operation 'blur'; choose one of 'freeze', 'noise', 'shuffle', 'shuffle_pub",
        ),
        ({"operations": {"untouched": lambda layer, seed: []}}, "the name of the baseline"),
        ({"operations": ["freeze"], "layers": [0]}, r"'freeze' has nothing to measure at layers \[0\]; name others"),
        ({"operations": {"x": Freeze(0)}}, r"give a function \(layer, seed\)"),
        ({"layers": [3]}, "sweep names layer 3; this model has layers 0 to 2"),
        ({"metric": "bleu"}, "unknown metric 'bleu'"),
        ({"targets": TARGETS[:2]}, "5 prompts and 2 targets"),
        ({"seeds": ()}, "0 seeds"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prompts": []}, "a list of at least one compiled prompt"),
        ({"operations": {"x": Injection([], "a")}}, "Injection has 0 donors for 5 prompts"),
        ({"operations": {"x": Injection(prompts(), "a", TARGETS[:1])}}, "Injection has 1 targets for 5 prompts"),
        ({"operations": {"x": Injection(prompts(6)[1:], "Q")}}, "4 tokens in prompt 0 and 5 in its donor"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(LeattnError, match=words):
        sweep(shared_model("llama"), **{**settings(prompts()), **options})


def test_summary_text_and_data_frame(monkeypatch):
    model, some = shared_model("llama"), prompts()
    result = sweep(model, some, READY, metric="loss", targets=TARGETS, seeds=(0, 1))
    values = np.array([[r.value for r in result.rows if (r.operation, r.layer, r.seed) == ("noise", 1, s)] for s in (0, 1)])
    point = result.summary("noise", 1)
    assert point.mean == pytest.approx(values.mean())
    assert values.mean(0).min() <= point.low < point.mean < point.high <= values.mean(0).max()
    assert point.count == 5
    assert result.interval == "bootstrap"
    assert f"{point.mean:.3f}" in str(result)
    assert f"{point.mean:.3f}" in result._repr_html_()
    with pytest.raises(LeattnError, match="unknown operation 'blur'"):
        result.mean("blur", 0)
    with pytest.raises(LeattnError, match="nothing was measured for layer 9"):
        result.mean("noise", 9)

    class Pandas:
        DataFrame = dict

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    frame = result.to_pandas()
    assert list(frame) == ["operation", "layer", "source_layer", "seed", "prompt", "target", "value"]
    assert len(frame["value"]) == len(result.rows)


def test_wilson_by_its_own_equation():
    """The ends solve (p − x)² = z² · x(1 − x) / n."""
    for p, n in ((0.5, 10), (1.0, 40), (0.0, 7), (0.93, 200)):
        for x in wilson(p, n):
            assert (p - x) ** 2 == pytest.approx(1.959964**2 * x * (1 - x) / n, abs=1e-7)


def test_pictures(tmp_path):
    from leattn.viz import plot_sweep

    model, some, donors = shared_model("llama"), prompts(), prompts(seed=1)
    operations = {"early": lambda layer, seed: [Freeze(layer)], "swap": injection(some, donors, targets=TARGETS[::-1])}
    result = sweep(model, some, operations, metric="loss", targets=TARGETS)
    ax = plot_sweep(result, path=tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert list(ax.lines[0].get_ydata()) == [result.mean("early", layer) for layer in range(LAYERS)]
    assert "bootstrap 95 % interval" in ax.get_title(loc="left")
    assert {"early", "untouched"} <= {text.get_text() for text in ax.texts}
    heat = plot_sweep(result, kind="injection", target="donor")
    shown = heat.images[0].get_array()
    for a in range(LAYERS):
        for b in range(LAYERS):
            assert shown[a, b] == result.mean("swap", b, source_layer=a, target="donor")
    for options, words in (
        ({"kind": "pie"}, "unknown kind 'pie'"),
        ({"kind": "layers", "operation": "swap"}, "unknown operation for kind='layers' 'swap'; choose one of 'early'"),
        ({"kind": "injection", "target": "third"}, "nothing was measured"),
    ):
        with pytest.raises(LeattnError, match=words):
            plot_sweep(result, **options)
    with pytest.raises(LeattnError, match="nothing to show as kind='injection'"):
        plot_sweep(sweep(model, some, ["skip"], [0], targets=TARGETS), kind="injection")
