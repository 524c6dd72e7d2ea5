import pytest
import torch

from kernels.gpu.card import KNOWN
from kernels.gpu.workspace import counters
from kernels.ops.matmul import hopper, matmul
from kernels.ops.matmul.hopper import grouped, many_rows, tuning, weight_stream
from kernels.ops.matmul.portable import few_rows, order
from kernels.ops.matmul.portable.plans import FewRows, few_rows_plan
from kernels.tree import fold, leaf_bounds
from tests.bits import assert_same_bits
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16, f32 = torch.bfloat16, torch.float32


def operands(M, N, K):
    return torch.randn(M, K, device="cuda").to(bf16), (torch.randn(N, K, device="cuda") / K**0.5).to(bf16)


def reference(a, b, leaves, dtype=bf16):
    return order.contract(a, b, leaf_bounds(a.shape[1], leaves)).to(dtype)


FEW = {(m, leaves, plan) for (m, _, _, leaves), plan in tuning.TABLE.items() if isinstance(plan, FewRows)}
FEW |= {
    (m, leaves, few_rows_plan(m, n, leaves, KNOWN[90].multiprocessors))
    for m in (16, 32, 64, 128)
    for n in (4096, 24576, 768)
    for leaves in (1, 2, 4, 8)
}
LISTED = [(key, getattr(plan, "below", plan)) for key, plan in tuning.TABLE.items()]
STREAM = {(m, leaves, plan) for (m, _, _, leaves), plan in LISTED if isinstance(plan, tuning.Stream)}
STREAM |= {
    (m, 8, tuning.Stream(min(m, 64), s, rows))
    for m in (16, 32, 64, 128, 256)
    for s in (1, 2, 4, 8)
    for rows in (64, 128)
}
STREAM |= {
    (m, leaves, tuning.Stream(min(m, 64), 1, rows)) for m in (16, 64, 256) for leaves in (1, 2, 4) for rows in (64, 128)
}
STREAM |= {(128, 8, tuning.Stream(128, s)) for s in (4, 8)}
STREAM |= {
    (m, leaves, tuning.Stream(min(m, 64), 1, rows, tail))
    for m in (64, 256)
    for leaves in (2, 8)
    for rows in (64, 128)
    for tail in (2, 4, 8)
}


@pytest.mark.parametrize("m,leaves,plan", sorted(FEW) + sorted(STREAM), ids=str)
def test_plans(m, leaves, plan):
    op = weight_stream if isinstance(plan, tuning.Stream) else few_rows
    for N, K in ((320, 2560), (1536, 12288), (6144, 4096)):
        for M in (m, m - 1) if m > 16 else (1, 5, 16):
            x, w = operands(M, N, K)
            for dtype in (bf16, f32):
                assert_same_bits(
                    op.contract(x, w, leaves, dtype, **plan._asdict()),
                    reference(x, w, leaves, dtype),
                    f"{leaves} {plan} {M} {N} {K}",
                )


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
def test_any_leaves_and_rows(leaves):
    for M, N, K in ((1, 512, 1024), (40, 96, 768), (130, 200, 1280), (200, 512, 2048), (3, 64, 16 * 3 * leaves)):
        x, w = operands(M, N, K)
        for dtype in (bf16, f32):
            got = hopper.contract(x, w, leaf_bounds(K, leaves), dtype)
            assert_same_bits(got, reference(x, w, leaves, dtype), f"{M} {N} {K}")


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [bf16, f32])
def test_many_rows(leaves, dtype):
    for M, N, K in ((1000, 4096, 4096), (129, 520, 1024), (256, 1024, 2560)):
        x, w = operands(M, N, K)
        y = torch.full((M, N), torch.nan, device="cuda", dtype=dtype)
        want = reference(x, w, leaves, dtype)
        for _ in range(2):
            many_rows.launch(x, w, y.fill_(torch.nan), M, N, leaves)
            assert_same_bits(y, want, f"{M} {N} {K}")
        many_rows.launch(x, w.T.contiguous(), y.fill_(torch.nan), M, N, leaves, b_mn=True)
        assert_same_bits(y, want, f"transposed {M} {N} {K}")
        if leaves == 1:
            many_rows.launch(x, w, y.fill_(torch.nan), M, N, leaves, BN=256)
            assert_same_bits(y, want, f"wide {M} {N} {K}")


