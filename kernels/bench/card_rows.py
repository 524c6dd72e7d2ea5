"""The rows of the GPU table: the shapes of Qwen3-8B, each with its baseline."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.bench.timer import Bout, Call, Row, copies, device_copies, group_offsets, normal, turns
from kernels.contract import same_bits
from kernels.model.known import QWEN3_8B
from kernels.ops import (
    add_rms_norm,
    attention,
    linear_logprob,
    matmul,
    norm_rope,
    quantize_blocks,
    quantize_rows,
    rms_norm,
    rope_table,
    swiglu,
    vocab_logprob,
    vocab_nodes,
)
from kernels.ops.attention import Pages
from kernels.ops.attention.spec import packed
from kernels.ops.matmul import input_gradient, weight_gradient
from kernels.ops.quantize import FP8, Quantized
from kernels.tree import leaf_bounds

PROJECTIONS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
"""N and K of Qwen3-8B's weights. A tensor-parallel rank holds columns (N) of qkv and gate_up, and leaves (K) of o and down."""
BY_COLUMNS = ("qkv", "gate_up")
HEADS, KV_HEADS, HEAD_DIM = QWEN3_8B.heads, QWEN3_8B.kv_heads, QWEN3_8B.head_dim
HIDDEN, INTERMEDIATE, VOCABULARY = QWEN3_8B.hidden_size, QWEN3_8B.intermediate_size, QWEN3_8B.vocab_size


def matmul_row(
    case: str, M: int, N: int, K: int, leaves: int, group: str | None, *, root: bool = False, graph: bool = True
) -> Row:
    """Describes a forward; `root`: of a rank that holds some of the leaves, and leaves a float32 root."""
    out = torch.float32 if root else torch.bfloat16

    def build() -> Bout:
        from kernels.ops.matmul.portable import order  # needs triton, which a machine without a GPU may lack

        x = normal(M, K)
        weights = [normal(N, K, std=K**-0.5) for _ in range(copies(2 * N * K) if M <= 256 else 1)]

        def holds() -> bool:
            expected = order.contract(x, weights[0], leaf_bounds(K, leaves)).to(out)
            return same_bits(matmul(x, weights[0], leaves, out_dtype=out), expected)

        ours: list[Call] = [lambda w=w: matmul(x, w, leaves, out_dtype=out) for w in weights]
        theirs: list[Call] = [lambda w=w: torch.mm(x, w.T) for w in weights]
        return Bout(*(turns(ours), {"cuBLAS": turns(theirs)}) if M <= 256 else (ours, {"cuBLAS": theirs}), holds)

    claim = "the bits of the reference order"
    size = f"M {M}" if graph else f"M {M}, one by one"
    return Row("matmul", case, size, claim, 2.0 * M * N * K, "TFLOP/s", build, group, graph=graph)


def matmul_rows() -> Iterator[Row]:
    """Yields the rows of matmul: Qwen3-8B's projections, whole at many batch sizes, and cut into 2, 4 and 8 shards."""
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


