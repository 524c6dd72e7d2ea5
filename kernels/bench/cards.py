"""The speed table of the GPU kernels: the shapes of Qwen3-8B on one card, each beside a baseline in the same run.

A ratio is the baseline's time over ours: above 1 we are faster. The baseline is

matmul, matmul_dx, matmul_dw    cuBLAS (torch.mm) on the same operands; its output is always bfloat16, while ours is float32
                                for dW and for the root that a rank with some of the leaves leaves
matmul_fp8                      torch's FP8 matmul (torch._scaled_mm), which has one scale a tensor, on the same values
attention, attention_backward   the faster of cuDNN and torch's flash attention
attention_decode, rms_norm,     the faster of two device-to-device copies that move as many bytes as the op must (half read,
  add_rms_norm, rope, swiglu,   half written), so the ratio is the share of copy bandwidth
linear_logprob                  cuBLAS for the three matmuls of forward and backward alone, with no softmax

Kernels compile on first use, so a pool of processes first runs every case once and leaves the compiled kernels on disk.
"""

import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from kernels.bench.card_rows import rows
from kernels.bench.table import Cell, show
from kernels.bench.timer import Result, Row, ceilings, measure, versions
from kernels.device import family_of
from kernels.gpu.card import card_of, choose_family, chosen_family
from kernels.host.command import write_json
from kernels.spec import all_specs

TARGETS = {
    "matmul, M <= 64": 1.05,
    "matmul_fp8, M <= 256": None,
    "matmul_fp8, 8192 rows": 0.85,
    "matmul one by one, M <= 64": None,
    "matmul, M 128 and 256": 0.95,
    **{f"matmul, M >= 1024, {leaves} leaves": 0.95 for leaves in (8, 4, 2)},
    **{f"matmul, a rank of {size}, M <= 64": 1.0 for size in (2, 4, 8)},
    "matmul_dx, 8192 tokens": 0.90,
    **{f"matmul_dw, 8192 tokens, groups {groups}": 0.90 for groups in (1, 8, 32)},
}
"""What the geometric mean of a group of rows should reach; rows outside a group have targets of their own."""


@dataclass(frozen=True)
class Mean:
    """Holds the geometric mean of the ratios of a group."""

    group: str
    ratio: float
    target: float | None


def met(ratio: float, target: float | None) -> bool | None:
    """Compares a ratio with its target; None where there is none. Not rounded: 0.8999 misses 0.90."""
    return None if target is None else ratio >= target


