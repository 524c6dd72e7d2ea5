"""Parameters cut into shards and slices: every row lands on one rank, and the digest does not know how many there are."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.model import Parameter, served
from kernels.tree import WHOLE, Shard, TreeError
from kernels.weights.digest import Leaves, digest, slice_digests
from kernels.weights.files import to_hf
from kernels.weights.initial import initial
from tests.bits import assert_same_bits, integers
from tests.model.shapes import EIGHT, SHAPES, TINY, random_weights

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
SIZES = [1, 2, 4, 8]


@st.composite
def parameter(draw: st.DrawFn) -> Parameter:
    axis = draw(st.sampled_from([None, 0, 1]))
    unit = 8 if axis == 0 else 1
    sections = tuple(unit * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    columns = 8 * draw(st.integers(1, 3)) if axis == 1 else draw(st.integers(0, 5))
    return Parameter("p", sections, columns, tuple(f"hf.{i}" for i in range(len(sections))), axis)


def numbered(p: Parameter) -> torch.Tensor:
    return torch.arange(torch.Size(p.shape).numel(), dtype=torch.float32).view(p.shape)


@PROPERTY
@given(parameter(), st.sampled_from(SIZES))
def test_shards_tile_the_whole(p: Parameter, size: int) -> None:
    whole = numbered(p)
    parts = [p.shard(whole, Shard(rank, size)) for rank in range(size)]
    for rank, part in enumerate(parts):
        assert tuple(part.shape) == p.part(Shard(rank, size)).shape and part.is_contiguous()
    if p.axis is None:
        expected = [whole] * size
    elif p.axis == 1:
        expected = list(whole.chunk(size, 1))
    else:  # each section on its own: rank r holds part r of each
        cut = [section.chunk(size) for section in whole.split(p.sections)]
        expected = [torch.cat([section[rank] for section in cut]) for rank in range(size)]
    assert_same_bits(parts, expected)
    if p.axis is not None:
        assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == whole.flatten().tolist()


@PROPERTY
@given(parameter(), st.sampled_from(SIZES), st.data())
def test_a_shard_of_a_shard_is_a_smaller_shard(p: Parameter, size: int, data: st.DataObject) -> None:
    inner = data.draw(st.sampled_from([n for n in SIZES if n * size <= 8]))
    rank, r = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, inner - 1))
    outer = Shard(rank, size)
    actual = p.part(outer).shard(p.shard(numbered(p), outer), Shard(r, inner))
    assert_same_bits(actual, p.shard(numbered(p), Shard(rank * inner + r, size * inner)))


@PROPERTY
@given(parameter())
def test_hugging_face_tensors_stack_to_the_whole(p: Parameter) -> None:
    tensors = to_hf(p, numbered(p))
    assert tuple(tensors) == p.hf_names and [len(t) for t in tensors.values()] == list(p.sections)
    assert_same_bits(torch.cat(list(tensors.values())), numbered(p))


def test_a_section_that_cannot_be_cut_is_an_error() -> None:
    p = Parameter("layers.0.qkv", (32, 12, 12), 4, ("q", "k", "v"), 0)
    for attempt in (lambda: p.part(Shard(0, 8)), lambda: p.shard(numbered(p), Shard(0, 8))):
        with pytest.raises(TreeError, match=r"layers\.0\.qkv 12 is not divisible by tensor-parallel size 8"):
            attempt()


def held(size: int, rank: int, seed: int = 0, config=EIGHT) -> Leaves:
    shard, out = Shard(rank, size), {}
    for p, whole in random_weights(config, seed):
        out |= slice_digests(config, p, p.shard(whole, shard), shard)
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_digest_does_not_depend_on_the_shards(size: int, tied: bool) -> None:
    config = replace(EIGHT, tied=tied)
    whole, merged = held(1, 0, config=config), {}
    cut = {p.name for p in served(config) if p.axis is not None}
    for rank in range(size):
        mine = held(size, rank, config=config)
        for key in mine.keys() & merged.keys():
            assert key[0] not in cut, f"two ranks hold {key}"
        merged |= mine
    assert merged == whole and digest(merged) == digest(whole)
    assert {i for name, i in whole if name in cut} == set(range(8))


def test_the_digest_reads_neither_order_nor_anything_but_the_leaves() -> None:
    whole = held(1, 0)
    assert digest(dict(reversed(list(whole.items())))) == digest(whole)
    assert digest({}) == hashlib.sha256(b"").hexdigest()
    assert digest({("a", 10): "x", ("a", 9): "y"}) == hashlib.sha256(b"a 9 y\na 10 x\n").hexdigest()
    assert digest(held(1, 0, seed=1)) != digest(whole)


def model_digest(weights: dict[str, torch.Tensor]) -> str:
    out: Leaves = {}
    for p in served(EIGHT):
        out |= slice_digests(EIGHT, p, weights[p.name], WHOLE)
    return digest(out)


WEIGHTS = {p.name: w for p, w in random_weights(EIGHT)}
DIGEST = model_digest(WEIGHTS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(served(EIGHT)), st.data())
def test_any_flipped_bit_changes_the_digest(p: Parameter, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, torch.Size(p.shape).numel() - 1)), data.draw(st.integers(0, 31))
    flipped = integers(WEIGHTS[p.name]).clone()
    flipped.view(-1)[at] ^= (1 << bit) - ((1 << 32) if bit == 31 else 0)
    assert model_digest(WEIGHTS | {p.name: flipped.view(torch.float32)}) != DIGEST
    assert model_digest(WEIGHTS) == DIGEST


def test_a_digest_sees_two_slices_exchanged() -> None:
    qkv = WEIGHTS["layers.0.qkv"]
    assert model_digest(WEIGHTS | {"layers.0.qkv": qkv.roll(16, 0)}) != DIGEST
    swapped = {"layers.0.o": WEIGHTS["layers.1.o"], "layers.1.o": WEIGHTS["layers.0.o"]}
    assert model_digest(WEIGHTS | swapped) != DIGEST


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_has_its_shape_once(name: str) -> None:
    config = SHAPES[name]
    listed = served(config)
    assert len({p.name for p in listed}) == len(listed)
    names = [n for p in listed for n in p.hf_names]
    assert len(set(names)) == len(names)
    assert ("head" in {p.name for p in listed}) != config.tied


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    first, again = dict(by_name(TINY, 7)), dict(by_name(TINY, 7))
    deeper = dict(by_name(replace(TINY, layers=2, vocab_size=128), 7))
    for name, tensor in first.items():
        assert_same_bits(again[name], tensor, name)
        if name not in ("embed", "head"):
            assert_same_bits(deeper[name], tensor, name)
    other = dict(by_name(TINY, 8))
    matrices = [n for n, t in first.items() if t.dim() == 2]
    assert all(not torch.equal(first[n], other[n]) for n in matrices)
    assert len({tuple(first[n].flatten()[:4].tolist()) for n in matrices}) == len(matrices)
    for n in matrices:
        deviation = 0.01 if n.endswith((".o", ".down")) else 0.02
        assert abs(float(first[n].std()) / deviation - 1) < 0.1, n
    assert all((t == 1).all() for t in first.values() if t.dim() == 1)


def test_random_weights_in_either_order() -> None:
    config = SHAPES["tiny"]
    ordered = list(initial(config, 3))
    assert [p.name for p, _ in ordered] == [p.name for p in served(config)], "as a file is written"
    want, soonest = {p.name: w for p, w in ordered}, list(initial(config, 3, soonest=True))
    assert len(soonest) == len(want)
    for parameter, weight in soonest:
        assert_same_bits(weight, want[parameter.name])
    assert max(w.numel() for w in want.values()) == soonest[-2][1].numel(), "the largest come last"


def by_name(config, seed: int):
    return ((p.name, w) for p, w in initial(config, seed))
