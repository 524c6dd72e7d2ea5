"""An agent for the package `verifiers` that talks in the environment's own process: a chat with the tools of the task.

The package's own agents for that (`null`, `bash`) are programs that `uv` installs anew, from an index.
"""

import json
from contextlib import AsyncExitStack
from typing import Any

from openai import APIStatusError, AsyncOpenAI
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult

__all__ = ["ChatHarness"]

_TOOL_SECONDS = 600.0


class ChatHarness(Harness[HarnessConfig]):
    """Sends the conversation to the policy until it calls no tool, or until a limit ends it."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> ProgramResult:
        """Returns when the conversation has ended."""
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        elif prompt:
            messages += [message_to_wire(message) for message in prompt]
        specs = {"mcpServers": {n: {"url": u, "timeout": self.config.tool_timeout} for n, u in mcp_urls.items()}}
        async with AsyncExitStack() as stack:
            tools, dispatch, servers = await connect_mcp(specs, stack) if mcp_urls else ([], {}, {})
            client = await stack.enter_async_context(
                AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=None, max_retries=0)
            )
            while True:
                try:
                    asked = {"tools": tools} if tools else {}
                    answer = await client.chat.completions.create(model=ctx.model, messages=messages, **asked)
                except APIStatusError as error:
                    if error.status_code == 400:  # a limit of the run, or the task's own end: no failure
                        break
                    raise
                message = answer.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                if not message.tool_calls:
                    break
                for call in message.tool_calls:
                    content = await _called(call.function, dispatch, servers)
                    messages.append(
                        {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": content}
                    )
        return ProgramResult(0, "", "")


async def _called(function: Any, dispatch: dict[str, Any], servers: dict[str, Any]) -> Any:
    """Returns what a tool answers; its failure is the policy's to read."""
    if function.name not in dispatch:
        return json.dumps({"error": f"no tool {function.name!r}; there are: {', '.join(dispatch)}"})
    try:
        return await call_mcp(servers, dispatch, function.name, json.loads(function.arguments or "{}"))
    except Exception as error:
        return json.dumps({"error": str(error) or type(error).__name__})
