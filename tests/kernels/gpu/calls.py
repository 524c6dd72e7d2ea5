"""Calls that between them launch every GPU kernel: small ones for the sanitizer, wide ones for the hashes.

Inputs are made on the CPU from a seed and the call's name. A call says which op runs at which shape, never which kernel; the
shapes are chosen so that each kernel has its turn, and `not_launched` says which did not.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels.collectives.fold_kernel import fold_rows
from kernels.contract import outputs_and_gradients
from kernels.model import Layout
from kernels.ops import (
    Mixture,
    adamw,
    attention,
    combine,
    combine_add_norm,
    dequantize_blocks,
    dispatch,
    embedding,
    exp,
    expert_matmul,
    gated_experts,
    gather,
    gumbel_argmax,
    kept_tokens,
    linear_logprob,
    low_rank_gradients,
    matmul,
    matmul_fp8,
    merge_low_rank,
    norm_rope,
    quantize_blocks,
    quantize_rows,
    rms_norm,
    rope_table,
    route,
    route_and_dispatch,
    square_rows,
    store_rows,
    sum_rows,
    swiglu,
    vocab_logprob,
    vocab_nodes,
)
from kernels.ops.experts import STRIPE
from kernels.ops.norm_rope import Stored
from kernels.ops.rms_norm import add_rms_norm
from kernels.ops.sample import portable as sample_gpu
from kernels.spec import Case, OpSpec, all_specs, spread

Call = Callable[[torch.Generator], tuple[torch.Tensor, ...]]
CUDA = torch.device("cuda")
bf16, f32 = torch.bfloat16, torch.float32


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def numbers(g: torch.Generator, *shape: int, dtype: torch.dtype = bf16, octaves: int = 2) -> torch.Tensor:
    return spread(shape, g, CUDA, dtype, octaves)


def integers(g: torch.Generator, high: int, count: int) -> torch.Tensor:
    return torch.randint(high, (count,), generator=g).to(CUDA)


def ends(*at: int) -> torch.Tensor:
    return torch.tensor([0, *at], device=CUDA)


def agree(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Compares two ways to the same values, where a GPU computed them."""
    if CUDA.type == "cuda" and not all(map(torch.equal, ours, theirs)):
        raise AssertionError("two ways to the same values differ")


def with_gradients(
    run: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], g: torch.Generator, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The outputs of `run(*inputs)` and the gradients of all inputs."""
    leaves = [t.requires_grad_() for t in inputs]
    y = run(*leaves)
    y = y if isinstance(y, tuple) else (y,)
    grads = torch.autograd.grad(y, leaves, [numbers(g, *t.shape, dtype=t.dtype, octaves=1) for t in y])
    return (*(t.detach() for t in y), *grads)


def product(M: int, N: int, K: int, leaves: int, dtype: torch.dtype = bf16) -> Call:
    """The forward alone: few_rows, weight_stream or many_rows."""
    return lambda g: (matmul(numbers(g, M, K), numbers(g, N, K), leaves, out_dtype=dtype),)


def product_gradients(M: int, N: int, K: int, leaves: int, *at: int, dtype: torch.dtype = bf16) -> Call:
    """Forward, dX and grouped dW; a float32 weight is a master."""
    return lambda g: with_gradients(
        lambda x, w: matmul(x, w, leaves, groups=ends(*at)), g, numbers(g, M, K), numbers(g, N, K, dtype=dtype)
    )


def product_fp8(M: int, N: int, K: int, leaves: int, dtype: torch.dtype = bf16) -> Call:
    """The forward of block-scaled FP8: of a weight and of what it is quantized to."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, w = numbers(g, M, K), numbers(g, N, K)
        with torch.no_grad():
            y = matmul_fp8(x, w, leaves, out_dtype=dtype)
            agree([y], [matmul_fp8(x, quantize_blocks(w), leaves, out_dtype=dtype)])
        return (y,)

    return call


