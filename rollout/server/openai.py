"""`/v1/completions` and `/v1/chat/completions` as OpenAI's: the `openai` client works, streaming too.

A seed that is absent is drawn, for each prompt another, and stands in the answer: with it the same answer comes again. `echo`
shows the prompt, with `logprobs` its log-probs too, and with `max_tokens` 0 nothing else: a text is scored. Log-probs are of
the temperature asked for. The most likely tokens are of the distribution drawn from, so fewer where a filter keeps fewer.
"""

import secrets
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic_core import to_json

from rollout.sampling import Completion, Request, Token, Top
from rollout.server.bodies import BadRequest, ChatBody, CompletionsBody, OpenAIBody
from rollout.server.sample import Sample
from rollout.server.service import Service
from rollout.text import Decode, TextStream, decode_all

OneBody = TypeVar("OneBody", bound=OpenAIBody)


@dataclass(frozen=True)
class Prompt:
    """Holds the ids of a prompt and its text."""

    ids: tuple[int, ...]
    given: str | None = None  # as it came, if as text
    decode: Decode | None = None

    @cached_property
    def text(self) -> str:
        """Returns the text, decoded of ids that are of the vocabulary, which is not said of what came."""
        return self.given if self.given is not None else decode_all(self.decode, self.ids) if self.decode else ""


def drawn_seed() -> int:
    """Draws a seed that a client's JSON keeps, whose numbers may be float64."""
    return secrets.randbelow(2**53)


def check_model(asked: str | None, service: Service) -> None:
    """Refuses the name of a model that is not served, with 404."""
    if asked not in (None, service.source.name, "default"):
        raise BadRequest(f"model {asked!r} is not served; served: {service.source.name!r}", 404)


