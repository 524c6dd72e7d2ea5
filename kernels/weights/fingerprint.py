"""A sum over the bits of a tensor that sharding does not change: what both sides of a publication compare.

    fingerprint(W) = sum over rows r and columns c of  row_key(r) * column_key(c) * bits(W[r, c])   modulo 2^64

with odd keys and the bits read as a signed integer. Integers add in any order, on any device, so the sums of disjoint parts
add up to that of the whole, and a part's is computed where it lies. One altered element always changes it (odd times non-zero
is not 0 modulo 2^64); other damage goes unseen with a probability of about 2^-64. It is no cryptographic digest:
`weights.digest` is.
"""

from functools import lru_cache

import torch

_CHUNK = 1 << 24  # elements whose products are in memory at once, 8 bytes each
_COLUMNS = 1 << 40  # the column keys' counters begin here
_INTEGER = {4: torch.int32, 2: torch.int16, 1: torch.int8}
_MASK = (1 << 64) - 1


def fingerprint(part: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Returns int64 [], on the part's device: the sum over `part` [R, C] (or [R]), contiguous and not empty, whose
    first element stands at (row, column) of its parameter."""
    bits = part.view(_INTEGER[part.itemsize]).view(len(part), -1)
    columns = _keys(_COLUMNS + column, bits.shape[1], part.device)
    rows = _keys(row, bits.shape[0], part.device)
    step = max(1, _CHUNK // max(1, bits.shape[1]))
    return (torch.cat([(some * columns).sum(1) for some in bits.split(step)]) * rows).sum()


def unsigned(value: int) -> int:
    """Returns the int64 of a tensor as a number below 2^64."""
    return value & _MASK


def _keys(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Returns int64 [count]: odd, and otherwise splitmix64 (Steele et al. 2014) of first, first + 1, ..."""
    base = _COLUMNS if first >= _COLUMNS else 0
    end = first - base + count
    return _table(base, 1 << (end - 1).bit_length() if end else 1, device)[end - count : end]


@lru_cache(maxsize=64)
def _table(first: int, count: int, device: torch.device) -> torch.Tensor:
    x = torch.arange(first, first + count, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return (x ^ _shifted(x, 31)) | 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns a logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
