"""Serves the engine's and the trainer's benchmark: the model that they time in `transformers`, and tokens a second
beside ours."""

import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

from kernels.bench.table import console, show
from kernels.bench.timer import Call, samples
from kernels.host.command import Parser, count, output, threads, write_json
from kernels.model import costs
from kernels.model.known import BENCH, ON_CARDS
from kernels.scratch import scratch
from kernels.weights.files import save
from kernels.weights.initial import initial


def median_seconds(work: Call, repeats: int) -> float:
    """Returns the median of `repeats` runs after one that is not counted."""
    return statistics.median(samples(work, repeats))


def arguments(description: str | None) -> Parser:
    """Returns a parser of what both benchmarks ask; `model` is of the table on a GPU."""
    parser = Parser(description=description)
    parser.add_argument("--threads", type=threads, default=2)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--json", type=output, help="write the rows to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=ON_CARDS, default="qwen3_8b", help="whose widths, on a GPU")
    return parser


def peer() -> Any:
    """Returns BENCH with the weights of seed 0 in `transformers`, with SDPA."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with scratch() as folder:
        save(BENCH, initial(BENCH, 0), folder)
        return transformers.Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


class Comparison:
    """Collects tokens per second, ours and theirs; the ratio is their time over ours, above 1 is faster."""

    def __init__(self, work: str, case: str, threads: int) -> None:
        self.case, self.threads = case, threads
        self.title = f"{work}, {costs.parameter_count(BENCH):,} parameters, {threads} threads"
        self.rows: list[dict[str, Any]] = []

    def add(self, case: str, tokens: int, ours: float, theirs: float) -> None:
        """Records a pair of times; `ours` and `theirs` in seconds."""
        row = {"case": case, "ours": tokens / ours, "transformers": tokens / theirs, "ratio": theirs / ours}
        self.rows.append(row)

    def show(self, path: Path | None) -> None:
        """Prints the table, and writes it as JSON."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        rows = [(r["case"], f"{r['ours']:,.0f}", f"{r['transformers']:,.0f}", f"{r['ratio']:.2f}") for r in self.rows]
        out = console()
        show(out, (self.case,), ("ours, tokens/s", "transformers, tokens/s", "ratio"), rows, self.title)
        out.print(platform.machine(), *(f"{name} {version}" for name, version in versions.items()))
        write_json(path, {"rows": self.rows, "threads": self.threads, **versions})
