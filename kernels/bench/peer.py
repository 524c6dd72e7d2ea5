"""What the engine's and the trainer's benchmark share: the model they time, its peer, and the table."""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from kernels.host.command import Parser, count, output, threads
from kernels.model import ModelConfig
from kernels.weights.files import save
from kernels.weights.initial import initial

BENCH_MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    max_positions=1024,
    rms_eps=1e-6,
    rope_theta=1e4,
    tied=False,
    leaves=8,
)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def arguments(description: str | None) -> Parser:
    parser = Parser(description=description)
    parser.add_argument("--threads", type=threads, default=2)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--json", type=output, help="write the rows to this file")
    return parser


def peer() -> Any:
    """BENCH_MODEL with the weights of seed 0 in `transformers`, with SDPA."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(BENCH_MODEL, initial(BENCH_MODEL, 0), folder)
        return transformers.Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


class Comparison:
    """Rows of tokens per second, ours and theirs; the ratio is their time over ours, above 1 is faster."""

    def __init__(self, work: str, case: str, threads: int) -> None:
        self.threads = threads
        self.rows: list[dict[str, Any]] = []
        self.table = Table(title=f"{work}, {BENCH_MODEL.parameter_count:,} parameters, {threads} threads")
        for column in (case, "ours, tokens/s", "transformers, tokens/s", "ratio"):
            self.table.add_column(column, justify="right")

    def add(self, case: str, tokens: int, ours: float, theirs: float) -> None:
        """`ours` and `theirs` in seconds."""
        row = {"case": case, "ours": tokens / ours, "transformers": tokens / theirs, "ratio": theirs / ours}
        self.rows.append(row)
        self.table.add_row(case, f"{row['ours']:,.0f}", f"{row['transformers']:,.0f}", f"{row['ratio']:.2f}")

    def show(self, path: Path | None) -> None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        Console().print(self.table)
        print(platform.machine(), *(f"{name} {version}" for name, version in versions.items()))
        if path:
            with open(path, "w") as file:
                json.dump({"rows": self.rows, "threads": self.threads, **versions}, file, indent=2)
