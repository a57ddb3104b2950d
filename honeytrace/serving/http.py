"""One machine: a FastAPI application around a `Service`, for uvicorn or any other ASGI server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

try:
    from fastapi import FastAPI, Request, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError:
    raise ImportError('the HTTP server needs FastAPI: pip install "honeytrace[serve]"') from None

from honeytrace.serving.protocol import Protocol, Refusal
from honeytrace.serving.service import Service

PATH = "/classify"

_CLOSE = {"Connection": "close"}  # of the body, something may be on its way that nobody will read
_HEADERS = {408: _CLOSE, 413: _CLOSE, 503: {"Retry-After": "1"}}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "What is wrong, in one sentence."}},
    "required": ["error"],
    "additionalProperties": False,
}
_REFUSALS = {
    400: "The body is not JSON.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    422: "The inputs are too many or not what the model takes, or it has no finite answer to them.",
    500: "The model failed on this request.",
    503: "Too many requests wait, or the server is shutting down. Retry-After says when to come again.",
}


def create_app(service: Service, *, close: bool = True) -> FastAPI:
    """The application: POST /classify, GET /healthz, /readyz, /openapi.json; no metrics (see `metrics`).

    Args:
        service: answers. It is warmed up when the application starts; /readyz answers 200 from then on.
        close: close the service when the application shuts down. Default True.

    A request that is refused gets {"error": one sentence} and a status of 4xx or 503.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.warm_up)
        yield
        if close:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="A classifier",
        description=f"Ask by POST {PATH}; an input has the shape {list(service.protocol.input_shape)}.",
        version="1",
        lifespan=lifespan,
        # The pages of FastAPI's documentation load scripts from elsewhere; /openapi.json says the same.
        docs_url=None,
        redoc_url=None,
    )

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.post(PATH, summary="Scores or labels of inputs", **_described(service.protocol))
    async def classify(request: Request) -> Response:
        return await respond(service, request)

    @app.get("/healthz", summary="Whether the process is alive", responses=_states(503))
    async def healthz() -> Response:
        return _state(service.alive)

    @app.get("/readyz", summary="Whether requests are answered now", responses=_states(503))
    async def readyz() -> Response:
        return _state(service.ready)

    return app


async def respond(service: Service, request: Request) -> Response:
    """The response to one request for classification, whatever it holds."""
    try:
        body = await read_body(request, service.protocol)
        inputs = service.protocol.read(body, request.headers.get("content-type"))
        future = service.timed(inputs)
        waited = asyncio.wrap_future(future)
        await asyncio.wait([waited])
        waited.exception()  # looked at, or asyncio would log it, with all its text
        answers = service.finished(future)
    except Refusal as refusal:
        service.metrics.refused(refusal.status)
        return error_response(refusal.status, refusal.message)
    except ClientDisconnect:
        return Response(status_code=400)  # to nobody
    return json_response(200, service.protocol.write(answers))


async def read_body(request: Request, protocol: Protocol) -> bytes:
    """The body of a request, read no further than the limit. Raises Refusal: 413, 408."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > protocol.most_bytes:
        protocol.refuse_size()

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > protocol.most_bytes:
                protocol.refuse_size()
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), protocol.limits.seconds)
    except (asyncio.TimeoutError, TimeoutError):  # two classes until Python 3.11
        raise Refusal(408, "the body did not arrive in time") from None


def json_response(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    """The content as JSON; NaN and infinity are an error."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("utf-8")
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """{"error": message}, and the headers that belong to the status."""
    return json_response(status, {"error": message}, headers or _HEADERS.get(status))


def _state(fine: bool) -> Response:
    return json_response(200, {"status": "ok"}) if fine else error_response(503, "not now")


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _states(*others: int) -> dict[int | str, dict[str, Any]]:
    ok = {
        "type": "object",
        "properties": {"status": {"const": "ok"}},
        "required": ["status"],
        "additionalProperties": False,
    }
    states: dict[int | str, dict[str, Any]] = {200: {"description": "Yes.", "content": _content(ok)}}
    states.update({n: {"description": _REFUSALS[n], "content": _content(_ERROR)} for n in others})
    return states


def _described(protocol: Protocol) -> dict[str, Any]:
    """What the OpenAPI description says of the classification, as arguments of a route."""
    refusals = {n: {"description": text, "content": _content(_ERROR)} for n, text in _REFUSALS.items()}
    answered = {"description": "One answer for each input.", "content": _content(protocol.response_schema())}
    body = {"required": True, "content": _content(protocol.request_schema())}
    return {"responses": {200: answered, **refusals}, "openapi_extra": {"requestBody": body}}
