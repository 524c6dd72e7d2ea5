"""Ops whose operations are the CPU's one by one: the bits must be the CPU's. rms_norm and sums: their own row order."""

import pytest
import torch

from kernels.ops import (
    adamw,
    embedding,
    fold_rows,
    gumbel_argmax,
    norm_rope,
    rms_norm,
    rope_table,
    square_rows,
    sum_rows,
    swiglu,
)
from kernels.ops.norm_rope import cpu as rope_cpu
from kernels.ops.norm_rope import portable as norm_rope_gpu
from kernels.ops.rms_norm import portable as rms_gpu
from kernels.ops.sample import cpu as sample_cpu
from kernels.ops.sample import portable as sample_gpu
from kernels.tree import fold
from tests.bits import assert_same_bits
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16 = torch.bfloat16


def both(f, *tensors):
    """f on the CPU and on the GPU, with gradients of what asks for them."""
    results = []
    for device in ("cpu", "cuda"):
        mine = [
            t.to(device).detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in tensors
        ]
        results.append((f(*mine), mine))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_swiglu(dtype):
    x = (torch.randn(37, 2 * 1500) * 4).to(dtype)
    x[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-30, -88.5])
    dy = torch.randn(37, 1500).to(dtype)
    (c, (cx,)), (g, (gx,)) = both(swiglu, x.requires_grad_())
    assert_same_bits(g.detach(), c.detach(), "swiglu")
    c.backward(dy), g.backward(dy.cuda())
    assert_same_bits(gx.grad, cx.grad, "its gradient")


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_rope(dtype):
    def rope(x, cosine, sine, positions):
        return torch.cat(norm_rope(x, None, 0.0, (cosine, sine), positions, 2), 1)

    for D in (128, 64, 2):
        table = rope_table(1000, D, 1e6)
        x, positions = torch.randn(50, 6, D).to(dtype), torch.randint(1000, (50,)).int()
        (c, (cx, *_)), (g, (gx, *_)) = both(rope, x.requires_grad_(), *table, positions)
        assert_same_bits(g.detach(), c.detach(), "rope")
        dy = torch.randn(50, 6, D).to(dtype)
        c.backward(dy), g.backward(dy.cuda())
        assert_same_bits(gx.grad, cx.grad, "its gradient")


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
@pytest.mark.parametrize("ends", [[300], [10, 200, 300], [0, 3, 3, 77, 300], [7 * i for i in range(1, 44)]])
def test_embedding(dtype, ends):
    ids, weight = torch.randint(40, (ends[-1],)), torch.randn(50, 1100).to(dtype)
    groups = torch.tensor([0, *ends])
    results = []
    for device in ("cpu", "cuda"):
        w = weight.detach().clone().to(device).requires_grad_()
        y = embedding(ids.to(device), w, groups=groups.to(device))
        y.backward((torch.arange(ends[-1] * 1100).remainder(997).view(-1, 1100) / 500 - 1).to(dtype).to(device))
        shard = embedding(ids.to(device), w.detach()[10:30], first_id=10)
        results.append((y.detach(), w.grad, shard))
    for c, g, what in zip(*results, ("rows", "gradient", "shard"), strict=False):
        assert_same_bits(g, c, what)


def test_adamw():
    tensors = [torch.randn(12345), torch.randn(12345) * 1e-3, torch.randn(12345) * 1e-3, torch.rand(12345) * 1e-6]
    gpu = [t.cuda() for t in tensors]
    for step in (1, 2, 3):
        for group in (tensors, gpu):
            adamw(*group, step=step, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=0.37)
    for name, c, g in zip(("weight", "grad", "first", "second"), tensors, gpu, strict=False):
        assert_same_bits(g, c, name)


def test_noise_and_draws():
    for seed, position in ((0, 0), (2**63 - 1, 123456789012), (77, 5)):
        assert_same_bits(
            sample_gpu.noise_words(seed, position, 5003, torch.device("cuda")),
            sample_cpu.noise_words(seed, position, 5003),
            "words",
        )
    for V, first in ((151936, 0), (1000, 400), (18992, 18992)):
        logits = torch.randn(9, V) * 3
        logits[1, 5] = logits[1, 900] = 50.0
        logits[2] = torch.nan
        logits[3, 17] = torch.nan
        t = torch.rand(9) + 0.3
        seeds, positions = torch.randint(2**62, (9,)), torch.randint(10**6, (9,))
        greedy = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.uint8)
        args = (logits, t, seeds, positions, greedy)
        c, g = gumbel_argmax(*args, first), gumbel_argmax(*(a.cuda() for a in args), first)
        for name, a, b in zip(("score", "id", "logit"), c, g, strict=False):
            assert_same_bits(b, a, name)
        one = gumbel_argmax(*(a[4:5].cuda() for a in args), first)
        assert_same_bits(one[0], g[0][4:5], "one row")


def row_order(square):
    """Lanes of 1024, folded by halves, from products that are exact in float64."""
    rows, n = square.shape
    lanes = min(1024, 1 << (n - 1).bit_length())
    lane = torch.zeros(rows, lanes)
    for c in range(0, n, lanes):
        part = square[:, c : c + lanes]
        lane[:, : part.shape[1]] = (lane[:, : part.shape[1]].double() + part).float()
    while lane.shape[1] > 1:
        half = lane.shape[1] // 2
        lane = lane[:, :half] + lane[:, half:]
    return lane[:, 0]


