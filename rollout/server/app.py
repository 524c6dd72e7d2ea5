"""The routes, and what stands before each: the key, the size of the body, errors of one shape."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Client
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rollout.server.fields import BadRequest, Fields, parse
from rollout.server.native import generate
from rollout.server.openai import Chat, Completions
from rollout.server.service import Call, GivenUp, Service

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}

_LAST_WORDS = 5.0  # seconds to send why a stream was given up


def build(service: Service) -> FastAPI:
    app = FastAPI(title="samebit", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        if service.asleep and not service.draining and service.loop.failure is None:
            return JSONResponse({"status": "asleep"}, 503)
        if service.loop.failure is not None:
            return refusal(BadRequest(f"the engine has stopped: {service.loop.failure}", 503))
        return JSONResponse({"status": "draining" if service.draining else "ok"}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics(client: Client) -> Response:
        check_key(service, client)
        service.metrics.state(service.loop)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(client: Client) -> Response:
        check_key(service, client)
        model = {"id": service.source.name, "object": "model", "created": 0, "owned_by": "samebit"}
        model["max_model_len"] = service.source.config.max_positions
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/get_model_info")
    async def model_info(client: Client) -> Response:
        check_key(service, client)
        directory, version = service.source.directory or service.source.name, str(service.engine.version)
        info = {"model_path": directory, "tokenizer_path": directory, "is_generation": True, "weight_version": version}
        return JSONResponse(info)

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(client: Client) -> Response:
        check_key(service, client)
        service.loop.forget()
        return Response("Cache flushed.\n", media_type="text/plain")

    @app.post("/release_memory_occupation")
    async def release(client: Client) -> Response:
        """Body {"tags": ["kv_cache"]}: keys and values alone; without tags the weights too."""

        async def work(body: Fields) -> dict[str, Any]:
            tags = occupied(body)
            if tags == {"weights"}:
                raise BadRequest('tags=["weights"]: the weights are released with "kv_cache", not without')
            await service.release("weights" in tags)
            return {}

        return await respond(service, client, work)

    @app.post("/resume_memory_occupation")
    async def resume(client: Client) -> Response:
        async def work(body: Fields) -> dict[str, Any]:
            occupied(body)
            await service.resume()
            return {}

        return await respond(service, client, work)

    @app.post("/generate")
    async def native(client: Client) -> Response:
        return await respond(service, client, lambda body: generate(body, service, client))

    @app.post("/v1/completions")
    async def completions(client: Client) -> Response:
        return await respond(service, client, lambda body: Completions(service).answer(body, client))

    @app.post("/v1/chat/completions")
    async def chat(client: Client) -> Response:
        return await respond(service, client, lambda body: Chat(service).answer(body, client))

    @app.exception_handler(BadRequest)
    async def refused(_: Client, error: BadRequest) -> Response:
        return refusal(error)

    @app.exception_handler(404)
    async def unknown(client: Client, _: Exception) -> Response:
        return refusal(BadRequest(f"there is no {client.url.path}", 404))

    @app.exception_handler(405)
    async def method(client: Client, _: Exception) -> Response:
        return refusal(BadRequest(f"{client.url.path} does not take {client.method}", 405))

    return app


async def respond(service: Service, client: Client, work: Callable[[Fields], Awaitable[Any]]) -> Response:
    check_key(service, client)
    try:
        body = await read(client, service.limits.body_bytes, service.limits.seconds)
        answer = await work(await service.aside(parse, body))
    except (GivenUp, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(answer, tuple):
        return Events(*answer)
    return JSONResponse(answer)


def occupied(body: Fields) -> set[str]:
    """The tags of a body: all where there are none."""
    tags = set(body.texts("tags", 2)) or {"weights", "kv_cache"}
    body.done()
    if unknown := sorted(tags - {"weights", "kv_cache"}):
        raise BadRequest(f'tags has {unknown[0]!r}; tags: "kv_cache", "weights"')
    return tags


def check_key(service: Service, client: Client) -> None:
    key = service.limits.api_key
    given = client.headers.get("authorization", "").encode()
    if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise BadRequest("the API key is missing or wrong: send Authorization: Bearer KEY", 401)


async def read(client: Client, limit: int, seconds: float) -> bytes:
    too_large = BadRequest(f"the body is larger than {limit} bytes", 413)
    length = client.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in client.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise BadRequest(f"the body took more than {seconds:g} s to arrive", 408) from None
    return bytes(body)


class Events(StreamingResponse):
    """Server-sent events. However it ends, what is left of the call is aborted."""

    def __init__(self, call: Call, values: AsyncIterator[str]) -> None:
        super().__init__(self._lines(values), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.call = call

    @staticmethod
    async def _lines(values: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for value in values:
                yield f"data: {value}\n\n"
        except GivenUp:
            return
        except BadRequest as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(
                TimeoutError
            ):  # a client that no longer reads holds its call no longer than any other
                async with asyncio.timeout(self.call.service.limits.seconds + _LAST_WORDS):
                    await super().__call__(scope, receive, send)
        finally:
            self.call.close()


def error_body(error: BadRequest) -> dict[str, Any]:
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}


def refusal(error: BadRequest) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error_body(error), error.status, headers)
