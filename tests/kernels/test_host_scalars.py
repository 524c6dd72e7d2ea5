"""Scalars and tables that the host computes for every device: rounded correctly, against whole numbers and decimals."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels.device import UnsupportedError
from kernels.ops import adamw, exp, normal, rope_table
from kernels.ops.norm_rope import RopeScaling
from kernels.scalars import LOG2_E, one_minus_power, root_of_power, sqrt_f32
from tests.bits import assert_same_bits, sha256

F4 = np.float32
RECORDED_NORMAL = "af00bdbf576078162b617695cca63411f579b281d317cd9aea89c6e51d013db8"
POSITIVE = st.floats(0, width=32, exclude_min=True, allow_infinity=False)
BASES = st.one_of(
    st.floats(0, 1, exclude_max=True), st.sampled_from([0.9, 0.95, 0.98, 0.99, 0.999, 0.5, 0.75, 1 - 2**-53])
)


def half_ways(y: float, kind: type) -> tuple[Fraction, Fraction]:
    """Between `y` and its neighbours in a float type: what rounds to `y` lies between them."""
    here = kind(y)
    below, above = (float(np.nextafter(here, kind(to))) for to in (-np.inf, np.inf))
    return (Fraction(below) + Fraction(y)) / 2, (Fraction(above) + Fraction(y)) / 2


@given(POSITIVE)
@example(2.0**-149)
@example(float(np.finfo(F4).max))
def test_square_root(x: float) -> None:
    y = sqrt_f32(x)
    low, high = half_ways(y, F4)
    assert float(F4(y)) == y and low**2 < Fraction(x) < high**2  # no root is half-way: its square would need 49 bits


def test_square_root_of_what_has_none() -> None:
    assert sqrt_f32(0.0) == 0 and sqrt_f32(math.inf) == math.inf and math.isnan(sqrt_f32(math.nan))


@given(BASES, st.integers(1, 400))
@example(0.5, 25)  # half-way: to even
@example(0.5 + 2**-50, 25)  # just below
@example(0.75, 12)
@example(0.0, 1)
@example(1 - 2**-53, 1)
def test_one_minus_power(base: float, exponent: int) -> None:
    y, true = one_minus_power(base, exponent), 1 - Fraction(base) ** exponent
    low, high = half_ways(y, F4)
    assert float(F4(y)) == y and low <= true <= high
    if true in (low, high):
        assert F4(y).view("u4") % 2 == 0


@given(BASES.filter(lambda b: b > 0), st.integers(400, 1_000_000))
def test_one_minus_a_high_power(base: float, exponent: int) -> None:
    y = one_minus_power(base, exponent)
    low, high = half_ways(y, F4)
    with localcontext(prec=80):
        true = 1 - (Decimal(base).ln() * exponent).exp()
    assert low <= Fraction(true) <= high


@given(st.floats(1e-3, 1e9), st.integers(0, 63), st.sampled_from([2, 6, 64, 80, 96, 128, 256]))
@example(1e4, 0, 64)
@example(65536.0, 32, 64)  # exact
@example(1e6, 50, 64)  # float64 vector code was an ulp off here
def test_root_of_power(base: float, place: int, denominator: int) -> None:
    numerator = 2 * place % denominator
    y = root_of_power(base, numerator, denominator)
    low, high = half_ways(y, np.float64)
    with localcontext(prec=60):
        true = (-Decimal(base).ln() * numerator / denominator).exp()
    assert low <= Fraction(true) <= high


def test_constant() -> None:
    with localcontext(prec=40):
        assert float(1 / Decimal(2).ln()) == LOG2_E


# Tables and numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 64), (5e5, 128), (1e6, 128), (5e6, 128), (1e7, 128), (1e4, 96)])
def test_rope_tables_of_long_contexts_are_rounded_correctly(theta: float, head_dim: int) -> None:
    """At every 97th of 131,072 positions, against longdouble."""
    table = rope_table(131_072, head_dim, theta)
    frequencies = np.array([root_of_power(theta, i, head_dim) for i in range(0, head_dim, 2)])
    angles = (np.arange(131_072.0)[::97, None] * frequencies).astype(np.longdouble)
    for ours, function in zip(table, (np.cos, np.sin), strict=True):
        truth = torch.from_numpy(function(angles).astype(F4))
        assert_same_bits(ours[::97], truth, f"{function.__name__}, theta {theta}, head_dim {head_dim}")


def test_scaled_frequencies() -> None:
    """Llama 3.1's: long waves eight times as long, short ones kept, and between them in between."""
    scaling = RopeScaling(factor=8.0, low=1.0, high=4.0, original_positions=8192)
    assert scaling(1e-6) == 1e-6 / 8 and scaling(1.0) == 1.0
    between = 2.5 * 2 * math.pi / 8192  # half-way between low and high
    assert scaling(between) == pytest.approx(between * (0.5 + 0.5 / 8), rel=1e-15)
    assert_same_bits(rope_table(3, 2, 1e4, scaling), rope_table(3, 2, 1e4), "the first frequency is 1, and kept")


def test_normal_numbers_are_those_that_are_recorded() -> None:
    """Of one stream and of its tail: numpy's own may change, these may not."""
    numbers = normal((1_000_000,), 3, 0x9E3779B9)
    assert sha256([numbers]) == RECORDED_NORMAL
    assert int((numbers.abs() > 3.6541529).sum()) > 200


def test_normal_numbers_are_normal() -> None:
    x = normal((4_000_000,), 1, 2).double()
    n = len(x)
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):  # within five standard errors
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / n)
        assert abs(float((x**power).mean()) - expected) < 5 * spread, f"moment {power}"
    for edge in (0.1, 0.5, 1.0, 2.0, 3.0, 3.6, 3.7, 4.0, 4.5):
        share = math.erfc(edge / math.sqrt(2))
        assert abs(float((x.abs() > edge).double().mean()) - share) < 5 * math.sqrt(share / n), f"beyond {edge}"


def test_streams_differ() -> None:
    first = normal((64,), 0, 1)
    assert not torch.equal(first, normal((64,), 1, 0)) and not torch.equal(first, normal((64,), 0, 2))


# Where they are used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 100, 12345])
def test_adamw_divides_by_the_exact_correction(step: int) -> None:
    """A step that is the first moment over its correction, and nothing else."""
    w, m, v = torch.zeros(1), torch.ones(1), torch.zeros(1)
    scalars = {"lr": 1.0, "betas": (0.9, 0.0), "eps": 1.0, "weight_decay": 0.0, "grad_scale": 1.0}
    adamw(w, torch.zeros(1), m, v, step=step, **scalars)
    assert F4(-w.item()) == F4(0.9) / F4(one_minus_power(0.9, step))


def test_a_ratio_of_equal_log_probs_is_1() -> None:
    assert exp(torch.zeros(5)).tolist() == [1.0] * 5


def test_a_thread_that_flushes_subnormals_is_refused() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        with pytest.raises(UnsupportedError, match="flushes subnormals to zero"):
            exp(torch.zeros(5))
    finally:
        torch.set_flush_denormal(False)
    assert exp(torch.zeros(1)).item() == 1