class Endpoint(Generic[OneBody]):
    """Holds what the two have in common (`service.Answer`): a body into requests, events into chunks."""

    object: str
    chunk_object: str
    prefix: str

    def __init__(self, service: Service, body: OneBody) -> None:
        check_model(body.model, service)
        self.service, self.body, self.stream = service, body, body.stream
        self.prompts: list[Prompt] = []
        self.requests: list[Request] = []
        for prompt in self.read():
            self.prompts.append(prompt)
            self.requests.append(self._request(prompt))
        name = f"{self.prefix}-{uuid.uuid4().hex}"
        self.names = [name] * len(self.requests)
        self.head: dict[str, Any] = {
            "id": name,
            "object": self.chunk_object if body.stream else self.object,
            "created": int(time.time()),
            "model": service.source.name,
            "system_fingerprint": f"samebit-weights-{service.engine.version}",
            "seed": self.requests[0].sampling.seed,
        }
        if body.stream and body.stream_options.include_usage:
            self.head["usage"] = None
        self._samples = [Sample(service.source, r) for r in self.requests for _ in range(r.sampling.n)]
        self._prompt_of = [i for i, r in enumerate(self.requests) for _ in range(r.sampling.n)]
        keys = [(r.id, i) for r in self.requests for i in range(r.sampling.n)]
        self._numbers = {key: number for number, key in enumerate(keys)}

    def read(self) -> Iterator[Prompt]:
        """Yields the prompts one by one, so that what cannot be served ends it."""
        raise NotImplementedError

    def most(self, prompt: Prompt) -> int:
        """Returns the most new tokens of one sample."""
        raise NotImplementedError

    def extras(self) -> tuple[int | None, int]:
        """Returns `score_from` and `top` of the requests."""
        raise NotImplementedError

    def shown(self, sample: Sample, prompt: Prompt) -> dict[str, Any]:
        """Returns what a choice holds of a whole sample."""
        raise NotImplementedError

    def added(self, text: str, sample: Sample, tokens: slice) -> dict[str, Any]:
        """Returns the same of what a stream adds."""
        raise NotImplementedError

    def before(self, prompt: Prompt) -> dict[str, Any] | None:
        """Returns the same of what it begins with."""
        raise NotImplementedError

    def _request(self, prompt: Prompt) -> Request:
        body, service = self.body, self.service
        seed = drawn_seed() if body.seed is None else body.seed
        sampling = body.sampling(self.most(prompt), seed, service.source.end_ids, service.limits.samples)
        return service.request(prompt.ids, sampling, *self.extras())

    def whole(self, completions: Sequence[Completion], seconds: float) -> bytes:
        """Returns the JSON of all choices and of the tokens used."""
        head = to_json({**self.head, "usage": self._usage(completions)})
        choices = []
        for number, (sample, c) in enumerate(zip(self._samples, completions, strict=True)):
            fields = self.shown(sample.whole(c), self.prompts[self._prompt_of[number]])
            choices.append(to_json(self._choice(number, fields, c.finish_reason)))
        return head[:-1] + b',"choices":[' + b",".join(choices) + b"]}"

    def opening(self) -> list[str]:
        """Returns the events that come before the first token: a role, or an echo."""
        out = []
        for number, prompt in enumerate(self._prompt_of):
            if (fields := self.before(self.prompts[prompt])) is not None:
                out.append(self._chunk(number, fields, None))
        return out

    def chunks(self, events: Sequence[Token | Completion], seconds: float) -> list[str]:
        """Returns one event for each sample that has text to show or has ended."""
        numbers = [self._numbers[event.request_id, event.sample] for event in events]
        for number, event in zip(numbers, events, strict=True):
            self._samples[number].hear(event)
        out = []
        for number in dict.fromkeys(numbers):
            sample = self._samples[number]
            if not sample.done and not sample.fresh:
                continue  # inside a character or a stop: its log-prob comes with what follows
            reason = sample.done.finish_reason if sample.done else None
            text, tokens = sample.news()
            out.append(self._chunk(number, self.added(text, sample, tokens), reason))
        return out

    def closing(self) -> list[str]:
        """Returns the event of the tokens used, where it is asked for."""
        if not self.body.stream_options.include_usage:
            return []
        done = [sample.done for sample in self._samples if sample.done]
        return [to_json({**self.head, "choices": [], "usage": self._usage(done)}).decode()]

    def _choice(self, number: int, fields: dict[str, Any], reason: str | None) -> dict[str, Any]:
        seed = self.requests[self._prompt_of[number]].sampling.seed
        return {"index": number, **fields, "finish_reason": reason, "seed": seed}

    def _chunk(self, number: int, fields: dict[str, Any], reason: str | None) -> str:
        return to_json({**self.head, "choices": [self._choice(number, fields, reason)]}).decode()

    def _usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        prompt, new = sum(len(r.prompt_ids) for r in self.requests), sum(len(c.token_ids) for c in completions)
        cached = {c.request_id: c.cached_tokens for c in reversed(completions) if c.sample == 0}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }


