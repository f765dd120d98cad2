"""The bundled model's training keeps an eighth of the pairs back, and the shipped weights answer about exactly those."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

import leattn
from bundled_model.__main__ import main
from bundled_model.curriculum import PHASES, lesson
from bundled_model.evaluate import Row, answered
from leattn.tiny import load, words
from leattn.tiny.examples import make


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load()


def test_the_package_does_without_it() -> None:
    for path in Path(leattn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "bundled_model" for name in names), path


# --- what is taught


@pytest.mark.parametrize("phase", PHASES)
def test_training_never_states_a_held_out_pair(phase: str) -> None:
    rng = Random(3)
    texts = [lesson(rng, phase) for _ in range(200)]
    assert not any(fact.held_out for text in texts for fact in text.facts)
    # The facts are all there is: every value that is written stands in them.
    for text in texts:
        values = {fact.value for fact in text.facts}
        written = " ".join(str(node.content) for node in text.targets)
        assert {name for name in re.findall(r"\w+", written) if name in _VALUES} <= values
    rng = Random(3)
    assert [str(n.content) for text in texts for n in text.targets] == [
        str(n.content) for _ in range(200) for n in lesson(rng, phase).targets
    ]


_VALUES = {value for values in words.VALUES.values() for value in values}


# --- how well it was learnt


@pytest.mark.parametrize(("kind", "at_least"), [("causal", 0.9), ("parallel", 0.9), ("contradiction", 0.85)])
def test_it_answers_what_it_has_never_been_told(tiny: tuple[Any, Any], kind: Any, at_least: float) -> None:
    rng = Random(7)
    right = answered(*tiny, [make(kind, rng) for _ in range(64)])
    assert sum(right) / 64 >= at_least


def test_it_cannot_know_what_it_does_not_see(tiny: tuple[Any, Any]) -> None:
    rng = Random(8)
    assert sum(answered(*tiny, [make("hidden", rng) for _ in range(64)])) <= 8


def test_a_row_states_its_uncertainty() -> None:
    row = Row("causal", 500, 480, 1 / 24, 0.95)
    low, high = row.interval
    assert 0.93 < low < 0.96 < high < 0.98  # Wilson, by hand: 0.939 to 0.974
    assert "96.0" in str(row)
    assert row.verdict == "ok"
    assert Row("hidden", 500, 100, 1 / 24, 1.5 / 24, at_most=True).verdict == "MISSED"


# --- the command


def test_the_command_trains_and_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path / "new")])
    assert "conjunction, parallel" in capsys.readouterr().out
    model, tokenizer = load(tmp_path / "new")
    assert len(tokenizer) == model.config.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