def quantized(rows: int, K: int, power_of_two: bool = False) -> Call:
    """Rows, blocks and back; a row of zeros, and one of subnormals."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, w = numbers(g, rows, K, octaves=12), numbers(g, 256, K, dtype=f32)
        x[rows // 2] = 0
        x[rows // 3] *= 2.0**-120
        of_rows, of_blocks = quantize_rows(x, power_of_two), quantize_blocks(w, power_of_two)
        made = (t for q in (of_rows, of_blocks) for t in (q.values.view(torch.uint8), q.scales))
        return (*made, dequantize_blocks(of_blocks))

    return call


def packed_attention(lengths: Sequence[int], heads: int, kv_heads: int, D: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        pages = Layout.packed(lengths, [1] * len(lengths), CUDA).pages
        q, k, v = (numbers(g, sum(lengths), n, D, octaves=1) for n in (heads, kv_heads, kv_heads))
        return with_gradients(lambda q, k, v: attention(q, k, v, pages, D**-0.5), g, q, k, v)

    return call


def paged_attention(spans: Sequence[tuple[int, int]], page: int, heads: int, kv_heads: int, D: int) -> Call:
    """Queries of `spans` over pages that lie in no order; spans of one token are decoding."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        need = [-(-stop // page) for _, stop in spans]
        order = torch.randperm(sum(need), generator=g).tolist()
        tables = [[order.pop() for _ in range(n)] for n in need]
        pages = Layout.paged(spans, tables, page, CUDA).pages
        q = numbers(g, sum(stop - start for start, stop in spans), heads, D, octaves=1)
        k, v = (numbers(g, sum(need) * page, kv_heads, D, octaves=1) for _ in range(2))
        return (attention(q, k, v, pages, D**-0.5),)

    return call


def logprob(rows: int, n: int, vocab: int, leaves: int, *at: int) -> Call:
    """The trainer's fused path with its gradients."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, head = numbers(g, rows, n, octaves=1), numbers(g, vocab, n, octaves=1) * n**-0.5
        targets, t = integers(g, vocab, rows), torch.rand(rows, generator=g).add(0.5).to(CUDA)
        return with_gradients(lambda x, head: linear_logprob(x, head, targets, t, leaves, ends(*at)), g, x, head)

    return call


def sampled(rows: int, vocab: int, leaves: int) -> Call:
    """A draw and its log-prob, as the runner makes them."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        logits = numbers(g, rows, vocab, dtype=f32)
        t = torch.rand(rows, generator=g).add(0.5).to(CUDA)
        greedy = (torch.arange(rows) % 3 == 2).to(torch.uint8).to(CUDA)
        seeds, positions = integers(g, 2**62, rows), integers(g, 10**6, rows)
        score, token, logit = gumbel_argmax(logits, t, seeds, positions, greedy)
        nodes = vocab_nodes(logits, t, leaves)
        return (score, token, logit, nodes, *vocab_logprob(nodes, logit, t))

    return call