def geometric_mean(ratios: Iterable[float]) -> float:
    """Computes the geometric mean of positive ratios."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def means(results: list[Result]) -> list[Mean]:
    """Returns the mean of each group that has rows, in their order."""
    groups: dict[str, list[float]] = {}
    for result in results:
        if result.group:
            groups.setdefault(result.group, []).append(result.ratio)
    return [Mean(group, geometric_mean(ratios), TARGETS[group]) for group, ratios in groups.items()]


def _prepare(op: str, case: str) -> str | None:
    """Leaves on disk whatever the rows of a case compile, in a process of the pool; returns the error, if there is one."""
    try:
        with torch.no_grad():
            for row in rows():
                if (row.op, row.case) == (op, case):
                    bout = row.build()
                    bout.holds()
                    bout.ours[0]()
                    torch.cuda.synchronize()
                    del bout
        torch.cuda.empty_cache()
    except Exception as error:  # the row meets it again when it is measured, and says so
        return f"{op} {case}: {type(error).__name__}: {str(error)[:200]}"
    return None


def prepare(chosen: list[Row], workers: int, progress: Progress) -> None:
    """Compiles what the rows launch, side by side."""
    cases = list(dict.fromkeys((row.op, row.case) for row in chosen))
    cases.sort(key=lambda case: case[0] != "linear_logprob")  # it compiles longest, so it starts first
    task = progress.add_task("compiling", total=len(cases))
    processes, told = min(workers, len(cases)), (chosen_family(),)
    with ProcessPoolExecutor(processes, get_context("spawn"), choose_family, told) as pool:
        for done in as_completed([pool.submit(_prepare, *case) for case in cases]):
            if done.result():
                progress.console.print(f"[yellow]compiling {done.result()}")
            progress.advance(task)


def time_text(microseconds: float) -> str:
    """Formats a time as microseconds below 1 ms and as milliseconds above."""
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"


def _verdict(ratio: float, target: float | None) -> tuple[str, str]:
    if target is None:
        return "", ""
    return f"{target:.2f}", "[green]met[/]" if met(ratio, target) else "[red]not met[/]"


def print_table(results: list[Result], out: Console) -> None:
    """Prints every row, and below the rows of a group their geometric mean."""
    rows: list[tuple[Cell, ...]] = []
    last = {r.group: i for i, r in enumerate(results) if r.group}
    mean = {m.group: m for m in means(results)}
    for i, r in enumerate(results):
        speed = f"{r.speed:.0f} {r.unit}" if r.unit == "TFLOP/s" else f"{r.speed:.2f} {r.unit}"
        ours, theirs = (time_text(r.microseconds), speed), (r.baseline, time_text(r.baselines[r.baseline]))
        rows.append((r.op, r.case, r.size, ours, theirs, f"{r.ratio:.3f}", _verdict(r.ratio, r.target)))
        if r.group and last[r.group] == i:
            m = mean[r.group]
            verdict = _verdict(m.ratio, m.target)
            rows.append(
                ("[bold]geometric mean[/]", f"[bold]{m.group}[/]", "", "", "", f"[bold]{m.ratio:.3f}[/]", verdict)
            )
    show(out, ("op", "case", "size"), ("ours", "baseline", "ratio", "target"), rows)


def report(results: list[Result]) -> dict[str, list[dict[str, object]]]:
    """Returns what JSON has of the table: `rows` in microseconds, and `means` of the groups."""
    scored = [{**asdict(r), "baseline": r.baseline, "ratio": r.ratio, "met": met(r.ratio, r.target)} for r in results]
    groups = [{**asdict(m), "met": met(m.ratio, m.target)} for m in means(results)]
    return {"rows": scored, "means": groups}


def _time(chosen: list[Row], progress: Progress, failed: list[str]) -> Iterator[Result]:
    """Times each row, says so, and goes on with the others where one is refused or raises, which `failed` then says."""
    task = progress.add_task("timing", total=len(chosen))
    case = None
    for row in chosen:
        name, result = f"{row.op}, {row.case}, {row.size}", None
        progress.update(task, description=name)
        if case not in (None, (row.op, row.case)):
            torch.cuda.empty_cache()
        case = (row.op, row.case)
        try:
            result = measure(row)
            why = f"not timed, as it lacks {row.claim}"
        except Exception as error:  # the other rows are still worth having; the run fails
            why = f"{type(error).__name__}: {error}"
        if result is None:
            failed.append(f"{name}: {why}")
            progress.console.print(f"[red]{name}: {why}")
        else:
            sides = {"ours": result.microseconds, **result.baselines}
            times = ", ".join(f"{side} {time_text(t)}" for side, t in sides.items())
            progress.console.print(f"{name}: {times}, ratio {result.ratio:.3f}")
            yield result
        progress.advance(task)


def rows_of(family: str) -> list[Row]:
    """Lists the rows whose op a family has."""
    lacks = {spec.name for spec in all_specs() if family not in spec.families}
    return [row for row in rows() if row.op not in lacks]


def run(ops: list[str], path: Path | None, workers: int, out: Console) -> int:
    """Times every row, or those of `ops`, and prints the table; 1 if a row was refused or raised."""
    start = time.perf_counter()
    chosen = [row for row in rows_of(family_of(card_of(torch.device("cuda")))) if not ops or row.op in ops]
    failed: list[str] = []
    with Progress(console=out, transient=True) as progress, torch.no_grad():
        if workers:
            prepare(chosen, workers, progress)
        limits = ceilings()
        results = list(_time(chosen, progress, failed))
    where = versions()
    print_table(results, out)
    out.print(", ".join([*(f"{k} {v}" for k, v in where.items()), *(f"{k} {v:.2f}" for k, v in limits.items())]))
    if peak := max((r.peak_bytes for r in results if r.op == "linear_logprob"), default=0):
        out.print(f"linear_logprob allocates at most {peak / 2**30:.1f} GiB beside its operands")
    scored: list[Result | Mean] = [*results, *means(results)]
    targets = [met(r.ratio, r.target) for r in scored if r.target is not None]
    seconds = time.perf_counter() - start
    out.print(f"{sum(map(bool, targets))} of {len(targets)} targets met, {len(failed)} rows failed; {seconds:.0f} s")
    write_json(path, {**where, "ceilings": limits, **report(results), "failed": failed})
    return 1 if failed else 0


def default_workers() -> int:
    """Returns how many processes compile side by side."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))
