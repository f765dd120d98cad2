"""The page of the docs that says what was found, written from the lines of a scan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from families.scan import COLUMNS

Entry = Mapping[str, Any]

HEAD = """# Families

What every causal language model of transformers {transformers} does with graphs, as a tiny random model in fp32 on the CPU
(torch {torch}, leattn {leattn}). `make families` measures this and writes this page; nothing in it is written by hand.

A number is the largest error of any logit, relative to the largest logit, over all checks of the cell: it was computed exactly,
up to rounding. *refused* is a sentence of leattn's before anything is computed; the numbers in brackets are those of the list
below the table. Answers are compared with what shares no code with leattn:

- **eager, sdpa, flex, sparse**: one forward on that backend. Plain text in several nodes, by ancestors and by parents, with
  `model(input_ids)`; every node of a graph with the node and its ancestors alone, under a mask written by hand; the same in
  another order, with an unreached node changed, in a batch with padding; all of it short and past 100 tokens, and with sliding
  windows of 6. flex runs uncompiled here.
- **generate**: greedy tokens and the logits they were chosen from, with and without a cache, of plain text, a graph, a batch,
  branches and a program, with full forwards token by token.
- **reuse**: logits and tokens with a `KVStore`: filled, found again, in other company, in `generate`, programs and batches.
- **shift**: the same prompt 7 and 210 positions further on, found in the store.
- **readings**: a question that reads two documents at temperatures, with a scale and a weight (`leattn.read`), on eager and on
  what `auto` takes, with the rule put in front of the plain model's softmax.
- **oracle** is how the plain model was made to follow a graph: by a 4-D *mask*, by *masks* per layer type, or by masking in
  front of its *softmax*; *text* where no way gave what the plain model gives for plain text, so that only nodes that are plain
  text have an answer to compare with.
"""

LOADED = """## Ways to load

One model, loaded otherwise than plainly in fp32. In half precision an error may be five times what its rounding is; a change in
attention is far larger. Adapters have large random weights. Offloaded weights live on the CPU or in a folder, and are put in
place layer by layer. The last three are configs that name an attention which this machine cannot run.
"""

ORACLES = {
    "one 4-D mask": "mask",
    "one 4-D mask, no window": "mask",
    "a 4-D mask per layer type": "masks",
    "masked softmax": "softmax",
    "plain text only": "text",
}


class Reasons:
    """Sentences of refusals by number, in the order in which they are met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.families: dict[str, list[str]] = {}

    def number(self, sentence: str, entry: Entry) -> int:
        """The number of a sentence; what it calls the model by is left out."""
        plain = anonymous(sentence, entry["names"])
        families = self.families.setdefault(plain, [])
        if entry["family"] not in families:
            families.append(entry["family"])
        return self.numbers.setdefault(plain, len(self.numbers) + 1)


def anonymous(sentence: str, names: Sequence[str]) -> str:
    """A sentence without the names of model and backend and the figures measured, which differ where the reason is the same."""
    sentence = re.sub(
        r"^(backend '\w+' cannot run this model|kv_store cannot serve \w+|\w+ cannot follow a graph): ", "", sentence
    )
    sentence = re.sub(r"^\w+ cannot read in other ways than as it does \(leattn\.read\): ", "", sentence)
    sentence = re.sub(r"^\w+ cannot follow a graph: ", "", sentence)
    for name in names:
        sentence = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "this model", sentence)
    sentence = re.sub(r"\b\d(\.\d+)?e[-+]\d+\b", "…", sentence)
    return re.sub(r"^\d+ tokens: ", "", sentence)


def cell(entry: Entry, column: str, reasons: Reasons) -> str:
    """One cell of the table."""
    checks = entry["columns"][column]["checks"]
    status = entry["columns"][column]["status"]
    numbers = sorted({reasons.number(check["text"], entry) for check in checks if check["status"] == "refused"})
    listed = f" [{', '.join(map(str, numbers))}]" if numbers else ""
    if status in ("WRONG", "CRASH"):
        return f"**{status}**"
    if status == "exact":
        error = max(check["error"] for check in checks if check["status"] == "exact")
        return f"{error:.0e}" + (f", partly{listed}" if listed else "")
    return f"{status}{listed}"


def faults(entries: Sequence[Entry]) -> Iterator[str]:
    """What is wrong or crashes: a line for everything in which a family goes wrong in the same way."""
    for entry in entries:
        found: dict[str, list[str]] = {}
        for column, one in entry["columns"].items():
            for check in one["checks"]:
                if check["status"] in ("WRONG", "CRASH"):
                    what = check.get("text") or "logits are off"
                    error = f" by {check['error']:.0e}" if "error" in check else ""
                    found.setdefault(f"{check['status']}, {what}", []).append(f"{column} ({check['check']}{error})")
        for what, where in found.items():
            yield f"- {entry['family']}: {what}: {', '.join(where)}"


def needless(entries: Sequence[Entry]) -> Iterator[str]:
    """Families that leattn refuses on eager, and that follow a graph when the mask is handed to them."""
    for entry in entries:
        if "4-D mask" in entry["oracle"] and entry["columns"]["eager"]["status"] == "refused":
            check = next(check for check in entry["columns"]["eager"]["checks"] if check["status"] == "refused")
            yield f"- {entry['family']}: {check['text']}"


def page(entries: Sequence[Entry]) -> str:
    """The whole page."""
    built = [entry for entry in entries if "unbuilt" not in entry]
    reasons = Reasons()
    families, loaded = (
        [
            [entry["family"], *(cell(entry, column, reasons) for column in COLUMNS), ORACLES[entry["oracle"]]]
            for entry in built
            if (entry["loaded"] is None) is plainly
        ]
        for plainly in (True, False)
    )
    counts = {column: Counter(entry["columns"][column]["status"] for entry in built) for column in COLUMNS}
    statuses = [status for status in ("exact", "refused", "WRONG", "CRASH") if any(counts[name][status] for name in COLUMNS)]
    lines = [
        HEAD.format(**entries[0]["state"]),
        f"## {len(built)} models",
        "",
        *grid(["", *COLUMNS], [[status, *(str(counts[column][status]) for column in COLUMNS)] for status in statuses]),
        "",
        *grid(["family", *COLUMNS, "oracle"], families),
        "",
        *([LOADED, *grid(["loaded", *COLUMNS, "oracle"], loaded), ""] if loaded else []),
        "## Why something is refused",
        "",
        *(f"{number}. {sentence} *({_some(reasons.families[sentence])})*" for sentence, number in reasons.numbers.items()),
    ]
    for title, found in (
        ("Faults", list(faults(built))),
        ("Refused, though the model follows a graph when a mask is handed to it", list(needless(built))),
        ("Not built", [f"- {entry['family']}: {entry['unbuilt']}" for entry in entries if "unbuilt" in entry]),
    ):
        if found:
            lines += ["", f"## {title}", "", *found]
    return "\n".join(lines) + "\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    escaped = [[each.replace("|", "\\|") for each in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *escaped)]


def _some(families: Sequence[str]) -> str:
    shown = ", ".join(families[:4])
    return shown if len(families) <= 4 else f"{shown} and {len(families) - 4} more"
