"""How examples are worded: in a model's chat template where it has one, else as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from leattn.comparison.compare import Method
from leattn.comparison.example import Example
from leattn.dag.builders import Content, parallel
from leattn.dag.node import ICLNode
from leattn.dag.reading import read
from leattn.methods import METHODS, ape, plain
from leattn.methods.structured import structured
from leattn.prompt.compile import compile_prompt
from leattn.prompt.compiled import CompiledPrompt

TASK = "Answer the question in a few words, using the documents.\n"
MARK = "\u2063"
"""Stands for what comes into the user's turn."""

TASKS = {
    "sst2": ("Each review is positive or negative.\n\n", "Review: {text}\nSentiment:", ("positive", "negative")),
    "trec": (
        "Each question asks for an abbreviation, a description, an entity, a location, a number or a person.\n\n",
        "Question: {text}\nType:",
        ("abbreviation", "description", "entity", "location", "number", "person"),
    ),
    "agnews": (
        "Each article is about business, sports, technology or the world.\n\n",
        "Article: {text}\nTopic:",
        ("business", "sports", "technology", "world"),
    ),
}
"""Header, how a text is shown, and the labels, which are the words to choose from."""


def question(row: dict[str, Any], documents: Sequence[dict[str, Any]], gold: int | None, tokenizer: Any, name: str) -> Example:
    """A question behind documents."""
    asked = f"\nQuestion: {row['question']}?"
    before, after, space = "", "\nAnswer:", " "
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": MARK}]
        before, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(MARK)
        space = ""
    elif tokenizer.bos_token is not None:
        before = tokenizer.bos_token
    shown = [f"\nDocument (Title: {each['title']}): {each['text']}\n" for each in documents]
    answers = [space + answer for answer in row["answers"]]
    return Example(asked + after, shown, before + TASK, answers=answers, gold=gold, id=name)


def classified(task: str, row: dict[str, Any], demonstrations: Sequence[dict[str, Any]], tokenizer: Any, name: str) -> Example:
    """A text to classify behind demonstrations."""
    header, shown, labels = TASKS[task]
    demos = [f"{shown.format(**each)} {each['label']}\n\n" for each in demonstrations]
    header = (tokenizer.bos_token or "") + header
    choices = [f" {label}" for label in labels]
    return Example(shown.format(**row), demos, header, choices=choices, right=labels.index(row["label"]), id=name)


def weighted(header: Content, documents: Sequence[Content], question: Content, tokenizer: Any = None) -> CompiledPrompt:
    """Shared positions, and all documents as one group that weighs 1/K: log-weight −log K."""
    first = ICLNode(header, id="header")
    docs = parallel(list(documents), [first], special_tokens="text")
    last = ICLNode(question, [first, read(docs, log_weight=-math.log(len(docs)))], id="question")
    return compile_prompt(last, tokenizer)


WAYS: dict[str, Method] = {
    "plain": plain,
    "pcw": METHODS["pcw"],
    "numbered": METHODS["numbered"],
    "ape 0.9, 0.9": ape,
    "ape 0.8, 1": partial(ape, temperature=0.8, scale=1.0),
    "structured": structured,
    "weighted 1/K": weighted,
    "superposition": METHODS["superposition"],
    "recompute 0.15": METHODS["recompute"],
}
"""The methods of the studies by name: those that are published, with their defaults, and two settings that trials found."""
