"""Draws numbers that are the same wherever and whenever they are drawn: what an environment may be random by."""

import hashlib


def draw(*of: object) -> float:
    """Returns a number in [0, 1), always the same of the same arguments: 48 bits of SHA-256 over their text."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:6], "big") / 2**48
