"""Writes a conversation as the text of a prompt, by a chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.data.fields import Message
from rl.data.section import DatasetSection
from rl.errors import UserError
from rollout.tokenizer import Tokenizer

PLAIN = """{% for message in messages %}{{ message['role'] }}:
{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '' }}
{% endfor %}{% if add_generation_prompt %}assistant:
{% endif %}"""
"""The template that data.chat_template=plain names: for a model that brings none."""


def named_template(section: DatasetSection) -> str | None:
    """Returns the Jinja template that the user names; None where it shall be the model's own."""
    if section.chat_template in (None, "plain"):
        return section.chat_template and PLAIN
    try:
        return Path(section.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"data.chat_template={section.chat_template}: cannot be read: {said} (plain, or a file)"
        ) from None


def check_undated(template: str, arguments: Mapping[str, Any]) -> None:
    """Raises UserError for a template that writes the day of the run."""
    if "strftime_now" in template and "date_string" not in arguments:
        raise UserError(
            "the chat template writes today's date, and the run would be another one tomorrow: set "
            "'data.template_args={date_string: \"26 Jul 2024\"}', or data.chat_template to a file without it"
        )


class Chat:
    """Makes prompts of messages, up to where the answer begins."""

    def __init__(self, section: DatasetSection, tokenizer: Tokenizer) -> None:
        """UserError where there is no template, or one that writes the day of the run."""
        self._tokenizer, self._arguments = tokenizer, dict(section.template_args)
        if (named := named_template(section)) is not None:
            self._arguments["chat_template"] = named
        template = named or tokenizer.chat_template
        if not template:
            raise UserError(
                "the data's questions are messages, and the model has no chat template: set data.chat_template=plain (role, "
                "content, a line each) or to a file of a Jinja template, or model.path to a model that has one"
            )
        self._text = str(template)
        check_undated(self._text, section.template_args)

    def __call__(self, messages: list[Message], tools: list[Any], at: str) -> str:
        """Returns the text; `at`: where the messages stand. UserError where the template cannot write them."""
        more = dict(self._arguments)
        if tools:
            if "tools" not in self._text:
                raise UserError(f"{at}: the problem has tools, and the chat template does not write any")
            more["tools"] = tools
        try:
            return self._tokenizer.chat(messages, **more)
        except Exception as error:  # a template raises what it likes
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{at}: the chat template cannot write these messages: {said}") from None
