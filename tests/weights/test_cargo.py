"""A and B in the place of merged weights: cut for a shard as the weight is, and merged there to the trainer's bits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.model import Adapter, ModelConfig, served
from kernels.ops import merge_low_rank
from kernels.tree import Shard
from kernels.weights.cargo import cargo, factors_are_less, merge_part
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, random_weights

TARGETS = {
    "attention": ("wide heads, odd widths", "experts", "61 ids", "qwen2"),
    "mlp": ("61 ids", "qwen2"),
    "experts": ("experts", "experts, dense layers"),
    "head": ("61 ids", "experts"),
}


def adapted(name: str, rank: int) -> ModelConfig:
    """All targets that the shape has, each of another rank."""
    ranks = tuple((target, rank + i) for i, (target, names) in enumerate(TARGETS.items()) if name in names)
    return replace(SHAPES[name], adapter=Adapter(ranks, 8.0))  # type: ignore[arg-type]


def factors_of(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A and B of every weight, whole."""
    noise, out = torch.Generator().manual_seed(seed), {}
    for p in cargo("factors", config, torch.float32).parameters:
        out[p.name] = torch.randn(p.shape, generator=noise)
        out[p.name][len(out[p.name]) - p.padding :] = 0
    return out


def merged_whole(config: ModelConfig, factors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the op alone, section by section."""
    adapter, out = config.adapter, {}
    assert adapter
    for p, w in random_weights(config):
        out[p.name] = held = w.to(dtype)
        if adapter.rank(p):
            b_held = adapter.tensors(p)[1]
            of_a, of_b = (
                factors[f"{p.name}_A"].chunk(len(p.stored)),
                b_held.to_files(factors[b_held.name]).split(p.stored),
            )
            parts = zip(p.to_files(held).split(p.stored), of_a, of_b, strict=True)
            files = torch.cat([merge_low_rank(w, a, b, adapter.scale(p), dtype) for w, a, b in parts])
            out[p.name] = p.from_files(files)
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted({name for names in TARGETS.values() for name in names})),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_shard_merges_to_its_part_of_the_whole(name: str, shards: int, rank: int, dtype: torch.dtype) -> None:
    config = adapted(name, rank)
    factors = factors_of(config)
    want, frozen = merged_whole(config, factors, dtype), {p.name: w.to(dtype) for p, w in random_weights(config)}
    carried = cargo("factors", config, dtype).parameters
    for shard in (Shard(s, shards) for s in range(shards)):
        mine = {p.name: p.shard(frozen[p.name], shard) for p in served(config)}
        got = {n: torch.full_like(w, torch.nan) for n, w in mine.items()}
        parts = {p.name: p.shard(factors[p.name], shard) for p in carried}
        for p in served(config):
            merge_part(config, shard, p, got[p.name], mine, parts)
            assert_same_bits(got[p.name], p.shard(want[p.name], shard), f"{p.name}, {shard}")


@pytest.mark.parametrize("name", ["61 ids", "experts"])
def test_a_shard_gets_no_more_than_it_needs(name: str) -> None:
    config = adapted(name, 4)
    carried, by_name = cargo("factors", config, torch.bfloat16), {p.name: p for p in served(config)}
    assert carried.dtype == torch.float32
    for p in carried.parameters:
        weight, part = by_name[p.name[:-2]], p.part(Shard(1, 2))
        cut = p.name.endswith("_A") == (weight.axis == 1) or "experts" in p.name
        assert part.held == (p.held // 2 if cut else p.held), p.name


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["experts", "61 ids", "qwen2"]), st.data())
def test_every_row_has_its_matrix(name: str, data: st.DataObject) -> None:
    """Of any rows, as of all of them: by the tensors of files, whose rows are numbered and laid out as they are held."""
    parameter = data.draw(st.sampled_from([p for p in served(SHAPES[name]) if p.columns]))
    rows = torch.arange(sum(parameter.stored)).repeat_interleave(max(parameter.columns, 1)).view(-1, parameter.columns)
    numbers = torch.arange(len(parameter.stored)).repeat_interleave(torch.tensor(parameter.stored))
    want = numbers[parameter.from_files(rows)[:, 0]]
    want[len(want) - parameter.padding :] = len(parameter.stored) - 1
    start = data.draw(st.integers(0, len(want) - 1))
    stop = data.draw(st.integers(start, len(want)))
    got = torch.full((stop - start,), -1)
    for number, where in parameter.owners(range(start, stop)):
        got[where] = number
    assert_same_bits(got, want[start:stop])


@pytest.mark.parametrize(("rank", "less"), [(1, True), (32, False)])
def test_what_is_less(rank: int, less: bool) -> None:
    config = replace(SHAPES["tiny"], adapter=Adapter((("attention", rank), ("mlp", rank)), 1.0))
    assert factors_are_less(config, torch.float32) == less and not factors_are_less(config, torch.bfloat16)
