"""Declares the keys of environments."""

from typing import Any, Literal

from pydantic import Field

from rl.section import Positive, Seconds, Section, Text

Format = Literal["auto", "hermes", "qwen_coder", "mistral", "llama", "plain"]


class EnvironmentSection(Section):
    """Says how a problem becomes a conversation. All but `timeout` and `errors` is part of what makes a run the run it is."""

    name: Literal["single_turn", "tools", "verifiers"] = Field(
        description="single_turn: one prompt and one completion; tools: turns between the policy and an object of `factory`; "
        "verifiers: an environment of that package"
    )
    factory: Text | None = Field(
        description="of tools: module:Class or path/to/file.py:Class, called without arguments but `args` for each "
        "conversation; of verifiers: the environment's id, a module that is installed"
    )
    args: dict[str, Any] = Field(
        description="keyword arguments of the factory; of verifiers: fields of the environment's config"
    )
    max_turns: Positive = Field(description="most completions of a conversation; what the last one calls is not called")
    max_tokens: Positive = Field(
        description="most tokens of a conversation beside the problem's own prompt: the tools' descriptions, answers, and what "
        "is sampled"
    )
    format: Format = Field(
        description="how the model writes a call: auto is what the chat template says, and plain, name(arguments), where there "
        "is none"
    )
    timeout: Seconds = Field(description="seconds of one call of the environment")
    errors: Literal["fail", "drop"] = Field(
        description="what an environment does that crashes, takes too long, or raises in reset or get_reward: end the run, or "
        "leave its sample out"
    )
