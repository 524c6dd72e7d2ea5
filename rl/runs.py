"""`python -m rl.runs [FOLDER ...] [--json]`: lists runs with their state, step, accuracy and hash."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.host.command import Parser, fail, interruptible
from rl.run.screen import Screen
from rl.run.standing import runs_under, standing, table


def main(arguments: Sequence[str]) -> None:
    """Lists the runs under the given folders, or under outputs/; those whose logs grew last stand last."""
    parser = Parser(prog="python -m rl.runs", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", default=[Path("outputs")])
    parser.add_argument("--json", action="store_true", help="a line of JSON each, in place of a table")
    asked = parser.parse_args(arguments)
    for folder in asked.folders:
        if not folder.is_dir():
            fail(f"{folder}: no such folder", 2)
    found = sorted((standing(f) for given in asked.folders for f in runs_under(given)), key=lambda run: run.changed)
    if asked.json:
        for run in found:
            print(json.dumps(run.row()))
    elif found:
        Screen(width=None if sys.stdout.isatty() else 140).print(table(found))
    else:
        print(f"no run under {', '.join(map(str, asked.folders))}")


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
