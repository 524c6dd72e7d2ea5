"""`/inference/v1/generate`, as vLLM's: ids in, ids out, for who keeps the text elsewhere. It does not stream."""

import uuid
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from rollout.sampling import Completion
from rollout.server.bodies import TokensBody
from rollout.server.openai import check_model, drawn_seed
from rollout.server.service import Service


class Tokens:
    """Answers one call (`service.Answer`)."""

    stream = False

    def __init__(self, service: Service, body: TokensBody) -> None:
        check_model(body.model, service)
        asked = body.sampling_params
        seed = drawn_seed() if asked.seed is None else asked.seed
        sampling = asked.sampling(asked.max_tokens, seed, service.source.end_ids, service.limits.samples)
        self.requests = [service.request(body.token_ids, sampling, top=asked.logprobs)]
        self.names = [uuid.uuid4().hex]

    def whole(self, completions: Sequence[Completion], seconds: float) -> bytes:
        """Returns the JSON of all samples and of the tokens used."""
        (request,), (name,) = self.requests, self.names
        prompt, new = len(request.prompt_ids), sum(len(c.token_ids) for c in completions)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        head = to_json({"request_id": name, "seed": request.sampling.seed, "usage": usage})
        choices = [to_json(self._choice(c)) for c in completions]
        return head[:-1] + b',"choices":[' + b",".join(choices) + b"]}"

    def _choice(self, c: Completion) -> dict[str, Any]:
        tops = c.top or ((),) * len(c.token_ids)
        content = [
            {**_entry(i, logprob), "top_logprobs": [_entry(*one) for one in top]}
            for i, logprob, top in zip(c.token_ids, c.logprobs, tops, strict=True)
        ]
        return {
            "index": c.sample,
            "token_ids": c.token_ids,
            "logprobs": {"content": content},
            "finish_reason": c.finish_reason,
            "weight_version": str(c.version),
            "weight_versions": _spans(c),
        }


def _spans(c: Completion) -> list[dict[str, Any]]:
    """Says which version of the weights sampled which tokens, from `start` up to `end`."""
    spans: list[dict[str, Any]] = []
    for i, version in enumerate(c.token_versions):
        if not spans or spans[-1]["version"] != str(version):
            spans.append({"version": str(version), "start": i})
        spans[-1]["end"] = i + 1
    return spans


def _entry(token: int, logprob: float) -> dict[str, Any]:
    """By the names of both: vLLM's and those of its clients."""
    return {"token": f"token_id:{token}", "token_id": token, "logprob": logprob}