@pytest.mark.parametrize("n", [128, 1024, 2560, 4096, 5120, 100])
def test_rms_norm(n):
    x, w = torch.randn(67, n).to(bf16), torch.rand(n).to(bf16)
    inverse = 1 / torch.sqrt(row_order(x.double() ** 2) / n + 1e-6)
    want = (x.float() * inverse[:, None] * w.float()).to(bf16)
    got = rms_norm(x.cuda(), w.cuda(), 1e-6)
    assert_same_bits(got, want, "rms_norm")
    for warps in (1, 2, 4, 8):
        assert_same_bits(rms_gpu.forward(x.cuda(), w.cuda(), 1e-6, warps=warps), got, f"{warps} warps")
        a, b = (rms_gpu.backward(x.cuda(), w.cuda(), x.cuda(), 1e-6, warps=k) for k in (1, warps))
        assert_same_bits(a[0], b[0], f"dx, {warps} warps")
        assert_same_bits(a[1], b[1], f"dw, {warps} warps")
    for rows in (slice(0, 1), slice(40, 47)):
        assert_same_bits(rms_norm(x.cuda()[rows], w.cuda(), 1e-6), got[rows], "rows")
    wide = torch.randn(20, 6, n).to(bf16).cuda()
    assert_same_bits(
        rms_norm(wide[:, 2:5], w.cuda(), 1e-6), rms_norm(wide[:, 2:5].contiguous(), w.cuda(), 1e-6), "strided"
    )
    X, W, dy = x.cuda().requires_grad_(), w.cuda().requires_grad_(), torch.randn(67, n).to(bf16).cuda()
    rms_norm(X, W, 1e-6, groups=torch.tensor([0, 30, 67], device="cuda")).backward(dy)
    A, B = x.double().requires_grad_(), w.double().requires_grad_()
    (A * torch.rsqrt((A * A).mean(-1, keepdim=True) + 1e-6) * B).backward(dy.cpu().double())
    assert relative_error(X.grad.cpu(), A.grad) < 3e-3 and relative_error(W.grad.cpu(), B.grad) < 3e-3
    half = x.cuda()[30:].requires_grad_()
    V = w.cuda().requires_grad_()
    rms_norm(half, V, 1e-6, groups=torch.tensor([0, 37], device="cuda")).backward(dy[30:])
    assert_same_bits(half.grad, X.grad[30:], "dx of some rows")


def test_sums():
    x = torch.randn(700, 130, device="cuda")
    for ends in ([700], [100, 300, 700], [1, 2, 3, 4, 5, 400, 700], [50 * i for i in range(1, 15)]):
        whole = sum_rows(x, torch.tensor([0, *ends], device="cuda"))
        nodes = [
            sum_rows(x[a:b].contiguous(), torch.tensor([0, b - a], device="cuda"))
            for a, b in zip([0, *ends], ends, strict=False)
        ]
        assert_same_bits(whole, fold(nodes, torch.add), f"{ends}")
        assert relative_error(whole, x.double().sum(0)) < 1e-6
    for rows, n in ((1, 3), (2, 4096), (5, 130), (1000, 1), (1025, 7), (151936, 1)):
        leaves = torch.rand(rows, n, device="cuda")
        assert_same_bits(fold_rows(leaves), fold(list(leaves.cpu()), torch.add).cuda(), f"fold_rows {rows} {n}")
    y = torch.randn(11, 5000, device="cuda")
    assert_same_bits(square_rows(y)[4:5], square_rows(y[4:5]), "square_rows")
    assert relative_error(square_rows(y), (y.double() ** 2).sum(1)) < 1e-6


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "D"), [(300, 32, 8, 128), (5, 4, 2, 64), (70, 3, 1, 256)])
def test_norm_rope_gradient_is_that_of_the_two_ops(tokens: int, heads: int, kv_heads: int, D: int) -> None:
    x = torch.randn(tokens, heads + 2 * kv_heads, D).to(bf16).cuda()[:, : heads + kv_heads]
    weights = torch.rand(D).to(bf16).cuda(), torch.rand(D).to(bf16).cuda()
    table = tuple(t.cuda() for t in rope_table(1000, D, 1e6))
    positions = torch.randint(1000, (tokens,), device="cuda").int()
    dq, dk = torch.randn(tokens, heads, D).to(bf16).cuda(), torch.randn(tokens, 2 * kv_heads, D).to(bf16).cuda()
    dk = dk[:, kv_heads:]
    turned = norm_rope_gpu.backward(x, None, 1e-6, table, positions, dq, dk)[0].split((heads, kv_heads), 1)
    dx, rows = norm_rope_gpu.backward(x, weights, 1e-6, table, positions, dq, dk)
    parts = x.split((heads, kv_heads), 1)
    alone = [rms_gpu.backward(part, w, d, 1e-6) for part, w, d in zip(parts, weights, turned, strict=True)]
    assert_same_bits(dx, torch.cat([a for a, _ in alone], 1), "dx")
    assert_same_bits(rows, tuple(d for _, d in alone), "contributions to the weights")
    on_cpu = [rope_cpu.rotate(d.cpu(), *(t.cpu() for t in table), positions.cpu(), -1.0) for d in (dq, dk)]
    assert_same_bits(torch.cat(turned, 1).cpu(), torch.cat(on_cpu, 1), "dx without a norm")
