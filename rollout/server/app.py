"""The routes, their document, and errors of one shape."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Client
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rollout.server.bodies import (
    AbortBody,
    BadRequest,
    Body,
    ChatBody,
    CompletionsBody,
    EmptyBody,
    GenerateBody,
    MemoryBody,
    Model,
    TokensBody,
    parse,
)
from rollout.server.gate import Gate, error_body, refusal
from rollout.server.native import Generate
from rollout.server.openai import Chat, Completions
from rollout.server.service import Answer, Call, GivenUp, Service, Streamed
from rollout.server.tokens import Tokens

ANSWERS: dict[str, tuple[type[Body], Any]] = {  # path: (body, what makes an `Answer` of the service and one)
    "/generate": (GenerateBody, Generate),
    "/v1/completions": (CompletionsBody, Completions),
    "/v1/chat/completions": (ChatBody, Chat),
    "/inference/v1/generate": (TokensBody, Tokens),
}

_PROBE = 20.0  # seconds in which an engine that works has done a step


def build(
    service: Service, names: frozenset[str] = frozenset({"localhost"}), info: Mapping[str, Any] | None = None
) -> Gate:
    """Builds the server's routes. `names`: what the server may be called; `info`: what /server_info tells of how it was
    started."""
    app = FastAPI(title="samebit", docs_url=None, redoc_url=None)
    _tells(app, service, dict(info or {}))
    changes = _changes(app, service)
    for path, (body, make) in ANSWERS.items():
        app.post(path, summary=(body.__doc__ or "").partition("\n")[0], openapi_extra=_document(body))(
            _answering(service, body, make)
        )
    _errors(app)
    bodies = [body for body, _ in ANSWERS.values()] + [AbortBody, EmptyBody, MemoryBody]
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    document = app.openapi()
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return Gate(app, names, service.limits.api_key, changes)


def build_tokens(service: Service) -> Gate:
    """Builds the routes that a client needs which has the text elsewhere: those of the package `verifiers`, say."""
    app, path = FastAPI(title="samebit", docs_url=None, redoc_url=None), "/inference/v1/generate"
    body, make = ANSWERS[path]
    app.post(path)(_answering(service, body, make))
    _models(app, service)
    _errors(app)
    return Gate(app, frozenset({"localhost"}), service.limits.api_key, frozenset())


_REF = "#/components/schemas/{model}"


def _document(body: type[Body]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}}}


def _tells(app: FastAPI, service: Service, info: dict[str, Any]) -> None:
    """What is read, and changes nothing."""

    @app.get("/health")
    async def health() -> Response:
        """Tells whether requests are taken."""
        if service.asleep and not service.draining and service.loop.failure is None:
            return JSONResponse({"status": "asleep"}, 503)
        if service.draining and service.loop.failure is None:
            return JSONResponse({"status": "draining"}, 503)
        service.check_awake()
        return JSONResponse({"status": "ok"})

    @app.get("/health_generate")
    async def health_generate() -> Response:
        """Tells whether the engine does a step, for a token if it is idle."""
        service.check_awake()
        if not await service.works(_PROBE):
            raise BadRequest(f"the engine did no step in {_PROBE:g} s", 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Returns the metrics for Prometheus."""
        service.metrics.state(service.loop)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    _models(app, service)

    def model() -> dict[str, Any]:
        directory, version = service.source.directory or service.source.name, str(service.engine.version)
        return {"model_path": directory, "tokenizer_path": directory, "is_generation": True, "weight_version": version}

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info() -> Response:
        """Says which model is served, and the version of its weights."""
        return JSONResponse(model())

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info() -> Response:
        """Tells how the server was started, and how it is."""
        state = {"in_flight": service.in_flight, "asleep": service.asleep, "draining": service.draining}
        return JSONResponse({**info, **model(), "internal_states": [state]})


def _models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": service.source.name, "object": "model", "created": 0, "owned_by": "samebit"}
        return JSONResponse(
            {"object": "list", "data": [{**model, "max_model_len": service.source.config.max_positions}]}
        )


def _changes(app: FastAPI, service: Service) -> frozenset[str]:
    """What changes the state of the server, and its paths: `Gate` says for whom."""
    paths: list[str] = []

    def changing(path: str, body: type[Model]) -> Callable[[Callable[[Model], Awaitable[Response]]], None]:
        def add(work: Callable[[Model], Awaitable[Response]]) -> None:
            async def route(client: Client) -> Response:
                try:
                    return await work(await service.take(client, lambda given: parse(body, given or b"{}")))
                except ClientDisconnect:
                    return Response(status_code=499)

            app.post(path, name=work.__name__, description=work.__doc__, openapi_extra=_document(body))(route)

        paths.append(path)
        return add

    @changing("/flush_cache", EmptyBody)
    async def flush_cache(body: EmptyBody) -> Response:
        """Empties the prefix cache."""
        service.loop.forget()
        return Response("Cache flushed.\n", media_type="text/plain")

    @changing("/abort_request", AbortBody)
    async def abort_request(body: AbortBody) -> Response:
        """Ends the requests whose rid begins with `rid`, or all; they are answered with what they have."""
        if not body.rid and not body.abort_all:
            raise BadRequest("send rid, the beginning of those to abort, or abort_all=true")
        service.abort("" if body.abort_all else body.rid)
        return Response()

    @changing("/release_memory_occupation", MemoryBody)
    async def release(body: MemoryBody) -> Response:
        """Gives the memory of keys and values back, with the tag weights that of these too."""
        if set(body.tags) == {"weights"}:
            raise BadRequest('tags=["weights"]: the weights are released with "kv_cache", not without')
        await service.release("weights" in body.tags)
        return JSONResponse({})

    @changing("/resume_memory_occupation", MemoryBody)
    async def resume(body: MemoryBody) -> Response:
        """Regains the memory that was given back."""
        await service.resume()
        return JSONResponse({})

    return frozenset(paths)


def _answering(service: Service, body: type[Body], make: Callable[[Service, Any], Answer]) -> Any:
    """A route that asks the engine."""

    def read(given: bytes) -> Answer:
        return make(service, parse(body, given))

    async def route(client: Client) -> Response:
        try:
            answer = await service.take(client, read)
            call = service.call(answer, client)
            if answer.stream:
                return Events(call, _lines(call, cast(Streamed, answer)))
            content = await service.write(answer.whole, await call.completions(), call.seconds)
        except (GivenUp, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        return Response(content, media_type="application/json")

    return route


async def _lines(call: Call, answer: Streamed) -> AsyncIterator[str]:
    write = call.service.write
    for line in await write(answer.opening):
        yield line
    async for events in call.events():
        for line in await write(answer.chunks, events, call.seconds):
            yield line
    for line in await write(answer.closing):
        yield line


class Events(StreamingResponse):
    """Streams server-sent events. However it ends, what is left of the call is aborted."""

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
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Exception)
    async def failed(_: Client, error: Exception) -> Response:
        return refusal(BadRequest(f"the server failed, and its log says where: {type(error).__name__}", 500))

    @app.exception_handler(BadRequest)
    async def refused(_: Client, error: BadRequest) -> Response:
        return refusal(error)

    @app.exception_handler(404)
    async def unknown(client: Client, _: Exception) -> Response:
        return refusal(BadRequest(f"there is no {client.url.path}", 404))

    @app.exception_handler(405)
    async def method(client: Client, _: Exception) -> Response:
        return refusal(BadRequest(f"{client.url.path} does not take {client.method}", 405))
