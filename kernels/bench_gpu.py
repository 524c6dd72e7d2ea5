"""The speed table of the GPU kernels: the shapes of Qwen3-8B on one card, each beside a baseline in the same run.

A ratio is the baseline's time over ours: above 1 we are faster. The baseline is

matmul, matmul_dx, matmul_dw    cuBLAS (torch.mm) on the same operands; its output is always bfloat16, while ours is float32
                                for dW and for the root that a rank with some of the leaves leaves
attention, attention_backward   the faster of cuDNN and torch's flash attention
attention_decode, rms_norm,     the faster of two device-to-device copies that move as many bytes as the op must (half read,
  add_rms_norm, rope, swiglu    half written), so the ratio is the share of copy bandwidth
linear_logprob                  cuBLAS for the three matmuls of forward and backward alone, with no softmax

How a row is timed. Calls lie in a CUDA graph (unless the row says "one by one", where launches count) over so many copies of
the operands that weights and keys come from memory, not from L2; where an op has an autograd graph it is launched one by one,
and takes milliseconds. The baseline runs before, between and after ours in slices of some milliseconds, as clocks drift; a
time is the median over slices. A row is not timed unless the call on its first operands keeps its claim, bit by bit.

Kernels compile on first use, so a pool of processes first runs every case once and leaves the compiled kernels on disk.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.contract import same_bits
from kernels.model import ModelConfig
from kernels.ops import (
    add_rms_norm,
    attention,
    linear_logprob,
    matmul,
    rms_norm,
    rope,
    rope_table,
    swiglu,
    vocab_logprob,
    vocab_nodes,
)
from kernels.ops.attention import Pages
from kernels.ops.attention.spec import packed
from kernels.ops.matmul import input_gradient, weight_gradient
from kernels.tree import leaf_bounds

Call = Callable[[], object]

PROJECTIONS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
"""N and K of Qwen3-8B's weights. A tensor-parallel rank holds columns (N) of qkv and gate_up, and leaves (K) of o and down."""
BY_COLUMNS = ("qkv", "gate_up")
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCABULARY = 32, 8, 128, 4096, 12288, 151936
QWEN3_8B = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    layers=36,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_positions=40960,
    rms_eps=1e-6,
    rope_theta=1e6,
    tied=False,
    leaves=8,
)

TARGETS = {
    "matmul, M <= 64": 1.05,
    "matmul one by one, M <= 64": None,
    "matmul, M 128 and 256": 0.95,
    **{f"matmul, M >= 1024, {leaves} leaves": 0.95 for leaves in (8, 4, 2)},
    **{f"matmul, a rank of {size}, M <= 64": 1.0 for size in (2, 4, 8)},
    "matmul_dx, 8192 tokens": 0.90,
    **{f"matmul_dw, 8192 tokens, groups {groups}": 0.90 for groups in (1, 8, 32)},
}
"""What the geometric mean of a group of rows should reach; rows outside a group have targets of their own."""

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


@dataclass(frozen=True)
class Mean:
    """The geometric mean of the ratios of a group."""

    group: str
    ratio: float
    target: float | None


def met(ratio: float, target: float | None) -> bool | None:
    """None where there is no target. Not rounded: 0.8999 misses 0.90."""
    return None if target is None else ratio >= target


def geometric_mean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def means(results: list[Result]) -> list[Mean]:
    """One for each group that has rows, in their order."""
    groups: dict[str, list[float]] = {}
    for result in results:
        if result.group:
            groups.setdefault(result.group, []).append(result.ratio)
    return [Mean(group, geometric_mean(ratios), TARGETS[group]) for group, ratios in groups.items()]


# Timing ---------------------------------------------------------------------------------------------------------------


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


# Operands -------------------------------------------------------------------------------------------------------------


def _normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


def _copies(size: float) -> int:
    """How many operands of `size` bytes calls rotate over."""
    return max(1, math.ceil(_ROTATED / size))


def _turns(calls: list[Call]) -> list[Call]:
    """The same calls, again and again up to 16: a replay then costs nothing beside what it holds."""
    return calls * math.ceil(16 / len(calls))


