"""Writes what stands between two completions as tokens: by the model's chat template, or as plain text where there is none.

Nothing is tokenised twice. A prompt is written once; of every later turn only what follows the end of the completion, with the
beginning of the next: the tokens that the policy wrote stay between them as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rl.config import RunConfig
from rl.data import Problem
from rl.data.chat import PLAIN, check_undated, named_template
from rl.data.section import DatasetSection, MixtureSection
from rl.errors import UserError
from rollout.tokenizer import Tokenizer

Message = dict[str, Any]

_SAID = "samebit-turn"  # in the place of what the policy wrote
_ASKED: Message = {"role": "user", "content": "?"}
_THOUGHT = f"so\n</think>\n\n{_SAID}"
_SAYINGS = ((_SAID, _SAID), (f"<think>\n{_THOUGHT}", f"<think>\n{_THOUGHT}"), (f"<think>\n{_THOUGHT}", _THOUGHT))
"""(content of a message, what the policy wrote of it): without a thought, with one, and with one that the prompt began."""
_ID = "000000000"
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": _ID, "type": "function", "function": {"name": "tool", "arguments": {}}}],
}
"""What the policy wrote where a template takes the answers of tools after nothing but calls, as Mistral's."""


class Turns(Protocol):
    """Declares how turns become tokens."""

    template: str | None
    """The chat template; None where there is none, or where it knows no tools."""

    def prompt(self, problem: Problem, told: str) -> tuple[int, ...]:
        """Returns the tokens before the first completion. `told`: what the environment adds to the problem's prompt."""

    def answers(self, told: Sequence[Message]) -> tuple[int, ...]:
        """Returns the tokens between a completion, which its end token ended, and the next. `told`: the tools' messages."""


class PlainTurns:
    """Writes answers as lines: a line break, each answer, a line break."""

    template: str | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prompt(self, problem: Problem, told: str) -> tuple[int, ...]:
        """Returns the problem's own prompt, and what is told right after it."""
        return (*problem.prompt_ids, *(self._tokenizer.encode(told, add_special_tokens=False) if told else ()))

    def answers(self, told: Sequence[Message]) -> tuple[int, ...]:
        """Returns the answers, a line each."""
        text = "\n" + "".join(f"{message['content']}\n" for message in told)
        return self._tokenizer.encode(text, add_special_tokens=False)


class ChatTurns:
    """Writes turns as the chat template does."""

    def __init__(
        self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], template: str, arguments: Mapping[str, Any]
    ) -> None:
        """UserError where the template is not prefix-preserving: what it writes of a conversation does not begin with what it
        wrote of its beginning, token by token."""
        self.template: str | None = None if template == PLAIN else template
        self._tokenizer, self._arguments = tokenizer, {**arguments, "chat_template": template}
        if tools and self.template:
            self._arguments["tools"] = [dict(tool) for tool in tools]
            if "tools" not in template:
                raise UserError("environment.name=tools: the chat template does not write any tools")
        self._ends = [tokenizer.decode([end], special=True) for end in tokenizer.ends]
        self._first = self._written([_ASKED])
        refused: list[UserError] = []
        for content, self._said in _SAYINGS:
            self._saying: Message = {"role": "assistant", "content": content}
            try:
                self._check()
                return
            except UserError as error:
                refused.append(error)
        try:
            self._saying, self._said = _CALL, self._called()
            self._check()
        except UserError:
            raise refused[0] from None

    def _called(self) -> str:
        """Returns what the template writes for a call, up to the token that ends it. UserError where it writes none."""
        rest = self._written([_ASKED, _CALL, _answer("1")]).removeprefix(self._first)
        said = min((rest.partition(end)[0] for end in self._ends), key=len)
        if "tool" not in said:
            raise UserError("environment.name=tools: the chat template writes no calls")
        return said

    def prompt(self, problem: Problem, told: str) -> tuple[int, ...]:
        """Returns the problem's messages, what is told at the end of the last one, and the beginning of an answer."""
        messages = [dict(m) for m in problem.messages or [{"role": "user", "content": problem.prompt}]]
        if told:
            content = messages[-1]["content"]
            more = [*content, {"type": "text", "text": told}] if isinstance(content, list) else f"{content}{told}"
            messages[-1]["content"] = more
        return self._ids(self._written(messages))

    def answers(self, told: Sequence[Message]) -> tuple[int, ...]:
        """Returns what the template writes after the end token of a completion."""
        return self._ids(self._after(self._first, [_ASKED, self._saying, *told])[1])

    def _written(self, messages: list[Message]) -> str:
        try:
            return self._tokenizer.chat(messages, **self._arguments)
        except Exception as error:  # a template raises what it likes
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"environment.name=tools: the chat template cannot write a turn: {said}") from None

    def _after(self, before: str, messages: list[Message]) -> tuple[str, str]:
        """Returns the text of the token that ends the last completion, which stands after the text `before`, and what follows
        it. UserError where the template is not prefix-preserving."""
        text = self._written(messages)
        if not text.startswith(before + self._said):
            raise UserError(
                "environment.name=tools: the chat template is not prefix-preserving: it writes the beginning of a conversation "
                "otherwise once more follows; set data.chat_template to one that does not"
            )
        rest = text.removeprefix(before + self._said)
        end = next((end for end in self._ends if rest.startswith(end)), None)
        if end is None:
            raise UserError(
                f"environment.name=tools: the chat template goes on after an answer with {rest[:20]!r}, which is no token that "
                f"ends a completion ({', '.join(map(repr, self._ends))})"
            )
        return end, rest.removeprefix(end)

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _check(self) -> None:
        """Compares turns that are written one by one with the template's writing of all of them."""
        told = [_answer("1"), _answer("two words")]
        whole = [_ASKED, self._saying, *told, self._saying, told[0]]
        end, after = self._after(self._first, whole[:4])
        begun = f"{self._first}{self._said}{end}{after}"
        turns = [self._first, f"{self._said}{end}", after, *self._last(begun, whole)]
        if self._ids("".join(turns)) != tuple(i for text in turns for i in self._ids(text)):
            raise UserError(
                "environment.name=tools: the tokens of a conversation are not those of its turns: the tokenizer joins what the "
                "chat template writes across their bounds"
            )

    def _last(self, begun: str, whole: list[Message]) -> tuple[str, str]:
        end, after = self._after(begun, whole)
        return f"{self._said}{end}", after


def _answer(text: str) -> Message:
    return {"role": "tool", "name": "tool", "content": text, "tool_call_id": _ID}


def open_turns(config: RunConfig, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> Turns:
    """Opens the template that the data names, else the model's own, else plain text. UserError where sources name several."""
    data = config.data
    sources = data.sources.values() if isinstance(data, MixtureSection) else [data]
    sections = [section for section in sources if isinstance(section, DatasetSection)]
    named = {(named_template(s), repr(s.template_args)) for s in sections}
    if len(named) > 1:
        raise UserError(
            "environment.name=tools: the sources of data.sources have chat templates of their own: name one"
        )
    template = (named_template(sections[0]) if sections else None) or tokenizer.chat_template
    if not template:
        return PlainTurns(tokenizer)
    arguments = sections[0].template_args if sections else {}
    check_undated(str(template), arguments)
    return ChatTurns(tokenizer, tools, str(template), arguments)
