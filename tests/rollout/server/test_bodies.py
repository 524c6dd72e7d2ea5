"""Bodies that are made to be slow are refused before they are read as what they say."""

import json

import pytest

from rollout.server.bodies import MOST_PARTS, MOST_VALUES, BadRequest, CompletionsBody, GenerateBody, parse

KEYS = b"{" + b",".join(b'"k%d":1' % i for i in range(MOST_PARTS)) + b"}"


@pytest.mark.parametrize(
    "body",
    [
        KEYS,
        b'{"text":"a","sampling_params":' + KEYS + b"}",
        b'{"text":"a","sampling_params":{"logit_bias":' + KEYS + b"}}",
        b'{"input_ids":[' + b"[]," * MOST_PARTS + b"[]]}",
        b'{"text":["' + b'","' * MOST_PARTS + b'"]}',
        b'{"text":' + b'"\\\\" "' * MOST_PARTS + b"}",  # each ends after a backslash that is one
        b"{" * (MOST_PARTS + 1),
    ],
    ids=["keys", "parameters", "nested", "lists", "texts", "backslashes", "braces"],
)
def test_a_body_of_too_many_parts(body: bytes) -> None:
    with pytest.raises(BadRequest, match="more than 100,000 texts, lists and objects") as error:
        parse(GenerateBody, body)
    assert error.value.status == 413


def test_a_body_of_too_many_values() -> None:
    """Commas of a text are none."""
    with pytest.raises(BadRequest, match="more than 2,000,000 values"):
        parse(GenerateBody, b'{"input_ids":[' + b"1," * (MOST_VALUES + 1) + b"1]}")
    body = parse(GenerateBody, json.dumps({"text": "a," * (MOST_VALUES + 1)}).encode())
    assert isinstance(body.text, str) and len(body.text) == 2 * MOST_VALUES + 2


def test_a_text_may_hold_what_counts_elsewhere() -> None:
    text = '[{"' * MOST_PARTS
    assert parse(GenerateBody, json.dumps({"text": text}).encode()).text == text


@pytest.mark.parametrize("letter", [b'\\"', b"\\\\", b"a", b"\\"])
def test_a_text_without_an_end_is_read_once(letter: bytes) -> None:
    """A pattern that tries again at every quote would not come to an end in a day."""
    with pytest.raises(BadRequest, match=r"not JSON|more than"):
        parse(GenerateBody, b'{"text":"' + letter * 3_000_000)


def test_null_is_as_absent_and_whole_numbers_are_integers() -> None:
    body = {"prompt": "a", "max_tokens": 4.0, "stop": None, "logit_bias": None, "n": 2.0, "frequency_penalty": 0}
    read = parse(CompletionsBody, json.dumps(body).encode())
    assert (read.max_tokens, read.n, read.stop, read.seed) == (4, 2, [], None)
    with pytest.raises(BadRequest, match=r"n=2.5 must be a valid integer"):
        parse(CompletionsBody, b'{"prompt":"a","n":2.5}')
    with pytest.raises(BadRequest, match=r"frequency_penalty=false is not supported; it may only be 0.0 or absent"):
        parse(CompletionsBody, b'{"prompt":"a","frequency_penalty":false}')


def test_one_error_of_many_is_told() -> None:
    body = b'{"text":[' + b",".join([b"1"] * 50_000) + b"]}"
    with pytest.raises(BadRequest, match=r"^text must be a string, or a list of strings, not a list of 50000$|not 1$"):
        parse(GenerateBody, body)
