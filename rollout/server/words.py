"""What a model's tokenizer says to a server: text to ids, within bounds, and what each token stands for."""

import json
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

from rollout.server.bodies import BadRequest
from rollout.source import Source
from rollout.text import BYTE_LETTERS

_BYTES = {letter: bytes([byte]) for byte, letter in BYTE_LETTERS.items()}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte, in vocabularies that have tokens for what they have no word for


class Words:
    """Turns text into ids within the model's length, and ids into what a client is shown."""

    def __init__(self, source: Source) -> None:
        self.source, self.positions = source, source.config.max_positions

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token; as bytes, in a vocabulary of these, which are no fewer."""
        assert self.source.words is not None
        return max(map(len, self.source.words.backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Encodes a text. `special`: with what the tokenizer puts around a text. A text that cannot fit is refused unread: a
        tokenizer takes some 200 bytes of memory for one of the text."""
        if self.source.words is None:
            raise BadRequest("this model has no tokenizer: send token ids")
        if len(text) > self.positions * self._longest:
            raise BadRequest(
                f"a text of {len(text):,} characters exceeds the model's {self.positions} positions: the longest token has "
                f"{self._longest} characters"
            )
        return self.source.words.encode(text, add_special_tokens=special)

    def chat(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> tuple[int, ...]:
        """Encodes messages by the model's chat template; BadRequest where it has none or the template refuses them."""
        words = self.source.words
        if words is None or not words.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions")
        if {"tokenize", "conversation", "chat_template"} & set(extra):
            raise BadRequest("chat_template_kwargs must be an object of the template's own arguments")
        try:
            text = words.chat(messages, **extra)
        except Exception as error:  # whatever a template raises for messages that it does not take
            why = " ".join(str(error).split())[:300]
            raise BadRequest(f"the chat template refuses these messages: {why}") from None
        return self.encode(text, special=False)

    def bytes_of(self, token: int) -> bytes | None:
        """Returns the bytes that a token stands for, which may be a part of a character; None where there is no tokenizer."""
        return self._spell(token) if self.source.words else None

    def name(self, token: int) -> str:
        """Returns a token's text; for a part of a character its bytes, as OpenAI writes them."""
        spelled = self.bytes_of(token)
        if not spelled:
            return f"token_id:{token}"
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in spelled)

    @cached_property
    def _spell(self) -> Callable[[int], bytes]:
        assert self.source.words is not None
        tokenizer = self.source.words.backend
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        kinds, added = set(re.findall(r'"type": "(\w+)"', decoder)), tokenizer.get_added_tokens_decoder()

        @lru_cache(1 << 16)
        def spell(token: int) -> bytes:
            if token in added:
                return str(added[token].content).encode()
            word = tokenizer.id_to_token(token)
            if word is None:
                return b""
            if "ByteLevel" in kinds:
                return b"".join(_BYTES.get(letter) or letter.encode() for letter in word)
            if "ByteFallback" in kinds and (byte := _FALLBACK.fullmatch(word)):
                return bytes.fromhex(byte[1])
            if kinds & {"Metaspace", "Replace"}:
                return str(word).replace("▁", " ").encode()
            return str(tokenizer.decode([token], skip_special_tokens=False)).encode()

        return spell
