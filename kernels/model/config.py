"""The shape of a Qwen3 decoder, read from and written to a Hugging Face `config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.tree import is_power_of_two


class ConfigError(ValueError):
    """A model that cannot run as asked; one line that names the numbers."""


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

    def __post_init__(self) -> None:
        if not is_power_of_two(self.leaves):
            raise ConfigError(f"model.leaves={self.leaves} must be a power of two")
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

    def check_shards(self, size: int, key: str = "rollout.tp") -> None:
        """Raises ConfigError where `size` tensor-parallel ranks cannot hold whole heads and whole subtrees."""
        if not is_power_of_two(size):
            raise ConfigError(f"{key}={size} must be a power of two")
        if self.leaves % size:
            raise ConfigError(
                f"{key}={size} is more than model.leaves={self.leaves}: set model.leaves to at least {size}"
            )
        if self.kv_heads % size:
            raise ConfigError(f"{key}={size} does not divide the model's {self.kv_heads} key-value heads")

    @property
    def parameter_count(self) -> int:
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden_size
        layer = qkv + self.heads * self.head_dim * self.hidden_size + 3 * self.intermediate_size * self.hidden_size
        layer += 2 * self.hidden_size + 2 * self.head_dim
        return self.layers * layer + (1 if self.tied else 2) * self.vocab_size * self.hidden_size + self.hidden_size

    @classmethod
    def from_hf(cls, hf: dict[str, Any], leaves: int) -> "ModelConfig":
        """From the fields of a Hugging Face config of architecture Qwen3ForCausalLM."""
        if hf.get("model_type") != "qwen3":
            raise ConfigError(f"model_type {hf.get('model_type')!r} is not supported; supported: 'qwen3' (dense)")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        refused = {
            "rope_type": kind != "default" and kind,
            "attention_bias": hf.get("attention_bias"),
            "use_sliding_window": hf.get("use_sliding_window"),
            "hidden_act": hf.get("hidden_act", "silu") != "silu" and hf["hidden_act"],
        }
        for field, value in refused.items():
            if value:
                raise ConfigError(f"Qwen3 with {field}={value!r} is not supported")
        theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
        try:
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                layers=hf["num_hidden_layers"],
                heads=hf["num_attention_heads"],
                kv_heads=hf["num_key_value_heads"],
                head_dim=hf.get("head_dim", 128),  # the default of transformers' Qwen3Config
                max_positions=hf["max_position_embeddings"],
                rms_eps=hf["rms_norm_eps"],
                rope_theta=float(theta),
                tied=bool(hf.get("tie_word_embeddings", False)),
                leaves=leaves,
                init_std=hf.get("initializer_range", 0.02),
            )
        except KeyError as missing:
            raise ConfigError(f"the model config has no field {missing}") from None

    @classmethod
    def from_directory(cls, directory: str | Path, leaves: int) -> "ModelConfig":
        path = Path(directory) / "config.json"
        try:
            return cls.from_hf(json.loads(path.read_text()), leaves)
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: a model directory holds a config.json") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
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
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "hidden_act": "silu",
            "initializer_range": self.init_std,
            "torch_dtype": dtype,
        }
