"""Draws whole numbers and fractions from a seed."""

import math

import numpy as np


class Draws:
    """Draws from the stream of two keys: 64-bit words of Philox4x64-10 (Salmon et al. 2011, section 4).

    numpy keeps the words of a bit generator from version to version (its compatibility policy; NEP 19), but not what its
    `Generator` makes of them. That is here: whole numbers, and one exact multiplication by a power of two.
    """

    def __init__(self, key: int, name: int) -> None:
        """Both in 0 .. 2^64 - 1."""
        self._words = np.random.Philox(key=np.array([key, name], dtype=np.uint64))
        self._half: int | None = None  # the upper half of a word of which the lower one was drawn

    def _bits(self) -> int:
        """32 bits: the lower half of a word, then its upper half."""
        if self._half is not None:
            half, self._half = self._half, None
            return half
        word = int(self._words.random_raw())
        self._half = word >> 32
        return word & 0xFFFFFFFF

    def fraction(self) -> float:
        """Draws a multiple of 2^-53 in [0, 1)."""
        return math.ldexp(int(self._words.random_raw()) >> 11, -53)

    def below(self, n: int) -> int:
        """Draws one of 0 .. n - 1, each as likely as the others (Lemire 2019, algorithm 5); n in 1 .. 2^32."""
        if n == 1:
            return 0
        product = self._bits() * n
        if product & 0xFFFFFFFF < n:
            least = 2**32 % n
            while product & 0xFFFFFFFF < least:
                product = self._bits() * n
        return product >> 32

    def permutation(self, n: int) -> list[int]:
        """Returns 0 .. n - 1 in an order drawn from all n! (Durstenfeld 1964, from the last place down; a place is as many
        bits as it needs, drawn again until they are none of the places above); n in 1 .. 2^32."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            mask = (1 << i.bit_length()) - 1
            while (j := self._bits() & mask) > i:
                pass
            order[i], order[j] = order[j], order[i]
        return order
