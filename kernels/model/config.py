"""The shape of a decoder, read from and written to a Hugging Face `config.json`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kernels.model.adapter import Adapter
from kernels.model.experts import Experts, experts_of, experts_to_hf
from kernels.model.fields import COUNTS, ConfigError, Said, check_understood, real, rope_of, rope_to_hf, shown, whole
from kernels.model.formats import FORMATS, PLAIN, Format
from kernels.model.operations import OPERATIONS, Numerics, Operations, operations
from kernels.model.parameter import Parameter
from kernels.ops import Quantized
from kernels.ops.norm_rope import RopeScaling
from kernels.tree import is_power_of_two


@dataclass(frozen=True)
class Family:
    """Says what sets one architecture apart from the others of the same decoder."""

    architecture: str
    qk_norm: bool = False  # heads of q and k pass an rms_norm before rope
    qkv_bias: bool = False
    head_dim: int | None = None  # where a config leaves it out; None: hidden_size / heads
    sliding_window: int | None = None  # likewise
    experts: bool = False  # layers may be a mixture of experts


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, experts=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),  # Qwen2.5 too
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", sliding_window=4096),
}
"""By the model_type of a Hugging Face config; the defaults are those of transformers."""
_OURS = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "max_positions")
_SIZES = dict(zip(_OURS, COUNTS, strict=True))  # our name -> that of a Hugging Face config


@dataclass(frozen=True)
class ModelConfig:
    """Holds the shape of a decoder and the contract of its sums: all that decides what a forward pass computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    tied: bool  # the LM head is the embedding
    leaves: int  # of every contraction: the largest tensor-parallel size that the run may ever use
    init_std: float = 0.02  # of random matrices
    model_type: str = "qwen3"  # a key of FAMILIES
    rope_scaling: RopeScaling | None = None
    numerics: Numerics = "exact"  # whose matmul, attention and log-prob: those on the tree, or the vendor's
    experts: Experts | None = None  # of the layers that are a mixture of experts; None: there is none
    adapter: Adapter | None = None  # what is trained, of weights that are frozen; None: the weights are trained
    format: Format = PLAIN  # of the projections: plain, or a key of FORMATS
    head: Literal["tokens", "value"] = "tokens"  # what it says of a position: the next token, or what the rest is worth

    def __post_init__(self) -> None:
        if not is_power_of_two(self.leaves):
            raise ConfigError(f"model.leaves={self.leaves} must be a power of two")
        if self.numerics not in OPERATIONS:
            raise ConfigError(f"numerics={self.numerics} must be one of {', '.join(OPERATIONS)}")
        for name in _SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"the model's {name} is {getattr(self, name)!r}; it must be a positive integer")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key-value heads")
        if self.head_dim % 16:
            raise ConfigError(f"head_dim {self.head_dim} is not a multiple of 16")
        if self.family.experts != (self.experts is not None):
            raise ConfigError(f"a {self.model_type} {'needs' if self.family.experts else 'has no'} experts")
        if self.experts:
            self.experts.check(self.layers)
        if self.format != PLAIN:
            self._check_format()
        for what, extent in self._contractions():
            if extent % self.leaves:
                most = math.gcd(self.leaves, *(e for _, e in self._contractions()))
                raise ConfigError(
                    f"{what} {extent} is not divisible by model.leaves={self.leaves}: this model takes at most {most} leaves"
                )

    def _check_format(self) -> None:
        what = f"model.format={self.format}"
        if self.format not in FORMATS:
            raise ConfigError(f"{what} must be one of {', '.join((PLAIN, *FORMATS))}")
        if self.numerics != "exact":
            raise ConfigError(
                f"{what} with numerics={self.numerics}: the vendor's ops here are plain; set model.format=plain"
            )
        if self.experts:
            raise ConfigError(
                f"{what}: experts are not quantized yet; a {self.model_type} takes plain weights and format only"
            )
        block = FORMATS[self.format].block
        for name, extent in self._contractions():
            if extent % (block * self.leaves):
                raise ConfigError(
                    f"{what}: {name} {extent} in model.leaves={self.leaves} are {extent / self.leaves:g} each, which is not "
                    f"whole blocks of {block}: {self._fewer_leaves(block)}"
                )

    def _fewer_leaves(self, block: int) -> str:
        shared = math.gcd(*(extent for _, extent in self._contractions()))
        if shared % block:
            return f"this model takes model.format={PLAIN} only"
        return f"this model takes at most {shared // block & -(shared // block)} leaves in it"

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises ConfigError where the model's format knows no activations of `dtype`."""
        if self.format != PLAIN and dtype != torch.bfloat16:
            raise ConfigError(
                f"model.format={self.format} quantizes activations of bfloat16, and model.dtype is "
                f"{str(dtype).removeprefix('torch.')}: set model.dtype=bfloat16, or model.format={PLAIN}"
            )

    def quantizes(self, parameter: Parameter) -> bool:
        """Says whether a parameter is multiplied with in the model's format, and not as it is."""
        return self.format != PLAIN and parameter.projection

    def quantize(self, weight: torch.Tensor) -> Quantized:
        """Quantizes a weight [N, K], or whole blocks of one, in the model's format: what the trainer's forward pass multiplies
        with, and what an engine holds."""
        return FORMATS[self.format].quantize(weight)

    def _contractions(self) -> list[tuple[str, int]]:
        out = [
            ("hidden_size", self.hidden_size),
            ("heads * head_dim", self.heads * self.head_dim),
            ("kv_heads * head_dim", self.kv_heads * self.head_dim),
        ]
        if not all(map(self.sparse, range(self.layers))):
            out.append(("intermediate_size", self.intermediate_size))
        return [*out, ("num_experts", self.experts.count)] if self.experts else out

    def check_shards(self, size: int, key: str = "rollout.tp", leaves: str = "model.leaves") -> None:
        """Raises ConfigError where `size` tensor-parallel ranks cannot hold whole heads and whole subtrees. `key`, `leaves`:
        what the user calls the two."""
        if not is_power_of_two(size):
            raise ConfigError(f"{key}={size} must be a power of two")
        if self.leaves % size:
            raise ConfigError(f"{key}={size} is more than {leaves}={self.leaves}: set {leaves} to at least {size}")
        if self.kv_heads % size:
            raise ConfigError(f"{key}={size} does not divide the model's {self.kv_heads} key-value heads")

    @property
    def value_rows(self) -> int:
        """Counts the rows of a value head: the first is the head, the others stay zero and fill a tile and every leaf."""
        return max(16, self.leaves)

    def sparse(self, layer: int) -> bool:
        """Says whether a layer's MLP is a mixture of experts."""
        return self.experts is not None and self.experts.sparse(layer)

    @property
    def family(self) -> Family:
        """Returns the rules of the model's family: its architecture's name, biases, norms."""
        return FAMILIES[self.model_type]

    @property
    def vocab_rows(self) -> int:
        """Counts the rows of the embedding and of the head as they are held: a multiple of 4 ids for each leaf. Those from
        vocab_size on are zeros and stand for no token: their logits are -inf (`kernels.ops.exclude_padding`), and no file has
        them."""
        unit = 4 * self.leaves
        return -(-self.vocab_size // unit) * unit

    @property
    def ops(self) -> Operations:
        """Returns the ops that the model is computed with: the exact ones, in its format, or torch's fast ones."""
        return operations(self.numerics, self.format)

    @classmethod
    def from_hf(
        cls, hf: dict[str, Any], leaves: int, said: Said | None = None, format: Format = PLAIN
    ) -> "ModelConfig":
        """Reads the fields of a Hugging Face config of one of FAMILIES; ConfigError for one that is not understood.
        `said`: what the user calls a field. `format`: of the projections, which the fields do not say."""
        said = said or (lambda field, value: f"the model's {field} is {value}; it")
        kind = hf.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None or not isinstance(kind, str):
            raise ConfigError(f"model_type {shown(kind)} is not supported; supported: {', '.join(FAMILIES)}")
        try:
            sizes: dict[str, Any] = {ours: whole(hf, name, said) for ours, name in _SIZES.items() if ours != "head_dim"}
            rms_eps = real("rms_norm_eps", hf["rms_norm_eps"], said, most=1.0)
            theta, scaling = rope_of(kind, hf, said)
        except KeyError as missing:
            raise ConfigError(f"the model config has no field {missing}") from None
        experts = experts_of(hf, said) if family.experts else None
        check_understood(kind, hf, said, experts is not None)
        if window := _window(hf, family):
            raise ConfigError(f"{kind} with sliding_window={shown(window)} is not supported")
        init_std = hf.get("initializer_range")
        tied = hf.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise ConfigError(f"{said('tie_word_embeddings', shown(tied))} must be true or false")
        own = hf.get("head_dim") is not None
        return cls(
            **sizes,
            head_dim=whole(hf, "head_dim", said) if own else family.head_dim or sizes["hidden_size"] // sizes["heads"],
            rms_eps=rms_eps,
            rope_theta=theta,
            tied=tied,
            leaves=leaves,
            init_std=0.02 if init_std is None else real("initializer_range", init_std, said, zero=True),
            model_type=kind,
            rope_scaling=scaling,
            experts=experts,
            format=format,
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Returns the fields of a Hugging Face `config.json` of this shape; `dtype` is what it says of the weights."""
        fields = {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            **{name: getattr(self, ours) for ours, name in _SIZES.items()},
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope_to_hf(self.rope_theta, self.rope_scaling),
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "initializer_range": self.init_std,
            "torch_dtype": dtype,
        }
        if self.experts:
            fields |= experts_to_hf(self.experts)
        if self.model_type in ("qwen3", "qwen3_moe", "llama"):
            fields["attention_bias"] = False
        if self.model_type == "mistral":
            fields["sliding_window"] = None
        return fields


def _window(hf: dict[str, Any], family: Family) -> Any:
    """Returns the sliding window of a config; None where there is none, or it never cuts."""
    window = hf.get("sliding_window", family.sliding_window)
    if hf.get("use_sliding_window", True) is False or window is None:
        return None
    number = isinstance(window, int | float) and not isinstance(window, bool)
    return None if number and window >= hf["max_position_embeddings"] else window