def _copy(size: float) -> dict[str, list[Call]]:
    """Copies that move `size` bytes each, half of it read and half written: by the driver, and by an elementwise kernel."""
    pairs = [torch.empty(2, int(size) // 8, device="cuda", dtype=torch.int32).random_() for _ in range(_copies(size))]
    return {
        "copy": _turns([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]),
        "copying kernel": _turns([lambda pair=pair: torch.bitwise_not(pair[0], out=pair[1]) for pair in pairs]),
    }


def _groups(count: int, rows: int) -> torch.Tensor:
    return torch.arange(0, rows + 1, rows // count, device="cuda")


# Rows -----------------------------------------------------------------------------------------------------------------


def matmul_row(
    case: str, M: int, N: int, K: int, leaves: int, group: str | None, *, root: bool = False, graph: bool = True
) -> Row:
    """A forward; `root`: of a rank that holds some of the leaves, and leaves a float32 root."""
    out = torch.float32 if root else torch.bfloat16

    def build() -> Bout:
        from kernels.ops.matmul import order  # needs triton, which a machine without a GPU may lack

        x = _normal(M, K)
        weights = [_normal(N, K, std=K**-0.5) for _ in range(_copies(2 * N * K) if M <= 256 else 1)]

        def holds() -> bool:
            expected = order.contract(x, weights[0], leaf_bounds(K, leaves)).to(out)
            return same_bits(matmul(x, weights[0], leaves, out_dtype=out), expected)

        ours: list[Call] = [lambda w=w: matmul(x, w, leaves, out_dtype=out) for w in weights]
        theirs: list[Call] = [lambda w=w: torch.mm(x, w.T) for w in weights]
        return Bout(*(_turns(ours), {"cuBLAS": _turns(theirs)}) if M <= 256 else (ours, {"cuBLAS": theirs}), holds)

    claim = "the bits of the reference order"
    size = f"M {M}" if graph else f"M {M}, one by one"
    return Row("matmul", case, size, claim, 2.0 * M * N * K, "TFLOP/s", build, group, graph=graph)


def matmul_rows() -> Iterator[Row]:
    for name, (N, K) in PROJECTIONS.items():
        case = f"{name} {N}x{K}, 8 leaves"
        for M in (1, 8, 16, 32, 64):
            yield matmul_row(case, M, N, K, 8, "matmul, M <= 64")
            yield matmul_row(case, M, N, K, 8, "matmul one by one, M <= 64", graph=False)
        for M in (128, 256):
            yield matmul_row(case, M, N, K, 8, "matmul, M 128 and 256")
    for name, (N, K) in PROJECTIONS.items():
        for leaves in (8, 4, 2):
            for M in (1024, 8192):
                case = f"{name} {N}x{K}, {leaves} leaves"
                yield matmul_row(case, M, N, K, leaves, f"matmul, M >= 1024, {leaves} leaves")
    for size in (2, 4, 8):
        for name, (N, K) in PROJECTIONS.items():
            columns = name in BY_COLUMNS
            n, k, leaves = (N // size, K, 8) if columns else (N, K // size, 8 // size)
            case = f"{name} {n}x{k}, {leaves} {'leaf' if leaves == 1 else 'leaves'}"
            for M in (1, 16, 64):
                yield matmul_row(case, M, n, k, leaves, f"matmul, a rank of {size}, M <= 64", root=not columns)


def matmul_gradient_rows(tokens: int = 8192) -> Iterator[Row]:
    for name, (N, K) in PROJECTIONS.items():
        work, case = 2.0 * tokens * N * K, f"{name} {N}x{K}"

        def build_dx(N: int = N, K: int = K) -> Bout:
            from kernels.ops.matmul import order

            dy, w = _normal(tokens, N), _normal(N, K, std=K**-0.5)
            return Bout(
                [lambda: input_gradient(dy, w, 8)],
                {"cuBLAS": [lambda: torch.mm(dy, w)]},
                lambda: same_bits(input_gradient(dy, w, 8), order.contract(dy, w.T, leaf_bounds(N, 8)).to(dy.dtype)),
            )

        def build_dw(count: int, N: int = N, K: int = K) -> Bout:
            from kernels.ops.matmul import order

            dy, x, groups = _normal(tokens, N), _normal(tokens, K), _groups(count, tokens)
            return Bout(
                [lambda: weight_gradient(dy, x, groups)],
                {"cuBLAS": [lambda: torch.mm(dy.T, x)]},
                lambda: same_bits(weight_gradient(dy, x, groups), order.contract(dy.T, x.T, groups.tolist())),
            )

        claim = "the bits of the reference order"
        size = f"{tokens} tokens"
        yield Row("matmul_dx", case, size, claim, work, "TFLOP/s", build_dx, "matmul_dx, 8192 tokens")
        for count in (1, 8, 32):
            group = f"matmul_dw, 8192 tokens, groups {count}"
            build = lambda count=count, build=build_dw: build(count)  # noqa: E731
            yield Row("matmul_dw", case, f"{size}, groups {count}", claim, work, "TFLOP/s", build, group)


_VENDOR_ATTENTION = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def _vendor_attention(
    kind: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int
) -> torch.Tensor:
    """Of sequences of one length, [T, heads, head_dim] seen as [sequences, heads, tokens, head_dim]."""
    q, k, v = (t.unflatten(0, (sequences, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(kind):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention_rows(tokens: int = 16384) -> Iterator[Row]:
    scale = HEAD_DIM**-0.5
    for n in (1024, 4096, 16384):
        sequences = tokens // n
        work = 4.0 * sequences * HEADS * HEAD_DIM * n * (n + 1) / 2

        def operands(sequences: int = sequences, n: int = n) -> tuple[list[torch.Tensor], Pages]:
            qkv = [_normal(sequences * n, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            return qkv, packed(torch.full((sequences,), n), torch.device("cuda"))

        def build(sequences: int = sequences, n: int = n, operands=operands) -> Bout:  # type: ignore[no-untyped-def]
            (q, k, v), pages = operands()

            def holds() -> bool:
                """The last queries again, through the page table, which is another kernel."""
                m = 64
                at = torch.arange(n - m, n, dtype=torch.int32, device="cuda")
                tail = Pages(pages.table[-1:], 1, torch.zeros_like(at), at, torch.tensor([0, m], device="cuda"))
                return same_bits(attention(q[-m:], k, v, tail, scale), attention(q, k, v, pages, scale)[-m:])

            theirs: dict[str, list[Call]] = {
                name: [lambda kind=kind: _vendor_attention(kind, q, k, v, sequences)]
                for name, kind in _VENDOR_ATTENTION.items()
            }
            return Bout([lambda: attention(q, k, v, pages, scale)], theirs, holds)

        def build_backward(sequences: int = sequences, n: int = n, operands=operands) -> Bout:  # type: ignore[no-untyped-def]
            qkv, pages = operands()
            d_out = torch.randn_like(qkv[0])

            def gradient(run: Callable[..., torch.Tensor], *given: torch.Tensor, d: torch.Tensor) -> Call:
                leaf = [t.detach().requires_grad_() for t in given]
                with torch.enable_grad():
                    y = run(*leaf)
                return lambda: torch.autograd.grad(y, leaf, d, retain_graph=True)

            def holds() -> bool:
                """The last sequence again, behind a short neighbour of other tokens."""
                beside = packed(torch.tensor([100, n]), torch.device("cuda"))
                longer = [torch.cat([_normal(100, *t.shape[1:]), t[-n:]]) for t in (*qkv, d_out)]
                again = gradient(lambda *t: attention(*t, beside, scale), *longer[:3], d=longer[3])()
                whole = gradient(lambda *t: attention(*t, pages, scale), *qkv, d=d_out)()
                return all(same_bits(a[100:], b[-n:]) for a, b in zip(again, whole, strict=True))

            d_vendor = d_out.unflatten(0, (sequences, -1)).transpose(1, 2)
            theirs = {
                name: [gradient(lambda *t, kind=kind: _vendor_attention(kind, *t, sequences), *qkv, d=d_vendor)]
                for name, kind in _VENDOR_ATTENTION.items()
            }
            return Bout([gradient(lambda *t: attention(*t, pages, scale), *qkv, d=d_out)], theirs, holds)

        case, size = f"causal, heads {HEADS}/{KV_HEADS} of {HEAD_DIM}", f"{sequences} x {n} tokens"
        claim = "the bits of the last queries through a page table"
        yield Row("attention", case, size, claim, work, "TFLOP/s", build, target=0.90)
        claim = "the bits of the gradients beside another neighbour"
        yield Row(
            "attention_backward", case, size, claim, 2.5 * work, "TFLOP/s", build_backward, target=0.80, graph=False
        )


def decode_rows() -> Iterator[Row]:
    scale, page = HEAD_DIM**-0.5, 16
    for batch, n in (
        *((1, 512), (1, 4096), (1, 32768), (16, 512), (16, 8192), (16, 32768)),
        *((64, 512), (64, 4096), (256, 512), (256, 2048)),
    ):
        work = 4.0 * batch * n * KV_HEADS * HEAD_DIM

        def build(batch: int = batch, n: int = n, work: float = work) -> Bout:
            q, each = _normal(batch, HEADS, HEAD_DIM), torch.arange(batch, dtype=torch.int32, device="cuda")
            table = torch.randperm(batch * n // page, device="cuda").int().view(batch, -1)
            starts = torch.arange(batch + 1, device="cuda")
            pages = Pages(table, page, each, torch.full_like(each, n - 1), starts)
            pools = [[_normal(batch * n, KV_HEADS, HEAD_DIM) for _ in range(2)] for _ in range(_copies(work))]

            def holds() -> bool:
                """As one of two queries of a sequence, which another kernel takes."""
                both = torch.tensor([n - 2, n - 1], dtype=torch.int32, device="cuda")
                chunk = Pages(table[:1], page, torch.zeros_like(both), both, torch.tensor([0, 2], device="cuda"))
                pair = attention(q[:1].repeat(2, 1, 1), *pools[0], chunk, scale)
                return same_bits(pair[1:], attention(q, *pools[0], pages, scale)[:1])

            ours: list[Call] = [lambda pool=pool: attention(q, *pool, pages, scale) for pool in pools]
            return Bout(_turns(ours), _copy(work), holds)

        case, size = f"pages of {page}, heads {HEADS}/{KV_HEADS} of {HEAD_DIM}", f"batch {batch}, {n} keys"
        claim = "the bits of a query in a chunk"
        yield Row("attention_decode", case, size, claim, work, "TB/s", build, target=0.85 if work > 256e6 else None)


def logprob_rows(rows: int = 8192) -> Iterator[Row]:
    def build() -> Bout:
        x, head = _normal(rows, HIDDEN), _normal(VOCABULARY, HIDDEN, std=0.02)
        targets = torch.randint(VOCABULARY, (rows,), device="cuda")
        temperature, d = torch.ones(rows, device="cuda"), torch.randn(rows, device="cuda")
        groups = _groups(8, rows)

        def ours() -> tuple[torch.Tensor, ...]:
            leaf = x.detach().requires_grad_(), head.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(linear_logprob(leaf[0], leaf[1], targets, temperature, 8, groups), leaf, d)

        def head_gradient(rows: slice, groups: torch.Tensor) -> torch.Tensor:
            """In float32, as of a master weight."""
            leaf = head.float().requires_grad_()
            with torch.enable_grad():
                y = linear_logprob(x[rows], leaf, targets[rows], temperature[rows], 8, groups)
            return torch.autograd.grad(y, leaf, d[rows])[0]

        def holds() -> bool:
            """The sampler's path on some rows, the input gradient of those alone, the head's from two halves of the groups."""
            m = slice(rows // 2, rows // 2 + 200)
            logits = matmul(x[m], head, 8, out_dtype=torch.float32)
            nodes = vocab_nodes(logits, temperature[m], 8)
            sampled, _ = vocab_logprob(nodes, logits.gather(1, targets[m, None])[:, 0], temperature[m])
            few = x[m].detach().requires_grad_()
            with torch.enable_grad():
                alone = linear_logprob(few, head, targets[m], temperature[m], 8)
            trained = linear_logprob(x, head, targets, temperature, 8)[m]
            dx, d_head = ours()
            if not (
                same_bits(sampled, trained)
                and same_bits(alone.detach(), trained)
                and same_bits(torch.autograd.grad(alone, few, d[m])[0], dx[m])
            ):
                return False
            half = rows // 2
            whole = head_gradient(slice(0, half), _groups(4, half)) + head_gradient(slice(half, rows), _groups(4, half))
            return same_bits(whole.to(head.dtype), d_head)

        logits, dx, dw = x.new_empty(rows, VOCABULARY), torch.empty_like(x), torch.empty_like(head)

        def theirs() -> None:
            torch.mm(x, head.T, out=logits)
            torch.mm(logits, head, out=dx)
            torch.mm(logits.T, x, out=dw)

        return Bout([ours], {"cuBLAS, 3 matmuls": [theirs]}, holds)

    work = 6.0 * rows * VOCABULARY * HIDDEN
    claim = "the bits of the sampler's path, and of the gradients of parts of the batch"
    case, size = f"forward and backward, V {VOCABULARY}, n {HIDDEN}", f"{rows} tokens"
    yield Row("linear_logprob", case, size, claim, work, "TFLOP/s", build, target=0.90, graph=False)


def elementwise_row(op: str, case: str, moved: float, tokens: int, make: Callable[[], list[Callable]]) -> Row:
    """`make` gives runs over different operands; run(rows) is the op on a slice of the tokens."""

    def build() -> Bout:
        runs = [run for _ in range(_copies(moved)) for run in make()]
        some, every = slice(7, 10), slice(None)

        def holds() -> bool:
            return all(same_bits(a, b[some]) for a, b in zip(runs[0](some), runs[0](every), strict=True))

        return Bout(_turns([lambda run=run: run(every) for run in runs]), _copy(moved), holds)

    claim = "the bits of three rows alone"
    return Row(op, case, f"{tokens} tokens", claim, moved, "TB/s", build, target=0.90)


def elementwise_rows(T: int = 16384) -> Iterator[Row]:
    def norm(*shape: int) -> list[Callable]:
        x, w = _normal(T, *shape), _normal(shape[-1])
        return [lambda rows: (rms_norm(x[rows], w, 1e-6),)]

    def add_norm() -> list[Callable]:
        x, delta, w = _normal(T, HIDDEN), _normal(T, HIDDEN), _normal(HIDDEN)
        return [lambda rows: add_rms_norm(x[rows], delta[rows], w, 1e-6)]

    def rotary() -> list[Callable]:
        x, (cosine, sine) = _normal(T, HEADS, HEAD_DIM), (t.cuda() for t in rope_table(4096, HEAD_DIM, 1e6))
        positions = torch.arange(T, dtype=torch.int32, device="cuda") % 4096
        return [lambda rows: (rope(x[rows], cosine, sine, positions[rows]),)]

    def gated() -> list[Callable]:
        x = _normal(T, 2 * INTERMEDIATE)
        return [lambda rows: (swiglu(x[rows]),)]

    size = 2.0 * T * HIDDEN
    heads = f"heads {HEADS} of {HEAD_DIM}"
    yield elementwise_row("rms_norm", f"rows of {HIDDEN}", 2 * size, T, lambda: norm(HIDDEN))
    yield elementwise_row("rms_norm", heads, 2 * size, T, lambda: norm(HEADS, HEAD_DIM))
    yield elementwise_row("add_rms_norm", f"rows of {HIDDEN}", 4 * size, T, add_norm)
    yield elementwise_row("rope", heads, 2 * size, T, rotary)
    yield elementwise_row("swiglu", f"rows of 2 x {INTERMEDIATE}", 6.0 * T * INTERMEDIATE, T, gated)


def rows() -> list[Row]:
    return [
        *matmul_rows(),
        *attention_rows(),
        *decode_rows(),
        *matmul_gradient_rows(),
        *logprob_rows(),
        *elementwise_rows(),
    ]


def ceilings() -> dict[str, float]:
    """What the card gives at best: the copy's TB/s over 2 GiB, the vendor's TFLOP/s on an 8192^3 product."""
    a, b = (_normal(8192, 8192) for _ in range(2))
    size = float(1 << 31)
    *copied, multiplied = interleaved([*_copy(size).values(), [lambda: torch.mm(a, b)]], True)
    return {"copy TB/s": size / min(copied) / 1e6, "torch.mm 8192^3 TFLOP/s": 2 * 8192.0**3 / multiplied / 1e6}


# The run --------------------------------------------------------------------------------------------------------------


def _prepare(op: str, case: str) -> str | None:
    """In a process of the pool: whatever the rows of a case compile, on disk. The error, if it has one."""
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
    cases = list(dict.fromkeys((row.op, row.case) for row in chosen))
    cases.sort(key=lambda case: case[0] != "linear_logprob")  # it compiles longest, so it starts first
    task = progress.add_task("compiling", total=len(cases))
    with ProcessPoolExecutor(min(workers, len(cases)), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_prepare, *case) for case in cases]):
            if done.result():
                progress.console.print(f"[yellow]compiling {done.result()}")
            progress.advance(task)


def time_text(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"


def _verdict(ratio: float, target: float | None) -> tuple[str, str]:
    if target is None:
        return "", ""
    return f"{target:.2f}", "[green]met" if met(ratio, target) else "[red]not met"


def table(results: list[Result]) -> Table:
    """Every row, and below the rows of a group their geometric mean."""
    view = Table(box=box.SIMPLE_HEAD)
    for column in ("op", "case", "size"):
        view.add_column(column, no_wrap=True)
    for column in ("ours", "speed", "baseline", "time", "ratio", "target", ""):
        view.add_column(column, justify="right", no_wrap=True)
    last = {r.group: i for i, r in enumerate(results) if r.group}
    mean = {m.group: m for m in means(results)}
    for i, r in enumerate(results):
        ours, theirs = time_text(r.microseconds), time_text(r.baselines[r.baseline])
        speed = f"{r.speed:.0f} {r.unit}" if r.unit == "TFLOP/s" else f"{r.speed:.2f} {r.unit}"
        verdict = _verdict(r.ratio, r.target)
        view.add_row(r.op, r.case, r.size, ours, speed, r.baseline, theirs, f"{r.ratio:.3f}", *verdict)
        if r.group and last[r.group] == i:
            m = mean[r.group]
            verdict = _verdict(m.ratio, m.target)
            view.add_row("[bold]geometric mean", f"[bold]{m.group}", *[""] * 5, f"[bold]{m.ratio:.3f}", *verdict)
    return view


def versions() -> dict[str, str | None]:
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }


def report(results: list[Result], where: dict[str, str | None], limits: dict[str, float], failed: list[str]) -> str:
    """JSON: `rows` in microseconds, `means` of the groups, and what was not timed."""
    scored = [{**asdict(r), "baseline": r.baseline, "ratio": r.ratio, "met": met(r.ratio, r.target)} for r in results]
    groups = [{**asdict(m), "met": met(m.ratio, m.target)} for m in means(results)]
    return json.dumps({**where, "ceilings": limits, "rows": scored, "means": groups, "failed": failed}, indent=1) + "\n"


def run(ops: list[str] | None, path: Path | None, workers: int, console: Console) -> int:
    """Every row, or those of `ops`; 1 if a row was refused or raised."""
    start = time.perf_counter()
    chosen = [row for row in rows() if not ops or row.op in ops]
    results: list[Result] = []
    failed: list[str] = []
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        if workers:
            prepare(chosen, workers, progress)
        limits = ceilings()
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
                results.append(result)
                sides = {"ours": result.microseconds, **result.baselines}
                times = ", ".join(f"{side} {time_text(t)}" for side, t in sides.items())
                progress.console.print(f"{name}: {times}, ratio {result.ratio:.3f}")
            progress.advance(task)
    where = versions()
    peak = max((r.peak_bytes for r in results if r.op == "linear_logprob"), default=0)
    title = ", ".join([*(f"{k} {v}" for k, v in where.items()), *(f"{k} {v:.2f}" for k, v in limits.items())])
    console.print(table(results), title, sep="\n")
    if peak:
        console.print(f"linear_logprob allocates at most {peak / 2**30:.1f} GiB beside its operands")
    targets = [met(r.ratio, r.target) for r in [*results, *means(results)] if r.target is not None]
    seconds = time.perf_counter() - start
    console.print(
        f"{sum(map(bool, targets))} of {len(targets)} targets met, {len(failed)} rows failed; {seconds:.0f} s"
    )
    if path:
        path.write_text(report(results, where, limits, failed))
    return 1 if failed else 0


def default_workers() -> int:
    return max(1, min(12, (os.cpu_count() or 1) - 2))
