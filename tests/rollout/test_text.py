"""Text while it is sampled: the same whatever the pieces, cut at the first stop, nothing shown that has to be taken back."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.text import TextStream, decode_all

LOST = "\N{REPLACEMENT CHARACTER}"


def utf8(ids: Sequence[int]) -> str:
    """A vocabulary of bytes, a character of which may take four tokens, and of a token 256 that is no text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


TEXTS = st.text(alphabet="ab é語🙂", max_size=20)
STOPS = st.lists(st.text(alphabet="ab é語🙂", min_size=1, max_size=4), max_size=3)


@given(TEXTS, STOPS)
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream, shown, ids = TextStream(utf8, stops), "", []
    for byte in text.encode():
        ids.append(byte)
        shown += stream.push(byte)
        so_far = bytes(ids).decode(errors="ignore")
        found = [s for s in stops if s in so_far]
        assert (stream.matched is None) == (not found)
        if found:
            at = min(so_far.find(s) for s in found)
            assert shown == so_far[:at] and so_far[at:].startswith(stream.matched)
            break
        assert so_far.startswith(shown), "a part of a stop was shown"
        held = max((n for s in stops for n in range(len(s)) if so_far.endswith(s[:n])), default=0)
        assert shown == so_far[: len(so_far) - held], "more was held back than may become a stop"
    shown += stream.finish()
    assert shown == decode_all(utf8, ids, stops)
    assert stream.matched is not None or shown == text
    kept = TextStream(utf8, stops, keep_stop=True)
    also = "".join([*map(kept.push, ids), kept.finish()])
    assert kept.matched == stream.matched and also == shown + (stream.matched or "")


PIECES = ["a", "b", "ab", "ba", "aab", "bb", "abab", ""]


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)
)
def test_a_stop_may_begin_and_end_inside_a_token(ids: list[int], stops: list[str]) -> None:
    """Of the stops that a token completes the earliest is the one."""

    def decode(ids: Sequence[int]) -> str:
        return "".join(PIECES[i] for i in ids)

    stream, shown = TextStream(decode, stops), ""
    for count, i in enumerate(ids, 1):
        shown += stream.push(i)
        text = decode(ids[:count])
        found = [(text.find(s), n) for n, s in enumerate(stops) if s in text]
        assert (stream.matched is None) == (not found)
        if found:
            at, n = min(found)
            assert (stream.matched, shown) == (stops[n], text[:at])
            return
    assert shown + stream.finish() == decode(ids)


@given(st.lists(st.sampled_from([*b"ab\xff\x80\xe8", *"語🙂".encode(), 256]), max_size=60))
def test_bytes_that_are_no_text_are_shown_too(ids: list[int]) -> None:
    """What is text among them is not lost. (How many replacement characters stand for the others depends on the pieces.)"""
    shown = decode_all(utf8, ids)
    assert shown.replace(LOST, "") == utf8(ids).replace(LOST, "")
    if LOST not in utf8(ids):
        assert shown == utf8(ids)


def test_a_character_is_shown_whole() -> None:
    stream = TextStream(utf8)
    assert [stream.push(byte) for byte in "a語b".encode()] == ["a", "", "", "語", "b"]


def test_a_token_is_decoded_after_the_one_before() -> None:
    """As where a tokenizer leaves out the space before the first word."""
    assert decode_all(lambda ids: " ".join("abc"[i] for i in ids), (0, 1, 2, 0)) == "a b c a"


def test_what_may_become_a_stop_is_held_back() -> None:
    stream = TextStream(utf8, ["</end>"])
    assert [stream.push(byte) for byte in b"x</e</end>"] == ["x", "", "", "", "</e", "", "", "", "", ""]
    assert stream.matched == "</end>" and stream.finish() == ""


@pytest.mark.parametrize("token", [ord("a"), 0x80, 0xE8, 256], ids=["text", "no text", "half a character", "special"])
def test_a_token_costs_the_same_however_long_the_text_is(token: int) -> None:
    """Counted, not timed: the tokens that are decoded for 5,000 of one kind, which no later one completes."""
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return utf8(ids)

    assert decode_all(counting, [token] * 5000) == utf8([token] * 5000)
    assert decoded < 5000 * 40


class Letters(str):
    """A stop text that counts how often a letter of it is looked at."""

    looked = 0

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        Letters.looked += 1
        return super().__getitem__(place)


def test_a_long_stop_costs_no_more_than_a_short_one() -> None:
    """Also one whose beginning is found again and again."""
    for length in (10, 1000):
        Letters.looked = 0
        stops = [Letters("a" * (length - 1) + last) for last in "bcdefgh"]
        stream = TextStream(utf8, stops)
        for _ in range(2000):
            stream.push(ord("a"))
        assert stream.matched is None and Letters.looked < 7 * (3 * 2000 + 4 * length)
        for letter in b"aab":
            stream.push(letter)
        assert stream.matched == "a" * (length - 1) + "b"