def test_qwen_shapes_are_taken_by_fast_kernels(monkeypatch):
    def slow(*_):
        raise AssertionError("the slow order runs")

    shapes = []
    for hidden, inter, q, kv in (
        (1024, 3072, 2048, 1024),
        (2048, 6144, 2048, 1024),
        (2560, 9728, 4096, 1024),
        (4096, 12288, 4096, 1024),
        (5120, 17408, 5120, 1024),
        (5120, 25600, 8192, 1024),
    ):
        for t in (1, 2, 4, 8):
            shapes += [
                (n, k, leaves, t == 1)
                for n, k, leaves in (
                    ((q + 2 * kv) // t, hidden, 8),
                    (hidden, q // t, 8 // t),
                    (2 * inter // t, hidden, 8),
                    (hidden, inter // t, 8 // t),
                )
            ]
    for N, K, leaves, whole in sorted(set(shapes)):
        for M in (2, 70):
            x, w = operands(M, N, K)
            want = reference(x, w, leaves, f32)
            with monkeypatch.context() as patch:
                patch.setattr(order, "contract", slow)
                assert_same_bits(hopper.contract(x, w, leaf_bounds(K, leaves), f32), want, f"{M} {N} {K} {leaves}")
                if M == 70 and whole:
                    hopper.contract(torch.randn(M, N, device="cuda").to(bf16), w.T, leaf_bounds(N, 8), bf16)


def test_rows_slices_and_shards():
    M, N, K = 200, 1024, 4096
    x, w = operands(M, N, K)
    whole = hopper.contract(x, w, leaf_bounds(K, 8), f32)
    for rows in (slice(0, 1), slice(7, 8), slice(60, 76), slice(3, 67), slice(100, 200)):
        assert_same_bits(hopper.contract(x[rows], w, leaf_bounds(K, 8), f32), whole[rows], f"{rows}")
    for T in (2, 4, 8):
        roots = []
        for r in range(T):
            k = slice(r * K // T, (r + 1) * K // T)
            roots.append(hopper.contract(x[:, k], w[:, k], leaf_bounds(K // T, 8 // T), f32))
            n = slice(r * N // T, (r + 1) * N // T)
            assert_same_bits(hopper.contract(x, w[n], leaf_bounds(K, 8), f32), whole[:, n], f"columns {r} of {T}")
            assert_same_bits(
                hopper.contract(x[:9], w[n], leaf_bounds(K, 8), f32), whole[:9, n], f"columns {r} of {T}, few rows"
            )
        assert_same_bits(fold(roots, torch.add), whole, f"{T} shards of K")
        few = [
            hopper.contract(
                x[:5, r * K // T : (r + 1) * K // T],
                w[:, r * K // T : (r + 1) * K // T],
                leaf_bounds(K // T, 8 // T),
                f32,
            )
            for r in range(T)
        ]
        assert_same_bits(fold(few, torch.add), whole[:5], f"{T} shards of K, few rows")


@pytest.mark.parametrize(
    "ends",
    [
        [128],
        [64, 128],
        [100, 171, 300],
        [5, 6, 70, 200, 263],
        [64 * i for i in range(1, 9)],
        [33 * i for i in range(1, 8)],
        [0, 50, 50, 120],
        [17 * i for i in range(1, 40)],
    ],
)
def test_weight_gradient(ends):
    T, N, K = ends[-1], 384, 520
    dy, x = torch.randn(T, N, device="cuda").to(bf16), torch.randn(T, K, device="cuda").to(bf16)
    bounds = torch.tensor([0, *ends], device="cuda")
    want = order.contract(dy.T, x.T, bounds.tolist())
    got = hopper.contract(dy.T, x.T, bounds, f32)
    assert_same_bits(got, want, f"{ends}")
    for plan in ({"blocks": 3}, {"most": 4}, {"depth": 3}, *([{"BN": 256}] if len(ends) == 1 else [])):
        y = torch.full_like(got, torch.nan)
        grouped.launch(dy, x, bounds, y, **plan)
        assert_same_bits(y, want, f"{ends}, {plan}")


def test_blocks_in_step():
    """Waiting for each other decides no bit, whether all blocks run at once or (132 fit) some wait in vain for the rest, and
    the counters are zero again."""
    plans = [{"period": 1, "blocks": blocks} for blocks in (7, 132, 200)]
    x, w = operands(1000, 4096, 1024)
    want, y = reference(x, w, 8), torch.empty(1000, 4096, device="cuda", dtype=bf16)
    for plan in plans:
        many_rows.launch(x, w, y.fill_(torch.nan), 1000, 4096, 8, **plan)
        assert_same_bits(y, want, f"{plan}")
    dy, x = torch.randn(500, 2048, device="cuda").to(bf16), torch.randn(500, 2048, device="cuda").to(bf16)
    for ends in ([500], [100, 171, 171, 300, 500], [17 * i for i in range(1, 29)] + [500]):
        bounds = torch.tensor([0, *ends], device="cuda")
        want, y = order.contract(dy.T, x.T, bounds.tolist()), torch.empty(2048, 2048, device="cuda")
        for plan in plans:
            grouped.launch(dy, x, bounds, y.fill_(torch.nan), **plan)
            assert_same_bits(y, want, f"{ends}, {plan}")
    assert not counters(x.device, 2).any()


def test_two_streams_share_the_card():
    """Each holds multiprocessors that the other's blocks wait for."""
    x, w = operands(4000, 4096, 4096)
    want = reference(x, w, 8)
    streams = [torch.cuda.Stream() for _ in range(2)]
    out = [torch.full_like(want, torch.nan) for _ in range(8)]
    torch.cuda.synchronize()
    for i, y in enumerate(out):
        with torch.cuda.stream(streams[i % 2]):
            many_rows.launch(x, w, y, 4000, 4096, 8, period=1)
    torch.cuda.synchronize()
    for i, y in enumerate(out):
        assert_same_bits(y, want, f"launch {i}")
    for stream in streams:
        with torch.cuda.stream(stream):
            assert not counters(x.device, 2).any()


def test_weight_gradient_of_a_window():
    """Widths that are no multiple of 8, in rows that TMA can read."""
    dy, x = (torch.randn(200, w, device="cuda").to(bf16)[:, :n] for w, n in ((320, 301), (264, 259)))
    bounds = torch.tensor([0, 40, 140, 200], device="cuda")
    assert_same_bits(hopper.contract(dy.T, x.T, bounds, f32), order.contract(dy.T, x.T, bounds.tolist()))


def test_weight_gradient_of_no_tokens():
    none = torch.empty(0, 64, device="cuda", dtype=bf16)
    got = hopper.contract(none.T, none[:, :16].T, torch.zeros(5, dtype=torch.int64, device="cuda"), f32)
    assert_same_bits(got, torch.zeros(64, 16, device="cuda"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_group_does_not_see_the_next(value):
    """What is not a number in one group's tokens stays out of the sums of the others, wherever the groups begin."""
    ends = [0, 40, 100, 164, 229, 300, 412, 500, 640]
    dy, x = torch.randn(640, 256, device="cuda").to(bf16), torch.randn(640, 256, device="cuda").to(bf16)
    for group in range(8):
        first, last = ends[group], ends[group + 1]
        among = [torch.full_like(t, value) for t in (dy, x)]
        for poisoned, t in zip(among, (dy, x), strict=True):
            poisoned[first:last] = t[first:last]
        want, y = order.contract(dy.T, x.T, [first, last]), torch.full((256, 256), torch.nan, device="cuda")
        grouped.launch(*among, torch.tensor([first, last], device="cuda"), y)
        assert_same_bits(y, want, f"group {group}")


def test_weight_gradient_splits_into_aligned_sets():
    ends = [0, 40, 100, 190, 256, 300, 412, 500, 640]
    dy, x = torch.randn(640, 256, device="cuda").to(bf16), torch.randn(640, 256, device="cuda").to(bf16)
    whole = hopper.contract(dy.T, x.T, torch.tensor(ends, device="cuda"), f32)
    for size in (2, 4):
        parts = []
        for i in range(0, 8, size):
            t = slice(ends[i], ends[i + size])
            parts.append(
                hopper.contract(dy[t].T, x[t].T, torch.tensor(ends[i : i + size + 1], device="cuda") - ends[i], f32)
            )
        assert_same_bits(fold(parts, torch.add), whole, f"sets of {size}")


def test_autograd_and_accuracy():
    M, N, K = 300, 1024, 2048
    x, w = operands(M, N, K)
    x.requires_grad_(), w.requires_grad_()
    groups = torch.tensor([0, 90, 201, 300], device="cuda")
    dy = torch.randn(M, N, device="cuda").to(bf16)
    y = matmul(x, w, 8, groups=groups)
    y.backward(dy)
    X, W, G = x.detach().double(), w.detach().double(), dy.double()
    for name, ours, theirs, want in (
        ("y", y, x @ w.T, X @ W.T),
        ("dx", x.grad, dy @ w, G @ W),
        ("dw", w.grad, dy.T @ x, G.T @ X),
    ):
        ours, theirs = relative_error(ours.detach(), want), relative_error(theirs.detach(), want)
        print(f"{name}: ours {ours:.3e}, vendor {theirs:.3e}")
        assert ours <= theirs * 1.02
    assert_same_bits(x.grad, order.contract(dy, w.detach().T, leaf_bounds(N, 8)).to(bf16), "dx")
