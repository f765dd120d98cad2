"""``python -m bundled_model --out weights``: trains the model of `leattn.tiny` from scratch.

The curriculum does it: five phases, each begun when the one before is at 90 %,
and at the end the learning rate goes to zero. ``--resume FOLDER --phase NAME``
goes on from earlier weights.

The shipped weights are one run of this command with its defaults: 4000 steps of 48
texts, seed 0, 56 minutes on one core of a busy machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bundled_model.curriculum import PHASES
from bundled_model.evaluate import HEADER, table
from bundled_model.train import build_model, save, train
from leattn.tiny.load import WEIGHTS, load
from leattn.tiny.tokenizer import build_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ``--help`` says what it takes."""
    parser = argparse.ArgumentParser("python -m bundled_model", description="Train or evaluate the bundled model.")
    parser.add_argument("--out", type=Path, default=Path("tiny-weights"), help="folder for weights and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=512, help="held-out prompts for each line of the table")
    parser.add_argument("--quick", action="store_true", help="a few steps and a few prompts: does it run at all?")
    parser.add_argument("--resume", type=Path, help="go on from the weights in this folder (not from optimizer state)")
    parser.add_argument("--phase", choices=PHASES, default=PHASES[0], help="phase to begin with, for --resume")
    parser.add_argument("--evaluate", action="store_true", help="only print the table of the shipped weights")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch_size, args.prompts = 4, 4, 4
    if args.evaluate:
        model, tokenizer = load(WEIGHTS)
    else:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        model = load(args.resume)[0] if args.resume else build_model(tokenizer)
        write = partial(save, model, tokenizer, args.out)
        train(
            model,
            tokenizer,
            steps=args.steps,
            seed=args.seed,
            batch_size=args.batch_size,
            first_phase=PHASES.index(args.phase),
            checkpoint=write,
        )
        write()
    print(HEADER, *table(model, tokenizer, n=args.prompts), sep="\n")


if __name__ == "__main__":
    main()
