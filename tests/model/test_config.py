"""A model that cannot run exactly is refused at the door, in one line with the numbers."""

from dataclasses import replace
from typing import Any

import pytest

from kernels.model import ConfigError, ModelConfig
from kernels.model.weights import parameters
from tests.model.shapes import EIGHT, SHAPES, TINY


def hf(**changes: Any) -> dict[str, Any]:
    fields = TINY.to_hf() | changes
    return {k: v for k, v in fields.items() if v is not Ellipsis}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("name", SHAPES)
def test_hugging_face_fields_round_trip(name: str) -> None:
    config = SHAPES[name]
    assert ModelConfig.from_hf(config.to_hf(), config.leaves) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; supported: qwen3, qwen2, llama, mistral"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported"),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        ({"rope_parameters": ..., "rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"sliding_window": 64}, "qwen3 with sliding_window=64 is not supported"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "mistral with sliding_window=4096 is not"),
        ({"model_type": "llama", "mlp_bias": True}, "llama with mlp_bias=True is not supported"),
        ({"rope_parameters": LLAMA3 | {"factor": 0}}, "factor is 0; it must be a positive number"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 9}}, "low_freq_factor 9 must be below high 4"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "no field 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": 5}, "rope parameters are 5; they must be an object"),
        ({"rope_theta": "x", "rope_parameters": ...}, "rope_theta is 'x'; it must be a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a positive number"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config={'quant_method': 'fp8'} is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_hidden_layers": ...}, "no field 'num_hidden_layers'"),
        ({"head_dim": 24}, "head_dim 24 is not a multiple of 16"),
        ({"num_attention_heads": 5}, "5 attention heads are not a multiple of 2 key-value heads"),
        ({"intermediate_size": 63}, "intermediate_size 63 is not divisible by model.leaves=2"),
        ({"hidden_size": 33}, "hidden_size 33 is not divisible by model.leaves=2"),
        ({"vocab_size": 60}, "leaves parts of 30, which is not a multiple of 4"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(hf(**changes), TINY.leaves)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_window_that_never_cuts_is_none() -> None:
    for changes in (
        {"sliding_window": None},
        {"sliding_window": 96},
        {"sliding_window": 8, "use_sliding_window": False},
    ):
        assert ModelConfig.from_hf(hf(**changes), 2) == TINY


def test_head_dim_of_a_config_without_one() -> None:
    for kind, expected in (("qwen3", 128), ("llama", 16), ("qwen2", 16)):
        config = ModelConfig.from_hf(hf(model_type=kind, head_dim=..., hidden_size=64), 2)
        assert config.head_dim == expected


def test_old_and_new_rope_fields() -> None:
    for changes in (
        {"rope_parameters": ..., "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": ...},
        {"rope_parameters": ..., "rope_scaling": None, "rope_theta": 5e5},
    ):
        assert ModelConfig.from_hf(hf(**changes), 2).rope_theta == 5e5


@pytest.mark.parametrize("leaves", [0, 3, 6, -2])
def test_leaves_are_a_power_of_two(leaves: int) -> None:
    with pytest.raises(ConfigError, match=f"model.leaves={leaves} must be a power of two"):
        replace(TINY, leaves=leaves)


def test_shards() -> None:
    for size in (1, 2, 4, 8):
        EIGHT.check_shards(size)
    with pytest.raises(ConfigError, match=r"rollout\.tp=3 must be a power of two"):
        EIGHT.check_shards(3)
    with pytest.raises(ConfigError, match=r"rollout\.tp=16 is more than model\.leaves=8"):
        EIGHT.check_shards(16)
    with pytest.raises(ConfigError, match=r"rollout\.tp=4 does not divide the model's 2 key-value heads"):
        replace(EIGHT, kv_heads=2).check_shards(4)


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count(name: str) -> None:
    config = SHAPES[name]
    count = sum(sum(p.sections) * (p.columns or 1) for p in parameters(config))
    assert config.parameter_count == count
