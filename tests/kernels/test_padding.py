"""Ids that stand for no token: what is drawn, kept and summed is that of the vocabulary without them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.ops import Truncation, exclude_padding, gumbel_argmax, kept_tokens, truncate, vocab_logprob, vocab_nodes
from tests.bits import assert_same_bits

ROWS = 5


def scene(
    vocabulary: int, padding: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, the same with padding that would win every draw, temperatures)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(ROWS, vocabulary, generator=generator)).to(device)
    padded = torch.cat([logits, torch.full((ROWS, padding), 1e6, device=device)], 1)
    exclude_padding(padded, vocabulary)
    return logits, padded, (torch.rand(ROWS, generator=generator) + 0.5).to(device)


@given(vocabulary=st.integers(1, 70), padding=st.integers(0, 40), seed=st.integers(0, 10**6), greedy=st.booleans())
def test_nothing_else_is_drawn(vocabulary, padding, seed, greedy, device) -> None:  # type: ignore[no-untyped-def]
    logits, padded, temperature = scene(vocabulary, padding, seed, device)
    seeds = torch.arange(ROWS, device=device) + seed
    rest = (temperature, seeds, seeds + 3, torch.full((ROWS,), greedy, dtype=torch.uint8, device=device))
    alone, among = gumbel_argmax(logits, *rest), gumbel_argmax(padded, *rest)
    assert_same_bits(list(among), list(alone))
    assert (among[1] < vocabulary).all()


@given(
    vocabulary=st.integers(1, 70),
    padding=st.integers(0, 40),
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([0, 1, 3, 60, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
)
def test_the_filters_keep_the_same(vocabulary, padding, seed, top_k, top_p, min_p, device) -> None:  # type: ignore[no-untyped-def]
    logits, padded, temperature = scene(vocabulary, padding, seed, device)
    filters = (
        torch.full((ROWS,), top_k, device=device),
        torch.full((ROWS,), top_p, device=device),
        torch.full((ROWS,), min_p, device=device),
    )
    kept = kept_tokens(padded, temperature, *filters)[:, :vocabulary]
    assert_same_bits(kept.contiguous(), kept_tokens(logits, temperature, *filters))
    truncate(padded, temperature, Truncation(torch.arange(ROWS, device=device), *filters))
    assert (padded[:, vocabulary:] == -torch.inf).all()


@given(vocabulary=st.integers(1, 300), padding=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_a_leaf_has_the_sum_of_its_tokens(vocabulary, padding, seed, device) -> None:  # type: ignore[no-untyped-def]
    logits, padded, temperature = scene(vocabulary, padding, seed, device)
    for leaf in (0, 1):  # with a second leaf, of padding alone
        width = vocabulary + padding
        wide = torch.cat([padded, torch.full((ROWS, width * leaf), -torch.inf, device=device)], 1)
        nodes = vocab_nodes(wide, temperature, 1 + leaf)
        assert_same_bits(nodes[:, :1].contiguous(), vocab_nodes(logits, temperature, 1))
        picked = logits[:, 0].contiguous()
        alone = vocab_logprob(vocab_nodes(logits, temperature, 1), picked, temperature)
        assert_same_bits(list(vocab_logprob(nodes, picked, temperature)), list(alone))


@given(vocabulary=st.integers(1, 64), shards=st.sampled_from([1, 2, 4, 8]))
def test_shards_exclude_their_part(vocabulary, shards, device) -> None:  # type: ignore[no-untyped-def]
    width = 64 // shards
    parts = [torch.zeros(2, width, device=device) for _ in range(shards)]
    for rank, part in enumerate(parts):
        exclude_padding(part, vocabulary, rank * width)
    expected = torch.where(torch.arange(64, device=device) < vocabulary, 0.0, -torch.inf).expand(2, -1)
    assert_same_bits(torch.cat(parts, 1), expected.contiguous())
