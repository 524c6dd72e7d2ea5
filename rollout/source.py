"""What is served: a Hugging Face model directory, or a tiny random model that needs no download."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kernels.model import ConfigError, ModelConfig
from kernels.model.weights import Parameter, find, initial, load, parameters
from rollout.text import BYTE_LETTERS, Decode

TINY = ModelConfig(
    vocab_size=288,  # 256 bytes, the end of text, and room to be divisible
    hidden_size=64,
    intermediate_size=128,
    layers=2,
    heads=8,
    kv_heads=8,
    head_dim=16,
    max_positions=1024,
    rms_eps=1e-6,
    rope_theta=10000.0,
    tied=False,
    leaves=8,
    init_std=0.2,
)
EOS = "<|endoftext|>"
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "


@dataclass(frozen=True)
class Source:
    """Plain data, so that it can be sent to the processes of other ranks; weights are read there."""

    name: str
    config: ModelConfig
    directory: str | None  # None: random weights of seed 0
    dtype: torch.dtype
    tokenizer: str | None  # a tokenizer.json, as text

    @classmethod
    def open(cls, directory: str | None, leaves: int = 8, dtype: str = "auto", device: str = "cpu") -> "Source":
        """`dtype` auto: the directory's own; the tiny model takes that of the device. ConfigError where the directory holds no
        model that can be served."""
        if directory is None:
            return cls(
                "tiny", TINY, None, _dtype(dtype, "bfloat16" if device == "cuda" else "float32"), _byte_tokenizer()
            )
        path = Path(directory)
        config = ModelConfig.from_directory(path, leaves)
        find(config, path)
        hf = json.loads((path / "config.json").read_text())
        tokenizer = path / "tokenizer.json"
        return cls(
            path.resolve().name,
            config,
            str(path),
            _dtype(dtype, hf.get("dtype") or hf.get("torch_dtype") or "float32"),
            tokenizer.read_text() if tokenizer.exists() else None,
        )

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Every parameter whole, one at a time."""
        return initial(self.config, 0) if self.directory is None else load(self.config, self.directory)

    @property
    def tensors(self) -> int:
        return len(parameters(self.config))

    @cached_property
    def decode(self) -> Decode | None:
        """The same function of the ids on every rank; None where there is no tokenizer.json."""
        return self._decoder(special=False)

    @cached_property
    def decode_special(self) -> Decode | None:
        """The same, special tokens being text too."""
        return self._decoder(special=True)

    def _decoder(self, special: bool) -> Decode | None:
        if self.tokenizer is None:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer)

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=not special))

        return decode

    @cached_property
    def words(self) -> Any:
        """The `transformers` tokenizer: text to ids, and the chat template. None where there is none."""
        if self.tokenizer is None:
            return None
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if self.directory is None:
            from tokenizers import Tokenizer

            return PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(self.tokenizer), eos_token=EOS, chat_template=CHAT
            )
        try:
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except Exception as error:  # whatever a damaged file makes `transformers` raise
            raise ConfigError(
                f"{self.directory}: no readable tokenizer: {' '.join(str(error).split())[:200]}"
            ) from None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text unless a request ignores them: those of generation_config.json and config.json, and the
        tokenizer's own."""
        found: list[Any] = []
        for name in ("generation_config.json", "config.json") if self.directory else ():
            path = Path(str(self.directory), name)
            if path.exists():
                try:
                    value = json.loads(path.read_text()).get("eos_token_id")
                except (ValueError, AttributeError):
                    raise ConfigError(f"{path} must hold a JSON object") from None
                found += value if isinstance(value, list) else [value]
        if self.words is not None:
            found.append(self.words.eos_token_id)
        return tuple(sorted({i for i in found if isinstance(i, int) and 0 <= i < self.config.vocab_size}))


def _dtype(asked: str, found: str) -> torch.dtype:
    name = str(found if asked == "auto" else asked).removeprefix("torch.")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"dtype {name!r} is not supported; supported: float32, bfloat16 (dtype=NAME chooses)")
    return known[name]


def _byte_tokenizer() -> str:
    """Token i is byte i; 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in BYTE_LETTERS.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return str(tokenizer.to_str())
