"""An environment of the package `verifiers`, for tests: it talks for three turns, and rewards what was said first."""

from typing import Any

import verifiers.v1 as vf
from openai import APIStatusError, AsyncOpenAI
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.runtimes import ProgramResult

__all__ = ["EchoHarness", "EchoTaskset"]


class EchoData(vf.TaskData):
    does: str = ""


class EchoTask(vf.Task[EchoData]):
    @vf.reward(weight=1.0)
    async def first(self, trace: Any) -> float:
        said = trace.assistant_messages[0].content or "" if trace.assistant_messages else ""
        return float(sum(map(ord, said)) % 7) / 7

    @vf.metric
    async def words(self, trace: Any) -> float:
        return float(len(trace.assistant_messages))


class EchoConfig(vf.TasksetConfig):
    tasks: int = 40


class EchoTaskset(vf.Taskset[EchoTask, EchoConfig]):
    def load(self) -> list[EchoTask]:
        does = {27: "raises", 28: "anew", 29: "silent"}  # these do wrong
        return [EchoTask(EchoData(idx=i, prompt=f"task {i}", does=does.get(i, ""))) for i in range(self.config.tasks)]


class EchoHarness(vf.Harness[HarnessConfig]):
    """Says back what the policy said, twice."""

    NEEDS_CONTAINER = False
    EXECUTES_CODE = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> ProgramResult:
        messages: list[Any] = [{"role": "user", "content": data.prompt}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            for turn in range(3):
                if turn == 1 and data.does == "raises":
                    raise RuntimeError("no board")
                if turn == 1 and data.does == "anew":
                    messages = [{"role": "user", "content": "again"}]
                if data.does == "silent":
                    return ProgramResult(0, "", "")
                try:
                    answer = await client.chat.completions.create(model=ctx.model, messages=messages)
                except APIStatusError:
                    break
                said = answer.choices[0].message
                messages += [
                    said.model_dump(exclude_none=True),
                    {"role": "user", "content": f"you said {said.content!r}"},
                ]
        return ProgramResult(0, "", "")
