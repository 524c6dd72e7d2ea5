"""`python -m rl.compare RUN_A RUN_B [--json]`: where two runs part.

It looks at what their folders hold: the settings that decide a bit, the weights of checkpoints of one step, the metrics step by
step (seconds and memory aside), and the completions that both kept, token by token with the bits of both sides' log-probs.
Where both kept the batch of a step (align.keep_batches), the forward pass is computed with the weights of each over the same
tokens: the first layer and op at which they part. Exit code 0: nothing differs; 1: something does; 2: bad input.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from kernels.host.command import Parser, fail
from rl.comparison.runs import Comparison, compare, replayed
from rl.errors import BAD_INPUT
from rl.run.screen import Screen
from trainer.checkpoint import CheckpointError


def main(arguments: Sequence[str]) -> None:
    """Compares two runs and says where they part."""
    parser = Parser(prog="python -m rl.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("a", type=Path, metavar="RUN_A")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument("--json", action="store_true", help="what was found as JSON")
    asked = parser.parse_args(arguments)
    try:
        found = compare(asked.a, asked.b)
        found = replace(found, replayed=replayed(asked.a, asked.b, Screen(stderr=True)))
    except (*BAD_INPUT, CheckpointError) as error:
        fail(error, 2)
    print(json.dumps(asdict(found), indent=1) if asked.json else "\n".join(told(found)))
    sys.exit(int(found.apart))


def told(found: Comparison) -> Iterator[str]:
    """Says in a line each what differs: A's value | B's value."""
    for difference in found.settings:
        yield f"setting      {difference}"
    if found.layout:
        yield f"layout       {', '.join(map(str, found.layout))} (decides no bit)"
    yield f"metrics      {_said(found.metrics, found.equal_rows, 'rows')}"
    yield f"completions  {_said(found.completion, found.equal_completions, 'completions')}"
    yield f"checkpoints  {_said(found.checkpoint, found.equal_checkpoints, 'of the same step')}"
    if found.replayed:
        step, parting = found.replayed
        for line in parting.told(("A", "B")):
            yield f"replay       step {step}: {line}"
    yield "the runs part" if found.apart else "nothing differs"


def _said(difference: object, equal: int, what: str) -> str:
    return f"{equal:,} {what} are equal, then {difference}" if difference else f"all {equal:,} {what} are equal"
