"""The decoder is transformers' Qwen3: on random weights they differ by rounding alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.model import ModelConfig
from kernels.ops import add_bias
from tests.bits import assert_same_bits
from tests.model.hugging_face import reference, reference_logits, units
from tests.model.shapes import SHAPES, TINY, packed_logits, prompts, random_weights

BOUND = 64.0
"""In units of float32 eps x the largest logit."""
LENGTHS = [1, 2, 33, 64, 7, 90]


def by_name(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {p.name: w for p, w in random_weights(config, seed)}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name: str) -> None:
    config = SHAPES[name]
    weights, sequences = by_name(config), prompts(config, LENGTHS)
    expected = reference_logits(reference(config, weights), sequences)
    assert expected.abs().max() > 4, "weights this small would hide a difference"
    error = units(packed_logits(config, weights, sequences), expected)
    assert error < BOUND, f"{name}: {error:.1f} units"


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 10100.0}, {"rms_eps": 1e-3}, {"q_norm": "k_norm"}, {"attn_norm": "mlp_norm"}, {"swap": "gate, up"}],
    ids=str,
)
def test_the_bound_sees_a_small_mistake(change: dict) -> None:
    """A slightly wrong frequency, eps or norm is a hundred times the bound or more."""
    weights, sequences = by_name(TINY), prompts(TINY, LENGTHS)
    expected = reference_logits(reference(TINY, weights), sequences)
    fields = {k: v for k, v in change.items() if hasattr(TINY, k)}
    wrong = dict(weights)
    for i in range(TINY.layers):
        at = f"layers.{i}."
        if "swap" in change:
            wrong[at + "gate_up"] = wrong[at + "gate_up"].roll(TINY.intermediate_size, 0)
        for a, b in change.items():
            if at + a in wrong:
                wrong[at + a], wrong[at + b] = weights[at + b], weights[at + a]
    assert units(packed_logits(replace(TINY, **fields), wrong, sequences), expected) > 100 * BOUND


def test_a_sequence_has_the_same_bits_alone() -> None:
    weights, sequences = by_name(TINY), prompts(TINY, LENGTHS)
    together = packed_logits(TINY, weights, sequences).split(LENGTHS)
    for n, row, sequence in zip(LENGTHS, together, sequences, strict=True):
        assert_same_bits(packed_logits(TINY, weights, [sequence]), row, f"the sequence of {n} tokens")


def test_a_prefix_has_the_same_bits_as_in_the_whole() -> None:
    """Causality to the bit: what follows a token changes nothing before it."""
    weights, (sequence,) = by_name(TINY), prompts(TINY, [90])
    whole = packed_logits(TINY, weights, [sequence])
    for n in (1, 2, 15, 16, 63, 64, 65, 89):
        assert_same_bits(packed_logits(TINY, weights, [sequence[:n]]), whole[:n], f"{n} of 90 tokens")


def test_float32_masters_are_their_bfloat16_roundings() -> None:
    """The trainer's weights against the engine's."""
    masters, sequences = by_name(TINY), prompts(TINY, LENGTHS)
    rounded = {name: w.bfloat16() for name, w in masters.items()}
    logits = packed_logits(TINY, masters, sequences, torch.bfloat16)
    assert_same_bits(logits, packed_logits(TINY, rounded, sequences, torch.bfloat16))
    exact = packed_logits(TINY, masters, sequences)
    assert 1e-3 < float((logits - exact).abs().max() / exact.abs().max()) < 0.1


def test_tied_logits_are_those_of_an_untied_copy() -> None:
    tied = SHAPES["tied"]
    weights, sequences = by_name(tied), prompts(tied, [20, 5])
    untied = weights | {"head": weights["embed"].clone()}
    expected = packed_logits(replace(tied, tied=False), untied, sequences)
    assert_same_bits(packed_logits(tied, weights, sequences), expected)


def test_a_bias_is_added_before_the_product_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    config, dtypes = SHAPES["qwen2"], set()

    def told(root: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtypes.add(root.dtype)
        return add_bias(root, *args, **kwargs)

    monkeypatch.setattr("kernels.model.blocks.attention.add_bias", told)
    packed_logits(config, dict(by_name(config)), [[1, 2, 3]], torch.bfloat16)
    assert dtypes == {torch.float32}