class Completions(Endpoint[CompletionsBody]):
    """Answers `/v1/completions`."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def read(self) -> Iterator[Prompt]:
        """Yields the prompts, texts or ids; BadRequest for too many of them, or an echo that cannot be streamed."""
        value: Any = self.body.prompt
        if self.body.echo and self.body.stream and self.body.logprobs is not None:
            raise BadRequest("echo=true with logprobs is not streamed: send stream=false")
        many = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
        if many and len(value) > self.service.limits.queue:
            raise BadRequest(f"prompt holds {len(value)} prompts; at most {self.service.limits.queue} are taken")
        return map(self._prompt, value if many else [value])

    def _prompt(self, value: str | list[int]) -> Prompt:
        if isinstance(value, str):
            return Prompt(self.service.words.encode(value), value)
        return Prompt(tuple(value), decode=self.service.source.decode)

    def most(self, prompt: Prompt) -> int:
        """Returns `max_tokens`."""
        return self.body.max_tokens

    def extras(self) -> tuple[int | None, int]:
        """Scores the prompt where echo and log-probs are asked for."""
        return (1 if self.body.echo and self.body.logprobs is not None else None), self.body.logprobs or 0

    def shown(self, sample: Sample, prompt: Prompt) -> dict[str, Any]:
        """Returns text and log-probs, with the prompt's first where it is echoed."""
        before = prompt.text if self.body.echo else ""
        logprobs = self._logprobs(sample, slice(None), len(before))
        if self.body.echo and logprobs and sample.done:
            ids, values = prompt.ids, [None, *sample.done.prompt_logprobs]
            tops = sample.done.prompt_top or ((),) * (len(ids) - 1)
            given = self._columns(ids, values, [(), *tops], self._offsets(ids))
            logprobs = {name: None if part is None else given[name] + part for name, part in logprobs.items()}
        return {"text": before + sample.text, "logprobs": logprobs}

    def added(self, text: str, sample: Sample, tokens: slice) -> dict[str, Any]:
        """Returns the new text and the log-probs of its tokens."""
        return {"text": text, "logprobs": self._logprobs(sample, tokens, 0)}

    def before(self, prompt: Prompt) -> dict[str, Any] | None:
        """Returns the prompt's text where it is echoed."""
        return {"text": prompt.text, "logprobs": None} if self.body.echo else None

    def _logprobs(self, sample: Sample, tokens: slice, start: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        offsets = [start + offset for offset in sample.offsets[tokens]]
        return self._columns(sample.ids[tokens], sample.logprobs[tokens], sample.top[tokens], offsets)

    def _columns(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top], offsets: list[int]
    ) -> dict[str, Any]:
        """Beside the most likely tokens stands the one itself; of several with one name the likeliest."""
        likely: list[dict[str, float] | None] = []
        for token, logprob, top in zip(ids, logprobs, tops, strict=True):
            named: dict[str, float] = {}
            for i, p in top if logprob is None else (*top, (token, logprob)):
                named.setdefault(self._name(i), p)
            likely.append(named or None)
        return {
            "tokens": [self._name(i) for i in ids],
            "token_logprobs": list(logprobs),
            "top_logprobs": likely if self.body.logprobs else None,
            "text_offset": offsets,
        }

    def _offsets(self, ids: Sequence[int]) -> list[int]:
        """Of each token of a prompt in its text."""
        decode = self.service.source.decode
        stream, out = TextStream(decode) if decode else None, []
        for i in ids:
            out.append(stream.length if stream else 0)
            if stream:
                stream.push(i)
        return out

    def _name(self, token: int) -> str:
        name = self.service.words.name(token)
        return f"bytes:{name}" if name.startswith("\\x") else name


class Chat(Endpoint[ChatBody]):
    """Answers `/v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def read(self) -> Iterator[Prompt]:
        """Yields the one prompt that the chat template makes of the messages."""
        if self.body.top_logprobs and not self.body.logprobs:
            raise BadRequest("top_logprobs needs logprobs=true")
        messages = [message.model_dump() for message in self.body.messages]
        yield Prompt(self.service.words.chat(messages, self.body.chat_template_kwargs))

    def most(self, prompt: Prompt) -> int:
        """Returns all the room there is, unless told."""
        body, pool = self.body, self.service.engine.pool
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        room = min(self.service.source.config.max_positions, pool.pages * pool.page_size) - len(prompt.ids)
        return max(room, 1) if asked is None else asked

    def extras(self) -> tuple[int | None, int]:
        """Scores no prompt; asks for the likeliest tokens as `top_logprobs` says."""
        return None, self.body.top_logprobs

    def shown(self, sample: Sample, prompt: Prompt) -> dict[str, Any]:
        """Returns the assistant's message and its log-probs."""
        message = {"role": "assistant", "content": sample.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(sample, slice(None))}

    def added(self, text: str, sample: Sample, tokens: slice) -> dict[str, Any]:
        """Returns the new text as a delta, and the log-probs of its tokens."""
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(sample, tokens)}

    def before(self, prompt: Prompt) -> dict[str, Any] | None:
        """Returns the delta that names the assistant's role."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _logprobs(self, sample: Sample, tokens: slice) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        rows = zip(sample.ids[tokens], sample.logprobs[tokens], sample.top[tokens], strict=True)
        content = [{**self._entry(i, p), "top_logprobs": [self._entry(*one) for one in top]} for i, p, top in rows]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.service.words.bytes_of(token)
        name = self.service.words.name(token)
        return {"token": name, "logprob": logprob, "bytes": None if spelled is None else list(spelled)}
