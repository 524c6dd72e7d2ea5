"""What is served: a Hugging Face model directory, or a tiny random model that needs no download."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kernels.model import ConfigError, ModelConfig, Parameter, Weight, saved
from kernels.model.formats import PLAIN
from kernels.model.known import TINY_BYTES
from kernels.weights import adapters
from kernels.weights.beside import DTYPES
from kernels.weights.files import load_as_stored
from kernels.weights.folder import ModelFolder
from kernels.weights.initial import initial
from rollout.text import BYTE_LETTERS, Decode
from rollout.tokenizer import Tokenizer

EOS = "<|endoftext|>"
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "


@dataclass(frozen=True)
class Source:
    """Says what is served, in plain data, so that it can be sent to the processes of other ranks; weights are read there."""

    name: str
    config: ModelConfig
    directory: str | None  # None: random weights of seed 0
    dtype: torch.dtype
    words: Tokenizer | None  # None: requests are ids, and so are answers
    end_ids: tuple[int, ...] = ()  # tokens that end a text unless a request ignores them
    remarks: tuple[str, ...] = ()  # from the contract of the directory: lines to be told
    adapter: str | None = None  # a folder of `peft`, merged into the weights as they are read

    @classmethod
    def open(
        cls,
        directory: str | None,
        leaves: int = 0,
        dtype: str = "auto",
        device: str = "cpu",
        adapter: str | None = None,
        format: str = "auto",
    ) -> "Source":
        """Opens a model directory, or the tiny model. `leaves` 0, `dtype` and `format` auto: those of the directory's contract,
        or else 8 leaves, the dtype of its tensors and plain; for the tiny model 8 leaves, the dtype of the device and plain.
        ConfigError where the directory holds no model to serve, or the folder `adapter` no adapters of it."""
        asked = None if dtype == "auto" else dtype
        if directory is None:
            if adapter:
                raise ConfigError(f"adapter={adapter} without a model: say which model directory it was trained on")
            if format not in ("auto", PLAIN):
                raise ConfigError(f"format={format} without a model: the tiny model's leaves are not whole blocks")
            name = asked or ("bfloat16" if device == "cuda" else "float32")
            if name not in DTYPES:
                raise ConfigError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
            made = Tokenizer(_byte_tokenizer())
            return cls("tiny", replace(TINY_BYTES, leaves=leaves or 8), None, DTYPES[name], made, made.ends)
        folder = ModelFolder(directory)
        contract = folder.asked(leaves or None, asked, format=None if format == "auto" else format)
        config = folder.model(contract.leaves, contract.format)
        config.check_dtype(DTYPES[contract.dtype])
        folder.tensors(config)
        if adapter:
            adapters.read(adapter, config)
        name, told, words = folder.path.resolve().name, tuple(folder.remarks(contract)), Tokenizer.of(folder)
        return cls(
            name, config, directory, DTYPES[contract.dtype], words, words.ends if words else folder.ends, told, adapter
        )

    def weights(self) -> Iterator[tuple[Parameter, Weight]]:
        """Yields every parameter whole, one at a time."""
        if self.directory is None:
            return initial(self.config, 0)
        if self.adapter is None:
            return load_as_stored(self.config, self.directory)
        modules = adapters.read(self.adapter, self.config)
        return adapters.load_merged(self.config, self.directory, modules, self.dtype)

    @property
    def tensors(self) -> int:
        """Counts the tensors that a file of the model holds."""
        return len(saved(self.config))

    @property
    def decode(self) -> Decode | None:
        """Returns the same function of the ids on every rank; None where there is no tokenizer."""
        return self.words.decode if self.words else None

    @property
    def decode_special(self) -> Decode | None:
        """Returns the same function, to which special tokens are text too."""
        return partial(self.words.decode, special=True) if self.words else None


def _byte_tokenizer() -> Any:
    """Token i is byte i; 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in BYTE_LETTERS.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, chat_template=CHAT)
