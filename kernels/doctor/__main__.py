"""`python -m kernels.doctor [--device cpu|cuda] [--family portable] [--quick] [--json]`: this machine, and whether it computes
as recorded.

Prints card, driver and versions; checks a part of every op's contract, the sampler against the trainer and a small run (two
minutes or so; --quick leaves the run out); and compares the hashes with those of kernels/doctor/recorded.json. From a card
that is not recorded, send what it prints with a pull request that adds its last line to that file. Without a GPU it tests the
CPU.
Exit code 0: all holds; 1: it does not; 2: a card that has no kernels, or a bad argument.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from kernels.doctor.checks import of_ops, of_run, of_sampler
from kernels.doctor.facts import HASHES, KEYS, compiled_for, facts, judge, recorded
from kernels.host.command import Parser, interruptible


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines as the arguments say; returns the exit code."""
    parser = Parser(
        prog="python -m kernels.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="without the small run")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument("--facts", action="store_true", help="say what there is, and check nothing")
    parser.add_family()
    asked = parser.parse_args(arguments)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.require(device, asked.family)
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {text}", file=sys.stderr if asked.json else sys.stdout, flush=True)

    found = facts(device)
    if device == "cpu" and not asked.json:
        print("no GPU is used: the CPU is tested")
    if not asked.json:
        print(*(f"{name:<16} {value}" for name, value in found.items()), sep="\n")
        print(f"{'compiled':<16} {compiled_for(found)}")
    report = found | {"compiled": compiled_for(found)}
    if not asked.facts:
        report |= examine(found, device, asked.family, asked.quick, say)
        _conclude(report, asked.json)
    if asked.json:
        print(json.dumps(report, indent=1))
    return 1 if report.get("wrong") or not report.get("holds", True) else 0


def examine(found: dict[str, Any], device: str, family: str, quick: bool, say: Any) -> dict[str, Any]:
    """Runs the checks; returns what is wrong, the line for recorded.json, and how it compares with what is there."""
    wrong, ops = of_ops(device, say)
    wrong += of_sampler(device, family, say)
    run = ""
    if not quick:
        more, run = of_run(device, family, say)
        wrong += more
    line = {name: found[name] for name in (*KEYS, "driver", "torch", "triton") if name in found} | {
        "ops": ops,
        "run": run,
    }
    said, holds = judge(line, recorded())
    return {"wrong": wrong, "line": line, "compared": said, "holds": holds}


def _conclude(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return
    print(*(f"WRONG: {what}" for what in report["wrong"]), *report["compared"], sep="\n")
    print("all that was checked holds" if not report["wrong"] and report["holds"] else "NOT as it should be")
    if all(report["line"][name] for name in HASHES):
        print("line for kernels/doctor/recorded.json:", json.dumps(report["line"]), sep="\n")


if __name__ == "__main__":
    with interruptible():
        sys.exit(main())
