"""What stands between two completions, as tokens: what the chat template writes of it all, and nothing twice."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.data import Problem
from rl.data.chat import PLAIN
from rl.data.tokenizer import byte_level_bpe, of_characters
from rl.environments.formats import mistral
from rl.environments.turns import ChatTurns, PlainTurns
from rl.errors import UserError
from rollout.tokenizer import Tokenizer

QWEN = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{{ eos_token }}
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}user:{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ eos_token }}
{% endif %}
{%- else %}{{ message.role }}:
{{ message.content }}{{ eos_token }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}assistant:
{% endif %}"""
"""As Qwen's: the answers of one turn stand together, and the end token is followed by a line break."""
MISTRAL = """{{- bos_token }}
{%- set said = namespace(count=0) %}
{%- for message in messages %}
{%- if message.role in ('user', 'assistant') and not message.tool_calls %}
{%- if (message.role == 'user') != (said.count % 2 == 0) %}{{ raise_exception('user and assistant must alternate') }}{% endif %}
{%- set said.count = said.count + 1 %}
{%- endif %}
{%- if message.role == 'user' %}
{%- if tools and message == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}
{{- '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif %}[INST] {{ message.content }}[/INST]
{%- elif message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{{ ']' if loop.last else ', ' }}
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'tool' %}
{%- if not message.tool_call_id or message.tool_call_id | length != 9 %}{{ raise_exception('an id of 9 letters') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %} {{ message.content }}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
"""As Mistral's: roles alternate but for calls and their answers, which name the call; the tools stand before the last question
only, and an answer begins with a space."""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TEXTS = ["user assistant tool_response add 1 2 3 what is it?", PLAIN, QWEN]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_bpe(TEXTS, 400, QWEN)


def chat(tokenizer: Tokenizer, template: str, **arguments: Any) -> ChatTurns:
    return ChatTurns(tokenizer, TOOLS, template, arguments)


def problem(tokenizer: Tokenizer, messages: list[dict[str, Any]] | None, prompt: str = "1+1=") -> Problem:
    return Problem("p", prompt, tokenizer.encode(prompt), "2", "2", None, messages)


WORDS = st.text(alphabet="ab1 \n{}\"'<é", max_size=12)


@pytest.mark.parametrize("template", [QWEN, PLAIN])
@settings(deadline=None)
@given(question=WORDS, rounds=st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), max_size=3))
def test_turns_are_the_template_of_all_of_it(
    tokenizer: Tokenizer, template: str, question: str, rounds: list[tuple[str, list[str]]]
) -> None:
    """Where the policy's own text is what the template would write: the text of both is one."""
    turns = chat(tokenizer, template)
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    ids = turns.prompt(problem(tokenizer, messages), "")
    for said, answers in rounds:
        told = [{"role": "tool", "name": "add", "content": text} for text in answers]
        messages += [{"role": "assistant", "content": said}, *told]
        assert tokenizer.end is not None
        ids += (*tokenizer.encode(said, add_special_tokens=False), tokenizer.end, *turns.answers(told))
    more = {"tools": TOOLS} if template == QWEN else {}
    assert tokenizer.decode(ids, special=True) == tokenizer.chat(messages, chat_template=template, **more)


def test_what_is_told_at_the_start_is_part_of_the_last_message(tokenizer: Tokenizer) -> None:
    turns = chat(tokenizer, QWEN)
    for messages in ([{"role": "user", "content": "one"}], None):
        text = tokenizer.decode(turns.prompt(problem(tokenizer, messages, "one"), ", two"), special=True)
        assert text.endswith("user:\none, two<eos>\nassistant:\n") and '"name": "add"' in text
    assert messages is None or messages == [{"role": "user", "content": "one"}]


def test_without_a_template_answers_are_lines() -> None:
    letters = of_characters(["0123456789+=\nab:"])
    turns = PlainTurns(letters)
    asked = problem(letters, None)
    assert turns.prompt(asked, "") == asked.prompt_ids
    assert letters.decode(turns.prompt(asked, "a:")) == "1+1=a:"
    assert letters.decode(turns.answers([{"content": "12"}, {"content": "b"}])) == "\n12\nb\n"


@pytest.mark.parametrize("begun", [True, False])
def test_a_thought_stands_before_an_answer(tokenizer: Tokenizer, begun: bool) -> None:
    """A template that writes a thought into every answer, begun by the prompt or not: the policy writes the rest of it."""
    template = (
        QWEN.replace(
            "{{ message.role }}:\n{{ message.content }}",
            "{{ message.role }}:\n{% if message.role == 'assistant' and '</think>' not in message.content %}"
            "<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
        )
        + "{% if add_generation_prompt and "
        + ("true" if begun else "false")
        + " %}<think>\n{% endif %}"
    )
    turns = chat(tokenizer, template)
    text = tokenizer.decode(turns.answers([{"role": "tool", "content": "3"}]), special=True)
    assert text.endswith("assistant:\n" + "<think>\n" * begun) and text.count("3") == 1


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (
            "{{ messages | length }} tools {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "prefix-preserv",
        ),
        (
            QWEN.replace("{{ message.content }}{{ eos_token }}", "{{ message.content | upper }}{{ eos_token }}"),
            "prefix",
        ),
        (QWEN.replace("{{ message.content }}{{ eos_token }}\n{% endif %}", "{{ message.content }};{% endif %}"), "';"),
        (QWEN.replace("if tools", "if functions").replace("tools", "functions"), "does not write any tools"),
        ("{{ raise_exception('only users') }} tools", "only users"),
        (
            QWEN.replace("{{ message.content }}{{ eos", "{{ message.content }}{{ loop.revindex }}{{ eos"),
            "prefix-preserv",
        ),
    ],
)
def test_a_template_that_cannot_carry_turns_is_refused(tokenizer: Tokenizer, template: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        chat(tokenizer, template)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_the_answers_of_mistrals_tools_name_their_calls() -> None:
    """What stands between two completions is what the template writes of a conversation of calls."""
    tokenizer = byte_level_bpe([*TEXTS, MISTRAL], 400, MISTRAL)
    end = tokenizer.decode([tokenizer.ends[0]], special=True)
    turns = chat(tokenizer, MISTRAL)
    told = [{"role": "tool", "name": "add", "content": str(i), "tool_call_id": f"{i:09d}"} for i in range(2)]
    calls = [{"id": f"{i:09d}", "type": "function", "function": {"name": "add", "arguments": {}}} for i in range(2)]
    asked = {"role": "user", "content": "what?"}
    prompt = turns.prompt(problem(tokenizer, [asked]), "")
    whole = tokenizer.chat(
        [asked, {"role": "assistant", "content": "", "tool_calls": calls}, *told],
        chat_template=MISTRAL,
        tools=TOOLS,
    )
    said = json.dumps([{"name": "add", "arguments": {}, "id": f"{i:09d}"} for i in range(2)])
    written = f"[TOOL_CALLS] {said}{end}"
    pieces = (*prompt, *tokenizer.encode(written, add_special_tokens=False), *turns.answers(told))
    assert tokenizer.decode(pieces, special=True) == whole
    (read, _) = mistral.calls(written.removesuffix(end), {"add": {}})
    assert read.id == "000000000" and not read.error
