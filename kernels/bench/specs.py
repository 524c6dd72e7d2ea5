"""python -m kernels.bench: how fast each op is, beside torch's own op for the same thing in the same process.

An op whose contract fails is not timed. On a CPU it reads the specs and knows no op by name; --device cuda runs the table of
real shapes in cards.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console

from kernels import contract
from kernels.bench import cards
from kernels.bench.table import console, show
from kernels.bench.timer import in_turn, processor
from kernels.host.command import Parser, output, progress, threads, write_json
from kernels.spec import Case, Inputs, OpSpec, Outputs, all_specs, as_tuple

_SAMPLES = 9
_SAMPLE_SECONDS = 0.03


@dataclass(frozen=True)
class Timing:
    """Holds how long an op took in one direction, and how long torch's own."""

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
        """Divides the vendor's time by ours: above 1 we are faster."""
        return self.vendor_milliseconds / self.milliseconds


def _backward(run: Callable[[Inputs], Outputs], spec: OpSpec, inputs: Inputs, dy: torch.Tensor) -> Callable[[], object]:
    """Returns a call for the gradient alone, of a forward that ran once."""
    leaf = {name: inputs[name].detach().requires_grad_() for name in spec.differentiable}
    y = as_tuple(run({**inputs, **leaf}))[0]
    return lambda: torch.autograd.grad(y, list(leaf.values()), dy, retain_graph=True)


def broken_claims(spec: OpSpec, case: Case, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Lists what of the contract does not hold here; empty if all of it does."""
    generator = torch.Generator().manual_seed(0)
    inputs = spec.make(case, generator, device, dtype)
    return [
        what
        for what, actual, expected in contract.quick(spec, inputs, generator)
        if not contract.same_bits(actual, expected)
    ]


def time_op(spec: OpSpec, case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Timing]:
    """Times an op and torch's own on one case: the fastest of several slices, as other load can only add to them."""
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
            seen = in_turn([theirs, ours], _SAMPLE_SECONDS, _SAMPLES, device.type == "cuda")
        vendor, seconds = map(min, seen)
        label = str(dtype).removeprefix("torch.")
        yield Timing(
            spec.name, spec.label(case), label, direction, seconds * 1e3, vendor * 1e3, size / seconds / 1e9, unit
        )


def print_table(timings: list[Timing], title: str, out: Console) -> None:
    """Prints a line for each timing, beside torch's own op."""
    rows = []
    for t in timings:
        op = t.op if t.direction == "forward" else f"{t.op} {t.direction}"
        ours, theirs = (f"{t.milliseconds:.3f}", f"{t.speed:.1f} {t.unit}"), f"{t.vendor_milliseconds:.3f}"
        rows.append((op, f"{t.case}, {t.dtype}", *ours, theirs, f"{t.ratio:.2f}"))
    show(out, ("op", "case"), ("ms", "speed", "torch ms", "torch / ours"), rows, title)


def time_all(ops: list[str], out: Console) -> tuple[list[Timing], list[str]]:
    """Times the ops of these names on the CPU; also returns those whose contract fails, which are not timed."""
    device, specs = torch.device("cpu"), {spec.name: spec for spec in all_specs()}
    timings: list[Timing] = []
    refused = []
    for name in progress(ops or list(specs)):
        spec = specs[name]
        dtype = spec.dtypes_on(device)[0]
        if broken := broken_claims(spec, spec.cases[1], device, dtype):
            refused.append(name)
            out.print(f"[red]{name} is not timed: its contract fails for {'; '.join(broken)}")
            continue
        for case in spec.bench:
            timings += time_op(spec, case, device, dtype)
    return timings, refused


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if an op was refused."""
    parser = Parser(prog="python -m kernels.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="only this op (may be given again)")
    parser.add_argument("--threads", type=threads, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=output, help="also write the numbers to this file")
    parser.add_argument(
        "--workers", type=int, default=cards.default_workers(), help="processes that compile GPU kernels; 0: none"
    )
    parser.add_family()
    options = parser.parse_args(arguments)
    on_gpu, out = options.device == "cuda", console()
    known = list(dict.fromkeys(row.op for row in cards.rows())) if on_gpu else [spec.name for spec in all_specs()]
    if unknown := set(options.op) - set(known):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    parser.require(options.device, options.family)
    if on_gpu:
        return cards.run(options.op, options.json, options.workers, out)
    torch.set_num_threads(options.threads)
    timings, refused = time_all(options.op, out)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor()}
    print_table(timings, f"torch {where['torch']}, {where['threads']} threads, {where['processor']}", out)
    rows = [{**asdict(t), "ratio": t.ratio} for t in timings]
    write_json(options.json, {**where, "timings": rows, "refused": refused})
    return 1 if refused else 0
