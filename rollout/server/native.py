"""`/generate`, in the words of SGLang's: a client of its deterministic mode works unchanged.

`return_logprob` gives the log-probs of the sampled tokens, with `logprob_start_len` also the prompt's from there on (the first
has none, as there), with `top_logprobs_num` the most likely tokens of each place. `max_new_tokens` 0 scores a prompt. A stream
tells text and ids so far; where the client is slower than the engine, an event covers several tokens.
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from rollout.sampling import Completion, Request, Token, Top
from rollout.server.bodies import MOST_TOP, BadRequest, GenerateBody, NativeSampling
from rollout.server.sample import Sample
from rollout.server.service import Service

_EACH = ("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "rid")


@dataclass(frozen=True)
class Ask:
    """Holds one prompt of a call."""

    request: Request
    rid: str
    logprobs: bool
    start: int  # of the prompt's log-probs, -1 for none
    special: bool  # special tokens are text
    keep_stop: bool  # what stopped a text is part of it


class Generate:
    """Answers one call (`service.Answer`)."""

    def __init__(self, service: Service, body: GenerateBody) -> None:
        if (body.text is None) == (body.input_ids is None):
            raise BadRequest("send either text or input_ids")
        name, value = ("input_ids", body.input_ids) if body.text is None else ("text", body.text)
        many = isinstance(value, list) and (name == "text" or any(isinstance(v, list) for v in value))
        prompts: Any = value if many else [value]
        if not prompts or len(prompts) > service.limits.queue:
            raise BadRequest(f"{name} holds {len(prompts)} prompts; 1 .. {service.limits.queue} are taken")
        self.service, self.stream, self.texts = service, body.stream, body.return_text_in_logprobs
        given = {name: getattr(body, name) for name in _EACH}
        given["rid"] = given["rid"] or [uuid.uuid4().hex for _ in prompts]
        columns = [_each(name, values, len(prompts)) for name, values in given.items()]
        self.asks = [self._ask(*row) for row in zip(prompts, *columns, strict=True)]
        self.requests, self.names = [a.request for a in self.asks], [a.rid for a in self.asks]
        self.single = not many and self.requests[0].sampling.n == 1
        self._samples = [self._sample(a) for a in self.asks for _ in range(a.request.sampling.n)]
        keys = [(r.id, i) for r in self.requests for i in range(r.sampling.n)]
        self._numbers = {key: number for number, key in enumerate(keys)}
        self._by_id = {a.request.id: a for a in self.asks}

    def _ask(self, prompt: Any, params: NativeSampling, wanted: bool, start: int, top: int, rid: str) -> Ask:
        if len(rid) > 200:
            raise BadRequest("rid must be a string of at most 200 characters")
        if start < -1 or not 0 <= top <= MOST_TOP:
            raise BadRequest(
                f"logprob_start_len={start} must be at least -1, top_logprobs_num={top} in 0 .. {MOST_TOP}"
            )
        ids = self.service.words.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        if start > len(ids):
            raise BadRequest(f"logprob_start_len={start} is past the prompt of {len(ids)} tokens")
        limits, ends = self.service.limits, self.service.source.end_ids
        sampling = params.sampling(params.max_new_tokens, params.sampling_seed, ends, limits.samples)
        special = not params.skip_special_tokens
        if special and sampling.stop:  # the engine looks for them in the text without
            raise BadRequest("skip_special_tokens=false together with stop texts is not supported: send stop_token_ids")
        score_from = start + 1 if wanted and start >= 0 else None
        request = self.service.request(ids, sampling, score_from, top * wanted)
        return Ask(request, rid, wanted, start if wanted else -1, special, params.no_stop_trim)

    def _sample(self, ask: Ask) -> Sample:
        return Sample(self.service.source, ask.request, ask.special, ask.keep_stop)

    def whole(self, completions: Sequence[Completion], seconds: float) -> bytes:
        """Returns the JSON of all samples: an object for one, else a list."""
        samples = [sample.whole(c) for sample, c in zip(self._samples, completions, strict=True)]
        out = [to_json(self._value(sample, seconds)) for sample in samples]  # one at a time: others run in between
        return out[0] if self.single else b"[" + b",".join(out) + b"]"

    def opening(self) -> list[str]:
        """Returns no events: a stream begins with its first token."""
        return []

    def chunks(self, events: Sequence[Token | Completion], seconds: float) -> list[str]:
        """Returns one event for each sample that grew, with its text and ids so far."""
        touched: dict[int, Sample] = {}
        for event in events:
            number = self._numbers[event.request_id, event.sample]
            touched[number] = self._samples[number]
            touched[number].hear(event)
        values = {number: self._value(sample, seconds) for number, sample in touched.items()}
        if not self.single:
            values = {number: {**value, "index": number} for number, value in values.items()}
        return [to_json(value).decode() for value in values.values()]

    def closing(self) -> list[str]:
        """Returns no events: the last one of each sample ends the stream."""
        return []

    def _value(self, sample: Sample, seconds: float) -> dict[str, Any]:
        """As SGLang answers, also in the middle of a stream."""
        ask, done = self._by_id[sample.request.id], sample.done
        meta: dict[str, Any] = {
            "id": ask.rid,
            "finish_reason": _reason(done, sample.request) if done else None,
            "prompt_tokens": len(sample.request.prompt_ids),
            "completion_tokens": len(sample.ids),
            "cached_tokens": done.cached_tokens if done else 0,
            "weight_version": str(sample.version),
            "e2e_latency": seconds,
        }
        if done and done.versions:
            meta["weight_versions"] = [str(v) for v in done.versions]
        if ask.logprobs:
            meta |= self._logprobs(sample, ask.start)
        return {"text": sample.text, "output_ids": sample.ids, "meta_info": meta}

    def _logprobs(self, sample: Sample, start: int) -> dict[str, Any]:
        done, request = sample.done, sample.request
        out: dict[str, Any] = {"output_token_logprobs": self._triples(zip(sample.ids, sample.logprobs, strict=True))}
        if request.top:
            out["output_top_logprobs"] = [self._triples(top) for top in sample.top]
        if not done:
            return out
        ids = request.prompt_ids[start:] if start >= 0 else ()
        values = [None, *done.prompt_logprobs][: len(ids)]
        out["input_token_logprobs"] = self._triples(zip(ids, values, strict=True))
        if request.top:
            tops: list[Top | None] = [None, *done.prompt_top][: len(ids)]
            out["input_top_logprobs"] = [top and self._triples(top) for top in tops]
        return out

    def _triples(self, pairs: Iterable[tuple[int, float | None]]) -> list[list[Any]]:
        decode = self.service.source.decode if self.texts else None
        return [[logprob, i, decode([i]) if decode else None] for i, logprob in pairs]


def _each(name: str, given: list[Any], prompts: int) -> list[Any]:
    """One value for all prompts, or one for each."""
    if len(given) not in (1, prompts):
        raise BadRequest(f"{name} has {len(given)} entries for {prompts} prompts")
    if name == "rid" and len(given) < prompts:
        given = [f"{given[0]}_{i}" for i in range(prompts)]
    return given if len(given) == prompts else given * prompts


def _reason(done: Completion, request: Request) -> dict[str, Any]:
    if done.finish_reason == "stop":
        return {"type": "stop", "matched": done.matched}
    if done.finish_reason == "length":
        return {"type": "length", "length": request.sampling.max_new_tokens}
    return {"type": "abort", "message": "aborted by /abort_request"}