def matmul_fp8_row(name: str, M: int) -> Row:
    """Describes the product alone of block-scaled FP8, of rows that are quantized; the vendor's has one scale a tensor, and 16
    rows at least."""
    N, K = PROJECTIONS[name]

    def build() -> Bout:
        from kernels.ops.matmul_fp8 import hopper
        from kernels.ops.matmul_fp8.hopper import order

        bounds = leaf_bounds(K, 8)
        x = quantize_rows(normal(M, K))
        count = copies(N * K) if M <= 256 else 1
        weights = [quantize_blocks(normal(N, K, std=K**-0.5)) for _ in range(count)]
        padded, one = torch.zeros(max(16, M), K, device="cuda").to(FP8), torch.ones((), device="cuda")
        padded[:M].copy_(x.values)

        def product(w: Quantized) -> torch.Tensor:
            return hopper.contract(x.values, x.scales, w.values, w.scales, bounds, torch.bfloat16)

        def vendor(w: Quantized) -> torch.Tensor:
            return torch._scaled_mm(padded, w.values.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        def holds() -> bool:
            w = weights[0]
            want = order.contract(x.values, x.scales, w.values, w.scales, bounds)
            return same_bits(product(w), want.to(torch.bfloat16))

        ours: list[Call] = [lambda w=w: product(w) for w in weights]
        theirs: list[Call] = [lambda w=w: vendor(w) for w in weights]
        baseline = "torch's FP8, a scale a tensor"
        return Bout(*(turns(ours), {baseline: turns(theirs)}) if M <= 256 else (ours, {baseline: theirs}), holds)

    group = "matmul_fp8, M <= 256" if M <= 256 else "matmul_fp8, 8192 rows"
    claim = "the bits of the reference order"
    return Row("matmul_fp8", f"{name} {N}x{K}, 8 leaves", f"M {M}", claim, 2.0 * M * N * K, "TFLOP/s", build, group)


def matmul_fp8_rows() -> Iterator[Row]:
    """Yields the rows of the matmul of block-scaled FP8: Qwen3-8B's projections, whole."""
    for name in PROJECTIONS:
        for M in (1, 16, 64, 256, 8192):
            yield matmul_fp8_row(name, M)


def matmul_gradient_rows(tokens: int = 8192) -> Iterator[Row]:
    """Yields the rows of matmul's gradients to input and weight, over a batch of `tokens`."""
    for name, (N, K) in PROJECTIONS.items():
        work, case = 2.0 * tokens * N * K, f"{name} {N}x{K}"

        def build_dx(N: int = N, K: int = K) -> Bout:
            from kernels.ops.matmul.portable import order

            dy, w = normal(tokens, N), normal(N, K, std=K**-0.5)
            return Bout(
                [lambda: input_gradient(dy, w, 8)],
                {"cuBLAS": [lambda: torch.mm(dy, w)]},
                lambda: same_bits(input_gradient(dy, w, 8), order.contract(dy, w.T, leaf_bounds(N, 8)).to(dy.dtype)),
            )

        def build_dw(count: int, N: int = N, K: int = K) -> Bout:
            from kernels.ops.matmul.portable import order

            dy, x, groups = normal(tokens, N), normal(tokens, K), group_offsets(count, tokens)
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
    """Yields the rows of packed causal attention, forward and backward, at several sequence lengths of `tokens` in all."""
    scale = HEAD_DIM**-0.5
    for n in (1024, 4096, 16384):
        sequences = tokens // n
        work = 4.0 * sequences * HEADS * HEAD_DIM * n * (n + 1) / 2

        def operands(sequences: int = sequences, n: int = n) -> tuple[list[torch.Tensor], Pages]:
            qkv = [normal(sequences * n, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            return qkv, packed(torch.full((sequences,), n), torch.device("cuda"))

        def build(sequences: int = sequences, n: int = n, operands=operands) -> Bout:  # type: ignore[no-untyped-def]
            (q, k, v), pages = operands()

            def holds() -> bool:
                """Compares the last queries again, through the page table, which is another kernel."""
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
                """Compares the last sequence again, behind a short neighbour of other tokens."""
                beside = packed(torch.tensor([100, n]), torch.device("cuda"))
                longer = [torch.cat([normal(100, *t.shape[1:]), t[-n:]]) for t in (*qkv, d_out)]
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
    """Yields the rows of paged attention of one query a sequence, for several batch sizes and context lengths."""
    scale, page = HEAD_DIM**-0.5, 16
    for batch, n in (
        *((1, 512), (1, 4096), (1, 32768), (16, 512), (16, 8192), (16, 32768)),
        *((64, 512), (64, 4096), (256, 512), (256, 2048)),
    ):
        work = 4.0 * batch * n * KV_HEADS * HEAD_DIM

        def build(batch: int = batch, n: int = n, work: float = work) -> Bout:
            q, each = normal(batch, HEADS, HEAD_DIM), torch.arange(batch, dtype=torch.int32, device="cuda")
            table = torch.randperm(batch * n // page, device="cuda").int().view(batch, -1)
            starts = torch.arange(batch + 1, device="cuda")
            pages = Pages(table, page, each, torch.full_like(each, n - 1), starts)
            pools = [[normal(batch * n, KV_HEADS, HEAD_DIM) for _ in range(2)] for _ in range(copies(work))]

            def holds() -> bool:
                """As one of two queries of a sequence, which another kernel takes."""
                both = torch.tensor([n - 2, n - 1], dtype=torch.int32, device="cuda")
                chunk = Pages(table[:1], page, torch.zeros_like(both), both, torch.tensor([0, 2], device="cuda"))
                pair = attention(q[:1].repeat(2, 1, 1), *pools[0], chunk, scale)
                return same_bits(pair[1:], attention(q, *pools[0], pages, scale)[:1])

            ours: list[Call] = [lambda pool=pool: attention(q, *pool, pages, scale) for pool in pools]
            return Bout(turns(ours), device_copies(work), holds)

        case, size = f"pages of {page}, heads {HEADS}/{KV_HEADS} of {HEAD_DIM}", f"batch {batch}, {n} keys"
        claim = "the bits of a query in a chunk"
        yield Row("attention_decode", case, size, claim, work, "TB/s", build, target=0.85 if work > 256e6 else None)


def logprob_rows(rows: int = 8192) -> Iterator[Row]:
    """Yields the rows of the linear log-prob and its gradient, over Qwen3-8B's vocabulary."""

    def build() -> Bout:
        x, head = normal(rows, HIDDEN), normal(VOCABULARY, HIDDEN, std=0.02)
        targets = torch.randint(VOCABULARY, (rows,), device="cuda")
        temperature, d = torch.ones(rows, device="cuda"), torch.randn(rows, device="cuda")
        groups = group_offsets(8, rows)

        def ours() -> tuple[torch.Tensor, ...]:
            leaf = x.detach().requires_grad_(), head.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(linear_logprob(leaf[0], leaf[1], targets, temperature, 8, groups), leaf, d)

        def head_gradient(rows: slice, groups: torch.Tensor) -> torch.Tensor:
            """Computes in float32, as of a master weight."""
            leaf = head.float().requires_grad_()
            with torch.enable_grad():
                y = linear_logprob(x[rows], leaf, targets[rows], temperature[rows], 8, groups)
            return torch.autograd.grad(y, leaf, d[rows])[0]

        def holds() -> bool:
            """Compares the sampler's path on some rows, the input gradient of those alone, the head's from two halves of
            the groups."""
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
            parts = slice(0, half), slice(half, rows)
            first, second = (head_gradient(part, group_offsets(4, half)) for part in parts)
            return same_bits((first + second).to(head.dtype), d_head)

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
    """Makes the row of an elementwise op and its gradient. `make` gives runs over different operands; run(rows) is the op on
    a slice of the tokens."""

    def build() -> Bout:
        runs = [run for _ in range(copies(moved)) for run in make()]
        some, every = slice(7, 10), slice(None)

        def holds() -> bool:
            return all(same_bits(a, b[some]) for a, b in zip(runs[0](some), runs[0](every), strict=True))

        return Bout(turns([lambda run=run: run(every) for run in runs]), device_copies(moved), holds)

    claim = "the bits of three rows alone"
    return Row(op, case, f"{tokens} tokens", claim, moved, "TB/s", build, target=0.90)


def elementwise_rows(T: int = 16384) -> Iterator[Row]:
    """Yields the rows of the ops that are bound by memory: norms, rope and the gated product, over `T` tokens."""

    def norm(*shape: int) -> list[Callable]:
        x, w = normal(T, *shape), normal(shape[-1])
        return [lambda rows: (rms_norm(x[rows], w, 1e-6),)]

    def add_norm() -> list[Callable]:
        x, delta, w = normal(T, HIDDEN), normal(T, HIDDEN), normal(HIDDEN)
        return [lambda rows: add_rms_norm(x[rows], delta[rows], w, 1e-6)]

    def rotary() -> list[Callable]:
        x, table = normal(T, HEADS, HEAD_DIM), tuple(t.cuda() for t in rope_table(4096, HEAD_DIM, 1e6))
        positions = torch.arange(T, dtype=torch.int32, device="cuda") % 4096
        return [lambda rows: norm_rope(x[rows], None, 0.0, table, positions[rows], KV_HEADS)]

    def gated() -> list[Callable]:
        x = normal(T, 2 * INTERMEDIATE)
        return [lambda rows: (swiglu(x[rows]),)]

    def quantized() -> list[Callable]:
        x = normal(T, HIDDEN)
        return [lambda rows: (quantize_rows(x[rows]).values,)]

    size = 2.0 * T * HIDDEN
    heads = f"heads {HEADS} of {HEAD_DIM}"
    yield elementwise_row("rms_norm", f"rows of {HIDDEN}", 2 * size, T, lambda: norm(HIDDEN))
    yield elementwise_row("rms_norm", heads, 2 * size, T, lambda: norm(HEADS, HEAD_DIM))
    yield elementwise_row("add_rms_norm", f"rows of {HIDDEN}", 4 * size, T, add_norm)
    yield elementwise_row("rope", heads, 2 * size, T, rotary)
    yield elementwise_row("quantize_rows", f"rows of {HIDDEN}", 1.5 * size, T, quantized)
    yield elementwise_row("swiglu", f"rows of 2 x {INTERMEDIATE}", 6.0 * T * INTERMEDIATE, T, gated)


def rows() -> list[Row]:
    """Returns all rows of the table, in its order."""
    return [
        *matmul_rows(),
        *matmul_fp8_rows(),
        *attention_rows(),
        *decode_rows(),
        *matmul_gradient_rows(),
        *logprob_rows(),
        *elementwise_rows(),
    ]
