"""The matmul of block-scaled FP8 and its quantization: every plan against the order as it reads, and the quantization against
the CPU's."""

import pytest
import torch

from kernels.gpu.card import card_of
from kernels.gpu.workspace import counters
from kernels.ops import dequantize_blocks, matmul_fp8, quantize_blocks, quantize_rows
from kernels.ops.matmul.hopper.tuning import ManyRows, Stream
from kernels.ops.matmul_fp8 import hopper
from kernels.ops.matmul_fp8.hopper import many_rows, order, tuning, weight_stream
from kernels.ops.quantize import Quantized
from kernels.ops.quantize.hopper import column_scales
from kernels.ops.quantize.spec import each_element
from kernels.spec import spread
from kernels.tree import fold, leaf_bounds
from tests.bits import assert_same_bits
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16, f32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def hopper_family(poisoned_memory: None) -> None:
    if card_of(torch.device("cuda")).family != "hopper":
        pytest.skip("the portable family has no FP8")


def operands(M: int, N: int, K: int) -> tuple[Quantized, Quantized]:
    """Normal numbers, a row of x and a block of w many octaves away from the rest."""
    x, w = torch.randn(M, K, device="cuda").to(bf16), (torch.randn(N, K, device="cuda") / K**0.5).to(bf16)
    x[M // 2] *= 2.0**9
    w[:128, K // 2 : K // 2 + 128] *= 2.0**-7
    return quantize_rows(x), quantize_blocks(w)


def flat(x: Quantized, w: Quantized) -> tuple[torch.Tensor, ...]:
    return x.values, x.scales, w.values, w.scales


def reference(x: Quantized, w: Quantized, leaves: int) -> torch.Tensor:
    return order.contract(*flat(x, w), leaf_bounds(x.shape[1], leaves))


def computed(x: Quantized, w: Quantized, leaves: int, dtype: torch.dtype = f32) -> torch.Tensor:
    return hopper.contract(*flat(x, w), leaf_bounds(x.shape[1], leaves), dtype)


STREAM = {
    (m, leaves, Stream(min(m, 64), split, rows))
    for m in (16, 32, 64, 256)
    for leaves, split in ((1, 1), (2, 1), (4, 1), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8), (16, 2))
    for rows in (64, 128)
}
STREAM |= {
    (m, leaves, Stream(min(m, 64), 1, rows, tail))
    for m in (16, 256)
    for leaves in (2, 8)
    for rows in (64, 128)
    for tail in (2, 4, 8)
}
LISTED = {(key[0], key[3], getattr(plan, "below", plan)) for key, plan in tuning.TABLE.items()}


@pytest.mark.parametrize("m,leaves,plan", sorted(STREAM | LISTED), ids=str)
def test_streams(m: int, leaves: int, plan: Stream) -> None:
    for N, K in ((384, 4096), (1536, 6144), (24576, 2048)):
        for M in (m, m - 1) if m > 16 else (1, 5, 16):
            x, w = operands(M, N, K)
            want = reference(x, w, leaves)
            given = x.values, column_scales(x.scales), w.values, w.scales, leaves
            for dtype in (bf16, f32):
                got = weight_stream.contract(*given, dtype, **plan._asdict())
                assert_same_bits(got, want.to(dtype), f"{leaves} {plan} {M} {N} {K}")


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [bf16, f32])
def test_many_rows(leaves: int, dtype: torch.dtype) -> None:
    plans = [{}, {"nodes": False}, {"depth": 2}, {"group": 1}, {"blocks": 7}, {"blocks": 200, "period": 1}]
    for M, N, K in ((1000, 4096, 4096), (129, 384, 1024), (1, 128, 3072), (256, 1536, 12288)):
        x, w = operands(M, N, K)
        want = reference(x, w, leaves).to(dtype)
        given = x.values, column_scales(x.scales), w.values, w.scales, leaves
        for plan in plans:
            for _ in range(2):  # the second finds what the first left in memory
                assert_same_bits(many_rows.contract(*given, dtype, **plan), want, f"{plan} {M} {N} {K}")
    assert not counters(x.device, 2).any()


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
def test_any_rows(leaves: int) -> None:
    """On both sides of every tile, and of the rows at which another kernel runs."""
    x, w = operands(400, 640, 128 * 3 * leaves)
    want = reference(x, w, leaves)
    for M in (0, 1, 2, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 192, 255, 257, 400):
        part = Quantized(x.values[:M], x.scales[:M])
        assert_same_bits(computed(part, w, leaves), want[:M], f"{M} rows")
        assert_same_bits(computed(part, w, leaves, bf16), want[:M].to(bf16), f"{M} rows, bfloat16")


