"""Times calls, by the clock on a CPU and by the device's on a GPU; and the rows of the GPU tables, with what the card
gives at best.

Calls of a row lie in a CUDA graph (unless the row says "one by one", where launches count) over so many copies of
the operands that weights and keys come from memory, not from L2; where an op has an autograd graph it is launched one by one,
and takes milliseconds. The baseline runs before, between and after ours in slices of some milliseconds, as clocks drift; a
time is the median over slices. A row is not timed unless the call on its first operands keeps its claim, bit by bit.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from kernels.device import family_of
from kernels.gpu.card import card_of

Call = Callable[[], object]

_ROTATED = 400e6  # bytes of operands that calls walk before one returns: 8 times the L2 cache of an H100
_SLICE_SECONDS = 0.005
_ROUNDS = 5


@dataclass(frozen=True)
class Bout:
    """Holds the two sides of a row, with operands on the GPU. A side is the same call over rotating operands."""

    ours: list[Call]
    baselines: dict[str, list[Call]]
    holds: Callable[[], bool]  # whether the claim holds for ours


@dataclass(frozen=True)
class Row:
    """Describes one line of the table, and builds what it times."""

    op: str
    case: str  # rows of one case share most of their kernels
    size: str
    claim: str  # what is checked before it is timed
    work: float  # floating-point operations, or bytes, of one call
    unit: str  # TFLOP/s or TB/s
    build: Callable[[], Bout] = field(repr=False)
    group: str | None = None
    target: float | None = None
    graph: bool = True


@dataclass(frozen=True)
class Result:
    """Holds what a row measured."""

    op: str
    case: str
    size: str
    group: str | None
    target: float | None
    microseconds: float
    baselines: dict[str, float]  # microseconds of each
    speed: float
    unit: str
    peak_bytes: int  # allocated by one call of ours beyond its operands, at most

    @property
    def baseline(self) -> str:
        """Names the fastest."""
        return min(self.baselines, key=self.baselines.__getitem__)

    @property
    def ratio(self) -> float:
        """Divides the chosen baseline's time by ours: above 1 we are faster."""
        return self.baselines[self.baseline] / self.microseconds


def mean_seconds(run: Call, repeats: int, on_gpu: bool) -> float:
    """Returns the seconds of one of `repeats` runs in a row."""
    if on_gpu:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def samples(run: Call, count: int, on_gpu: bool = False, before: Call | None = None) -> list[float]:
    """Returns the seconds of each of `count` runs, after one that is not counted; `before` each, uncounted, runs
    `before`. Runs on a GPU follow one another without a pause."""
    prepare = before or (lambda: None)
    prepare()
    run()
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    seconds = []
    for _ in range(count):
        prepare()
        if on_gpu:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            marks.append((first, last))
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    if on_gpu:
        torch.cuda.synchronize()
    return seconds + [first.elapsed_time(last) / 1e3 for first, last in marks]


def in_turn(runs: list[Call], slice_seconds: float, rounds: int, on_gpu: bool) -> list[list[float]]:
    """Returns the seconds of each of `runs`, of slices of about `slice_seconds` taken in turn, as clocks and load
    drift. The last one is ours: the others also run after it, so that all see one clock."""
    repeats = []
    for run in runs:
        run()
        once = min(mean_seconds(run, 2, on_gpu) for _ in range(2))
        repeats.append(max(1, int(slice_seconds / max(once, 1e-7))))
    seen: list[list[float]] = [[] for _ in runs]
    for i in [i for _ in range(rounds) for i in range(len(runs))] + list(range(len(runs) - 1)):
        seen[i].append(mean_seconds(runs[i], repeats[i], on_gpu))
    return seen


def _each(calls: list[Call]) -> None:
    for call in calls:
        call()


def recorded(calls: list[Call]) -> Call:
    """Returns the replay of a graph of the calls. They run once outside it, for what compiles, plans or allocates on
    first use."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _each(calls)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _each(calls)
    return graph.replay


def interleaved(sides: list[list[Call]], graph: bool) -> list[float]:
    """Returns the microseconds of a call of each side, ours last: medians over slices."""
    runs: list[Call] = [recorded(calls) if graph else partial(_each, calls) for calls in sides]
    slice_seconds = _SLICE_SECONDS if graph else 4 * _SLICE_SECONDS  # each starts on an idle card, behind a launch
    seen = in_turn(runs, slice_seconds, _ROUNDS, True)
    return [statistics.median(times) / len(calls) * 1e6 for times, calls in zip(seen, sides, strict=True)]


def measure(row: Row) -> Result | None:
    """Times a row; None if its claim does not hold: then it is not timed."""
    bout = row.build()
    if not bout.holds():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bout.ours[0]()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    *theirs, ours = interleaved([*bout.baselines.values(), bout.ours], row.graph)
    scale = 1e6 * {"TFLOP/s": 1e-12, "TB/s": 1e-12}[row.unit]
    return Result(
        row.op,
        row.case,
        row.size,
        row.group,
        row.target,
        ours,
        dict(zip(bout.baselines, theirs, strict=True)),
        row.work / ours * scale,
        row.unit,
        peak,
    )


def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    """Draws bfloat16 numbers on the card."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


def copies(size: float) -> int:
    """Returns how many operands of `size` bytes calls rotate over."""
    return max(1, math.ceil(_ROTATED / size))


def turns(calls: list[Call]) -> list[Call]:
    """Repeats the calls, up to 16: a replay then costs nothing beside what it holds."""
    return calls * math.ceil(16 / len(calls))


def device_copies(size: float) -> dict[str, list[Call]]:
    """Returns copies that move `size` bytes each, half of it read and half written: by the driver, and by an
    elementwise kernel."""
    pairs = [torch.empty(2, int(size) // 8, device="cuda", dtype=torch.int32).random_() for _ in range(copies(size))]
    return {
        "copy": turns([partial(pair[1].copy_, pair[0]) for pair in pairs]),
        "copying kernel": turns([partial(torch.bitwise_not, pair[0], out=pair[1]) for pair in pairs]),
    }


def group_offsets(count: int, rows: int) -> torch.Tensor:
    """Returns the offsets of `count` equal groups of rows."""
    return torch.arange(0, rows + 1, rows // count, device="cuda")


def ceilings() -> dict[str, float]:
    """Measures what the card gives at best: the copy's TB/s over 2 GiB, the vendor's TFLOP/s on an 8192^3 product."""
    a, b = (normal(8192, 8192) for _ in range(2))
    size = float(1 << 31)
    *copied, multiplied = interleaved([*device_copies(size).values(), [lambda: torch.mm(a, b)]], True)
    return {"copy TB/s": size / min(copied) / 1e6, "torch.mm 8192^3 TFLOP/s": 2 * 8192.0**3 / multiplied / 1e6}


def processor() -> str:
    """Names the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    """Names the card and the libraries under it."""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": family_of(card_of(torch.device("cuda"))) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }
