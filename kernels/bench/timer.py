"""How a row of the GPU tables is timed, and what the card gives at best.

Calls lie in a CUDA graph (unless the row says "one by one", where launches count) over so many copies of
the operands that weights and keys come from memory, not from L2; where an op has an autograd graph it is launched one by one,
and takes milliseconds. The baseline runs before, between and after ours in slices of some milliseconds, as clocks drift; a
time is the median over slices. A row is not timed unless the call on its first operands keeps its claim, bit by bit.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata

import torch

Call = Callable[[], object]

_ROTATED = 400e6  # bytes of operands that calls walk before one returns: 8 times the L2 cache of an H100
_SLICE_SECONDS = 0.005
_ROUNDS = 5


@dataclass(frozen=True)
class Bout:
    """The two sides of a row, with operands on the GPU. A side is the same call over rotating operands."""

    ours: list[Call]
    baselines: dict[str, list[Call]]
    holds: Callable[[], bool]  # whether the claim holds for ours


@dataclass(frozen=True)
class Row:
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
        """The fastest."""
        return min(self.baselines, key=self.baselines.__getitem__)

    @property
    def ratio(self) -> float:
        return self.baselines[self.baseline] / self.microseconds


def _each(calls: list[Call]) -> None:
    for call in calls:
        call()


def _recorded(calls: list[Call]) -> Call:
    """A graph of the calls; they run once outside it, for what compiles, plans or allocates on first use."""
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


def _seconds(run: Call, repeats: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def interleaved(sides: list[list[Call]], graph: bool) -> list[float]:
    """Microseconds of a call of each side. The last side is ours: the others also run after it, so both see one clock."""
    runs = [_recorded(calls) if graph else lambda calls=calls: _each(calls) for calls in sides]
    repeats = []
    for run in runs:
        run()
        slice_seconds = _SLICE_SECONDS if graph else 4 * _SLICE_SECONDS  # each starts on an idle card, behind a launch
        repeats.append(max(1, int(slice_seconds / _seconds(run, 2))))
    seen: list[list[float]] = [[] for _ in sides]
    turns = [i for _ in range(_ROUNDS) for i in range(len(sides))] + list(range(len(sides) - 1))
    for i in turns:
        seen[i].append(_seconds(runs[i], repeats[i]))
    return [statistics.median(times) / len(calls) * 1e6 for times, calls in zip(seen, sides, strict=True)]


def measure(row: Row) -> Result | None:
    """None if its claim does not hold: then it is not timed."""
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
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


def copies(size: float) -> int:
    """How many operands of `size` bytes calls rotate over."""
    return max(1, math.ceil(_ROTATED / size))


def turns(calls: list[Call]) -> list[Call]:
    """The same calls, again and again up to 16: a replay then costs nothing beside what it holds."""
    return calls * math.ceil(16 / len(calls))


def device_copies(size: float) -> dict[str, list[Call]]:
    """Copies that move `size` bytes each, half of it read and half written: by the driver, and by an elementwise kernel."""
    pairs = [torch.empty(2, int(size) // 8, device="cuda", dtype=torch.int32).random_() for _ in range(copies(size))]
    return {
        "copy": turns([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]),
        "copying kernel": turns([lambda pair=pair: torch.bitwise_not(pair[0], out=pair[1]) for pair in pairs]),
    }


def group_offsets(count: int, rows: int) -> torch.Tensor:
    return torch.arange(0, rows + 1, rows // count, device="cuda")


def ceilings() -> dict[str, float]:
    """What the card gives at best: the copy's TB/s over 2 GiB, the vendor's TFLOP/s on an 8192^3 product."""
    a, b = (normal(8192, 8192) for _ in range(2))
    size = float(1 << 31)
    *copied, multiplied = interleaved([*device_copies(size).values(), [lambda: torch.mm(a, b)]], True)
    return {"copy TB/s": size / min(copied) / 1e6, "torch.mm 8192^3 TFLOP/s": 2 * 8192.0**3 / multiplied / 1e6}


def versions() -> dict[str, str | None]:
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }
