"""Formats of projections: what a model must be for one, and that whoever holds the weights, in whatever shards, computes the
same."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.model import ConfigError, ModelConfig, costs, served
from kernels.model.formats import FORMATS, PLAIN
from kernels.model.known import QWEN3_0P6B, QWEN3_8B, QWEN3_30B_A3B
from kernels.ops import Quantized, quantize_blocks
from kernels.tree import WHOLE, Shard
from kernels.weights.digest import digest, slice_digests
from rollout.held import put, views, weight_memory
from rollout.sampling import Request, SamplingParams
from tests.alignment.scenes import batch_of
from tests.alignment.threads import run_threads
from tests.bits import assert_same_bits
from tests.model.shapes import FP8, random_weights
from tests.rollout.scenarios import engine
from tests.trainer.batches import plain_model, token_logprobs

EIGHT = replace(FP8, hidden_size=1024, intermediate_size=1024, heads=8, kv_heads=8, layers=1, leaves=8)
"""Can be cut into 1, 2, 4 and 8 shards of whole blocks."""


@pytest.mark.parametrize("format", FORMATS)
def test_known_models_take_it(format: Any) -> None:
    for shape in (QWEN3_8B, QWEN3_0P6B):
        assert replace(shape, format=format).ops.project is FORMATS[format].project
        assert shape.ops.project is shape.ops.matmul
        assert replace(shape, format=format).ops.matmul is shape.ops.matmul


REFUSED: dict[str, tuple[ModelConfig, dict[str, Any], str]] = {
    "half a block a leaf": (
        QWEN3_8B,
        {"leaves": 16},
        "kv_heads . head_dim 1024 in model.leaves=16 are 64 each, .* blocks of 128: this model takes at most 8 leaves",
    ),
    "two and a half": (QWEN3_8B, {"hidden_size": 2560}, "hidden_size 2560 in .*=8 are 320 each, .* at most 4 leaves"),
    "never": (QWEN3_8B, {"hidden_size": 2496}, "hidden_size 2496 in .* this model takes model.format=plain only"),
    "narrow": (FP8, {"intermediate_size": 64, "leaves": 1}, "intermediate_size 64 .* model.format=plain only"),
    "experts": (QWEN3_30B_A3B, {}, "experts are not quantized yet; a qwen3_moe takes plain weights"),
    "fast": (QWEN3_8B, {"numerics": "fast"}, "model.format=fp8_block with numerics=fast"),
    "unknown": (QWEN3_8B, {"format": "fp4"}, "model.format=fp4 must be one of plain, fp8_block, fp8_block_ue8m0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    shape, changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refused:
        replace(shape, **({"format": "fp8_block"} | changes))
    assert "\n" not in str(refused.value)


def test_activations_are_bfloat16() -> None:
    FP8.check_dtype(torch.bfloat16)
    replace(FP8, format=PLAIN).check_dtype(torch.float32)
    with pytest.raises(
        ConfigError, match=r"model.format=fp8_block quantizes activations of bfloat16, and .* is float32"
    ):
        engine(FP8)


def test_what_is_quantized() -> None:
    named = [p.name for p in served(FP8) if FP8.quantizes(p)]
    assert named == [f"layers.{i}.{name}" for i in (0, 1) for name in ("qkv", "o", "gate_up", "down")]
    assert not any(replace(FP8, format=PLAIN).quantizes(p) for p in served(FP8))


def test_an_engine_holds_half_the_bytes() -> None:
    plain, quantized = (replace(QWEN3_8B, format=f) for f in (PLAIN, "fp8_block"))
    layers = sum(p.elements for p in served(quantized) if quantized.quantizes(p))
    assert costs.weight_bytes(plain, 1, 2) - costs.weight_bytes(quantized, 1, 2) == layers - 4 * layers // 128**2
    assert costs.file_bytes(plain) == costs.file_bytes(quantized) == 4 * costs.parameter_count(plain)
    for tp in (1, 2):
        config = replace(FP8, layers=1)
        held = weight_memory(config, Shard(0, tp), torch.bfloat16, "cpu").tensors.values()
        assert sum(t.nbytes for t in held) == costs.held_bytes(config, tp, 2)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shards_hold_what_the_whole_would(size: int) -> None:
    """Quantized before it is cut or after, from masters or from what is published of them; and one digest."""
    whole, leaves, last = {}, {}, {}
    for p, master in random_weights(EIGHT):
        whole |= slice_digests(EIGHT, p, master.bfloat16(), WHOLE)
        for rank in range(size):
            shard = Shard(rank, size)
            held = views(EIGHT, weight_memory(EIGHT, shard, torch.bfloat16, "cpu").tensors)[p.name]
            put(EIGHT, p, held, master, shard)
            leaves |= slice_digests(EIGHT, p, held, shard)
            if isinstance(held, Quantized):
                given = [EIGHT.quantize(master), master.bfloat16()]
                for other in given:
                    again = views(EIGHT, weight_memory(EIGHT, shard, torch.bfloat16, "cpu").tensors)[p.name]
                    put(EIGHT, p, again, other, shard)
                    assert_same_bits(again.values, held.values, p.name)
                    assert_same_bits(again.scales, held.scales, p.name)
        last = {p.name: master}
    assert digest(leaves) == digest(whole)
    (name, tensor), p = next(iter(last.items())), served(EIGHT)[-1]
    other = whole | slice_digests(EIGHT, p, (tensor + 1).bfloat16(), WHOLE)
    assert name == p.name and digest(other) != digest(whole)


def test_the_digest_sees_the_format_and_every_scale() -> None:
    p, master = next((p, w) for p, w in random_weights(FP8) if FP8.quantizes(p))
    made = quantize_blocks(master)
    found = {
        format: digest(slice_digests(replace(FP8, format=format), p, master.bfloat16(), WHOLE)) for format in FORMATS
    }
    plain = digest(slice_digests(replace(FP8, format=PLAIN), p, master.bfloat16(), WHOLE))
    assert len({*found.values(), plain}) == 3 and digest(slice_digests(FP8, p, made, WHOLE)) == found["fp8_block"]
    made.scales.view(torch.int32)[-1, -1] ^= 1
    assert digest(slice_digests(FP8, p, made, WHOLE)) != found["fp8_block"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_size_samples_what_the_trainer_computes(format: Any) -> None:
    config = replace(EIGHT, format=format)
    prompts = [(5, 6, 7), (9,) * 17, (1,)]
    requests = [Request(i, prompt, SamplingParams(4, 1.0, i), 1) for i, prompt in enumerate(prompts)]
    completions = engine(config, dtype=torch.bfloat16).generate(requests)
    for size in (2, 4, 8):
        for ranks in run_threads(
            size, lambda group: engine(config, group=group, dtype=torch.bfloat16).generate(requests)
        ):
            assert ranks == completions, f"{size} ranks"
    batch = batch_of(requests, completions)
    model = plain_model(config, {p.name: w for p, w in random_weights(config)}, torch.bfloat16)
    assert_same_bits(token_logprobs(model, batch).detach(), torch.from_numpy(batch.logprobs))
    plain = plain_model(replace(config, format=PLAIN), {p.name: w for p, w in random_weights(config)}, torch.bfloat16)
    far = (token_logprobs(plain, batch).detach() - torch.from_numpy(batch.logprobs)).abs().max()
    assert 0 < far < 1, f"{far} from the plain model"
