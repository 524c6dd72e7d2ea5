"""What the server asks of tokenizers of several kinds."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rollout.tokenizer
from rollout.server.bodies import BadRequest
from rollout.server.words import Words
from rollout.source import Source
from rollout.text import BYTE_LETTERS

TINY = Source.open(None)


def words(tokenizer: Tokenizer) -> Words:
    tokenizer.add_special_tokens([AddedToken("<eos é>", special=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos é>")
    return Words(replace(TINY, words=rollout.tokenizer.Tokenizer(wrapped)))


def test_letters_of_bytes() -> None:
    """As GPT-2 has them: the space is a G with a dot, the newline a C with one."""
    assert len(set(BYTE_LETTERS.values())) == 256 and sorted(BYTE_LETTERS) == list(range(256))
    assert (BYTE_LETTERS[ord(" ")], BYTE_LETTERS[ord("\n")], BYTE_LETTERS[0xAD], BYTE_LETTERS[ord("a")]) == tuple(
        "ĠĊŃa"
    )
    assert set(BYTE_LETTERS.values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_bytes_of_a_vocabulary_of_bytes() -> None:
    vocabulary = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    vocabulary |= {"Ġa": 256, "è": vocabulary["è"], "èª": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("è", "ª")]))
    tokenizer.decoder = decoders.ByteLevel()
    known = words(tokenizer)
    assert [known.bytes_of(i) for i in (256, 257, 0xFF, 258, 259)] == [
        b" a",
        b"\xe8\xaa",
        b"\xff",
        "<eos é>".encode(),
        b"",
    ]
    assert [known.name(i) for i in (256, 257, 258, 259)] == [" a", "\\xe8\\xaa", "<eos é>", "token_id:259"]


def test_bytes_of_a_vocabulary_of_words() -> None:
    """As Llama 2's: a mark for the space, and tokens of single bytes for what has no word."""
    vocabulary = [
        ("<unk>", 0.0),
        *((f"<0x{b:02X}>", -9.0) for b in range(256)),
        ("▁", -1.0),
        ("▁語", -1.0),
        ("a", -1.0),
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    known = words(tokenizer)
    assert [known.bytes_of(i) for i in (1 + 0xE8, 257, 258, 259)] == [b"\xe8", b" ", " 語".encode(), b"a"]
    ids = tokenizer.encode("a é 語 🙂", add_special_tokens=False).ids
    assert b"".join(known.bytes_of(i) or b"" for i in ids) == "a é 語 🙂".encode()
    assert known.name(1 + 0xE8) == "\\xe8"


def test_bytes_of_pieces_of_words() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    known = words(tokenizer)
    assert known.bytes_of(1) == b"ab" and known.name(3) == "<eos é>"


def test_without_a_tokenizer() -> None:
    known = Words(replace(TINY, words=None))
    assert known.bytes_of(5) is None and known.name(5) == "token_id:5"


def test_a_text_that_cannot_fit_is_not_read() -> None:
    """Not even by the tokenizer: 15 MB of text would take gigabytes."""
    read = []

    def encode(text: str, **_: Any) -> tuple[int, ...]:
        read.append(len(text))
        return (0,)

    assert TINY.words is not None
    backend = TINY.words.backend
    fake: Any = SimpleNamespace(encode=encode, chat_template="x", chat=lambda *_, **__: "a" * 20_000, backend=backend)
    known = Words(replace(TINY, words=fake))
    most = TINY.config.max_positions * len("<|endoftext|>")
    assert known.encode("a" * most) == (0,) and read == [most]
    for ask in (lambda: known.encode("a" * (most + 1)), lambda: known.chat([], {})):
        with pytest.raises(
            BadRequest, match=r"characters exceeds the model's 1024 positions: the longest token has 13"
        ):
            ask()
    assert read == [most]
