"""A model that cannot run exactly is refused at the door, in one line with the numbers."""

import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from kernels.model import ConfigError, ModelConfig, costs
from kernels.model.fields import COUNTS
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
        (
            {"model_type": "gemma"},
            "model_type 'gemma' is not supported; supported: qwen3, qwen3_moe, qwen2, llama, mistral",
        ),
        ({"model_type": "glm4_moe"}, "'glm4_moe' is not supported"),
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
        ({"rope_scaling": 5}, "rope parameters is 5; it must be an object"),
        ({"rope_theta": "x", "rope_parameters": ...}, "rope_theta is 'x'; it must be a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a positive number"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config={'quant_method': 'fp8'} is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
            "rope_parameters.factor=4.0 is not supported with",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_hidden_layers": ...}, "no field 'num_hidden_layers'"),
        ({"head_dim": 24}, "head_dim 24 is not a multiple of 16"),
        ({"num_attention_heads": 5}, "5 attention heads are not a multiple of 2 key-value heads"),
        ({"intermediate_size": 63}, "intermediate_size 63 is not divisible by model.leaves=2"),
        ({"hidden_size": 33}, "hidden_size 33 is not divisible by model.leaves=2"),
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
    """Spelled out; the blocks' own declarations are what is counted."""
    config = SHAPES[name]
    H, I, D, family = config.hidden_size, config.intermediate_size, config.head_dim, config.family
    qkv = (config.heads + 2 * config.kv_heads) * D
    layer = qkv * (H + family.qkv_bias) + config.heads * D * H + 2 * H + 2 * D * family.qk_norm
    tables = (1 if config.tied else 2) * config.vocab_size * H
    sparse, own = sum(map(config.sparse, range(config.layers))), config.experts
    mixture = own.count * (1 + 3 * own.intermediate_size) * H if own else 0
    mlps = sparse * mixture + (config.layers - sparse) * 3 * I * H
    assert costs.parameter_count(config) == config.layers * layer + mlps + tables + H


# fields that are not understood -------------------------------------------------------------------------------------------

PUBLISHED = {  # configs of the hub as they are, but for their sizes
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "max_window_layers": 36,
        "rope_scaling": None,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
    },
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "max_window_layers": 48,
    },
    "qwen2": {"max_window_layers": 28, "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False},
    "llama": {"mlp_bias": False, "pretraining_tp": 1, "rope_scaling": LLAMA3, "eos_token_id": [128001, 128008, 128009]},
    "mistral": {"sliding_window": None, "attention_dropout": 0.0, "head_dim": 16, "_name_or_path": "x/y"},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configs_are_read(kind: str) -> None:
    old = {"rope_parameters": ..., "attention_bias": ..., "sliding_window": ...}
    assert ModelConfig.from_hf(hf(model_type=kind, **(old | PUBLISHED[kind])), 2).model_type == kind


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "qwen2", "llama", "mistral"])
def test_what_transformers_writes_is_read(kind: str) -> None:
    """All of it: also in the long form of a config of version 4."""
    sizes = {k: v for k, v in hf(model_type=kind).items() if k in COUNTS}
    extra = {"sliding_window": None} if kind == "mistral" else {}
    made = AutoConfig.for_model(kind, **sizes, **extra).to_dict() | {"model_type": kind}
    longer = {
        "is_decoder": False,
        "pruned_heads": {},
        "top_p": 1.0,
        "bad_words_ids": None,
        "add_cross_attention": False,
    }
    assert ModelConfig.from_hf(made | longer, 2).layers == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"num_experts": 8},
        {"num_experts": 0},
        {"dual_chunk_attention_config": {"chunk_size": 262144}},
        {"attention_multiplier": 0.5},
        {"a_field_of_tomorrow": False},
        {"partial_rotary_factor": 0.5},
        {"pretraining_tp": 2},
        {"use_mrope": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_parameters": ..., "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"rope_parameters": ..., "rope_scaling": {"rope_type": ["default"]}},
    ],
    ids=str,
)
def test_a_field_that_may_decide_numbers_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(hf(**changes), 2)
    (name,) = (n for n, v in changes.items() if v is not ...)
    assert name in str(error.value) or "rope" in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"layer_types": ["full_attention"] * 2}, {"attn_logit_softcapping": None}], ids=str
)
def test_a_field_that_says_nothing_is_read(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(hf(**changes), 2) == TINY


NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")


@given(
    name=st.sampled_from(
        [*COUNTS, *NUMBERS, "tie_word_embeddings", "sliding_window", "layer_types", "rope_parameters"]
    ),
    value=st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.sampled_from(
        [2**70, 10**400, 1e23, 1e-300, float("nan"), float("inf"), "x", [], {}, [1], {"rope_theta": 10**400}]
    )
    | st.floats(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_is_read_or_refused_in_a_line(name: str, value: Any) -> None:
    """And what is read is held by float32, and by the tables that are made of it."""
    try:
        config = ModelConfig.from_hf(hf(**{name: value}), 2)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    for number in (config.rms_eps, config.rope_theta, config.init_std):
        held = struct.unpack("f", struct.pack("f", number))[0]
        assert math.isfinite(held) and (held > 0) == (number > 0)
    assert config.layers <= 2**14 and config.max_positions <= 2**24


def test_the_hint_for_leaves_works() -> None:
    with pytest.raises(ConfigError, match="this model takes at most 4 leaves"):
        ModelConfig.from_hf(hf(intermediate_size=60), 16)
    assert ModelConfig.from_hf(hf(intermediate_size=60), 4).leaves == 4


@given(vocabulary=st.integers(1, 2000), leaves=st.sampled_from([1, 2, 4, 8, 16]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_vocabulary_fits_any_leaves(vocabulary: int, leaves: int) -> None:
    config = replace(EIGHT, vocab_size=vocabulary, leaves=leaves, hidden_size=64)
    assert config.vocab_rows % (4 * leaves) == 0 and 0 <= config.vocab_rows - vocabulary < 4 * leaves
    assert config.to_hf()["vocab_size"] == vocabulary
