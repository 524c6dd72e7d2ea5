"""Block-scaled FP8 on a CPU: numbers against the grid of e4m3 written out, the matmul against the order written out."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.device import UnsupportedError
from kernels.ops import Quantized, dequantize_blocks, matmul_fp8, quantize_blocks, quantize_rows
from kernels.ops.quantize import FP8
from kernels.spec import spread
from kernels.tree import TreeError
from tests.bits import assert_same_bits
from tests.kernels import order_oracle as oracle

CPU = torch.device("cpu")
GRID = [Fraction(float(v)) for v in oracle.e4m3(np.arange(0x7F, dtype=np.uint8))]
NAN_SCALE, NAN_VALUE = 0x7FC00000, 0x7F
EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def nearest(quotient: float) -> int:
    """The e4m3 bits of a float32: the nearest of the grid, of two the even one."""
    sign, wanted = (0x80 if np.signbit(np.float32(quotient)) else 0), abs(Fraction(quotient))
    return sign | min(range(len(GRID)), key=lambda i: (abs(GRID[i] - wanted), i & 1))


def expected(block: np.ndarray, power_of_two: bool, every: int) -> tuple[np.float32, list[int]]:
    """The scale of a block of finite float32, and the bits of each `every`th element."""
    scale = max(np.abs(block).max() / np.float32(448), np.float32(2.0**-126))
    if power_of_two:
        scale = np.float32(2.0 ** next(e for e in range(-126, 128) if Fraction(2) ** e >= Fraction(float(scale))))
    return scale, [nearest(float(v)) for v in (block / scale)[::every].tolist()]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_bfloat16_alone_in_its_block(power_of_two: bool) -> None:
    """The largest of a block is 448 scales, or more than 224 of a power of two, wherever it lies among the exponents."""
    x = torch.zeros(len(EVERY), 128, dtype=torch.bfloat16)
    x[:, 5] = EVERY
    made = quantize_rows(x, power_of_two)
    finite = EVERY.isfinite()
    largest = made.values.view(torch.uint8)[finite, 5] & 0x7F
    normal = EVERY.float()[finite].abs() / 448 >= 2.0**-126
    assert (largest[normal] == 0x7E if not power_of_two else largest[normal] >= 0x76).all()
    scales = made.scales[finite, 0]
    least = torch.full((), 2.0**-126)
    plain = torch.maximum(EVERY.float()[finite].abs() / 448, least)
    if power_of_two:
        bits = scales.view(torch.int32)
        assert (
            not (bits & 0x7FFFFF).any()
            and (scales >= plain).all()
            and (scales[scales > least] < 2 * plain[scales > least]).all()
        )
    else:
        assert_same_bits(scales, plain)
    assert (made.scales.view(torch.int32)[~finite] == NAN_SCALE).all()
    assert (made.values.view(torch.uint8)[~finite] == NAN_VALUE).all()
    assert not made.values.view(torch.uint8)[finite][:, 6:].any()


def test_every_bfloat16_beside_a_scale_of_one() -> None:
    """448 in a block makes its scale 1: every other element is rounded as it is."""
    small = EVERY[EVERY.isfinite() & (EVERY.abs() <= 448)]
    x = torch.full((-(-len(small) // 127), 128), 448.0, dtype=torch.bfloat16)
    cells = x[:, 1:].clone().reshape(-1)
    cells[: len(small)] = small
    x[:, 1:] = cells.view(len(x), 127)
    made = quantize_rows(x)
    assert (made.scales == 1).all()
    found = made.values.view(torch.uint8)[:, 1:].reshape(-1)[: len(small)]
    interesting = (small.abs() >= 2.0**-11).nonzero()[:, 0]  # below, all is zero
    for i in interesting[:: max(1, len(interesting) // 4000)].tolist():
        assert int(found[i]) == nearest(float(small[i])), float(small[i])
    tiny = small.abs() <= 2.0**-10
    assert not (found[tiny] & 0x7F).any(), "half of the smallest subnormal goes to the even zero"


@given(st.data())
def test_blocks_against_the_grid(data: st.DataObject) -> None:
    height, octaves = data.draw(st.sampled_from([1, 128])), data.draw(st.integers(0, 40))
    seed, power_of_two = data.draw(st.integers(0, 999)), data.draw(st.booleans())
    x = spread((height, 256), torch.Generator().manual_seed(seed), CPU, torch.bfloat16, octaves)
    x[:, : data.draw(st.integers(0, 128))] = data.draw(st.sampled_from([0.0, -0.0]))
    x *= 2.0 ** data.draw(st.integers(-100, 60))
    made = (quantize_rows if height == 1 else quantize_blocks)(x, power_of_two)
    for b in (0, 1):
        block = x[:, 128 * b : 128 * b + 128].float().numpy().reshape(-1)
        every = 1 if height == 1 else 97
        scale, bits = expected(block, power_of_two, every)
        assert made.scales[0, b].numpy().tobytes() == np.float32(scale).tobytes()
        found = made.values.view(torch.uint8)[:, 128 * b : 128 * b + 128].reshape(-1).tolist()
        assert found[::every] == bits


@given(st.integers(0, 999), st.booleans())
def test_weights_that_were_quantized_from_bfloat16_are_a_fixed_point(seed: int, power_of_two: bool) -> None:
    """What stands for a quantized weight, value x scale in bfloat16, is quantized to numbers that are the same."""
    w = spread((128, 256), torch.Generator().manual_seed(seed), CPU, torch.bfloat16)
    once = quantize_blocks(w, power_of_two)
    held = dequantize_blocks(once)
    again = quantize_blocks(held, power_of_two)
    assert_same_bits(dequantize_blocks(again), held)
    if not power_of_two:
        assert_same_bits(again.scales, once.scales)
        assert_same_bits(again.values, once.values)


def test_not_a_number_takes_its_block_and_no_other() -> None:
    w = spread((256, 384), torch.Generator().manual_seed(0), CPU, torch.bfloat16)
    clean = quantize_blocks(w)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = w.clone()
        broken[200, 130] = value
        made = quantize_blocks(broken)
        assert int(made.scales.view(torch.int32)[1, 1]) == NAN_SCALE
        assert (made.values.view(torch.uint8)[128:, 128:256] == NAN_VALUE).all()
        made.scales[1, 1], made.values[128:, 128:256] = clean.scales[1, 1], clean.values[128:, 128:256]
        assert_same_bits(made.values, clean.values)
        assert_same_bits(made.scales, clean.scales)
        assert matmul_fp8(broken[200:201, :], w[:128], 1).isnan().all()


@pytest.mark.parametrize("leaves", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 9, 33])
def test_the_order_written_out(rows: int, leaves: int) -> None:
    generator = torch.Generator().manual_seed(rows + leaves)
    x, w = (spread((n, 256 * leaves), generator, CPU, torch.bfloat16) for n in (rows, 128))
    made = [quantize_rows(x), quantize_blocks(w)]
    plain = [(oracle.e4m3(m.values.view(torch.uint8).numpy()), m.scales.numpy()) for m in made]
    root = torch.from_numpy(oracle.contract_fp8(*plain[0], *plain[1], leaves))
    assert_same_bits(matmul_fp8(x, w, leaves, out_dtype=torch.float32), root)
    assert_same_bits(matmul_fp8(x, made[1], leaves), root.bfloat16())


def test_every_value_is_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    w = torch.zeros(256, 128, dtype=torch.uint8)
    w[:, 3] = codes
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 3] = 448  # its scale is 1
    y = matmul_fp8(x, Quantized(w.view(FP8), torch.ones(2, 1)), 1, out_dtype=torch.float32)[0]
    wide = torch.from_numpy(oracle.e4m3(codes.numpy())) * 448
    assert torch.equal(y.isnan(), wide.isnan()) and int(y.isnan().sum()) == 2
    assert torch.equal(y[~y.isnan()], wide[~y.isnan()])


REFUSED = {
    "columns": (lambda: quantize_rows(torch.zeros(2, 130).bfloat16()), "130 columns are not whole blocks of 128"),
    "rows": (lambda: quantize_blocks(torch.zeros(130, 128)), "130 rows are not whole blocks of 128"),
    "float32 activations": (
        lambda: quantize_rows(torch.zeros(2, 128)),
        "float32 .2, 128. must be a matrix of bfloat16",
    ),
    "a leaf of half a block": (
        lambda: matmul_fp8(torch.zeros(1, 256).bfloat16(), torch.zeros(128, 256), 4),
        "256 columns in 4 leaves are 64 each, which is not whole blocks of 128",
    ),
    "an output of float16": (
        lambda: matmul_fp8(torch.zeros(1, 128).bfloat16(), torch.zeros(128, 128), 1, out_dtype=torch.float16),
        "the output is torch.float16",
    ),
    "other scales": (
        lambda: dequantize_blocks(Quantized(torch.zeros(128, 128).to(FP8), torch.ones(2, 1))),
        r"scales torch.float32 \(2, 1\) must be",
    ),
    "another device": (
        lambda: quantize_rows(torch.zeros(1, 128, dtype=torch.bfloat16, device="meta")),
        "quantize has no exact implementation for device 'meta'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    attempt, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        attempt()
    with pytest.raises(TreeError, match="power of two"):
        matmul_fp8(torch.zeros(1, 128).bfloat16(), torch.zeros(128, 128), 3)
