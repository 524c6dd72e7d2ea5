"""What is read as a call in what models write."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.environments.formats import FORMATS, chosen
from rl.environments.formats.call import Call
from rl.errors import UserError

TOOLS: dict[str, Any] = {
    "add": {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    "say": {"properties": {"text": {"type": "string"}}},
    "now": {"properties": {}},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def read(family: str, text: str) -> list[Call]:
    return FORMATS[family](text, TOOLS)


@settings(deadline=None)
@given(
    a=VALUES,
    b=VALUES,
    before=st.sampled_from(["", "So.\n", "<think>\n<tool_call>no\n</think>\n", "<tool_call>no\n</think>\n"]),
)
def test_what_a_family_writes_is_read(a: Any, b: Any, before: str) -> None:
    arguments = {"a": a, "b": b}
    said = json.dumps({"name": "add", "arguments": arguments})
    expected = Call("add", arguments)
    assert read("hermes", f"{before}<tool_call>\n{said}\n</tool_call>") == [expected]
    assert read("hermes", f"{before}<tool_call>{said}</tool_call>\n<tool_call>\n{said}</tool_call>") == [expected] * 2
    assert read("llama", json.dumps({"name": "add", "parameters": arguments})) == [expected]
    assert read("llama", "<|python_tag|>" + said) == [expected]
    listed = json.dumps([{"name": "add", "arguments": arguments, "id": "abc12DEF9"}] * 2)
    one = Call("add", arguments, id="abc12DEF9")
    assert read("mistral", f"{before}[TOOL_CALLS] {listed}") == [one, one]
    assert read("mistral", f"{before}[TOOL_CALLS]{said}") == [Call("add", arguments, id="000000000")]
    later = f"[TOOL_CALLS]add[CALL_ID]abc12DEF9[ARGS]{json.dumps(arguments)}"
    numbered = Call("add", arguments, id="000000001")
    if "[TOOL_CALLS]" not in later[12:] and "[ARGS]" not in later[45:]:  # in a text of the arguments
        assert read("mistral", f"{before}{later}[TOOL_CALLS]add[ARGS]{json.dumps(arguments)}") == [one, numbered]
    assert read("plain", f"add({json.dumps(a)}, {json.dumps(b)})") == [expected]


@settings(deadline=None)
@given(a=st.integers(), text=st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_values_of_qwen_coder_are_what_the_schema_says(a: int, text: str) -> None:
    def call(name: str, **arguments: Any) -> str:
        inside = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
        return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"

    assert read("qwen_coder", call("add", a=a, b="x")) == [Call("add", {"a": a, "b": "x"})]
    if "<" not in text:
        assert read("qwen_coder", "So: " + call("say", text=text)) == [Call("say", {"text": text})]
    assert read("qwen_coder", call("now")) == [Call("now")]


@pytest.mark.parametrize(
    ("family", "text", "part"),
    [
        ("hermes", '<tool_call>{"name": "add"', "not closed"),
        ("hermes", "<tool_call>add(1, 2)</tool_call>", "no JSON"),
        ("hermes", "<tool_call>[]</tool_call>", "holds {"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "no JSON"),
        (
            "hermes",
            '<tool_call>{"name": "sub", "arguments": {}}</tool_call>',
            "no tool 'sub'; there are: add, say, now",
        ),
        ("hermes", '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', "no tool"),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "no object"),
        ("qwen_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1", "a call is"),
        ("qwen_coder", "<tool_call><function=sub></function></tool_call>", "no tool 'sub'"),
        ("llama", '{"name": "sub", "parameters": {}}', "no tool 'sub'"),
        ("mistral", '[TOOL_CALLS] [{"name": "sub", "arguments": {}}]', "no tool 'sub'"),
        ("mistral", '[TOOL_CALLS] [{"name": "add"', "no JSON"),
        ("mistral", '[TOOL_CALLS] ["add"]', "is followed by"),
        ("mistral", "[TOOL_CALLS]add[ARGS]{", "no JSON"),
        ("mistral", "[TOOL_CALLS][ARGS]{}", "a call is"),
        ("plain", "add(1; 2)", "no JSON"),
        ("plain", "add(1, 2, 3)", "takes 2"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(family: str, text: str, part: str) -> None:
    (call,) = read(family, text)
    assert part in call.error and "\n" not in call.error


@pytest.mark.parametrize(
    "text", ["", "4", "add", "f(x)", "{", '{"name": "add"}', "I would add(1, 2).", "<think>add(1,2)"]
)
def test_a_text_is_no_call(text: str) -> None:
    assert not any(read(family, text) for family in FORMATS)


@settings(deadline=None)
@given(st.text(alphabet="<>{}[]()/=\"',: \nabtolcnmeu_0", max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    for family in FORMATS:
        for start in ("", "<tool_call>", "<tool_call><function=", "[TOOL_CALLS]", "[TOOL_CALLS]add[ARGS]", "{", "add("):
            assert all(call.error or call.name in TOOLS for call in read(family, start + text))


def test_the_family_is_the_templates() -> None:
    assert chosen("auto", None) == "plain"
    assert chosen("auto", "{{ '<tool_call>' }}") == "hermes"
    assert chosen("auto", "{{ '<tool_call><function=' }}") == "qwen_coder"
    assert chosen("auto", "{% if role == 'ipython' %}") == "llama"
    assert chosen("auto", "{{ '[TOOL_CALLS] [' }}") == "mistral"
    assert chosen("llama", "{{ '<tool_call>' }}") == "llama"
    with pytest.raises(UserError, match="hermes, qwen_coder, mistral, llama, plain"):
        chosen("auto", "{{ messages }}")
