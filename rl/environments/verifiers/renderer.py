"""Writes turns as tokens for the package's client: as `rl/environments/turns.py` does, so that nothing is tokenised twice."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from renderers.base import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus
from renderers.configs import BaseRendererConfig
from renderers.default import DefaultRenderer

from kernels.weights.folder import ModelFolder
from rl.environments.formats import FORMATS, parameters
from rl.environments.turns import ChatTurns
from rollout.tokenizer import Tokenizer

_MARKS = ("<tool_call>", "[TOOL_CALLS]")  # where the calls of a text begin


class TurnsConfig(BaseRendererConfig):
    """Holds what the run knows of its model."""

    _internal_fields = frozenset({"folder", "template", "arguments", "format"})

    folder: str
    template: str
    arguments: dict[str, Any]
    format: str


class Renderer(DefaultRenderer):  # type: ignore[misc]
    """Renders a conversation by the run's template, and a further turn as the tokens that follow those that are there."""

    config_class = TurnsConfig
    supports_tools = True

    def __init__(self, tokenizer: Any, config: TurnsConfig) -> None:
        super().__init__(tokenizer)
        own = Tokenizer.of(ModelFolder(config.folder))
        assert own
        self._own, self._of = own, config

    def _apply(self, messages: Any, *, tools: Any = None, add_generation_prompt: bool = False) -> list[int]:
        arguments = {**self._of.arguments, "chat_template": self._of.template}
        if tools:
            arguments["tools"] = tools
        text = self._own.chat([_plain(m) for m in messages], add_generation_prompt=add_generation_prompt, **arguments)
        return list(self._own.encode(text, add_special_tokens=False))

    def get_stop_token_ids(self) -> list[int]:
        """Returns the tokens that end a completion."""
        return list(self._own.ends)

    def parse_response(self, token_ids: list[int], *, tools: Any = None, prompt_ids: Any = None) -> ParsedResponse:
        """Reads thoughts, text and calls."""
        ids = list(token_ids[:-1] if token_ids and token_ids[-1] in self._own.ends else token_ids)
        text = self._own.decode(ids, special=True)
        thought, closed, said = text.partition("</think>")
        content = said if closed else text
        calls = FORMATS[self._of.format](text, parameters(tools or ()))
        if calls:
            content = content[: min((at for mark in _MARKS if (at := content.find(mark)) >= 0), default=0)]
        thought = thought.removeprefix("<think>").strip()
        return ParsedResponse(
            content=content.strip(),
            reasoning_content=thought if closed and thought else None,
            tool_calls=[
                ParsedToolCall(
                    raw=text,
                    name=call.name or None,
                    arguments=dict(call.arguments),
                    status=ToolCallParseStatus.INVALID_JSON if call.error else ToolCallParseStatus.OK,
                )
                for call in calls
            ],
        )

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Any],
        *,
        tools: Any = None,
    ) -> RenderedTokens:
        """Returns all tokens so far, and what the template writes between the end of the completion and the next."""
        before = [*previous_prompt_ids, *previous_completion_ids]
        if not before or before[-1] not in self._own.ends:  # a limit ended it: its end is given
            assert self._own.end is not None
            before.append(self._own.end)
        turns = _turns(self._own, self._of.model_dump_json(), _Tools(tools or ()))
        after = list(turns.answers([_plain(m) for m in new_messages]))
        return RenderedTokens(
            token_ids=[*before, *after],
            message_indices=[-1] * len(before) + [len(new_messages) - 1] * len(after),
            message_roles=[m.get("role") or "" for m in new_messages],
        )


class _Tools(tuple[Any, ...]):
    """Holds tools as a key: schemas are dicts, which have no hash."""

    def __hash__(self) -> int:
        return hash(repr(tuple(self)))


@lru_cache(maxsize=64)
def _turns(tokenizer: Tokenizer, config: str, tools: Sequence[Any]) -> ChatTurns:
    of = TurnsConfig.model_validate_json(config)
    return ChatTurns(tokenizer, list(tools), of.template, of.arguments)


def _plain(message: Any) -> dict[str, Any]:
    """Returns a message whose content is a text."""
    plain = {name: value for name, value in dict(message).items() if value is not None}
    content = plain.get("content", "")
    if isinstance(content, list):
        content = "".join(str(block.get("text", "")) for block in content)
    return {**plain, "content": content}
