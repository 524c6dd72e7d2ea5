"""How models write calls of tools, a file for each family: `calls` reads them in the text of a completion.

hermes.py       <tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3
qwen_coder.py   <tool_call><function=...><parameter=...>: Qwen3-Coder, Qwen3.5
mistral.py      [TOOL_CALLS] [{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}: Mistral
llama.py        {"name": ..., "parameters": {...}} as the whole text: Llama 3
plain.py        name(arguments) as the whole text: a model without a chat template
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl.environments.formats import hermes, llama, mistral, plain, qwen_coder
from rl.environments.formats.call import Call
from rl.errors import UserError

Read = Callable[[str, Mapping[str, Any]], list[Call]]
"""(text of a completion, the schema of each tool's parameters by its name) -> the calls in it, in their order."""
FORMATS: dict[str, Read] = {
    "hermes": hermes.calls,
    "qwen_coder": qwen_coder.calls,
    "mistral": mistral.calls,
    "llama": llama.calls,
    "plain": plain.calls,
}


def chosen(name: str, template: str | None) -> str:
    """Returns the format that environment.format names, or for auto the one that the chat template writes. UserError where it
    writes none that is known."""
    if name != "auto":
        return name
    if template is None:
        return "plain"
    marks = (("qwen_coder", "<function="), ("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("llama", "ipython"))
    found = next((family for family, mark in marks if mark in template), None)
    if found is None:
        raise UserError(
            f"environment.format=auto: the chat template shows no known format of tool calls: set environment.format to "
            f"{', '.join(FORMATS)}"
        )
    return found


def parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the schema of each tool's parameters, by its name."""
    return {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
