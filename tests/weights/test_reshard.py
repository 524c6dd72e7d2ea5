"""The plan from FSDP's rows to tensor-parallel shards, and the sum that both sides compare."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.model import served
from kernels.tree import Shard
from kernels.weights.fingerprint import fingerprint, unsigned
from kernels.weights.reshard import buckets, extent, fsdp_rows, shard_rows
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, TINY, random_weights

CONFIGS = [SHAPES[name] for name in sorted(SHAPES)]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(CONFIGS), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2]), st.integers(0, 99), DTYPES)
def test_pieces_make_up_the_shards(config, size: int, shards: int, seed: int, dtype: torch.dtype) -> None:
    """Through buckets of any size that holds a row, filled with NaN first: every element of every shard, once."""
    weights = {p.name: w.to(dtype) for p, w in random_weights(config)}
    widest = max(w.stride(0) for w in weights.values()) * dtype.itemsize
    half = (widest + random.Random(seed).randrange(1, 1 << 16) + 15) // 16 * 16
    held = {
        (s, p.name): torch.full(p.part(Shard(s, shards)).shape, torch.nan, dtype=dtype)
        for s in range(shards)
        for p in served(config)
    }
    written = dict.fromkeys(held, 0)
    for w in range(size):
        for bucket in buckets(served(config), w, size, shards, half, dtype):
            data = torch.full((half,), 255, dtype=torch.uint8)
            ends = [0, *(p.start + p.bytes(dtype) for p in bucket)]
            assert all(p.start >= end for p, end in zip(bucket, ends, strict=False)) and ends[-1] <= half
            assert extent(bucket, dtype) == slice(0, ends[-1])
            for piece in bucket:
                rows = fsdp_rows(piece.parameter.shape[0], w, size)
                mine = weights[piece.parameter.name][rows.start : rows.stop]
                source = mine.reshape(len(mine), -1)[piece.source : piece.source + piece.rows, piece.columns]
                piece.of(data, dtype).copy_(source)
            for piece in bucket:
                target = held[piece.shard.rank, piece.parameter.name]
                target.view(len(target), -1)[piece.target : piece.target + piece.rows] = piece.of(data, dtype)
                written[piece.shard.rank, piece.parameter.name] += piece.shape[0] * piece.shape[1]
    for (s, name), part in held.items():
        parameter = next(p for p in served(config) if p.name == name)
        assert_same_bits(part, parameter.shard(weights[name], Shard(s, shards)))
        assert written[s, name] == part.numel()


def test_a_row_that_no_bucket_holds() -> None:
    with pytest.raises(ValueError, match=r"a row of embed is \d+ bytes, a bucket 16"):
        buckets(served(CONFIGS[0]), 0, 1, 1, 16, torch.float32)


def whole(w: torch.Tensor) -> int:
    return unsigned(int(fingerprint(w, 0, 0)))


def oracle(w: torch.Tensor) -> int:
    """The formula, in Python's integers."""

    def key(counter: int) -> int:
        x = counter * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) | 1

    bits = w.view({2: torch.int16, 4: torch.int32}[w.itemsize]).tolist()
    return sum(key(r) * key(2**40 + c) * v for r, row in enumerate(bits) for c, v in enumerate(row)) % 2**64


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), DTYPES)
def test_fingerprint_is_the_formula_and_adds_up(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator).to(dtype)
    assert whole(w) == oracle(w)
    row, column = rows // 2, columns // 3
    parts = [(r, c, w[r : r + n, c : c + m]) for r, n in ((0, row), (row, rows)) for c, m in ((0, column), (column, 9))]
    sums = [int(fingerprint(part.contiguous(), r, c)) for r, c, part in parts if part.numel()]
    assert unsigned(sum(sums)) == whole(w)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 63), st.integers(0, 63), st.integers(0, 31), DTYPES)
def test_fingerprint_sees_one_bit_and_a_swap(row: int, column: int, bit: int, dtype: torch.dtype) -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    other = w.clone()
    integers = other.view({2: torch.int16, 4: torch.int32}[w.itemsize])
    integers[row, column] ^= 1 << bit % (8 * w.itemsize - 1)
    assert whole(other) != whole(w)
    swapped = w.clone()
    swapped[row], swapped[column] = w[column], w[row]
    assert (whole(swapped) == whole(w)) is torch.equal(swapped, w)


def test_shard_rows_follow_the_sections() -> None:
    for config in CONFIGS:
        for p in served(config):
            for shard in (Shard(0, 2), Shard(1, 2)):
                rows = [r for part, _ in shard_rows(p, shard) for r in part]
                numbers = torch.arange(p.shape[0], dtype=torch.float32)[:, None].expand(-1, max(p.columns, 1))
                expected = p.shard(numbers if p.columns else numbers[:, 0], shard)
                assert rows == expected.reshape(len(expected), -1)[:, 0].int().tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    w = torch.randn(3000, 6000).to(dtype)  # more than a chunk
    assert int(fingerprint(w.cuda(), 5, 7)) == int(fingerprint(w, 5, 7))


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_a_fingerprint_in_pieces_is_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(33.0).view(11, 3)
    expected = fingerprint(whole, 2, 5)
    monkeypatch.setattr("kernels.weights.fingerprint._CHUNK", chunk)
    assert fingerprint(whole, 2, 5) == expected


def test_the_pieces_of_a_shard_stand_together() -> None:
    """A receiver on another card is sent one range of bytes."""
    for bucket in buckets(served(TINY), 0, 2, 2, 1 << 14, torch.float32):
        ranks = [piece.shard.rank for piece in bucket]
        assert ranks == sorted(ranks) and bucket[0].start == 0
