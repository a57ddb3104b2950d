"""The core that all servers share: a request is checked, put through the protected model, counted."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from honeytrace.ops import WatermarkOutput
from honeytrace.serving.batching import Batcher, Closed, Full
from honeytrace.serving.metrics import Metrics, NoMetrics
from honeytrace.serving.protocol import Answers, Limits, Protocol, Refusal
from honeytrace.training import device_of, logits_of
from honeytrace.watermark import Watermark

_log = logging.getLogger("honeytrace.serving")


class Service:
    """A protected model that answers requests from many threads.

    Args:
        model: the bare classifier; it is put into eval mode.
        watermark: protects it. None serves it bare, for comparison.
        input_shape: shape of one input without the batch. Default: that of the watermark's triggers.
        answers: "probabilities" (default; softmax of what the model gives), "logits" (what the model gives)
            or "labels" (the best class of each input).
        constant_time: as `Watermark.protect`: time does not tell which answers are bent.
        limits: of a request. Default `Limits()`.
        batch_rows, batch_wait: how concurrent requests are put together, see `Batcher`. Default 64 inputs,
            0 seconds.
        metrics: is told what happens. Default: nobody is.

    Concurrent requests go through the model in one pass. The watermark gives each row what it would get
    alone, bit for bit; the model's own layers may round otherwise in another batch.

    Raises:
        TypeError, ValueError: as `Watermark.protect` and `Protocol`; no input shape where there is no
            watermark to take it from.
    """

    def __init__(
        self,
        model: nn.Module,
        watermark: Watermark | None,
        *,
        input_shape: Sequence[int] | None = None,
        answers: Answers = "probabilities",
        constant_time: bool = False,
        limits: Limits | None = None,
        batch_rows: int = 64,
        batch_wait: float = 0.0,
        metrics: Metrics | None = None,
    ) -> None:
        self.protocol = protocol_of(watermark, input_shape=input_shape, answers=answers, limits=limits)
        self.metrics = NoMetrics() if metrics is None else metrics
        self._model = model.eval()
        if watermark is not None:
            observe = None if metrics is None else self._count
            self._model = watermark.protect(model, constant_time=constant_time, observe=observe).eval()
        self._device = device_of(model)
        self._batcher = Batcher(
            self.answer, rows=batch_rows, wait=batch_wait, waiting=self.protocol.limits.waiting
        )
        self._warm = False

    def __repr__(self) -> str:
        protocol = getattr(self, "protocol", None)  # a crash report may ask in the middle of __init__
        if protocol is None:
            return "Service(<being made>)"
        return f"Service(input_shape={protocol.input_shape}, answers={protocol.answers!r})"

    @torch.inference_mode()
    def answer(self, inputs: Tensor) -> Tensor:
        """One pass: inputs [n, *input_shape] -> scores float32 [n, C], or labels int64 [n]; on the CPU."""
        found = logits_of(self._model(inputs.to(self._device)))
        if self.protocol.answers == "labels":
            return found.argmax(dim=-1).cpu()
        found = found.float()
        return (found.softmax(dim=-1) if self.protocol.answers == "probabilities" else found).cpu()

    def submit(self, inputs: Tensor) -> Future[Tensor]:
        """As `answer`, together with whoever asks at the same time. From any thread.

        Raises:
            Refusal: 503, too many wait, or the service is closed.
        """
        try:
            return self._batcher.submit(inputs)
        except Full:
            raise Refusal(503, "too many requests wait; come again later") from None
        except Closed:
            raise Refusal(503, "the service is shutting down") from None

    def finished(self, future: Future[Tensor]) -> Tensor:
        """The answers of a future of `submit` that is done, fit to be sent. Raises as `sendable`."""
        error = future.exception()
        return self.sendable(future.result() if error is None else error)

    def sendable(self, answers: Tensor | BaseException) -> Tensor:
        """What the model gave, if it may be sent.

        Raises:
            Refusal: 500, the model failed (the log says where, the client is not told); 422, its answer to
                these inputs is not finite.
        """
        if isinstance(answers, BaseException):
            # Where and what, not the text: a model's error may quote what it was given.
            last = traceback.extract_tb(answers.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            _log.error("the model failed: %s at %s", type(answers).__name__, where)
            raise Refusal(500, "the model failed on this request")
        if answers.is_floating_point() and not bool(answers.isfinite().all()):
            raise Refusal(422, "the model has no finite answer to these inputs")
        return answers

    def warm_up(self) -> None:
        """Answer one input of zeros, so that the first client does not wait for what is made at the first
        call. The service is ready after it."""
        self.submit(self.protocol.zeros()).result()
        self._warm = True

    @property
    def alive(self) -> bool:
        """Whether the thread that runs the model is there."""
        return self._batcher.alive

    @property
    def ready(self) -> bool:
        """Whether requests are answered: warmed up, alive, not closed."""
        return self._warm and self.alive

    def close(self) -> None:
        """Answer what waits, and take nothing more."""
        self._batcher.close()

    def timed(self, inputs: Tensor) -> Future[Tensor]:
        """`submit`, and the metrics are told how long it took."""
        start = time.perf_counter()
        future = self.submit(inputs)

        def done(future: Future[Tensor]) -> None:
            if not future.cancelled() and future.exception() is None:
                self.metrics.answered(rows=len(inputs), seconds=time.perf_counter() - start)

        future.add_done_callback(done)
        return future

    def _count(self, output: WatermarkOutput) -> None:
        # By numpy: for a single answer each of torch's operations would cost as much as the distances.
        bent = int((output.similarity.cpu().numpy().max(axis=1) > 0).sum())
        self.metrics.marked(rows=len(output.similarity), bent=bent)


def protocol_of(
    watermark: Watermark | None,
    *,
    input_shape: Sequence[int] | None = None,
    answers: Answers = "probabilities",
    limits: Limits | None = None,
) -> Protocol:
    """The protocol of a service with these arguments. Raises as `Service`."""
    dtype = torch.float32
    if watermark is not None:
        # The triggers themselves in no local variable: crash reports list those.
        dtype, shape = watermark.groups[0].triggers.dtype, watermark.groups[0].triggers.shape[1:]
        input_shape = shape if input_shape is None else input_shape
    if input_shape is None:
        raise ValueError("input_shape must be given where no watermark tells it")
    return Protocol(input_shape, dtype=dtype, answers=answers, limits=limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """A service by the names of its files: small, picklable, the same on every machine that has them.

    Args:
        model: ``package.module:factory`` or ``path/file.py:factory``, as on the command line.
        watermark: file that `Watermark.save` wrote; None serves the bare model.
        weights: safetensors file of the model's weights. Default: those the factory gives it.
        graded_only: leave the flips out (`Watermark.without_flips`). Default False.
        device: where the model runs. Default "cpu".
        threads: of PyTorch in the serving process. Default: as it is.
        settings: further arguments of `Service`, by name.
    """

    model: str
    watermark: str | os.PathLike[str] | None
    weights: str | os.PathLike[str] | None = None
    graded_only: bool = False
    device: str = "cpu"
    threads: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def load(self, *, metrics: Metrics | None = None) -> Service:
        """The service. Runs the factory, and no other code that is not installed.

        Raises:
            BadInput, ArtifactError, FileNotFoundError: a file is missing or not what it should be.
            TypeError, ValueError: as `Service`.
        """
        # On demand: command-line tools import this module to name a spec, and need no model for that.
        from honeytrace.userfiles import make_module

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = make_module(self.model, self.weights).to(self.device)
        return Service(model, self._watermark(), metrics=metrics, **self.settings)

    def protocol(self) -> Protocol:
        """The protocol of the service, for a process that checks requests and does not answer them.

        Raises: as `load`, but for the model.
        """
        known = ("input_shape", "answers", "limits")
        settings = {name: self.settings[name] for name in known if name in self.settings}
        return protocol_of(self._watermark(), **settings)

    def _watermark(self) -> Watermark | None:
        watermark = None if self.watermark is None else Watermark.load(self.watermark)
        return watermark.without_flips() if watermark is not None and self.graded_only else watermark
