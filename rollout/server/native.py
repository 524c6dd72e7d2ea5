"""`/generate`, in the words of SGLang's: a client of its deterministic mode works unchanged.

`text` or `input_ids`, one or a list; `sampling_params`; `return_logprob` (of the sampled tokens) with `logprob_start_len` (also
of the prompt's, from there on; the first has none, as there); `stream` (server-sent events; text and ids so far). What SGLang
has and this server has not may be sent at the value that changes nothing; anything else is refused, not ignored.
"""

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as Client

from rollout.sampling import Completion, Request, RequestError, SamplingParams, Token
from rollout.server.fields import BadRequest, Fields, is_integer
from rollout.server.sample import Sample
from rollout.server.service import Call, Service, whole
from rollout.source import Source

NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "min_new_tokens": (0,),
    "logit_bias": ({},),
    "json_schema": ("",),
    "regex": ("",),
    "ebnf": ("",),
    "structural_tag": ("",),
    "stop_regex": ([],),
    "custom_params": ({},),
    "spaces_between_special_tokens": (),
    "stream_interval": (),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_logprobs_num": (0,),
    "token_ids_logprob": ([],),
    "return_hidden_states": (False,),
    "lora_path": ("",),
    "image_data": ([],),
    "session_params": ({},),
    "custom_logit_processor": ("",),
    "log_metrics": (),
    "priority": (),
    "model": (),
}
_LENGTH = 1 << 40  # of a prompt or a text; the model's own limit is checked by the engine


@dataclass(frozen=True)
class Ask:
    """One prompt of a call."""

    request: Request
    rid: str
    logprobs: bool
    start: int  # of the prompt's log-probs, -1 for none
    texts: bool  # of the tokens, beside their log-probs
    special: bool  # special tokens are text
    keep_stop: bool  # what stopped a text is part of it

    def sample(self, source: Source) -> Sample:
        return Sample(source, self.request, self.special, self.keep_stop)


def sampling_params(fields: Fields, service: Service) -> SamplingParams:
    """`sampling_params` of one prompt."""
    new = fields.integer("max_new_tokens", 128, 1, _LENGTH)
    stops = fields.integers("stop_token_ids", 64)
    ends = () if fields.boolean("ignore_eos") else service.source.end_ids
    made = {
        "max_new_tokens": new,
        "temperature": fields.number("temperature", 1.0),
        "seed": fields.integer("sampling_seed", 42, 0, 2**63 - 1),
        "stop_ids": tuple(sorted({*stops, *ends})),
        "stop": fields.texts("stop", 16),
        "n": fields.integer("n", 1, 1, service.limits.samples),
        **filters(fields),
    }
    fields.neutral(NEUTRAL_SAMPLING)
    fields.done()
    try:
        return SamplingParams(**made)
    except RequestError as error:
        raise BadRequest(str(error)) from None


def filters(fields: Fields) -> dict[str, Any]:
    """top_k (-1, as 0: no limit), top_p and min_p."""
    top_k = fields.integer("top_k", 0, -1, 2**63 - 1)
    return {"top_k": max(top_k, 0), "top_p": fields.number("top_p", 1.0), "min_p": fields.number("min_p", 0.0)}


def parse(body: Fields, service: Service) -> tuple[list[Ask], bool, bool]:
    """(one for each prompt, whether they came as a list, whether to stream)."""
    text, ids = body.any("text"), body.any("input_ids")
    if (text is None) == (ids is None):
        raise BadRequest("send either text or input_ids")
    name, value = ("text", text) if ids is None else ("input_ids", ids)
    if not isinstance(value, list if ids is not None else (list, str)):
        raise BadRequest(f"{name} must be {'a list of integers' if ids is not None else 'a string'}, or a list of such")
    batched = isinstance(value, list) and (ids is None or any(isinstance(v, list) for v in value))
    prompts = value if batched else [value]
    if not prompts or len(prompts) > service.limits.queue:
        raise BadRequest(f"{name} holds {len(prompts)} prompts; 1 .. {service.limits.queue} are taken")

    def each(what: str, default: Any) -> list[Any]:
        """One value for all prompts, or a list of one for each."""
        given = body.any(what, default)
        if isinstance(given, list) and len(given) != len(prompts):
            raise BadRequest(f"{what} has {len(given)} entries for {len(prompts)} prompts")
        return given if isinstance(given, list) else [given] * len(prompts)

    columns = [each(w, d) for w, d in (("sampling_params", {}), ("return_logprob", False), ("logprob_start_len", -1))]
    rids = each("rid", [uuid.uuid4().hex for _ in prompts])
    texts, stream = body.boolean("return_text_in_logprobs"), body.boolean("stream")
    body.neutral(NEUTRAL)
    body.done()
    asks = []
    for prompt, params, wanted, start, rid in zip(prompts, *columns, rids, strict=True):
        if not isinstance(wanted, bool):
            raise BadRequest("return_logprob must be true or false")
        if not is_integer(start) or start < -1:
            raise BadRequest("logprob_start_len must be an integer of at least -1")
        if not isinstance(rid, str) or len(rid) > 200:
            raise BadRequest("rid must be a string of at most 200 characters")
        whole(rid)
        prompt_ids = as_ids(prompt, name, service)
        if start > len(prompt_ids):
            raise BadRequest(f"logprob_start_len={start} is past the prompt of {len(prompt_ids)} tokens")
        score_from = start + 1 if wanted and start >= 0 else None
        fields = Fields(params, "sampling_params")
        special, keep_stop = not fields.boolean("skip_special_tokens", True), fields.boolean("no_stop_trim")
        sampling = sampling_params(fields, service)
        if special and sampling.stop:  # the engine looks for them in the text without
            raise BadRequest("skip_special_tokens=false together with stop texts is not supported: send stop_token_ids")
        request = Request(service.next_id(), prompt_ids, sampling, score_from)
        asks.append(Ask(request, rid, wanted, start if wanted else -1, texts, special, keep_stop))
    return asks, batched, stream


