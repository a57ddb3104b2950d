"""A `Service` behind a real uvicorn on loopback, and plain requests to it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from torch import Tensor

from honeytrace.serving import Service, ServiceSpec


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(
    url: str,
    body: bytes | None = None,
    *,
    method: str | None = None,
    content_type: str | None = "application/json",
    headers: dict[str, str] | None = None,
) -> Response:
    """One request; whatever status comes back."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    sent = dict(headers or {})
    if body is not None and content_type is not None:
        sent.setdefault("Content-Type", content_type)
    try:
        connection.request(method or ("GET" if body is None else "POST"), parts.path, body, sent)
        found = connection.getresponse()
        return Response(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
    finally:
        connection.close()


def ask(url: str, inputs: Any) -> Response:
    """POST /classify for inputs (an array, a tensor or lists)."""
    lists = inputs if isinstance(inputs, list) else inputs.tolist()
    return request(f"{url}/classify", json.dumps({"inputs": lists}).encode())


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The service's application under uvicorn in a thread; the value is its URL without a path."""
    import uvicorn

    from honeytrace.serving.http import create_app

    config = uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert thread.is_alive(), "the server did not start"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def until(holds: Any, seconds: float = 60.0) -> None:
    """Wait until holds() is true."""
    last = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < last, "it did not happen in time"
        time.sleep(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedSpec(ServiceSpec):
    """As `ServiceSpec`; the process that answers writes each pass to a file of its own: the queries' numbers
    (the first feature of each input), and the answers."""

    records: str

    def load(self, **settings: Any) -> Service:
        service = super().load(**settings)
        answer = service.answer

        def recorded(inputs: Tensor) -> Tensor:
            answers = answer(inputs)
            with open(f"{self.records}/{os.getpid()}", "ab") as file:
                pickle.dump((inputs[:, 0].numpy(), answers.numpy()), file)
            return answers

        service._batcher._run = recorded
        return service


def recorded(directory: str) -> dict[int, list[Any]]:
    """What each process has written: pid -> [(numbers, answers) of a pass]."""
    found: dict[int, list[Any]] = {}
    for name in os.listdir(directory):
        found[int(name)] = []
        with open(f"{directory}/{name}", "rb") as file, contextlib.suppress(EOFError):
            while True:
                found[int(name)].append(pickle.load(file))
    return found