def test_rows_slices_and_shards() -> None:
    M, N, K = 200, 2048, 8192
    x, w = operands(M, N, K)
    whole = computed(x, w, 8)
    assert_same_bits(whole, reference(x, w, 8), "whole")
    for rows in (slice(0, 1), slice(7, 8), slice(60, 76), slice(3, 67), slice(100, 200)):
        part = Quantized(x.values[rows], x.scales[rows])
        assert_same_bits(computed(part, w, 8), whole[rows], f"{rows}")
        copied = Quantized(x.values[rows].clone(), x.scales[rows].contiguous())
        assert_same_bits(computed(copied, w, 8), whole[rows], f"{rows}, scales that lie by rows")
    for T in (2, 4, 8):
        for few in (M, 5):
            roots = []
            for r in range(T):
                k, b = (slice(r * n // T, (r + 1) * n // T) for n in (K, K // 128))
                part = Quantized(x.values[:few, k], x.scales[:few, b]), Quantized(w.values[:, k], w.scales[:, b])
                roots.append(computed(*part, 8 // T))
                n, b = (slice(r * n // T, (r + 1) * n // T) for n in (N, N // 128))
                got = computed(Quantized(x.values[:few], x.scales[:few]), Quantized(w.values[n], w.scales[b]), 8)
                assert_same_bits(got, whole[:few, n], f"columns {r} of {T}, {few} rows")
            assert_same_bits(fold(roots, torch.add), whole[:few], f"{T} shards of K, {few} rows")


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantization_is_the_cpus(power_of_two: bool) -> None:
    """Every bfloat16 number, and numbers of a kind, in blocks of each; what is not finite too."""
    generator = torch.Generator().manual_seed(0)
    each = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(bf16)
    mixed = each[torch.randperm(1 << 16, generator=generator)].view(128, 512)
    for x in (
        each.view(128, 512),
        mixed,
        *(spread((n, 640), generator, torch.device("cpu"), bf16, 12) for n in (1, 70, 256)),
    ):
        for tiny in (0, -100, -126):
            x = (x.float() * 2.0**tiny).to(bf16)
            for run in (quantize_rows, quantize_blocks)[: 2 if x.shape[0] % 128 == 0 else 1]:
                ours, want = run(x.cuda(), power_of_two), run(x, power_of_two)
                assert_same_bits(ours.values, want.values, f"{run.__name__} {tuple(x.shape)} x 2^{tiny}")
                assert_same_bits(ours.scales, want.scales, f"scales of {run.__name__} {tuple(x.shape)} x 2^{tiny}")
                if run is quantize_blocks and x.isfinite().all():
                    back = dequantize_blocks(ours)
                    assert_same_bits(back.cpu(), dequantize_blocks(want), f"back, {tuple(x.shape)} x 2^{tiny}")


def test_quantization_of_other_strides() -> None:
    x = torch.randn(1024, 640, device="cuda").to(bf16)
    for run in (quantize_rows, quantize_blocks):
        for view in (x.T, x[1:513, 128:], x[::4]):
            ours, want = run(view), run(view.contiguous())
            assert_same_bits(
                (ours.values, ours.scales), (want.values, want.scales), f"{tuple(view.shape)} {view.stride()}"
            )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_does_not_see_the_next(value: float) -> None:
    """What is not a number in one row, or in a part of w, stays there."""
    for M in (7, 64, 300):
        x, w = torch.randn(M, 1024, device="cuda").to(bf16), torch.randn(384, 1024, device="cuda").to(bf16)
        with torch.no_grad():
            want = matmul_fp8(x, w, 8, out_dtype=f32)
            x[M // 2, 300], w[130, 5] = value, value
            got = matmul_fp8(x, w, 8, out_dtype=f32)
        rows, columns = torch.arange(M, device="cuda") != M // 2, torch.arange(384, device="cuda") // 128 != 1
        assert got[M // 2].isnan().all() and got[:, 128:256].isnan().all()
        assert_same_bits(got[rows][:, columns], want[rows][:, columns], f"{M} rows")


@pytest.mark.parametrize("M,N,K", [(16, 4096, 4096), (512, 6144, 4096), (512, 4096, 12288)])
def test_accuracy(M: int, N: int, K: int) -> None:
    """Against float64: what the product itself adds is small beside what quantization does, and the whole is no worse than the
    vendor's FP8 with one scale a tensor."""
    a, b = torch.randn(M, K, device="cuda").to(bf16), (torch.randn(N, K, device="cuda") / K**0.5).to(bf16)
    x, w = quantize_rows(a), quantize_blocks(b)
    got = computed(x, w, 8)
    X = x.values.double() * each_element(x.scales, 1).double()
    W = w.values.double() * each_element(w.scales, 128).double()
    exact, want = X @ W.T, a.double() @ b.double().T
    scales = [(t.abs().max().float() / 448.0) for t in (a, b)]
    halves = [(t.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn) for t, s in zip((a, b), scales, strict=True)]
    vendor = torch._scaled_mm(halves[0], halves[1].T, scale_a=scales[0], scale_b=scales[1], out_dtype=bf16)
    added, ours, theirs = relative_error(got, exact), relative_error(got, want), relative_error(vendor, want)
    print(f"{M} x {N} x {K}: of the product {added:.2e}, of all {ours:.3e}, vendor {theirs:.3e}")
    assert added < 2.0**-11 and ours <= 1.05 * theirs


def test_the_table_has_a_kernel_for_every_shape() -> None:
    for M in (1, 16, 64, 128, 129, 8192):
        for leaves in (1, 8, 16):
            chosen = tuning.plan(M, 4096, 4096, leaves)
            assert isinstance(chosen, ManyRows) == (M > tuning.MOST_STREAMED and leaves <= 8)
