"""Concurrent requests in one call: whoever waits while the model is busy is answered together with the
others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from honeytrace.rule import check_integer, check_number

Run = Callable[[Tensor], Tensor]
"""Inputs [n, ...] -> outputs, row for row."""


class Full(RuntimeError):
    """As many inputs wait as are allowed to."""


class Closed(RuntimeError):
    """The batcher was closed."""


def together(run: Run, requests: Sequence[Tensor]) -> list[Tensor | Exception]:
    """The outputs of several requests by one call of `run`; the exception in place of one that fails.

    When the call fails, each request is tried alone: one that the function cannot take does not take the
    others with it.
    """
    try:
        inputs = requests[0] if len(requests) == 1 else torch.cat(list(requests))
        outputs = run(inputs)
        if len(outputs) != len(inputs):
            raise ValueError(f"the model gave {len(outputs)} answers to {len(inputs)} inputs")
        return list(torch.split(outputs, [len(inputs) for inputs in requests]))
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [found for request in requests for found in together(run, [request])]


class Batcher:
    """Puts inputs that come from many threads through one function, as many as there are at a time.

    Args:
        run: called by one thread of the batcher's own.
        rows: most inputs in a call, >= 1; a request with more goes alone. Default 64.
        wait: seconds to wait for more before a call that is not full, >= 0. Default 0: what has come while
            the last call ran goes into the next, and nobody waits for somebody who may not come.
        waiting: most inputs that may wait. Default 1024.

    Requests that fail together are tried alone, see `together`.
    """

    def __init__(self, run: Run, *, rows: int = 64, wait: float = 0.0, waiting: int = 1024) -> None:
        self._run = run
        self._rows = check_integer("rows", rows, 1, 1 << 20)
        self._wait = check_number("wait", wait, 0.0)
        self._most_waiting = check_integer("waiting", waiting, 1, 1 << 20)
        self._queue: deque[tuple[Tensor, Future[Tensor]]] = deque()
        self._waiting = 0  # inputs in the queue
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, inputs: Tensor) -> Future[Tensor]:
        """The outputs of inputs [n, ...], once they are there. May be called from any thread.

        Raises:
            Full: more inputs would wait than may.
            Closed: after `close`.
        """
        future: Future[Tensor] = Future()
        with self._changed:
            if self._closed:
                raise Closed
            # A request that is larger than all that may wait is taken when nobody waits.
            if self._queue and self._waiting + len(inputs) > self._most_waiting:
                raise Full
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="honeytrace-batcher", daemon=True)
                self._thread.start()
            self._queue.append((inputs, future))
            self._waiting += len(inputs)
            self._changed.notify()
        return future

    @property
    def alive(self) -> bool:
        """Whether requests are taken: not closed, and the thread, if there is one, runs."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    def close(self) -> None:
        """Answer what waits and take nothing more. Returns when all is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                return
            live = [(inputs, future) for inputs, future in batch if future.set_running_or_notify_cancel()]
            if live:
                outputs = together(self._run, [inputs for inputs, _ in live])
                for (_, future), output in zip(live, outputs, strict=True):
                    if isinstance(output, Tensor):
                        future.set_result(output)
                    else:
                        future.set_exception(output)

    def _next(self) -> list[tuple[Tensor, Future[Tensor]]] | None:
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            last = time.monotonic() + self._wait
            while self._waiting < self._rows and not self._closed:
                left = last - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[tuple[Tensor, Future[Tensor]]] = []
            rows = 0
            while self._queue and (not batch or rows + len(self._queue[0][0]) <= self._rows):
                batch.append(self._queue.popleft())
                rows += len(batch[-1][0])
            self._waiting -= rows
            return batch