def as_ids(prompt: Any, name: str, service: Service) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return service.encode(prompt)
    if not isinstance(prompt, list) or not all(is_integer(i) for i in prompt):
        raise BadRequest(f"{name}: a prompt must be a {'string' if name == 'text' else 'list of integers'}")
    return tuple(prompt)


async def generate(body: Fields, service: Service, client: Client) -> Any:
    """What to answer: a JSON value, or a Call with the events of a stream."""
    asks, batched, stream = await service.aside(parse, body, service)
    call = service.call([ask.request for ask in asks], client)
    if stream:
        return call, events(call, asks, service.source, batched)
    completions = await call.completions()
    by_id = {ask.request.id: ask for ask in asks}
    out = []
    for completion in completions:
        ask = by_id[completion.request_id]
        sample = ask.sample(service.source).whole(completion)
        out.append(answer(sample, ask, service.source, completion, service.engine.version, call.seconds))
    return out if batched or len(out) > 1 else out[0]


async def events(call: Call, asks: list[Ask], source: Source, batched: bool) -> AsyncIterator[str]:
    by_id = {ask.request.id: (i, ask) for i, ask in enumerate(asks)}
    samples: dict[tuple[int, int], Sample] = {}
    first: dict[int, int] = {}  # request -> number of its first sample
    for ask in asks:
        first[ask.request.id] = len(samples)
        for i in range(ask.request.sampling.n):
            samples[ask.request.id, i] = ask.sample(source)
    async for event in call.events():
        sample = samples[event.request_id, event.sample]
        _, ask = by_id[event.request_id]
        done: Completion | None = None
        if isinstance(event, Token):
            sample.token(event)
            if event.id in sample.stops or (sample.stream and sample.stream.matched is not None):
                continue  # the completion says the same
        else:
            sample.end()
            done = event
        value = answer(sample, ask, source, done, event.version, call.seconds)
        if batched or len(samples) > 1:
            value["index"] = first[event.request_id] + event.sample
        yield json.dumps(value)


def answer(
    sample: Sample, ask: Ask, source: Source, done: Completion | None, version: int, seconds: float
) -> dict[str, Any]:
    """As SGLang answers; `done` is None in the middle of a stream."""
    request = ask.request
    meta: dict[str, Any] = {
        "id": ask.rid,
        "finish_reason": None,
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": len(sample.ids),
        "cached_tokens": done.cached_tokens if done else 0,
        "weight_version": str(done.version if done else version),
        "e2e_latency": seconds,
    }
    if done:
        reason: dict[str, Any] = {"type": done.finish_reason}
        if done.finish_reason == "stop":
            reason["matched"] = done.matched
        elif done.finish_reason == "length":
            reason["length"] = request.sampling.max_new_tokens
        meta["finish_reason"] = reason
        if done.versions:
            meta["weight_versions"] = [str(v) for v in done.versions]
    if ask.logprobs:
        meta["output_token_logprobs"] = triples(sample.logprobs, sample.ids, source, ask.texts)
        if ask.start >= 0 and done:
            prompt_ids = request.prompt_ids[ask.start :]
            values = [None, *done.prompt_logprobs][: len(prompt_ids)]
            meta["input_token_logprobs"] = triples(values, prompt_ids, source, ask.texts)
        elif done:
            meta["input_token_logprobs"] = []
    return {"text": sample.shown, "output_ids": list(sample.ids), "meta_info": meta}


def triples(logprobs: Any, ids: Any, source: Source, texts: bool) -> list[list[Any]]:
    def text(i: int) -> str | None:
        return source.decode([i]) if texts and source.decode else None

    return [[logprob, i, text(i)] for logprob, i in zip(logprobs, ids, strict=True)]
