"""The benchmarks run on shrunken workloads, refuse to time what disagrees, and the README shows what was measured."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import attention, branches, cached, measure, plain, planning, table
from benchmarks.row import SMALLEST, Effort, Goal, Measured, Result, Row

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here_and_small(monkeypatch):
    """Models of two layers; memory in this process, as a fresh one takes seconds; flex uncompiled, as it needs a compiler."""
    small = functools.partial(branches.small_llama, layers=2, hidden=64)
    for module in (branches, cached, plain):
        monkeypatch.setattr(module, "small_llama", small)
    threads = torch.get_num_threads()

    def peak(setup, *args):
        setup(*args)()
        return 1.0

    for module in (attention, branches, planning):
        monkeypatch.setattr(module, "peak_megabytes", peak)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


LONG = ("attention-f", "attention-g", "import")
"""Uncompiled flex makes S × S scores, and an interpreter takes seconds to start."""


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_row_runs_on_the_smallest_setting(tmp_path, capsys):
    out = tmp_path / "results" / "small.json"
    rows = [row for row in command.ROWS if row.name not in LONG]
    results = command.run(rows, SMALLEST, out)
    for row, result in zip(rows, results, strict=True):
        assert result.measured.figures, row.name
        for goal in row.goals:
            assert goal.figure in result.measured.figures, row.name
        assert all(verdict.reached is None for verdict in result.verdicts), "shrunken workloads say nothing about goals"
    assert "attention-a: " in capsys.readouterr().out
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [Result.from_dict(entry) for entry in written["rows"]] == results
    assert set(written["machine"]) == {
        "processor", "capability", "threads", "python", "torch", "transformers", "leattn"
    }  # fmt: skip


def test_the_workloads_have_the_sizes_of_the_table():
    sizes = {name: len(make()) for name, make in attention.WORKLOADS.items() if name != "g"}
    assert sizes == {"a": 3514, "b": 4160, "c": 720, "d": 4096, "e": 4096, "f": 32_832}
    assert len(attention.WORKLOADS["g"]().graph) == 200


def test_attention_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(attention, "sparse", lambda prompt, query, key, value: lambda: query)
    monkeypatch.setattr(attention, "interleaved", None)
    with pytest.raises(
        measure.Disagreement, match=r"sparse differs from the reference by .*more than 0.0001; nothing was timed"
    ):
        attention.measure("c", SMALLEST)


def test_flex_that_does_not_compile_is_a_remark(monkeypatch):
    def compile(function, *, dynamic):
        def fail(*args, **kwargs):
            raise RuntimeError("no compiler\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    measured = attention.measure("c", SMALLEST)
    assert measured.notes == ("flex does not compile here: no compiler",)
    assert "flex" not in measured.seconds


def test_branches_that_write_something_else_are_not_timed(monkeypatch):
    monkeypatch.setattr(branches, "interleaved", None)
    right = branches.together

    def wrong(model, prompt, new):
        return right(model, prompt, new).flip(0)

    monkeypatch.setattr(branches, "together", wrong)
    with pytest.raises(measure.Disagreement, match=r"leattn: token 0 of branch \d+ is \d+, the reference has"):
        branches.measure(256, SMALLEST)


def test_a_tie_of_the_reference_may_be_decided_either_way():
    expected, found = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 7, 8]])
    branches.check_tokens("ours", found, expected, gaps=torch.tensor([[1.0, 1e-4, 1.0]]))
    with pytest.raises(measure.Disagreement, match="token 1 of branch 0 is 7, the reference has 2"):
        branches.check_tokens("ours", found, expected, gaps=torch.tensor([[1.0, 1.0, 1.0]]))
    with pytest.raises(measure.Disagreement, match=r"wrote \[1, 2\] tokens"):
        branches.check_tokens("ours", found[:, :2], expected, gaps=torch.ones(1, 3))


def test_a_store_that_does_not_hold_the_documents_is_not_timed():
    model, prompt = cached.small_llama(), cached.retrieval_prompt(4)
    store = cached.leattn.KVStore(max_bytes=1)
    with pytest.raises(measure.Disagreement, match=r"0 tokens were reused and \d+ computed, not 64 and 16"):
        cached.check_reuse(model, prompt, store, documents=64)


def test_a_number_that_is_none_disagrees():
    with pytest.raises(measure.Disagreement, match="ours differs from the reference by nan"):
        measure.check_close("ours", torch.tensor([float("nan")]), torch.zeros(1), 1.0)


def test_rivals_take_turns_and_the_first_round_does_not_count():
    calls = []
    ticks = iter(range(100))
    rivals = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = measure.interleaved(rivals, 2, clock=lambda: float(next(ticks)))
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert times.rounds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert times.ratio("a", "b") == 1.0


HOLD = """
import torch

def hold(megabytes):
    return lambda: torch.ones(megabytes * 1_000_000 // 4).sum()
"""


def test_peak_memory_counts_what_was_freed_too(tmp_path, monkeypatch):
    (tmp_path / "holding.py").write_text(HOLD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 35 < measure.peak_megabytes(SimpleNamespace(__module__="holding", __name__="hold"), 40) < 60


def test_a_failing_measurement_says_why():
    nowhere = SimpleNamespace(__module__="nowhere", __name__="hold")
    with pytest.raises(RuntimeError, match=r"memory of hold\(40,\) failed: ModuleNotFoundError: No module named 'nowhere'"):
        measure.peak_megabytes(nowhere, 40)


@pytest.mark.parametrize(
    ("goal", "measured", "says"),
    [
        (Goal("x", "≥", 20), 25.0, "reached"),
        (Goal("x", "≥", 20), 15.0, "missed by 25 %"),
        (Goal("x", "≤", 2), 2.0, "reached"),
        (Goal("x", "≤", 2), 2.5, "missed by 25 %"),
        (Goal("y", "≤", 2), 2.5, "not measured"),
    ],
)
def test_a_goal_is_reached_or_missed_by_so_much(goal, measured, says):
    row = Row("r", "a row", lambda effort: Measured(figures={"x": measured}), (goal,))
    assert table.judgement(row.run(Effort(1)).verdicts[0]) == says


def test_rows_are_chosen_by_name_or_tag():
    assert [row.name for row in command.select(["cached", "branches-256"])] == ["cached", "branches-256"]
    assert {row.name for row in command.select(["memory"])} == {"memory-f", "memory-branches", "memory-compile"}
    assert len({row.name for row in command.ROWS}) == len(command.ROWS)
    with pytest.raises(ValueError, match=r"there is no row 'cache'; rows and tags are .*cached"):
        command.select(["cache"])


def test_the_readme_shows_the_committed_figures():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert len(files) == 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = json.loads(files[0].read_text(encoding="utf-8"))
    assert table.rewritten(readme, table.section(measured)) == readme, f"run python -m benchmarks.table {files[0].name}"
    results = [Result.from_dict(entry) for entry in measured["rows"]]
    goals = {row.name: row.goals for row in command.ROWS}
    assert {result.name: tuple(verdict.goal for verdict in result.verdicts) for result in results} == goals


def test_a_readme_without_its_place_for_figures_is_refused():
    with pytest.raises(ValueError, match="the README needs <!-- performance:begin -->"):
        table.rewritten("# leattn\n", "figures")
