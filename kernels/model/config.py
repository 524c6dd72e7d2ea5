"""The shape of a decoder, read from and written to a Hugging Face `config.json`."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.model.operations import OPERATIONS, Numerics, Operations
from kernels.ops.rope import RopeScaling
from kernels.tree import is_power_of_two


class ConfigError(ValueError):
    """A model that cannot run as asked; one line that names the numbers."""


@dataclass(frozen=True)
class Family:
    """What sets one architecture apart from the others of the same decoder."""

    architecture: str
    qk_norm: bool = False  # heads of q and k pass an rms_norm before rope
    qkv_bias: bool = False
    head_dim: int | None = None  # where a config leaves it out; None: hidden_size / heads
    sliding_window: int | None = None  # likewise


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),  # Qwen2.5 too
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", sliding_window=4096),
}
"""By the model_type of a Hugging Face config; the defaults are those of transformers."""


@dataclass(frozen=True)
class ModelConfig:
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

    def __post_init__(self) -> None:
        if not is_power_of_two(self.leaves):
            raise ConfigError(f"model.leaves={self.leaves} must be a power of two")
        if self.numerics not in OPERATIONS:
            raise ConfigError(f"numerics={self.numerics} must be one of {', '.join(OPERATIONS)}")
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "max_positions",
        )
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"the model's {name} is {getattr(self, name)!r}; it must be a positive integer")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key-value heads")
        if self.head_dim % 16:
            raise ConfigError(f"head_dim {self.head_dim} is not a multiple of 16")
        for what, extent in self._contractions():
            if extent % self.leaves:
                raise ConfigError(
                    f"{what} {extent} is not divisible by model.leaves={self.leaves}: set model.leaves to a divisor"
                )
        if self.vocab_size // self.leaves % 4:
            raise ConfigError(
                f"vocabulary {self.vocab_size} over model.leaves={self.leaves} leaves parts of "
                f"{self.vocab_size // self.leaves}, which is not a multiple of 4: pad the vocabulary or lower model.leaves"
            )

    def _contractions(self) -> list[tuple[str, int]]:
        return [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("heads * head_dim", self.heads * self.head_dim),
            ("kv_heads * head_dim", self.kv_heads * self.head_dim),
            ("vocabulary", self.vocab_size),
        ]

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
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def ops(self) -> Operations:
        return OPERATIONS[self.numerics]

    @property
    def parameter_count(self) -> int:
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = qkv * (self.hidden_size + self.family.qkv_bias) + 2 * self.hidden_size
        layer += self.heads * self.head_dim * self.hidden_size + 3 * self.intermediate_size * self.hidden_size
        layer += 2 * self.head_dim * self.family.qk_norm
        return self.layers * layer + (1 if self.tied else 2) * self.vocab_size * self.hidden_size + self.hidden_size

    @classmethod
    def from_hf(cls, hf: dict[str, Any], leaves: int) -> "ModelConfig":
        """From the fields of a Hugging Face config of one of FAMILIES."""
        kind = hf.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            raise ConfigError(
                f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)} (dense decoders)"
            )
        # where there are both, transformers takes the first
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"the model's rope parameters are {rope!r}; they must be an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        window = hf.get("sliding_window", family.sliding_window)
        if hf.get("use_sliding_window", True) is False or (window or 0) >= (hf.get("max_position_embeddings") or 0):
            window = None  # it never cuts
        refused = {
            "rope_type": rope_type not in ("default", "llama3") and rope_type,
            "attention_bias": hf.get("attention_bias"),
            "mlp_bias": hf.get("mlp_bias"),
            "sliding_window": window,
            "hidden_act": hf.get("hidden_act", "silu") != "silu" and hf["hidden_act"],
            "quantization_config": hf.get("quantization_config"),
        }
        for field, value in refused.items():
            if value:
                raise ConfigError(f"{kind} with {field}={value!r} is not supported")
        theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
        for name, number in {"rope_theta": theta, "rms_norm_eps": hf.get("rms_norm_eps", 1.0)}.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise ConfigError(f"the model's {name} is {number!r}; it must be a positive number")
        init_std = hf.get("initializer_range")
        init_std = 0.02 if init_std is None else init_std
        if isinstance(init_std, bool) or not isinstance(init_std, int | float) or not 0 <= init_std < math.inf:
            raise ConfigError(f"the model's initializer_range is {init_std!r}; it must be a number from 0 up")
        tied = hf.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise ConfigError(f"the model's tie_word_embeddings is {tied!r}; it must be true or false")
        try:
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                layers=hf["num_hidden_layers"],
                heads=hf["num_attention_heads"],
                kv_heads=hf["num_key_value_heads"],
                head_dim=hf.get("head_dim") or family.head_dim or hf["hidden_size"] // hf["num_attention_heads"],
                max_positions=hf["max_position_embeddings"],
                rms_eps=hf["rms_norm_eps"],
                rope_theta=float(theta),
                tied=tied,
                leaves=leaves,
                init_std=init_std,
                model_type=kind,
                rope_scaling=_scaling(rope) if rope_type == "llama3" else None,
            )
        except KeyError as missing:
            raise ConfigError(f"the model config has no field {missing}") from None
        except (TypeError, ZeroDivisionError):  # of the head_dim that a config leaves out
            raise ConfigError(
                f"the model's hidden_size is {hf['hidden_size']!r} and num_attention_heads is "
                f"{hf['num_attention_heads']!r}; both must be positive integers"
            ) from None

    @classmethod
    def from_directory(cls, directory: str | Path, leaves: int) -> "ModelConfig":
        path = Path(directory) / "config.json"
        try:
            hf = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: a model directory holds a config.json") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if not isinstance(hf, dict):
            raise ConfigError(f"{path} must hold a JSON object")
        return cls.from_hf(hf, leaves)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling:
            rope |= {"rope_type": "llama3"} | {hf: getattr(self.rope_scaling, ours) for ours, hf in _SCALING.items()}
        fields = {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "initializer_range": self.init_std,
            "torch_dtype": dtype,
        }
        if self.model_type in ("qwen3", "llama"):
            fields["attention_bias"] = False
        if self.model_type == "mistral":
            fields["sliding_window"] = None
        return fields


_SCALING = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}


def _scaling(rope: dict[str, Any]) -> RopeScaling:
    values = {ours: rope[hf] for ours, hf in _SCALING.items()}
    for value, hf in zip(values.values(), _SCALING.values(), strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"the model's rope {hf} is {value!r}; it must be a positive number")
    if values["low"] >= values["high"]:
        raise ConfigError(f"the model's rope low_freq_factor {values['low']} must be below high {values['high']}")
    return RopeScaling(**values)
