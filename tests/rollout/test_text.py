"""Text while it is sampled: the same whatever the pieces, cut at the first stop, nothing shown that has to be taken back."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from rollout.text import TextStream, decode_all


def utf8(ids: Sequence[int]) -> str:
    """A vocabulary of bytes: a character may take four tokens."""
    return bytes(ids).decode("utf-8", errors="replace")


TEXTS = st.text(alphabet="ab é語🙂", max_size=20)
STOPS = st.lists(st.text(alphabet="ab é語🙂", min_size=1, max_size=4), max_size=3)


@given(TEXTS, STOPS)
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(utf8, stops), ""
    for i, byte in enumerate(text.encode()):
        stream.push(byte)
        shown += stream.take()
        so_far = text.encode()[: i + 1].decode(errors="ignore")
        found = [s for s in stops if s in so_far]
        assert (stream.matched is None) == (not found)
        if found:
            at = min(so_far.find(s) for s in found)
            assert stream.text == so_far[:at] and so_far[at:].startswith(stream.matched)
            break
        assert so_far.startswith(shown), "a part of a stop was shown"
    stream.finish()
    shown += stream.rest()
    assert shown == stream.text == decode_all(utf8, stream.ids, stops)
    assert stream.matched is not None or shown == text
    kept, also = TextStream(utf8, stops, keep_stop=True), ""
    for byte in stream.ids:
        kept.push(byte)
        also += kept.take()
    kept.finish()
    also += kept.rest()
    assert kept.matched == stream.matched and also == kept.text == shown + (stream.matched or "")


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_are_shown_too(data: bytes) -> None:
    stream, shown = TextStream(utf8), ""
    for byte in data:
        stream.push(byte)
        shown += stream.take()
    stream.finish()
    shown += stream.rest()
    assert shown == stream.text
    if data.decode(errors="ignore").encode() == data:
        assert shown == data.decode()


def test_a_character_is_shown_whole() -> None:
    stream = TextStream(utf8)
    seen = []
    for byte in "a語b".encode():
        stream.push(byte)
        seen.append(stream.take())
    assert seen == ["a", "", "", "語", "b"]


def test_a_token_is_decoded_after_the_one_before() -> None:
    """As where a tokenizer leaves out the space before the first word."""
    stream = TextStream(lambda ids: " ".join("abc"[i] for i in ids))
    for token in (0, 1, 2, 0):
        stream.push(token)
    assert stream.take() == "a b c a"


def test_what_may_become_a_stop_is_held_back() -> None:
    stream = TextStream(utf8, ["</end>"])
    seen = []
    for byte in b"x</e</end>":
        stream.push(byte)
        seen.append(stream.take())
    assert seen == ["x", "", "", "", "</e", "", "", "", "", ""]
    assert stream.matched == "</end>" and stream.text == "x</e"
