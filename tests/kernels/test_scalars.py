"""exp, exp2 and log of `samebit.h`: to the bit what the oracle defines, and their error in ulp; exp and log of `wide.h`.

One ulp is the spacing of float32 at the true value (2^-149 where that is subnormal); the truth is numpy's longdouble.
"""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.cpu import build
from tests.bits import assert_same_bits
from tests.kernels import order_oracle as oracle

F4, LD = np.float32, np.longdouble
STEP = 1009  # a prime: every 1009th bit pattern
ROOT = Path(build.__file__).parent


@pytest.fixture(scope="module")
def scalars(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("scalars") / "scalars.so"
    source = Path(__file__).with_name("scalars.c")
    subprocess.run(
        [build._compiler(), *build._FLAGS, "-march=native", f"-I{ROOT}", str(source), "-o", str(library), "-lm"],
        check=True,
    )
    return ctypes.CDLL(str(library))


def apply(scalars: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x)
    y = np.full_like(x, np.nan)
    address = [v.ctypes.data_as(ctypes.c_void_p) for v in (x, y)]
    getattr(scalars, f"apply_{name}")(*address, ctypes.c_int64(x.size))
    return y


def between(low: float, high: float) -> np.ndarray:
    """float32 values of one sign from low to high, both ends included."""
    first, last = sorted(int(F4(v).view(np.uint32)) for v in (low, high))
    return np.append(np.arange(first, last, STEP, dtype=np.uint32), np.uint32(last)).view(F4)


def ulps(y: np.ndarray, truth: np.ndarray) -> float:
    unit = np.maximum(np.spacing(np.abs(truth).astype(F4)).astype(LD), LD(2.0) ** -149)
    return float((np.abs(y.astype(LD) - truth) / unit).max())


@pytest.mark.parametrize(
    ("name", "truth", "low", "high", "bound"),
    [
        ("exp", np.exp, 0.0, 88.7228, 1.0),
        ("exp", np.exp, -0.0, -87.3, 1.0),
        ("exp", np.exp, -87.3, -104.5, 1.0),  # subnormal results
        ("exp2", np.exp2, 0.0, 127.99999, 1.0),
        ("exp2", np.exp2, -0.0, -126.0, 1.0),
        ("exp2", np.exp2, -126.0, -151.5, 1.0),
        ("log", np.log, 2.0**-149, 2.0**-126, 1.0),  # subnormal arguments
        ("log", np.log, 2.0**-126, 0.70, 2.0),
        ("log", np.log, 0.70, 1.42, 2.0),  # around the zero of log
        ("log", np.log, 1.42, 3.4028234e38, 2.0),
    ],
)
def test_ulp(scalars: ctypes.CDLL, name: str, truth: Callable, low: float, high: float, bound: float) -> None:
    x = between(low, high)
    assert x.size > 1000
    y = apply(scalars, name, x)
    assert np.isfinite(y).all()
    worst = ulps(y, truth(x.astype(LD)))
    assert worst <= bound, f"{name} on {low} .. {high}: {worst:.3f} ulp"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("exp", 0.0, 90.0),
        ("exp", -0.0, -110.0),
        ("exp2", 0.0, 130.0),
        ("exp2", -0.0, -160.0),
        ("log", 2.0**-149, 3.4e38),
    ],
)
def test_the_bits_are_those_of_the_oracle(scalars: ctypes.CDLL, name: str, low: float, high: float) -> None:
    x = between(low, high)[::7]
    with np.errstate(over="ignore"):
        expected = getattr(oracle, name)(x)
    assert_same_bits(torch.from_numpy(apply(scalars, name, x)), torch.from_numpy(expected), name)


def test_ends(scalars: ctypes.CDLL) -> None:
    inf = F4(np.inf)
    x = np.array([-np.inf, -200, -0.0, 0.0, 1, 200, np.inf], F4)
    assert apply(scalars, "exp", x).tolist() == [0, 0, 1, 1, F4(np.e), inf, inf]
    assert apply(scalars, "exp2", x).tolist() == [0, 0, 1, 1, 2, inf, inf]
    assert apply(scalars, "exp2", np.arange(-149, 128, dtype=F4)).tolist() == [2.0**n for n in range(-149, 128)]
    assert not np.signbit(apply(scalars, "log", np.ones(1, F4)))[0] and apply(scalars, "log", np.ones(1, F4))[0] == 0
    assert apply(scalars, "log", np.array([np.inf], F4))[0] == np.inf
    for name in ("exp", "exp2", "log"):
        assert np.isnan(apply(scalars, name, np.array([np.nan], F4)))[0]


def test_exp_is_monotone(scalars: ctypes.CDLL) -> None:
    """Across the seams between powers of two, where two polynomials meet."""
    for name, unit in (("exp", np.log(2.0)), ("exp2", 1.0)):
        for n in range(-20, 20):
            seam = F4((n + 0.5) * unit).view(np.uint32)
            x = np.sort((np.arange(-50, 50) + int(seam)).astype(np.uint32).view(F4))
            y = apply(scalars, name, x)
            assert (np.diff(y) >= -np.spacing(y[1:])).all(), f"{name} falls by more than an ulp at {seam.view(F4)}"


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 47, 200])
def test_row_dot_uses_16_lanes(scalars: ctypes.CDLL, n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = (rng.standard_normal(n).astype(F4) for _ in range(2))
    scalars.apply_row_dot.restype = ctypes.c_float
    address = [v.ctypes.data_as(ctypes.c_void_p) for v in (a, b)]
    assert F4(scalars.apply_row_dot(*address, ctypes.c_int64(n))) == oracle.row_dot(a, b)


# float64 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "truth", "low", "high", "bound"),
    [
        ("exp_f64", np.exp, -10.0, 10.0, 1.0),
        ("exp_f64", np.exp, -600.0, 600.0, 1.0),
        ("log_f64", np.log, 1e-6, 1e6, 2.0),
    ],
)
def test_ulp_of_float64(
    scalars: ctypes.CDLL, name: str, truth: Callable, low: float, high: float, bound: float
) -> None:
    x = np.random.default_rng(0).uniform(low, high, 200_000)
    y, t = apply(scalars, name, x), truth(x.astype(LD))
    assert float((np.abs(y - t) / np.spacing(np.abs(t).astype("f8"))).max()) <= bound


def test_the_logarithm_of_the_normal_tail_is_rounded_correctly(scalars: ctypes.CDLL) -> None:
    """-ln(1 - u) for all 2^24 values of u, to float32. Half an ulp of longdouble decides none of them."""
    u = np.arange(1 << 24) * 2.0**-24
    truth = np.log1p(-u.astype(LD))
    assert_same_bits(
        torch.from_numpy(-apply(scalars, "log_f64", 1 - u).astype(F4) + F4(0)),
        torch.from_numpy((-truth).astype(F4) + F4(0)),
        "-ln(1 - u)",
    )
    middle = truth.astype(F4).astype(LD)
    for sign in (-1, 1):
        border = (middle + np.nextafter(truth.astype(F4), F4(sign * np.inf)).astype(LD)) / 2
        assert (np.abs(truth - border) > np.abs(truth) * LD(2) ** -60)[1:].all(), (
            "a truth too close to half-way to be told"
        )
