"""The fields of a Hugging Face `config.json`: which decide numbers here, which decide none, and what their values may be.

A field that is in neither list may decide numbers that nothing here computes, so it is refused: a config is read as a whole.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from kernels.ops.norm_rope import RopeScaling


class ConfigError(ValueError):
    """Says in one line why a model cannot run as asked, and names the numbers."""


Said = Callable[[str, str], str]
"""(field, its value for people) -> how a message begins that goes on with "must be ..."."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 60


def shown(value: object) -> str:
    """Shows a value in a message: as Python writes it, and not longer than a line."""
    return _REPR.repr(value)


CONTRACT = "samebit"
"""The field in which a saved model says under which contract it was trained (`kernels.weights.folder`)."""

COUNTS = {  # of a Hugging Face config: the largest value that is taken
    "vocab_size": 2**31 - 1,  # ids are int32 on a GPU
    "hidden_size": 2**31 - 1,
    "intermediate_size": 2**31 - 1,
    "num_hidden_layers": 2**14,
    "num_attention_heads": 2**31 - 1,
    "num_key_value_heads": 2**31 - 1,
    "head_dim": 2**31 - 1,
    "max_position_embeddings": 2**24,  # float32 has every integer up to there
}
EXPERT_COUNTS = {  # of a mixture of experts: likewise
    "num_experts": 2**12,  # a block of a kernel holds a row of the router
    "num_experts_per_tok": 2**12,
    "moe_intermediate_size": 2**31 - 1,
    "decoder_sparse_step": 2**14,
}
OTHER_NAMES = {"num_experts": "num_local_experts"}
"""Fields that some files name otherwise."""
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32: the smallest with all its bits, and the largest

_READ = {
    *COUNTS,
    "model_type",
    "hidden_act",
    "initializer_range",
    "layer_types",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    CONTRACT,
}
_OF_EXPERTS = {*EXPERT_COUNTS, *OTHER_NAMES.values(), "mlp_only_layers", "norm_topk_prob"}
_WITHOUT_EFFECT = {  # fields of which one value changes nothing: that value
    "add_cross_attention": False,
    "attention_bias": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "quantization_config": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
_OTHER_EXPERTS = {
    *("first_k_dense_replace", "kv_lora_rank", "moe_layer_freq", "n_group", "n_routed_experts", "n_shared_experts"),
    *("num_shared_experts", "routed_scaling_factor", "scoring_func", "shared_expert_intermediate_size", "topk_group"),
    *("topk_method", "use_expert_bias", "use_grouped_topk"),
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that say something of tokens, and nothing of numbers."""
_NO_NUMBER = {
    *TOKENS,
    "architectures",  # what stands in the files, by name and shape, says more
    # of training elsewhere; here no dropout is computed, and the loss is the algorithm's
    *("attention_dropout", "output_router_logits", "router_aux_loss_coef"),
    *("chunk_size_feed_forward", "is_decoder", "max_window_layers"),  # how and where, and not what
    *("attn_implementation", "auto_map", "dtype", "tf_legacy_loss", "torch_dtype", "torchscript", "use_bfloat16"),
    *("transformers_version", "transformers_weights", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict", "use_cache"),
    *("max_sequence_length", "model_max_length", "prefix", "sep_token_id", "tokenizer_class"),
    # of sampling: a request says these
    *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
}
_SCALING = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
_ROPE_ALWAYS = {"rope_type", "type", "rope_theta"}
_ROPE = {"default": set(), "llama3": {*_SCALING.values()}}  # what each type reads beside these


def whole(fields: Mapping[str, Any], name: str, said: Said) -> int:
    """Reads a field of COUNTS or of EXPERT_COUNTS."""
    value, most = fields[name], (COUNTS | EXPERT_COUNTS)[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{said(name, shown(value))} must be a positive integer")
    if value > most:
        raise ConfigError(f"{said(name, shown(value))} must be at most {most}")
    return value


def real(name: str, value: object, said: Said, most: float = _MOST, zero: bool = False) -> float:
    """Reads a number that float32 holds with all its bits, from 2^-126 to `most`; or 0, if that is allowed."""
    kind = "a number from 0 up" if zero else "a positive number"
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or (zero and value == 0)):
        raise ConfigError(f"{said(name, shown(value))} must be {kind}")
    if value and not _LEAST <= value <= most:
        raise ConfigError(f"{said(name, shown(value))} must be {kind} from 2^-126 to {most:.3g}, which float32 holds")
    return value


def check_understood(kind: str, fields: Mapping[str, Any], said: Said, experts: bool = False) -> None:
    """Raises ConfigError for the first field that may decide a number and is not understood, or has a value that is not
    supported. A null says nothing. `experts`: those of a mixture are read too."""
    read = _READ | _NO_NUMBER | (_OF_EXPERTS if experts else set())
    for name, value in fields.items():
        if value is None or name in read or name.startswith("_"):
            continue
        if name in _OTHER_EXPERTS:
            raise ConfigError(
                f"{said(name, shown(value))} is of another mixture of experts; supported are models of type qwen3_moe, whose "
                "experts are all routed, by one softmax"
            )
        if name in _WITHOUT_EFFECT:
            if value != _WITHOUT_EFFECT[name]:
                raise ConfigError(f"{kind} with {name}={shown(value)} is not supported")
        else:
            raise ConfigError(
                f"{said(name, shown(value))} is not understood, and may decide numbers: another model, or a field to remove"
            )
    if (fields.get("hidden_act") or "silu") != "silu":
        raise ConfigError(f"{kind} with hidden_act={shown(fields['hidden_act'])} is not supported")
    types, layers = fields.get("layer_types"), fields["num_hidden_layers"]
    if types is not None and types != ["full_attention"] * layers:
        held = sorted({*map(str, types)}) if isinstance(types, list) else types
        raise ConfigError(
            f"{said('layer_types', shown(held))} must be 'full_attention' for each of the {layers} layers"
        )


def rope_of(kind: str, fields: Mapping[str, Any], said: Said) -> tuple[float, RopeScaling | None]:
    """Returns (theta, scaling) of a config's rope parameters, old and new."""
    # where there are both, transformers takes the first
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{said('rope parameters', shown(rope))} must be an object")
    form = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(form, str) or form not in _ROPE:
        raise ConfigError(f"{kind} with rope_type={shown(form)} is not supported")
    for part, value in rope.items():
        if part == "partial_rotary_factor" and value == 1:
            continue
        if value is not None and part not in _ROPE_ALWAYS | _ROPE[form]:
            raise ConfigError(f"{kind} with {name}.{part}={shown(value)} is not supported with rope_type={shown(form)}")
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    if form == "default":
        return float(real("rope_theta", theta, said)), None
    values = {ours: real(f"rope {hf}", rope[hf], said) for ours, hf in _SCALING.items()}
    if values["low"] >= values["high"]:
        raise ConfigError(f"the model's rope low_freq_factor {values['low']} must be below high {values['high']}")
    return float(real("rope_theta", theta, said)), RopeScaling(**values)  # type: ignore[arg-type]


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns `rope_parameters` as config.json holds them: type default, or llama3 with its scaling."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        rope |= {"rope_type": "llama3"} | {hf: getattr(scaling, ours) for ours, hf in _SCALING.items()}
    return rope
