"""Numbers that are computed on the host and decide bits on every device: rounded correctly, so every machine has the same.

A libm and a vector library round `pow`, `exp` and `cos` as their makers, and the CPU they run on, decide. What is here is made
of whole numbers, which have no rounding, and of the operations that IEEE 754 rounds (+, -, x, / and the square root).
"""

import math
from fractions import Fraction

import numpy as np

LOG2_E = 1.4426950408889634
"""log2(e), the nearest float64."""

_BITS = 24  # of a float32's significand


def sqrt_f32(x: float) -> float:
    """Returns the float32 nearest to the square root of a float32.

    IEEE 754 demands the nearest float64 of `math.sqrt`; rounding that to 24 bits gives what rounding once would, because
    53 >= 2 * 24 + 2 (Figueroa 1995, "When is double rounding innocuous?").
    """
    return float(np.float32(math.sqrt(x)))


def one_minus_power(base: float, exponent: int) -> float:
    """Returns the float32 nearest to 1 - base^exponent, for a float64 base in 0 .. 1 and an exponent of 1 or more.

    The power is enclosed by two multiples of 2^-bits; where they do not round to one float32, `bits` is doubled. That ends: a
    value half-way between two float32 has few bits, and its power is then exact.
    """
    bits, value = 128, Fraction(base)
    while True:
        one = 1 << bits
        low, high = math.floor(value * one), math.ceil(value * one)
        below, above = one, one
        for digit in f"{exponent:b}":
            below, above = below * below >> bits, -(-above * above >> bits)
            if digit == "1":
                below, above = below * low >> bits, -(-above * high >> bits)
        least, most = _nearest(one - above, bits), _nearest(one - below, bits)
        if least == most:
            return least
        bits *= 2


def root_of_power(base: float, numerator: int, denominator: int) -> float:
    """Returns the float64 nearest to base^(-numerator / denominator), for a base above 0.

    `math.pow` only proposes: a neighbour half-way, m, is compared with the true value by whole numbers, since
    m <= b^(-p/q) means m^q b^p <= 1.
    """
    exponent, true = Fraction(numerator, denominator), Fraction(base)
    p, q = exponent.numerator, exponent.denominator

    def at_most(m: Fraction) -> bool:
        return m.numerator**q * true.numerator**p <= m.denominator**q * true.denominator**p

    y = math.pow(base, -(numerator / denominator))
    while at_most((Fraction(y) + Fraction(up := math.nextafter(y, math.inf))) / 2):
        y = up
    while not at_most((Fraction(y) + Fraction(down := math.nextafter(y, 0.0))) / 2):
        y = down
    return y


def _nearest(n: int, bits: int) -> float:
    """Returns the float32 nearest to n / 2^bits, ties to even, for a value in float32's normal range."""
    drop = n.bit_length() - _BITS
    if drop > 0:
        n = (n + (1 << drop - 1) - 1 + (n >> drop & 1)) >> drop
        bits -= drop
    return math.ldexp(n, -bits)
