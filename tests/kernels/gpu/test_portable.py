"""The portable family beside Hopper's, on a Hopper card: every op that both have, and the same bits where the order is one.

`pytest -m gpu --family portable tests/kernels` runs every other test of an op in the portable family.
"""

from itertools import pairwise

import pytest
import torch

from kernels.model import Layout
from kernels.ops.attention import hopper as hopper_attention
from kernels.ops.attention import portable as portable_attention
from kernels.ops.dispatch import dispatch
from kernels.ops.experts import hopper as hopper_experts
from kernels.ops.experts import portable as portable_experts
from kernels.ops.logprob import hopper as hopper_logprob
from kernels.ops.logprob import portable as portable_logprob
from kernels.ops.matmul import hopper as hopper_matmul
from kernels.ops.matmul import portable as portable_matmul
from kernels.ops.matmul.portable import order
from kernels.tree import leaf_bounds
from tests.bits import assert_same_bits
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16, f32 = torch.bfloat16, torch.float32


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(bf16)


@pytest.mark.parametrize("leaves", [1, 2, 8, 16])
@pytest.mark.parametrize("M,N,K", [(1, 40, 96), (7, 136, 768), (65, 72, 1024), (300, 200, 2048), (1030, 1000, 1536)])
def test_matmul(M: int, N: int, K: int, leaves: int) -> None:
    """Forward and dX against the order as it reads, and against Hopper's kernels; operands that lie otherwise too."""
    x, w, bounds = numbers(M, K), numbers(N, K), leaf_bounds(K, leaves)
    want = order.contract(x, w, bounds)
    for dtype in (f32, bf16):
        assert_same_bits(portable_matmul.contract(x, w, bounds, dtype), want.to(dtype), f"{dtype}")
        assert_same_bits(hopper_matmul.contract(x, w, bounds, dtype), want.to(dtype), f"Hopper's {dtype}")
    assert_same_bits(portable_matmul.contract(x, w.T.contiguous().T, bounds, f32), want, "w lies by rows")
    assert_same_bits(portable_matmul.contract(x.T.contiguous().T, w, bounds, f32), want, "x lies by columns")
    assert_same_bits(portable_matmul.contract(x[:, : K // 2], w[:, : K // 2], leaf_bounds(K // 2, leaves), f32),
                     order.contract(x[:, : K // 2], w[:, : K // 2], leaf_bounds(K // 2, leaves)), "half")  # fmt: skip


@pytest.mark.parametrize("ends", [[37], [0, 5, 5, 300, 301, 700], list(range(16, 16 * 33, 16)), [100, 100, 100]])
@pytest.mark.parametrize("N,K", [(40, 72), (200, 264), (1024, 768)])
def test_weight_gradient(ends: list[int], N: int, K: int) -> None:
    """dW against the order as it reads, and Hopper's; groups without a token among them."""
    dy, x = numbers(ends[-1], N), numbers(ends[-1], K)
    bounds = torch.tensor([0, *ends], device="cuda")
    want = order.contract(dy.T, x.T, bounds.tolist())
    assert_same_bits(portable_matmul.contract(dy.T, x.T, bounds, f32), want, "portable")
    assert_same_bits(hopper_matmul.contract(dy.T, x.T, bounds, f32), want, "Hopper's")


@pytest.mark.parametrize("tokens", [3, 50, 200, 900])
def test_experts(tokens: int) -> None:
    """Forward, dX and dW of experts; some get no token."""
    experts, k, H, I = 16, 4, 256, 192
    ids = torch.stack([torch.randperm(experts - 2)[:k].sort().values for _ in range(tokens)]).int().cuda()
    groups = torch.tensor([0, tokens // 3, tokens], device="cuda")
    x, up, down = numbers(tokens, H), numbers(experts * 2 * I, H) * 0.1, numbers(experts * H, I) * 0.1
    found = []
    for family in (portable_experts, hopper_experts):
        slots = dispatch(ids, 0, experts, family.align_of(tokens), groups)
        at = slots.of.long()
        z = family.gated(x, up, slots)
        y = family.product(z, down, slots)
        dy = torch.zeros_like(y)
        dy[at.flatten()] = x.repeat_interleave(k, 0)
        z_full = torch.zeros_like(z)
        z_full[at.flatten()] = z[at.flatten()]
        rows = torch.zeros(slots.capacity, H, dtype=bf16, device="cuda")
        rows[at.flatten()] = x.repeat_interleave(k, 0)
        grads = family.input_gradient(dy, down, slots)[at], family.weight_gradient(dy, z_full, slots)
        found.append([z[at], y[at], *grads, family.weight_gradient(rows, dy, slots)])
    for name, ours, theirs in zip(("gated", "product", "dx", "dw", "dw of rows"), *found, strict=True):
        assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize("rows,n,vocab,leaves", [(5, 64, 1600, 16), (300, 1024, 8000, 8), (130, 512, 4096, 4)])
def test_logprob(rows: int, n: int, vocab: int, leaves: int) -> None:
    x, head = numbers(rows, n), numbers(vocab, n) * n**-0.5
    targets, t = torch.randint(vocab - 3, (rows,), device="cuda"), torch.rand(rows, device="cuda") + 0.5
    groups, d = torch.tensor([0, rows // 2, rows], device="cuda"), torch.randn(rows, device="cuda")
    found = []
    for family in (portable_logprob, hopper_logprob):
        out, lse, kept = family.linear(x, head, targets, t, leaves, True, None, vocab - 3)
        grads = family.backward(x, head, targets, t, lse, d, leaves, groups, kept, None, vocab - 3)
        found.append([out, lse, *grads])
    for name, ours, theirs in zip(("log-prob", "lse", "dx", "dhead"), *found, strict=True):
        assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize("heads,kv_heads,D", [(8, 2, 128), (4, 4, 64), (4, 1, 32), (2, 1, 256)])
def test_attention(heads: int, kv_heads: int, D: int) -> None:
    """The forward has Hopper's bits, packed and decoding; the backward is as near to float64 as Hopper's."""
    lengths = [1, 130, 700, 64]
    T, pages = sum(lengths), Layout.packed(lengths, [1] * 4, "cuda").pages
    q, k, v, d_out = numbers(T, heads, D), numbers(T, kv_heads, D), numbers(T, kv_heads, D), numbers(T, heads, D)
    out, lse = portable_attention.forward(q, k, v, pages, D**-0.5)
    for name, ours, theirs in zip(
        ("out", "lse"), (out, lse), hopper_attention.forward(q, k, v, pages, D**-0.5), strict=True
    ):
        assert_same_bits(ours, theirs, name)
    tables, spans, first = [], [], 0
    for n in lengths:
        tables.append(list(range(first, first + -(-n // 16))))
        spans.append((n - 1, n))
        first += -(-n // 16)
    keys, values = (torch.zeros(first * 16, kv_heads, D, dtype=bf16, device="cuda") for _ in range(2))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for table, (a, b) in zip(tables, pairwise(starts), strict=True):
        keys[table[0] * 16 : table[0] * 16 + b - a], values[table[0] * 16 : table[0] * 16 + b - a] = k[a:b], v[a:b]
    last = torch.tensor(starts[1:], device="cuda") - 1
    alone, e = portable_attention.forward(q[last], keys, values, Layout.paged(spans, tables, 16, "cuda").pages, D**-0.5)
    assert_same_bits(alone, out[last], "decoding")
    assert_same_bits(e, lse[last], "decoding, lse")
    ends = torch.tensor(starts, device="cuda")
    ours = portable_attention.backward(q, k, v, out, lse, d_out, ends, D**-0.5)
    theirs = hopper_attention.backward(q, k, v, out, lse, d_out, ends, D**-0.5)
    want = _gradients(q, k, v, d_out, starts, D**-0.5)
    for name, mine, other, exact in zip(("dq", "dk", "dv"), ours, theirs, want, strict=True):
        assert relative_error(mine, exact) <= 1.1 * relative_error(other, exact) + 1e-4, name


def _gradients(q, k, v, d_out, starts, scale):  # type: ignore[no-untyped-def]
    """In float64, sequence by sequence."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    for a, b in pairwise(starts):
        x, y, z = (t[a:b].transpose(0, 1) for t in leaves)
        s = x @ y.repeat_interleave(group, 0).transpose(1, 2) * scale
        s = s.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool, device="cuda").triu(1), -torch.inf)
        o = s.softmax(-1) @ z.repeat_interleave(group, 0)
        o.backward(d_out[a:b].double().transpose(0, 1), retain_graph=True)
    return [t.grad for t in leaves]
