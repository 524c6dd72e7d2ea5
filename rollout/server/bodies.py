"""What a request may say: its body as a pydantic model, refused with one line that says why.

Null is as absent. What other servers have and this one has not may be sent at the value that changes nothing; anything else is
refused, not ignored. The ranges of sampling parameters are `rollout.sampling`'s.
"""

import re
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, to_json
from typing_extensions import TypedDict

from rollout.sampling import RequestError, SamplingParams

MOST_PARTS, MOST_VALUES = 100_000, 2_000_000
"""Texts, lists and objects in one body, and values of any kind. No other thread runs while one is parsed, which is to take less
than half a second."""

PROMPT = "a string or a list of integers, or a list of such"

MOST_STOPS, LONGEST_STOP, MOST_TOP = 16, 1024, 20

_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_PART = re.compile(_TEXT + rb"|[\[{]", re.DOTALL)

Model = TypeVar("Model", bound="Body")


class BadRequest(ValueError):
    """Refuses a request: it is answered with `status`, and with the message as the reason."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse(model: type[Model], body: bytes) -> Model:
    """Reads a body of JSON as `model`; BadRequest, in one line, for what it does not take or is too large."""
    if next(islice(_PART.finditer(body), MOST_PARTS, None), None):
        raise BadRequest(f"the body holds more than {MOST_PARTS:,} texts, lists and objects", 413)
    if body.count(b",") > MOST_VALUES and re.sub(_TEXT, b"", body, flags=re.DOTALL).count(b",") > MOST_VALUES:
        raise BadRequest(f"the body holds more than {MOST_VALUES:,} values", 413)
    try:
        return model.model_validate_json(body)
    except ValidationError as errors:
        raise BadRequest(_line(model, errors)) from None


def _line(model: type["Body"], errors: ValidationError) -> str:
    """The first of them, in one line."""
    error: Any = errors.errors(include_url=False)[0]
    kind, place, message = error["type"], error["loc"], error["msg"]
    if kind == "json_invalid":
        return message.replace("Invalid JSON", "the body is not JSON")
    if kind == "named":
        return message
    if not place:
        return "the body must be a JSON object"
    field = model.model_fields.get(place[0])
    if field is not None and field.description:  # one of several types, each of which has failed
        return f"{place[0]} must be {field.description}, not {show(error['input'])}"
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if kind == "missing":
        return f"{path} is missing"
    if not message.startswith("Input should"):
        return f"{path}: {message}"
    return f"{path}={show(error['input'])}{message.replace('Input should', ' must', 1)}"


def show(value: Any) -> str:
    """Formats a value of a body for a message, in at most 60 characters."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = to_json(value if not isinstance(value, str) else value[:60]).decode()
    return text if len(text) <= 60 else text[:57] + "..."


class Only:
    """Allows, in an annotation, only the one value that changes nothing."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"const": self.value}

    def _check(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        if value == self.value and isinstance(value, bool) == isinstance(self.value, bool):
            return value
        allowed = to_json(self.value).decode()
        raise _named(f"{info.field_name}={show(value)} is not supported; it may only be {allowed} or absent")


def _named(message: str) -> PydanticCustomError:
    return PydanticCustomError("named", "{line}", {"line": message})


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Nothing = Annotated[Any, Only(0.0)]
One = Annotated[Any, Only(1.0)]
Unset = Annotated[Any, Only({})]
Empty = Annotated[Any, Only([])]
Blank = Annotated[Any, Only("")]
No = Annotated[Any, Only(False)]
Whole = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_whole, json_schema_input_type=int)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole, json_schema_input_type=int)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Many = Annotated[list[str], Field(fail_fast=True)]
Batch = Annotated[list[Ids], Field(fail_fast=True)]
Mixed = Annotated[list[str | Ids], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
Stops = Annotated[
    list[Stop],
    Field(fail_fast=True, max_length=MOST_STOPS),
    BeforeValidator(_listed, json_schema_input_type=Stop | list[Stop]),
]
StopIds = Annotated[list[int], Field(fail_fast=True, max_length=64)]
Bools = Annotated[list[bool], Field(fail_fast=True), BeforeValidator(_listed, json_schema_input_type=bool | list[bool])]
Ints = Annotated[list[int], Field(fail_fast=True), BeforeValidator(_listed, json_schema_input_type=int | list[int])]
Names = Annotated[list[str], Field(fail_fast=True), BeforeValidator(_listed, json_schema_input_type=str | list[str])]


class Body(BaseModel):
    """Refuses unknown fields and takes null as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    where: ClassVar[str] = "the body"

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Without what is null; one line, not one each, for what is not known."""
        if not isinstance(value, dict):
            raise _named(f"{cls.where} must be a JSON object")
        given = {k: v for k, v in value.items() if v is not None}
        if cls.model_config["extra"] == "forbid" and (unknown := given.keys() - cls.model_fields.keys()):
            fields = ", ".join(sorted(cls.model_fields))
            raise _named(f"{cls.where} has an unknown field {show(min(unknown))}; fields: {fields}")
        return given


class Filters(Body):
    """Holds the filters of a sampler, and the ends of a text; the same names for all clients."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Whole = -1  # as 0: no limit
    min_p: float = 0.0
    n: Whole = 1
    stop: Stops = []
    stop_token_ids: StopIds = []
    ignore_eos: bool = False
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    repetition_penalty: One = None
    logit_bias: Unset = None

    def sampling(self, new: int, seed: int, end_ids: Sequence[int], most: int) -> SamplingParams:
        """Makes the sampling parameters. `most`: samples of one request."""
        if not 1 <= self.n <= most:
            raise BadRequest(f"n={self.n} must be in 1 .. {most}")
        if self.top_k < -1:
            raise BadRequest(f"top_k={self.top_k} must be -1, 0 (no limit) or a number of tokens")
        ends = tuple(sorted({*self.stop_token_ids, *(() if self.ignore_eos else end_ids)}))
        filters = max(self.top_k, 0), self.top_p, self.min_p
        try:
            return SamplingParams(new, self.temperature, seed, ends, tuple(filter(None, self.stop)), self.n, *filters)
        except RequestError as error:
            raise BadRequest(str(error)) from None


