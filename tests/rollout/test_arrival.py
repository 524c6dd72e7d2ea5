"""Pieces of a publication in any cut and order become the weights that an engine would load; a bit that differs is seen."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.model import Adapter, ModelConfig, served
from kernels.model.formats import PLAIN
from kernels.ops import Quantized
from kernels.tree import Shard
from kernels.weights.cargo import cargo, merge_part
from kernels.weights.fingerprint import fingerprint, unsigned
from kernels.weights.reshard import buckets, fsdp_rows, shard_rows
from rollout.arrival import Arrival, fingerprints
from rollout.held import put, views, weight_memory
from tests.bits import assert_same_bits
from tests.model.shapes import FP8, random_weights

BF16 = torch.bfloat16
CONFIG = replace(FP8, layers=1)
CONFIG_PLAIN = replace(CONFIG, format=PLAIN)
MASTERS = {p.name: w for p, w in random_weights(CONFIG)}


def arrived(config: ModelConfig, shard: Shard, trainers: int, limit: int, seed: int = 0) -> tuple[Arrival, dict]:
    """What `trainers` ranks send to a shard, their buckets in turns that `seed` draws; and the memory that it is in."""
    memory = weight_memory(config, shard, BF16, "cpu")
    arrival = Arrival(config, shard, BF16, memory.tensors)
    plans = [buckets(served(config), w, trainers, shard.size, limit, BF16) for w in range(trainers)]
    generator = torch.Generator().manual_seed(seed)
    left = [(w, bucket) for w, plan in enumerate(plans) for bucket in plan]
    for i in torch.randperm(len(left), generator=generator).tolist():
        w, bucket = left[i]
        for piece in bucket:
            if piece.shard == shard:
                whole = MASTERS[piece.parameter.name].to(BF16)
                mine = fsdp_rows(len(whole), w, trainers)
                rows = whole.view(len(whole), -1)[mine.start + piece.source :][: piece.rows, piece.columns]
                arrival.take(piece, rows)
    return arrival, memory.tensors


def promised(config: ModelConfig, shard: Shard) -> list[int]:
    """The fingerprints of what was published."""
    out = []
    for p in served(config):
        held = p.shard(MASTERS[p.name].to(BF16), shard)
        column = shard.rank * held.shape[1] if p.axis == 1 else 0
        parts = [fingerprint(held[at : at + len(rows)], rows.start, column) for rows, at in shard_rows(p, shard)]
        out.append(unsigned(int(torch.stack(parts).sum())))
    return out


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(["fp8_block", "fp8_block_ue8m0", PLAIN]),
    st.sampled_from([Shard(), Shard(0, 2), Shard(1, 2)]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1 << 12, 1 << 15, 1 << 20]),
    st.integers(0, 99),
)
def test_whatever_the_cut(format: str, shard: Shard, trainers: int, limit: int, seed: int) -> None:
    config = replace(CONFIG, format=format)  # type: ignore[arg-type]
    arrival, _ = arrived(config, shard, trainers, limit, seed)
    assert arrival.fingerprints() == promised(config, shard)
    expected = views(config, weight_memory(config, shard, BF16, "cpu").tensors)
    for p in served(config):
        put(config, p, expected[p.name], MASTERS[p.name], shard)
        found, loaded = arrival.weights[p.name], expected[p.name]
        if isinstance(found, Quantized) and isinstance(loaded, Quantized):
            assert_same_bits(found.values, loaded.values, p.name)
            assert_same_bits(found.scales, loaded.scales, p.name)
        else:
            assert isinstance(found, torch.Tensor) and isinstance(loaded, torch.Tensor)
            assert_same_bits(found, loaded, p.name)


def test_every_bit_of_values_and_scales_counts() -> None:
    shard = Shard(1, 2)
    arrival, tensors = arrived(CONFIG, shard, 2, 1 << 15)
    right = promised(CONFIG, shard)
    assert fingerprints(CONFIG, shard, arrival.weights, arrival.before) == right
    for i, p in enumerate(served(CONFIG)):
        for name in (p.name, p.scales.name) if CONFIG.quantizes(p) else (p.name,):
            bits = tensors[name].view(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensors[name].itemsize])
            for at in (0, len(bits) // 2, len(bits) - 1):
                bits[at] ^= 1
                found = fingerprints(CONFIG, shard, arrival.weights, arrival.before)
                assert [j for j, (a, b) in enumerate(zip(found, right, strict=True)) if a != b] == [i], name
                bits[at] ^= 1


def test_a_piece_that_is_missing_is_seen() -> None:
    config, shard = CONFIG, Shard()
    arrival = Arrival(config, shard, BF16, weight_memory(config, shard, BF16, "cpu").tensors)
    pieces = [piece for bucket in buckets(served(config), 0, 1, 1, 1 << 15, BF16) for piece in bucket]
    left_out = max(i for i, piece in enumerate(pieces) if piece.parameter.name == "layers.0.o")
    for i, piece in enumerate(pieces):
        if i != left_out:
            whole = MASTERS[piece.parameter.name].to(BF16)
            arrival.take(piece, whole.view(len(whole), -1)[piece.source : piece.source + piece.rows, piece.columns])
    found = zip(served(config), arrival.fingerprints(), promised(config, shard), strict=True)
    assert [p.name for p, a, b in found if a != b] == ["layers.0.o"]


@pytest.mark.parametrize("format", ["fp8_block", "fp8_block_ue8m0", PLAIN])
@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)])
def test_adapters_are_merged_and_then_quantized(format: str, shard: Shard) -> None:
    """What an engine makes of A and B is what it makes of the merged weights that the trainer would send."""
    config = replace(CONFIG, format=format, adapter=Adapter((("attention", 3), ("mlp", 2)), 8.0))  # type: ignore[arg-type]
    frozen = {p.name: p.shard(MASTERS[p.name].to(BF16), shard) for p in served(config)}
    noise = torch.Generator().manual_seed(0)
    carried = cargo("factors", config, BF16).parameters
    factors = {p.name: p.shard(torch.randn(p.shape, generator=noise), shard) for p in carried}
    arrival = Arrival(config, shard, BF16, weight_memory(config, shard, BF16, "cpu").tensors)
    plain = Arrival(replace(config, format=PLAIN), shard, BF16, weight_memory(CONFIG_PLAIN, shard, BF16, "cpu").tensors)
    for p in served(config):
        for one in (arrival, plain):
            merge_part(config, shard, p, one.open(p), frozen, factors)
            one.close(p)
    assert arrival.fingerprints() == plain.fingerprints(), "of what was merged, before it was quantized"
    for p in served(config):
        found, merged = arrival.weights[p.name], plain.weights[p.name]
        assert isinstance(merged, torch.Tensor)
        if isinstance(found, Quantized):
            assert_same_bits(found.values, config.quantize(merged).values, p.name)
            assert_same_bits(found.scales, config.quantize(merged).scales, p.name)
        else:
            assert_same_bits(found, merged, p.name)


@pytest.mark.parametrize("format", ["fp8_block", PLAIN])
def test_only_what_is_quantized_is_gathered_apart(format: str) -> None:
    config = replace(CONFIG, format=format)  # type: ignore[arg-type]
    arrival, _ = arrived(config, Shard(), 1, 1 << 20)
    assert not arrival._gathered and len(arrival.before) == (4 if format == "fp8_block" else 0)
