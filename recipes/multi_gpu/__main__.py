"""python -m recipes.multi_gpu [--quick]: everything that takes several GPUs of one host, in parts, each row run and judged.

Writes OUT/multi_gpu.json, OUT/multi_gpu.md and the log of every command; the folders of the runs are removed at the end. Exit
code 1 where a row does not hold. --quick takes minutes: Qwen3-8B's widths in 4 layers, short texts. Without it the model has
its 36 layers.
"""

import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from kernels.host.command import Parser, fail, interruptible
from kernels.packages import version_of
from kernels.scratch import scratch
from recipes.multi_gpu.command import ROOT
from recipes.multi_gpu.parts import PARTS, STAGES, Row, Setting
from recipes.multi_gpu.problems import write_problems
from recipes.multi_gpu.record import markdown


def facts(cards: list[str]) -> dict[str, str]:
    """Names the cards, the versions, the commit and the day."""
    found = {"cards": f"{len(cards)} x {cards[0]}", "python": platform.python_version()}
    for name in ("torch", "triton", "ray", "transformers"):
        found[name] = version_of(name) or "not installed"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found["commit"] = git.stdout.strip() or "not a git checkout"
    return found | {"date": time.strftime("%Y-%m-%d", time.gmtime())}


def show(row: Row) -> None:
    """Prints a row in a line."""
    figures = ", ".join(f"{name} {value}" for name, value in row.figures.items())
    print(
        f"{'ok  ' if row.ok else 'FAIL'} {row.part}: {row.case} ({row.seconds:.0f} s) {figures} {row.note}", flush=True
    )


def attempted(name: str, setting: Setting) -> Iterator[Row]:
    """Yields the rows of a part, and one more that says so where it broke: the other parts go on."""
    try:
        yield from PARTS[name](setting)
    except Exception as error:
        yield Row(name, "the part itself", False, 0.0, "", {}, f"{type(error).__name__}: {error}")


def main() -> None:
    """Runs the chosen parts and writes their page as they end; exit code 1 where a row does not hold."""
    parser = Parser(prog="recipes.multi_gpu", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("--quick", action="store_true", help="minutes: 4 layers, 3 steps of 64 sequences")
    parser.add_argument("--only", help=f"parts with commas between them: {','.join(PARTS)}")
    parser.add_argument("--layers", type=int, help="of Qwen3-8B's 36")
    parser.add_argument(
        "--minutes", type=float, help="stop after these; default 60, --quick: 5, which takes compiled kernels"
    )
    parser.add_argument("--no-fast", action="store_true", help="leave out numerics=fast")
    parser.add_argument("--data", type=Path, help="train.jsonl and test.jsonl as GSM8K has them; default: made up")
    parser.add_argument("--out", type=Path, default=Path("outputs/multi_gpu"))
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        fail(f"--only: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}", 2)
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if len(cards) < 2:
        fail(f"needs two GPUs or more, and there are {len(cards)}", 2)
    parser.require("cuda")
    count = 1 << min(3, len(cards).bit_length() - 1)
    args.out.mkdir(parents=True, exist_ok=True)
    out, rows = args.out.absolute(), list[Row]()
    with scratch() as folder:
        write_problems(folder)
        layers, steps, prompts, new_tokens = (4, 3, 8, 64) if args.quick else (36, 3, 16, 512)
        sizes = (args.layers or layers, steps, prompts, new_tokens)
        data, fast = (args.data or folder).absolute(), not args.no_fast
        limit = 60 * (args.minutes or (5 if args.quick else 60))
        until = time.monotonic() + limit
        gib = min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / 2**30
        most = limit if len(chosen) == 1 else limit / 2  # a command that hangs leaves the other parts their time
        setting = Setting(out, folder, count, *sizes, data, most, until, fast, args.quick, gib)
        about = {"command": " ".join(["python -m recipes.multi_gpu", *sys.argv[1:]]), **facts(cards[:count])}
        lock = threading.Lock()

        def work(name: str) -> None:
            for row in attempted(name, setting):
                with lock:
                    rows.append(row)
                    show(row)
                    (out / "multi_gpu.json").write_text(
                        json.dumps(about | {"rows": [asdict(r) for r in rows]}, indent=1)
                    )
                    (out / "multi_gpu.md").write_text(markdown(rows, about))

        for stage in STAGES:
            with ThreadPoolExecutor() as pool:
                list(pool.map(work, [name for name in stage if name in chosen]))
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(failed)} of {len(rows)} rows hold; {out / 'multi_gpu.md'}")
    if failed:
        fail(f"{failed[0].part}, {failed[0].case}: {failed[0].note}", 1)


if __name__ == "__main__":
    with interruptible():
        main()