class NativeSampling(Filters):
    """Holds `sampling_params` of `/generate`, as SGLang's."""

    where: ClassVar[str] = "sampling_params"
    max_new_tokens: Count = 128  # 0: the prompt is scored
    sampling_seed: Seed = 42
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    min_new_tokens: Nothing = None
    json_schema: Blank = None
    regex: Blank = None
    ebnf: Blank = None
    structural_tag: Blank = None
    stop_regex: Empty = None
    custom_params: Unset = None
    spaces_between_special_tokens: Any = None
    stream_interval: Any = None


class GenerateBody(Body):
    """Asks `/generate`, as SGLang's: `text` or `input_ids`, one or a list; other lists have one entry for each."""

    text: str | Many | None = Field(None, union_mode="left_to_right", description="a string, or a list of strings")
    input_ids: Ids | Batch | None = Field(
        None, union_mode="left_to_right", description="a list of integers, or a list of such"
    )
    sampling_params: Annotated[
        list[NativeSampling],
        Field(fail_fast=True),
        BeforeValidator(_listed, json_schema_input_type=NativeSampling | list[NativeSampling]),
    ] = [NativeSampling()]
    return_logprob: Bools = [False]
    logprob_start_len: Ints = [-1]  # of the prompt's; -1: none
    top_logprobs_num: Ints = [0]
    rid: Names | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    token_ids_logprob: Empty = None
    return_hidden_states: No = None
    lora_path: Blank = None
    image_data: Empty = None
    session_params: Unset = None
    custom_logit_processor: Blank = None
    log_metrics: Any = None
    priority: Any = None
    model: Any = None


class StreamOptions(Body):
    """Says what a stream tells beside its text."""

    where: ClassVar[str] = "stream_options"
    include_usage: bool = False
    include_obfuscation: Any = None


class OpenAIBody(Filters):
    """Holds what `/v1/completions` and `/v1/chat/completions` share, as OpenAI's; top_k, min_p, stop_token_ids and ignore_eos
    too."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Seed | None = None  # one that is absent is drawn, and is in the answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class CompletionsBody(OpenAIBody):
    """Asks for completions of one prompt or many, as OpenAI's `/v1/completions`."""

    prompt: str | Ids | Mixed = Field(union_mode="left_to_right", description=PROMPT)
    max_tokens: Count = 16  # 0: the prompt is scored
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool = False
    best_of: One = None
    suffix: Blank = None


class TextPart(TypedDict):
    """Holds one part, a text, of a message."""

    type: Literal["text"]
    text: str


def _joined(value: Any) -> Any:
    """The text of a message that comes in parts."""
    parts = value if isinstance(value, list) else []
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    whole = bool(parts) and len(texts) == len(parts) and all(isinstance(t, str) for t in texts)
    return "".join(map(str, texts)) if whole else value


class Message(Body):
    """Holds one message of a conversation; what else it holds is the chat template's."""

    model_config = ConfigDict(extra="allow")
    where: ClassVar[str] = "a message"
    role: str
    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class ChatBody(OpenAIBody):
    """Asks for the answer to a conversation, as OpenAI's `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: Count | None = None  # absent: all the room there is
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    chat_template_kwargs: dict[str, Any] = {}
    response_format: Annotated[Any, Only({"type": "text"})] = None
    tools: Empty = None
    tool_choice: Annotated[Any, Only("none")] = None
    functions: Empty = None
    modalities: Annotated[Any, Only(["text"])] = None
    parallel_tool_calls: Any = None


class TokensSampling(Filters):
    """Holds `sampling_params` of `/inference/v1/generate`, as vLLM's."""

    model_config = ConfigDict(extra="ignore")
    where: ClassVar[str] = "sampling_params"
    max_tokens: Count = 16
    seed: Seed | None = None
    logprobs: int = Field(0, ge=0, le=MOST_TOP)


class TokensBody(Body):
    """Asks `/inference/v1/generate`, as vLLM's: ids in, ids out. What is not known is for who trains, and changes nothing
    here."""

    model_config = ConfigDict(extra="ignore")
    token_ids: Ids
    model: str | None = None
    sampling_params: TokensSampling = Field(default_factory=lambda: TokensSampling.model_validate({}))
    stream: No = None


class AbortBody(Body):
    """Ends the request `rid`, or all of them."""

    rid: str = ""
    abort_all: bool = False


class MemoryBody(Body):
    """Names the kinds of memory by tags; without tags: all of them."""

    tags: list[Literal["kv_cache", "weights"]] = ["kv_cache", "weights"]


class EmptyBody(Body):
    """Asks for nothing."""
