"""Text to ids, ids to text, and which ids end a text: one definition for whoever samples and whoever trains."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kernels.model import ConfigError
from kernels.scratch import scratch
from kernels.weights.folder import GENERATION, VOCABULARIES, ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenizer:
    """Wraps a `transformers` tokenizer that gives every process the same ids for a text and the same text for ids.

    A copy in another process encodes and decodes; it has no chat template and no files.
    """

    def __init__(self, words: "PreTrainedTokenizerBase", folder: ModelFolder | None = None) -> None:
        """`folder`: where `words` is from, and what is said there of ends; None: it was made, and says all itself."""
        words(
            ""
        )  # settles truncation and padding of the backend, which later calls would change; the backend's own do not
        self._words: PreTrainedTokenizerBase | None = words
        self._backend = words.backend_tokenizer
        self._folder = folder
        said, own = folder.ends if folder else (), words.eos_token_id
        self.ends = tuple(sorted({*said, *(() if own is None else (own,))}))
        """Ids of which any ends a completion."""
        self.end = own if own is not None else said[0] if said else None
        """The one that a text which is taught ends with; None where there is none."""

    @classmethod
    def of(cls, folder: ModelFolder, known: bool = True) -> "Tokenizer | None":
        """Reads the tokenizer of a directory: None where it has none; ConfigError for one that cannot be read. Where the model
        must be `known`, also for one of no family that the exact kernels compute."""
        if not any((folder.path / name).exists() for name in VOCABULARIES):
            return None
        if known:
            folder.model(leaves=1)  # `transformers` reads the config too, and makes a list of as many layers as it says
        return cls(_loaded(folder), folder)

    def __getstate__(self) -> dict[str, Any]:
        plain = {"_backend": self._backend, "ends": self.ends, "end": self.end}
        return {**plain, "_words": None, "_folder": None}

    @property
    def backend(self) -> Any:
        """Returns the `tokenizers.Tokenizer` below, for what is asked of single tokens."""
        return self._backend

    @cached_property
    def _size(self) -> int:
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._size

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Returns the ids of a prompt, with what the tokenizer puts around a text (a begin of text); without that the ids of
        a part: of what a chat template has written, of a completion."""
        encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # others run meanwhile
        return tuple(encoded[0].ids)

    def completion(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a text that is taught as the answer to a prompt, and its end."""
        assert self.end is not None
        return (*self.encode(text, add_special_tokens=False), self.end)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Returns the text, a pure function of the ids. `special`: special tokens are text too."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def shown(self, ids: Iterable[int]) -> str:
        """Returns ids with their text, for people."""
        return ", ".join(f"{i} {self.decode([i], special=True)!r}" for i in ids)

    @property
    def chat_template(self) -> Any:
        """Returns the chat template, None where there is none."""
        return getattr(self._words, "chat_template", None)

    def chat(self, messages: list[dict[str, str]], **arguments: Any) -> str:
        """Returns what the chat template makes of messages, up to where the answer begins, unless `arguments` say otherwise;
        `encode` it without special tokens. Raises whatever the template does."""
        assert self._words is not None
        arguments = {"add_generation_prompt": True, **arguments}
        return str(self._words.apply_chat_template(messages, tokenize=False, **arguments))

    # What a model directory carries on. Where its own files say nothing, they are told what `words` says, so that whoever loads
    # them stops where we do.

    @property
    def _known(self) -> dict[str, Any]:
        assert self._words is not None
        ends = self.ends[0] if len(self.ends) == 1 else list(self.ends) or None
        begin, padding = self._words.bos_token_id, self._words.pad_token_id
        return {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": padding}

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Returns those fields of config.json that say something of tokens."""
        return _completed(self._folder.token_fields if self._folder else {}, self._known)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Returns all other files that do, by path."""
        assert self._words is not None
        files = self._folder.token_files() if self._folder else _saved(self._words)
        generation = self._folder.generation if self._folder else {}
        if (whole := _completed(generation, self._known)) != generation:
            files[GENERATION] = (json.dumps(whole, indent=2) + "\n").encode()
        return files


def _completed(fields: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    missing = {name: value for name, value in known.items() if value is not None and fields.get(name) is None}
    return {**fields, **missing}


def _saved(words: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    with scratch() as folder:
        words.save_pretrained(str(folder))
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def _loaded(folder: ModelFolder) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    folder.token_files()  # can be read, and none of them is a pipe
    try:
        words = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        words("")
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # whatever a damaged file makes two libraries raise: one of them is Rust, and may panic
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder.path}: its tokenizer cannot be loaded: {reason}") from None
    if getattr(words, "backend_tokenizer", None) is None:
        raise ConfigError(f"{folder.path}: its tokenizer has no tokenizer.json, and none can be made of its files")
    return words