def norms(rows: int, n: int, heads: int, D: int, *at: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, delta, w = numbers(g, rows, n), numbers(g, rows, n), numbers(g, n, octaves=1)
        wide, v = numbers(g, rows, heads, D), numbers(g, D, octaves=1)
        return (
            *with_gradients(lambda x, w: rms_norm(x, w, 1e-6, groups=ends(*at)), g, x, w),
            *with_gradients(lambda x, d, w: add_rms_norm(x, d, w, 1e-6, groups=ends(*at)), g, x, delta, w),
            *with_gradients(lambda x, w: rms_norm(x, w, 1e-6, groups=ends(*at)), g, wide, v),
        )

    return call


def normed_and_turned(rows: int, heads: int, kv_heads: int, D: int, *at: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        cosine, sine = (t.to(CUDA) for t in rope_table(1000, D, 1e6))
        positions = integers(g, 1000, rows).int()
        x, *weights = numbers(g, rows, heads + kv_heads, D), *(numbers(g, D, octaves=1) for _ in range(2))
        keys, values = (torch.zeros(rows, kv_heads, D, dtype=bf16, device=CUDA) for _ in range(2))
        slots, given = torch.arange(rows, device=CUDA).flip(0), x[:, heads:]
        where = ((cosine, sine), positions, kv_heads)
        _, k = norm_rope(x, (weights[0], weights[1]), 1e-6, *where, stored=Stored(keys, values, slots, given))
        agree((keys.flip(0), values.flip(0)), (k, given))
        return with_gradients(
            lambda x, q, k: norm_rope(x, (q, k), 1e-6, *where, groups=ends(*at)),
            g,
            x,
            *weights,
        )

    return call


def stored(rows: int, kv_heads: int, D: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        keys, values = (torch.zeros(2 * rows, kv_heads, D, dtype=bf16, device=CUDA) for _ in range(2))
        slots = torch.randperm(2 * rows, generator=g)[:rows].to(CUDA)
        store_rows(keys, values, slots, *(numbers(g, rows, kv_heads, D) for _ in range(2)))
        return keys, values

    return call


def turned(rows: int, heads: int, D: int) -> Call:
    """Rope alone."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        cosine, sine = (t.to(CUDA) for t in rope_table(1000, D, 1e6))
        positions = integers(g, 1000, rows).int()

        def turn(x: torch.Tensor) -> torch.Tensor:
            return torch.cat(norm_rope(x, None, 0.0, (cosine, sine), positions, heads // 2), 1)

        return with_gradients(turn, g, numbers(g, rows, heads, D))

    return call


def gated(rows: int, n: int) -> Call:
    return lambda g: with_gradients(swiglu, g, numbers(g, rows, 2 * n, octaves=3))


def mixed(tokens: int, experts: int, k: int, n: int, inner: int, leaves: int, align: int, *at: int) -> Call:
    """A mixture of experts, forward and backward; without `at` as an engine runs it."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        logits = numbers(g, tokens, experts, dtype=f32)
        x, up, down = numbers(g, tokens, n), numbers(g, experts * 2 * inner, n), numbers(g, experts * n, inner)
        if not at:
            with torch.no_grad():
                ids, share, slots = route_and_dispatch(logits, k, True, 0, experts, align)
                mixture = Mixture(expert_matmul(gated_experts(x, up, slots), down, slots), share, ids, slots, leaves)
                out, weight = combine(*mixture), x[0].contiguous()
                together = combine_add_norm(x, mixture, weight, 1e-6)
                agree(together, add_rms_norm(x, out, weight, 1e-6))
                return ids, share, out

        def run(logits: torch.Tensor, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            ids, share = route(logits, k, True)
            slots = dispatch(ids, 0, experts, align, ends(*at))
            y = swiglu(expert_matmul(gather(x, slots), up, slots), STRIPE)
            return combine(expert_matmul(y, down, slots), share, ids, slots, leaves)

        return with_gradients(run, g, logits, x, up, down)

    return call


def embedded(rows: int, vocab: int, n: int, *at: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        ids = integers(g, vocab // 2, rows)
        return with_gradients(lambda w: embedding(ids, w, groups=ends(*at)), g, numbers(g, vocab, n))

    return call


def updated(n: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        w, grad, m, v = (numbers(g, n, dtype=f32) for _ in range(4))
        v = v.square()
        adamw(w, grad, m, v, step=3, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=0.37)
        return w, m, v

    return call


def low_rank(tokens: int, N: int, K: int, rank: int, leaves: int, *at: int) -> Call:
    """A merge, and the gradients of an adapter of two sections."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        w, a, b = numbers(g, N, K), numbers(g, 2 * rank, K, dtype=f32), numbers(g, N, rank, dtype=f32)
        merged = merge_low_rank(w, a[:rank], b, 0.3, bf16), merge_low_rank(w.float(), a[rank:], b, 0.3, f32)
        dy, x = numbers(g, tokens, N), numbers(g, tokens, K)
        sections = N // 4, N - N // 4
        return *merged, *low_rank_gradients(dy, x, a.to(bf16), b.to(bf16), 0.3, sections, leaves, ends(*at))

    return call


def sums(rows: int, n: int, *at: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x = numbers(g, rows, n, dtype=f32)
        return sum_rows(x, ends(*at)), square_rows(x)

    return call


def folded(ranks: int, n: int) -> Call:
    """What a rank does with the roots of all."""

    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        out = torch.empty(n, dtype=bf16, device=CUDA)
        fold_rows(numbers(g, ranks, n, dtype=f32, octaves=8), out)
        return (out,)

    return call


def truncated(rows: int, vocab: int) -> Call:
    def call(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        logits = numbers(g, rows, vocab, dtype=f32)
        t, top_p, min_p = (torch.rand(rows, generator=g).add(0.1).to(CUDA) for _ in range(3))
        return (kept_tokens(logits, t, integers(g, vocab, rows), top_p, min_p / 20),)

    return call


def noise(ids: int) -> Call:
    return lambda g: (sample_gpu.noise_words(12345, 678, ids, CUDA),)


def exponentials(n: int) -> Call:
    return lambda g: with_gradients(exp, g, numbers(g, n, dtype=f32, octaves=4))


SMALL: dict[str, Call] = {
    "matmul 1 row": product(1, 200, 64, 1),
    "matmul 17 rows, 8 leaves": product(17, 200, 512, 8),
    "matmul 70 rows, 8 leaves": product(70, 200, 512, 8),
    "matmul 300 rows, 8 leaves": product(300, 136, 512, 8),
    "matmul 300 rows, 4 leaves, float32": product(300, 136, 256, 4, f32),
    "matmul 600 rows, wide": product(600, 256, 64, 1),
    "matmul, leaves of 48": product(9, 40, 96, 2),
    "matmul gradients": product_gradients(300, 192, 128, 1, 5, 70, 300),
    "matmul gradients, 8 leaves": product_gradients(130, 512, 512, 8, 64, 130),
    "matmul gradients, odd": product_gradients(7, 30, 18, 2, 3, 3, 7),
    "attention, packed": packed_attention((1, 65, 530), 4, 2, 128),
    "attention, packed, narrow heads": packed_attention((3, 70), 4, 2, 32),
    "attention, packed, wide heads": packed_attention((3, 70), 4, 2, 256),
    "attention, chunks": paged_attention(((0, 70), (60, 131), (5, 6)), 16, 4, 2, 128),
    "attention, decode": paged_attention(((0, 1), (64, 65), (530, 531)), 16, 4, 2, 128),
    "attention, decode, pages of 64": paged_attention(((64, 65), (600, 601)), 64, 4, 2, 128),
    "attention, decode, wide heads": paged_attention(((0, 1), (530, 531)), 16, 4, 2, 256),
    "log-prob": logprob(70, 512, 8 * 130, 8, 20, 70),
    "log-prob, odd": logprob(5, 20, 2 * 33, 2, 2, 5),
    "sampling": sampled(3, 1300, 2),
    "sampling, many rows": sampled(17, 264, 2),
    "truncation": truncated(3, 1300),
    "norms": norms(5, 100, 3, 32, 2, 5),
    "norms, long rows": norms(3, 2500, 2, 128, 3),
    "rope": turned(5, 3, 32),
    "norm and rope": normed_and_turned(5, 3, 1, 32, 2, 5),
    "store": stored(5, 3, 32),
    "swiglu": gated(3, 1100),
    "experts, 1 token": mixed(1, 8, 2, 64, 32, 4, 16),
    "experts, 40 tokens": mixed(40, 8, 2, 64, 32, 4, 16),
    "experts": mixed(150, 8, 2, 128, 64, 4, 128, 40, 40, 150),
    "experts, odd": mixed(20, 6, 2, 40, 24, 2, 16, 20),
    "embedding": embedded(40, 16, 33, 10, 10, 40),
    "adamw": updated(1100),
    "low rank": low_rank(150, 256, 128, 16, 4, 10, 140, 150),
    "low rank, odd": low_rank(7, 40, 24, 5, 2, 3, 7),
    "sums": sums(150, 33, 10, 140, 150),
    "fold": folded(8, 3001),
    "noise": noise(1100),
    "exp": exponentials(1100),
}

SMALL_HOPPER: dict[str, Call] = {
    "matmul of FP8, 1 row": product_fp8(1, 256, 256, 1),
    "matmul of FP8, 70 rows": product_fp8(70, 384, 1024, 8),
    "matmul of FP8, 300 rows": product_fp8(300, 384, 1024, 8),
    "matmul of FP8, 150 rows, 4 leaves": product_fp8(150, 256, 1024, 4, f32),
    "quantization": quantized(5, 256),
    "quantization, many rows": quantized(150, 640, power_of_two=True),
}
"""Of kernels that Hopper's family alone has."""

HIDDEN = {"0.6B": (1024, 3072), "8B": (4096, 12288)}
WIDE: dict[str, Call] = {
    **{f"matmul {m} rows, K 4096, 8 leaves": product(m, 768, 4096, 8) for m in (1, 64, 200, 700)},
    **{
        f"matmul {m} rows, K {k}, {leaves} leaves": product(m, 768, k, leaves)
        for m in (16, 700)
        for k, leaves in ((12288, 8), (2048, 4), (6144, 2), (1536, 1))
    },
    "matmul to float32": product(700, 4096, 512, 1, f32),
    **{
        f"matmul gradients {name}": product_gradients(700, inter // 4, hidden, 8, 64, 200, 201, 333, 700, dtype=f32)
        for name, (hidden, inter) in HIDDEN.items()
    },
    "attention, packed": packed_attention((700, 1, 64, 65, 513), 16, 8, 128),
    "attention, packed, narrow heads": packed_attention((300, 1, 65), 4, 2, 32),
    "attention, chunks": paged_attention(((0, 700), (600, 1100), (5, 6)), 16, 32, 8, 128),
    "attention, decode, pages of 16": paged_attention(((0, 1), (511, 512), (1299, 1300)), 16, 32, 8, 128),
    "attention, decode, pages of 64": paged_attention(((63, 64), (1299, 1300)), 64, 16, 8, 128),
    "log-prob": logprob(200, 1024, 8 * 1200, 8, 33, 100, 200),
    "sampling": sampled(9, 151936, 8),
    "sampling, many rows": sampled(40, 18992, 1),
    "truncation": truncated(9, 151936),
    "norms 0.6B": norms(70, 1024, 24, 128, 30, 70),
    "norms 8B": norms(70, 4096, 40, 128, 30, 30, 70),
    "rope": turned(70, 40, 128),
    "norm and rope": normed_and_turned(70, 32, 8, 128, 30, 70),
    "store": stored(70, 8, 128),
    "swiglu": gated(70, 12288),
    **{
        f"experts, {tokens} tokens": mixed(tokens, 32, 8, 2048, 768, 8, align)
        for tokens, align in ((1, 16), (60, 16), (200, 32), (500, 64), (900, 128))
    },
    "experts": mixed(700, 32, 8, 1024, 768, 8, 128, 64, 200, 201, 333, 700),
    "embedding": embedded(300, 2000, 1024, 10, 10, 200, 300),
    "adamw": updated(100_003),
    "sums": sums(700, 1024, 100, 100, 500, 700),
    "fold": folded(8, 100_003),
    "noise": noise(151_936),
}
WIDE_HOPPER: dict[str, Call] = {
    **{f"matmul of FP8, {m} rows, K 4096, 8 leaves": product_fp8(m, 768, 4096, 8) for m in (1, 64, 200, 700)},
    **{
        f"matmul of FP8, {m} rows, K {k}, {leaves} leaves": product_fp8(m, 768, k, leaves, f32)
        for m in (16, 700)
        for k, leaves in ((12288, 8), (2048, 4), (6144, 2), (1536, 1))
    },
    "quantization, 70 rows": quantized(70, 4096),
    "quantization, powers of two": quantized(70, 4096, power_of_two=True),
}


def small(family: str) -> dict[str, Call]:
    """The small calls that a family runs."""
    return SMALL | SMALL_HOPPER if family == "hopper" else SMALL


def wide(family: str) -> dict[str, Call]:
    """The wide calls that a family runs."""
    return WIDE | WIDE_HOPPER if family == "hopper" else WIDE


def hashed(family: str) -> Iterator[tuple[str, Call]]:
    """Every call of a family that has a recorded hash."""
    yield from spec_calls(family)
    yield from wide(family).items()


def spec_calls(family: str) -> Iterator[tuple[str, Call]]:
    """The largest case of every spec on a GPU, with its gradients: odd shapes, which the kernels for wide ones do not take."""
    for spec in all_specs():
        if family not in spec.families:
            continue
        case = max(spec.cases, key=lambda case: prod(case.values()))
        for dtype in spec.dtypes_on(CUDA):

            def call(
                g: torch.Generator, spec: OpSpec = spec, case: Case = case, dtype: torch.dtype = dtype
            ) -> tuple[torch.Tensor, ...]:
                return outputs_and_gradients(spec, spec.make(case, g, CUDA, dtype))

            yield f"spec {spec.name}: {spec.label(case)}, {str(dtype).removeprefix('torch.')}", call


def all_kernels() -> dict[str, Any]:
    """Every jitted function of `kernels` that another function launches, by module and name."""
    from triton.runtime.jit import JITFunction

    found = {}
    root = Path(kernels.__file__).parent
    for path in sorted(root.rglob("*.py")):
        source = path.read_text()
        if not re.search(r"^@(triton|gluon)\.jit", source, re.M) or path.name == "order.py":  # which nothing runs
            continue
        module = import_module(".".join(("kernels", *path.relative_to(root).with_suffix("").parts)))
        for name, value in vars(module).items():
            mine = isinstance(value, JITFunction) and value.__module__ == module.__name__
            if mine and re.search(rf"\b(launch|run)\(\s*{name},", source):
                found[f"{module.__name__}.{name}"] = value
    return found


def not_launched(family: str) -> list[str]:
    """The kernels of a family that this process has not launched."""
    return [n for n in kernels_of(family) if not any(c[0] for c in all_kernels()[n].device_caches.values())]


def kernels_of(family: str) -> list[str]:
    """The names of the kernels that a family has to launch; Hopper's may take some of the portable ones too."""
    found = all_kernels()
    if family == "portable":
        return [name for name in found if ".hopper" not in name]
    ops = {name.split(".hopper")[0] for name in found if ".hopper" in name}
    return [name for name in found if ".hopper" in name or name.split(".portable")[0] not in ops]
