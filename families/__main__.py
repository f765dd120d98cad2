"""``python -m families [NAMES …] [--out FILE] [--table PAGE] [--jobs N] [--timeout S] [--again]``."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

from families.catalogue import families
from families.scan import resume
from families.table import page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m families", description=__doc__)
    parser.add_argument("names", nargs="*", help="families, or patterns such as 'gemma*'; all of them if none is given")
    parser.add_argument("--out", type=Path, default=Path("out/families.jsonl"), help="results, a line per family")
    parser.add_argument("--table", type=Path, help="write the results as a page of Markdown")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one family may take")
    parser.add_argument("--again", action="store_true", help="scan also what the file has already")
    args = parser.parse_args(arguments)
    known = families()
    names = [name for name in known if not args.names or any(fnmatch.fnmatch(name, each) for each in args.names)]
    if not names:
        parser.error(f"no family is called {args.names[0]!r}; there are {', '.join(known)}")
    results = resume(args.out, [known[name] for name in names], jobs=args.jobs, timeout=args.timeout, again=args.again)
    for entry in results:
        if "unbuilt" in entry:
            print(f"{entry['family']:32} {entry['unbuilt']}")
        else:
            print(f"{entry['family']:32} " + "  ".join(f"{name} {one['status']}" for name, one in entry["columns"].items()))
    if args.table is not None:
        args.table.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
