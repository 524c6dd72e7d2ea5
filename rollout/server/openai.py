"""`/v1/completions`, `/v1/chat/completions` and `/v1/models` as OpenAI's: the `openai` client works, streaming too.

`seed` is the sampling seed (42 where it is absent); `top_k`, `min_p`, `stop_token_ids` and `ignore_eos` are taken as well. What
would change the distribution and is not supported is refused, not ignored.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as Client

from rollout.sampling import Completion, Request, RequestError, SamplingParams, Token
from rollout.server.fields import BadRequest, Fields, is_integer
from rollout.server.native import as_ids, filters
from rollout.server.sample import Sample
from rollout.server.service import Call, Service, whole

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": ({},),
    "user": (),
    "metadata": (),
    "store": (),
    "service_tier": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
}
NEUTRAL_COMPLETIONS: dict[str, tuple[Any, ...]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
}
_LENGTH = 1 << 40


class Endpoint:
    """What the two endpoints share: a body into requests, events into chunks."""

    object: str
    chunk_object: str
    prefix: str

    def __init__(self, service: Service) -> None:
        self.service = service

    async def answer(self, body: Fields, client: Client) -> Any:
        """What to answer: a JSON value, or a Call with the events of a stream."""
        model = body.text("model", self.service.source.name)
        if model not in (self.service.source.name, "default"):
            raise BadRequest(f"model {model!r} is not served; served: {self.service.source.name!r}", 404)
        stream = body.boolean("stream")
        options = Fields(body.any("stream_options", {}), "stream_options")
        usage = options.boolean("include_usage")
        options.neutral({"include_obfuscation": ()})
        options.done()
        prompts, logprobs = await self.service.aside(self.prompts, body)
        requests = self.requests(body, prompts)
        call = self.service.call(requests, client)
        head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object if stream else self.object,
            "created": int(time.time()),
            "model": self.service.source.name,
            "system_fingerprint": f"samebit-weights-{self.service.engine.version}",
        }
        if stream:
            return call, self.events(call, head, logprobs, usage)
        completions = await call.completions()
        by_id = {r.id: r for r in requests}
        samples = [Sample(self.service.source, by_id[c.request_id]).whole(c) for c in completions]
        choices = [
            {"index": i, **self.choice(sample, logprobs), "finish_reason": c.finish_reason}
            for i, (c, sample) in enumerate(zip(completions, samples, strict=True))
        ]
        return {**head, "choices": choices, "usage": usage_of(requests, completions)}

    def prompts(self, body: Fields) -> tuple[list[tuple[int, ...]], bool]:
        """(prompts, whether log-probs are wanted)."""
        raise NotImplementedError

    def choice(self, sample: Sample, logprobs: bool) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str, sample: Sample, logprobs: bool) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self) -> dict[str, Any] | None:
        """What is said of a sample before its first token."""
        return None

    def most(self, body: Fields, prompt: tuple[int, ...]) -> int:
        raise NotImplementedError

    def requests(self, body: Fields, prompts: list[tuple[int, ...]]) -> list[Request]:
        stops = body.integers("stop_token_ids", 64)
        ends = () if body.boolean("ignore_eos") else self.service.source.end_ids
        made = {
            "temperature": body.number("temperature", 1.0),
            "seed": body.integer("seed", 42, 0, 2**63 - 1),
            "stop_ids": tuple(sorted({*stops, *ends})),
            "stop": body.texts("stop", 16),
            "n": body.integer("n", 1, 1, self.service.limits.samples),
            **filters(body),
        }
        lengths = [self.most(body, prompt) for prompt in prompts]
        body.neutral(NEUTRAL)
        body.done()
        try:
            return [
                Request(self.service.next_id(), prompt, SamplingParams(new, **made))
                for prompt, new in zip(prompts, lengths, strict=True)
            ]
        except RequestError as error:
            raise BadRequest(str(error)) from None

    async def events(self, call: Call, head: dict[str, Any], logprobs: bool, usage: bool) -> AsyncIterator[str]:
        samples: dict[tuple[int, int], Sample] = {}
        numbers: dict[tuple[int, int], int] = {}
        for request in call.requests:
            for i in range(request.sampling.n):
                numbers[request.id, i] = len(numbers)
                samples[request.id, i] = Sample(self.service.source, request)
        if usage:
            head = {**head, "usage": None}

        def chunk(number: int, fields: dict[str, Any], reason: str | None) -> str:
            choice = {"index": number, **fields, "finish_reason": reason}
            return json.dumps({**head, "choices": [choice]})

        if opening := self.opening():
            for number in numbers.values():
                yield chunk(number, opening, None)
        completions: list[Completion] = []
        async for event in call.events():
            key = event.request_id, event.sample
            sample = samples[key]
            if isinstance(event, Token):
                text, reason = sample.token(event), None
                if not text and not (logprobs and self.service.source.decode is None):
                    continue  # inside a character or a stop: its log-prob comes with what follows
            else:
                text, reason = sample.end(), str(event.finish_reason)
                completions.append(event)
            fields = self.delta(text, sample, logprobs)
            sample.told = len(sample.ids)
            yield chunk(numbers[key], fields, reason)
        if usage:
            yield json.dumps({**head, "choices": [], "usage": usage_of(list(call.requests), completions)})

    def texts(self, ids: list[int]) -> list[str]:
        decode = self.service.source.decode
        return [decode([i]) if decode else f"token_id:{i}" for i in ids]


class Completions(Endpoint):
    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def prompts(self, body: Fields) -> tuple[list[tuple[int, ...]], bool]:
        value = body.any("prompt")
        if not isinstance(value, (str, list)):
            raise BadRequest("prompt must be a string or a list of integers, or a list of such")
        many = isinstance(value, list) and bool(value) and not all(is_integer(v) for v in value)
        prompts = [as_ids(p, "prompt", self.service) for p in (value if many else [value])]
        if len(prompts) > self.service.limits.queue:
            raise BadRequest(f"prompt holds {len(prompts)} prompts; at most {self.service.limits.queue} are taken")
        logprobs = body.integer("logprobs", None, 0, 1)
        body.neutral(NEUTRAL_COMPLETIONS)
        return prompts, logprobs is not None

    def most(self, body: Fields, prompt: tuple[int, ...]) -> int:
        return int(body.integer("max_tokens", 16, 1, _LENGTH))

    def choice(self, sample: Sample, logprobs: bool) -> dict[str, Any]:
        return {"text": sample.shown, "logprobs": self.logprobs(sample) if logprobs else None}

    def delta(self, text: str, sample: Sample, logprobs: bool) -> dict[str, Any]:
        return {"text": text, "logprobs": self.logprobs(sample) if logprobs else None}

    def logprobs(self, sample: Sample) -> dict[str, Any]:
        return {
            "tokens": self.texts(sample.ids[sample.told :]),
            "token_logprobs": sample.logprobs[sample.told :],
            "top_logprobs": None,
            "text_offset": None,
        }


class Chat(Endpoint):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def prompts(self, body: Fields) -> tuple[list[tuple[int, ...]], bool]:
        messages = body.any("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of at least one message")
        plain = [self.message(m, i) for i, m in enumerate(messages)]
        words = self.service.source.words
        if words is None or not words.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions")
        extra = body.any("chat_template_kwargs", {})
        if not isinstance(extra, dict) or {"tokenize", "conversation", "chat_template"} & set(extra):
            raise BadRequest("chat_template_kwargs must be an object of the template's own arguments")
        try:
            text = words.chat(plain, **extra)
        except Exception as error:  # whatever a template raises for messages that it does not take
            raise BadRequest(
                f"the chat template refuses these messages: {' '.join(str(error).split())[:300]}"
            ) from None
        logprobs = body.boolean("logprobs")
        body.neutral(NEUTRAL_CHAT)
        return [words.encode(whole(text), add_special_tokens=False)], logprobs

    def message(self, value: Any, place: int) -> dict[str, str]:
        if not isinstance(value, dict) or not isinstance(value.get("role"), str):
            raise BadRequest(f"messages[{place}] must be an object with a role")
        content = value.get("content")
        if isinstance(content, list):
            texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
            whole_text = len(texts) == len(content) and all(isinstance(t, str) for t in texts)
            content = "".join(map(str, texts)) if whole_text else None
        if not isinstance(content, str):
            raise BadRequest(f"messages[{place}].content must be text")
        return {"role": value["role"], "content": content}

    def most(self, body: Fields, prompt: tuple[int, ...]) -> int:
        """All the room there is, unless told."""
        new = body.integer("max_completion_tokens", body.integer("max_tokens", None, 1, _LENGTH), 1, _LENGTH)
        pool = self.service.engine.pool
        room = min(self.service.source.config.max_positions, pool.pages * pool.page_size) - len(prompt)
        return int(new or max(room, 1))

    def choice(self, sample: Sample, logprobs: bool) -> dict[str, Any]:
        message = {"role": "assistant", "content": sample.shown, "refusal": None}
        return {"message": message, "logprobs": self.logprobs(sample) if logprobs else None}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, text: str, sample: Sample, logprobs: bool) -> dict[str, Any]:
        return {
            "delta": {"content": text} if text else {},
            "logprobs": self.logprobs(sample) if logprobs else None,
        }

    def logprobs(self, sample: Sample) -> dict[str, Any]:
        texts = self.texts(sample.ids[sample.told :])
        pairs = zip(texts, sample.logprobs[sample.told :], strict=True)
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in pairs
            ]
        }


def usage_of(requests: list[Request], completions: list[Completion]) -> dict[str, Any]:
    prompt, new = sum(len(r.prompt_ids) for r in requests), sum(len(c.token_ids) for c in completions)
    cached = {c.request_id: c.cached_tokens for c in reversed(completions) if c.sample == 0}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }
