"""Declares the keys of data: which source problems are of, and which of its fields."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rl.data.template import typed
from rl.section import Folder, Positive, Section, Text, found_at_home

Typed = Annotated[str, AfterValidator(typed)]
Name = Annotated[str, Field(pattern=r"^[\w-]+$")]


class ReasoningGymSection(Section):
    """Says which reasoning-gym dataset problems are drawn from."""

    kind: Literal["reasoning_gym"] = Field(
        description="problems of reasoning-gym; data=NAME chooses it, with its values"
    )
    task: str = Field(description="name of a reasoning-gym dataset")
    args: dict[str, Any] = Field(description="its parameters")
    pattern: str = Field(description="regular expression: keeps the questions it matches; its groups fill `prompt`")
    prompt: Typed = Field(description="template over the groups of `pattern`; a typed \\n is a line break")
    problems: Annotated[int, Field(gt=0, le=10**7)] = Field(
        description="problems to draw before the held-out ones are set apart"
    )


class DatasetSection(Section):
    """Says which data set problems are read from, and which of its fields. A field is a dotted path
    (reward_model.ground_truth, choices.0)."""

    kind: Literal["dataset"] = Field(description="rows of a data set; data=NAME chooses it, with its values")
    path: Folder = Field(
        description="a file (.jsonl, .json, .csv, .tsv, .parquet), a folder with train.* and test.*, a folder of `datasets` "
        "(save_to_disk), or a name on the hub (openai/gsm8k)"
    )
    subset: str | None = Field(description="configuration of a data set on the hub that has several (main)")
    split: Text = Field(description="what is trained on, where the data has splits")
    held_out: Annotated[Text, AfterValidator(found_at_home)] | None = Field(
        description="what is held out: a split, or a file; null: the split test or validation, else one problem in eight"
    )
    question: Text | None = Field(
        description="field of the question, a text or a list of messages; null: found by its name (prompt, question, ...)"
    )
    answer: Text | None = Field(
        description="field of the answer, a text or a number; null: found by its name (answer, label, ...), or none"
    )
    marker: Annotated[Typed, Field(min_length=1)] | None = Field(
        description="the result is what follows it in the answer and in a completion; null: what is boxed, else all of it"
    )
    prompt: Typed = Field(
        description="template over {question} and the other fields, of a text or of the last message; a typed \\n is a line "
        "break"
    )
    chat: bool = Field(description="a question that is a text is a user's message too; messages always are chat")
    system: str | None = Field(description="system prompt: chat, as is `chat=true`; it replaces that of the data")
    tools: Text | None = Field(description="field of the tools' JSON schemas; null: the field tools, if there is one")
    chat_template: Folder | None = Field(
        description="null: the model's own; plain: role and content, a line each; or a file of a Jinja template"
    )
    template_args: dict[str, Any] = Field(description="what the chat template is told besides (enable_thinking: false)")
    vocab_size: Annotated[int, Field(gt=0, le=2**20)] = Field(
        description="of the byte-level BPE that is trained where the model brings no tokenizer"
    )
    max_prompt_tokens: Positive = Field(description="longer prompts are left out; the run says how many")
    curriculum: Text | None = Field(
        description="a field with a number, or prompt_tokens: the first pass over the data goes from the least to the most"
    )


class NumberedSection(Section):
    """Says how many problems there are that an environment makes of their number alone."""

    kind: Literal["numbered"]
    prompt: Typed = Field(description="template over {number}; a typed \\n is a line break")
    problems: Annotated[int, Field(gt=0, le=10**7)] = Field(description="problems, of which one in eight is held out")


class MixtureSection(Section):
    """Says which sources are mixed, and how."""

    kind: Literal["mixture"] = Field(description="several sources; data=mixture chooses it")
    sources: dict[Name, Annotated[ReasoningGymSection | DatasetSection, Field(discriminator="kind")]] = Field(
        min_length=1,
        description="by names of yours, what `data` would say of each; `data: NAME` begins with configs/data/NAME.yaml, else "
        "with reasoning_gym (where there is a task) or dataset",
    )
    weights: dict[Name, Annotated[int, Field(gt=0, le=1000)]] = Field(
        description="of a source: how many of the sum(weights) next problems are of it; default 1"
    )
    vocab_size: Annotated[int, Field(gt=0, le=2**20)] = Field(
        description="of the byte-level BPE that is trained on all sources where the model brings no tokenizer"
    )


AnyData = ReasoningGymSection | DatasetSection | NumberedSection | MixtureSection
DATA: dict[str, type[Section]] = {
    "reasoning_gym": ReasoningGymSection,
    "dataset": DatasetSection,
    "numbered": NumberedSection,
    "mixture": MixtureSection,
}
"""The sections of `data`, by kind."""
