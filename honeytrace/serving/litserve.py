"""LitServe: a pool of workers on one machine, behind its own queue and its own batching.

    from honeytrace.serving import ServiceSpec
    from honeytrace.serving.litserve import create_server

    spec = ServiceSpec(model="mymodel.py:victim", weights="w.safetensors", watermark="model.honeytrace")
    create_server(spec, workers=2).run(host="127.0.0.1", port=8000, generate_client_file=False)

Requests are checked where they arrive, before they are queued: in LitServe one that cannot be read takes the
whole batch it is in with it. The interface is POST /classify as in `honeytrace.serving.http`, with LitServe's
own /health.
"""

import dataclasses
import os
import time
from typing import Any

try:
    import litserve
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise ImportError('this server needs LitServe: pip install "honeytrace[litserve]"') from None

from torch import Tensor

from honeytrace.serving.batching import together
from honeytrace.serving.http import PATH, error_response, json_response, read_body
from honeytrace.serving.metrics import PrometheusMetrics
from honeytrace.serving.protocol import Protocol, Refusal
from honeytrace.serving.service import Service, ServiceSpec


def create_server(
    spec: ServiceSpec,
    *,
    workers: int = 1,
    batch_requests: int = 16,
    batch_wait: float = 0.0,
    metrics_port: int | None = None,
    **settings: Any,
) -> litserve.LitServer:
    """A LitServe server of the protected model.

    Args:
        spec: what every worker loads.
        workers: processes that run the model, on each device. Default 1.
        batch_requests: most requests in one pass. Default 16.
        batch_wait: seconds to wait for more of them. Default 0.
        metrics_port: worker i tells its metrics at 127.0.0.1, port `metrics_port` + i. Its latencies are
            those of the passes; LitServe's queue is not in them. Default: no metrics.
        settings: further arguments of `litserve.LitServer`, such as `accelerator` and `devices` (default: the
            device of the spec) or `timeout`.

    Raises:
        as `ServiceSpec.protocol`; ImportError without LitServe or, for metrics, prometheus-client.
    """
    accelerator, _, number = spec.device.partition(":")
    devices = [int(number)] if number else 1
    api = ProtectedAPI(spec, metrics_port, max_batch_size=batch_requests, batch_timeout=batch_wait)
    given = {
        "accelerator": accelerator,
        "devices": devices,
        "workers_per_device": workers,
        "middlewares": [(_Guard, {"protocol": spec.protocol()})],
        **settings,
    }
    return litserve.LitServer(api, **given)


class ProtectedAPI(litserve.LitAPI):  # type: ignore[misc]  # litserve may be missing where types are checked
    """The steps of LitServe around a `Service`; made by `create_server`."""

    def __init__(self, spec: ServiceSpec, metrics_port: int | None, **settings: Any) -> None:
        super().__init__(api_path=PATH, **settings)
        self._spec_to_load, self._metrics_port = spec, metrics_port
        self._service: Service

    def setup(self, device: str) -> None:
        metrics = None
        if self._metrics_port is not None:
            metrics = PrometheusMetrics()
            worker = int(os.environ.get("LITSERVE_WORKER_ID", "0"))
            metrics.listen(self._metrics_port + worker)
        self._service = dataclasses.replace(self._spec_to_load, device=device).load(metrics=metrics)
        self._service.answer(self._service.protocol.zeros())

    # LitServe reads the annotations: without one for `request` it gives the JSON of the body.
    def decode_request(self, request) -> Tensor:  # type: ignore[no-untyped-def]
        return self._service.protocol.check(request["inputs"])

    def batch(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs

    def predict(self, inputs: Any) -> Any:
        """Of one request, or of a list of them."""
        requests = inputs if isinstance(inputs, list) else [inputs]
        start = time.perf_counter()
        found = together(self._service.answer, requests)
        seconds = time.perf_counter() - start
        for request, answers in zip(requests, found, strict=True):
            if isinstance(answers, Tensor):
                self._service.metrics.answered(rows=len(request), seconds=seconds)
        return found if isinstance(inputs, list) else found[0]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Response:
        try:
            return json_response(200, self._service.protocol.write(self._service.sendable(output)))
        except Refusal as refusal:
            self._service.metrics.refused(refusal.status)
            return error_response(refusal.status, refusal.message)


class _Guard:
    """ASGI middleware: requests that are none are refused here, the others go on."""

    def __init__(self, app: ASGIApp, *, protocol: Protocol) -> None:
        self._app, self._protocol = app, protocol

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = await read_body(request, self._protocol)
            self._protocol.read(body, request.headers.get("content-type"))
        except Refusal as refusal:
            await error_response(refusal.status, refusal.message)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        await self._app(scope, again, send)
