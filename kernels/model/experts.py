"""The fields of a mixture of experts, read from and written to a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.model.fields import EXPERT_COUNTS, OTHER_NAMES, ConfigError, Said, shown, whole
from kernels.ops.experts import STRIPE

_DEFAULTS = {  # those of transformers, for Qwen3MoeConfig
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
}


@dataclass(frozen=True)
class Experts:
    """Describes the layers that are a mixture of experts, by the names of a Hugging Face config.

    Every token passes `chosen` of `count` experts, each a gated MLP of `intermediate_size`."""

    count: int  # num_experts
    chosen: int  # num_experts_per_tok
    intermediate_size: int  # moe_intermediate_size
    normalize: bool = False  # norm_topk_prob: the weights of the chosen ones add up to 1
    step: int = 1  # decoder_sparse_step: layers step - 1, 2 step - 1, ... are sparse
    dense: tuple[int, ...] = ()  # mlp_only_layers: of those, these are not

    def sparse(self, layer: int) -> bool:
        """Says whether a layer is a mixture of experts."""
        return layer not in self.dense and (layer + 1) % self.step == 0

    def check(self, layers: int) -> None:
        """Raises ConfigError where a model of `layers` layers cannot have them."""
        if not 0 < self.chosen <= self.count:
            raise ConfigError(f"num_experts_per_tok={self.chosen} must be from 1 to num_experts={self.count}")
        if self.intermediate_size % STRIPE:
            raise ConfigError(f"moe_intermediate_size={self.intermediate_size} must be a multiple of {STRIPE}")
        if not any(map(self.sparse, range(layers))):
            raise ConfigError(
                f"decoder_sparse_step={self.step} and mlp_only_layers={list(self.dense)} leave no expert in {layers} layers"
            )


def experts_of(fields: Mapping[str, Any], said: Said) -> Experts:
    """Reads them; what a config leaves out has the value that transformers gives it. ConfigError names the field."""
    own = {name: fields.get(name, fields.get(OTHER_NAMES.get(name, ""))) for name in EXPERT_COUNTS}
    other = fields.get(OTHER_NAMES["num_experts"])
    if other is not None and own["num_experts"] != other:
        raise ConfigError(f"{said('num_experts', shown(own['num_experts']))} must be num_local_experts={shown(other)}")
    values = _DEFAULTS | {name: value for name, value in own.items() if value is not None}
    counts = {name: whole(values, name, said) for name in EXPERT_COUNTS}
    normalize = fields.get("norm_topk_prob") or False
    if not isinstance(normalize, bool):
        raise ConfigError(f"{said('norm_topk_prob', shown(normalize))} must be true or false")
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or not all(type(i) is int and i >= 0 for i in dense):
        raise ConfigError(f"{said('mlp_only_layers', shown(dense))} must be a list of layers")
    return Experts(
        counts["num_experts"],
        counts["num_experts_per_tok"],
        counts["moe_intermediate_size"],
        normalize,
        counts["decoder_sparse_step"],
        tuple(dense),
    )


def experts_to_hf(experts: Experts) -> dict[str, Any]:
    """Writes them."""
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": experts.step,
        "mlp_only_layers": list(experts.dense),
    }
