"""python -m kernels.bench: how fast each op is, beside torch's own op for the same thing in the same process.

An op whose contract fails is not timed. On a CPU it reads the specs and knows no op by name; --device cuda runs the table of
real shapes in bench_gpu.py.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kernels import bench_gpu, contract
from kernels.host.command import Parser, interruptible, output, progress, threads
from kernels.spec import Case, Inputs, OpSpec, all_specs, as_tuple

_SAMPLES = 9
_SAMPLE_SECONDS = 0.03


@dataclass(frozen=True)
class Timing:
    op: str
    case: str
    dtype: str
    direction: str  # forward or backward
    milliseconds: float
    vendor_milliseconds: float
    speed: float  # 10^9 operations or bytes a second
    unit: str  # GFLOP/s or GB/s

    @property
    def ratio(self) -> float:
        """Of the vendor's time to ours: above 1 we are faster."""
        return self.vendor_milliseconds / self.milliseconds


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def compare(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each of `runs`: the fastest of several samples, taken in turn, as other load can only add to them."""
    repeats = []
    for run in runs:
        run()
        once = min(_seconds(run, device, 1) for _ in range(3))
        repeats.append(max(1, int(_SAMPLE_SECONDS / max(once, 1e-7))))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(_SAMPLES):
        for run, count, seen in zip(runs, repeats, samples, strict=True):
            seen.append(_seconds(run, device, count))
    return [min(seen) for seen in samples]


def _backward(run: Callable[[Inputs], object], spec: OpSpec, inputs: Inputs, dy: torch.Tensor) -> Callable[[], object]:
    """The gradient alone, of a forward that ran once."""
    leaf = {name: inputs[name].detach().requires_grad_() for name in spec.differentiable}
    y = as_tuple(run({**inputs, **leaf}))[0]
    return lambda: torch.autograd.grad(y, list(leaf.values()), dy, retain_graph=True)


def broken_claims(spec: OpSpec, case: Case, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What of the contract does not hold here; empty if all of it does."""
    generator = torch.Generator().manual_seed(0)
    inputs = spec.make(case, generator, device, dtype)
    return [
        what
        for what, actual, expected in contract.quick(spec, inputs, generator)
        if not contract.same_bits(actual, expected)
    ]


def time_op(spec: OpSpec, case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Timing]:
    inputs = spec.make(case, torch.Generator().manual_seed(0), device, dtype)
    work = spec.work(case, dtype.itemsize)
    amount, unit = (work.flops, "GFLOP/s") if work.by_flops else (work.bytes, "GB/s")
    run = spec.timed or spec.run
    pairs = [("forward", amount, lambda: run(inputs), lambda: spec.vendor(inputs))]
    if spec.differentiable and work.backward:
        dy = contract.cotangent(spec, inputs)
        ours, theirs = _backward(spec.run, spec, inputs, dy), _backward(spec.vendor, spec, inputs, dy)
        pairs.append(("backward", amount * work.backward, ours, theirs))
    for direction, size, ours, theirs in pairs:
        with torch.set_grad_enabled(direction == "backward"):
            seconds, vendor = compare([ours, theirs], device)
        label = str(dtype).removeprefix("torch.")
        yield Timing(
            spec.name, spec.label(case), label, direction, seconds * 1e3, vendor * 1e3, size / seconds / 1e9, unit
        )


def table(timings: list[Timing], title: str) -> Table:
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("op", "case"):
        view.add_column(column, no_wrap=True)
    for column in ("ms", "speed", "torch ms", "torch / ours"):
        view.add_column(column, justify="right", no_wrap=True)
    for t in timings:
        op = t.op if t.direction == "forward" else f"{t.op} {t.direction}"
        numbers = (f"{t.milliseconds:.3f}", f"{t.speed:.1f} {t.unit}", f"{t.vendor_milliseconds:.3f}", f"{t.ratio:.2f}")
        view.add_row(op, f"{t.case}, {t.dtype}", *numbers)
    return view


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op (may be given again)")
    parser.add_argument("--threads", type=threads, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=output, help="also write the numbers to this file")
    parser.add_argument(
        "--workers", type=int, default=bench_gpu.default_workers(), help="processes that compile GPU kernels; 0: none"
    )
    options = parser.parse_args(arguments)
    specs = {spec.name: spec for spec in all_specs()}
    known = list(specs) if options.device == "cpu" else list(dict.fromkeys(row.op for row in bench_gpu.rows()))
    if unknown := set(options.op or ()) - set(known):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    device, console = torch.device(options.device), Console(width=None if sys.stdout.isatty() else 180)
    if options.device == "cuda":
        parser.require_card()
        return bench_gpu.run(options.op, options.json, options.workers, console)
    torch.set_num_threads(options.threads)
    timings, refused = [], []
    for name in progress(options.op or list(specs)):
        spec = specs[name]
        dtype = spec.dtypes_on(device)[0]
        broken = broken_claims(spec, spec.cases[1], device, dtype)
        if broken:
            refused.append(name)
            console.print(f"[red]{name} is not timed: its contract fails for {'; '.join(broken)}")
            continue
        for case in spec.bench:
            timings += time_op(spec, case, device, dtype)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(device)}
    console.print(table(timings, f"torch {where['torch']}, {where['threads']} threads, {where['processor']}"))
    if options.json:
        rows = [{**asdict(t), "ratio": t.ratio} for t in timings]
        options.json.write_text(json.dumps({**where, "timings": rows, "refused": refused}, indent=1) + "\n")
    return 1 if refused else 0


if __name__ == "__main__":
    with interruptible():
        sys.exit(main())
