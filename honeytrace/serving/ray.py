"""More than one machine: a Ray Serve application of replicas that share nothing.

    from ray import serve
    from honeytrace.serving import ServiceSpec
    from honeytrace.serving.ray import application

    spec = ServiceSpec(model="mymodel.py:victim", weights="w.safetensors", watermark="model.honeytrace")
    serve.run(application(spec, replicas=4), name="classifier", route_prefix="/")

Each replica loads the files that the spec names, so every node must have them, and none needs to hear of
another: which answers are bent, and how, follows from the query and the file alone. The HTTP interface is
that of `honeytrace.serving.http`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

try:
    from ray import serve
    from ray.util import metrics as ray_metrics
except ImportError:
    raise ImportError('replicas need Ray Serve: pip install "honeytrace[ray-serve]"') from None

from honeytrace.serving.http import create_app
from honeytrace.serving.metrics import SECONDS, STEP, InSteps
from honeytrace.serving.protocol import Refusal
from honeytrace.serving.service import Service, ServiceSpec

_here: list[Service] = []
"""The service of this process: a replica has a process of its own. The application is built without a way to
hand it anything."""


def application(
    spec: ServiceSpec,
    *,
    replicas: int = 2,
    concurrency: int = 64,
    name: str = "honeytrace",
    options: dict[str, Any] | None = None,
) -> Any:
    """A Ray Serve application, for `serve.run` or a Serve configuration file.

    Args:
        spec: what every replica loads; its paths must lead to the same files on every node.
        replicas: their number. For autoscaling give `options`.
        concurrency: most requests that a replica works on at once; they are put together as `Service` does.
        name: of the deployment.
        options: further options of `serve.deployment`, such as `ray_actor_options` or `autoscaling_config`.

    Metrics go to Ray's own exporter, under the names of `PrometheusMetrics`; keep Ray's metrics port closed
    for the reason that is told there.
    """
    given = {"num_replicas": replicas, "max_ongoing_requests": concurrency, **(options or {})}
    if "autoscaling_config" in given:
        given.pop("num_replicas")
    return serve.deployment(name=name, **given)(Replica).bind(spec)


def _app() -> Any:
    return create_app(_here[-1], close=False)


@serve.ingress(_app)
class Replica:
    """One replica: the HTTP application, and `classify` for other deployments that hold a handle."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._service = spec.load(metrics=RayMetrics())
        self._service.warm_up()
        _here.append(self._service)

    async def classify(self, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Inputs [n, *input_shape] -> scores float32 [n, C], or labels int64 [n].

        Raises:
            ValueError: the inputs are not what the model takes, too many wait, or the model failed.
        """
        try:
            future = self._service.timed(self._service.protocol.check(inputs))
            await asyncio.wait([asyncio.wrap_future(future)])
            return self._service.finished(future).numpy()
        except Refusal as refusal:
            self._service.metrics.refused(refusal.status)
            raise ValueError(refusal.message) from None

    def check_health(self) -> None:
        """Asked by Ray now and then; a replica that fails is replaced."""
        if not self._service.ready:
            raise RuntimeError("the service is not ready")


class RayMetrics:
    """As `PrometheusMetrics`, through Ray's exporter. Only inside of a Ray process."""

    def __init__(self, *, step: int = STEP) -> None:
        self._queries = ray_metrics.Counter("honeytrace_queries", "Inputs that were answered.")
        self._seconds = ray_metrics.Histogram(
            "honeytrace_request_seconds", "From a request to its answer.", boundaries=list(SECONDS)
        )
        self._refused = ray_metrics.Counter("honeytrace_refused", "Refused requests.", ("status",))
        steps = f"In steps of {step} queries or more."
        self._marked = ray_metrics.Counter("honeytrace_marked", f"Queries the watermark saw. {steps}")
        self._bent = ray_metrics.Counter("honeytrace_bent", f"Queries whose answer was bent. {steps}")
        self._steps = InSteps(step)

    def answered(self, *, rows: int, seconds: float) -> None:
        self._queries.inc(rows)
        self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        self._refused.inc(1, {"status": str(status)})

    def marked(self, *, rows: int, bent: int) -> None:
        whole = self._steps.add(rows, bent)
        if whole is not None:
            self._marked.inc(whole[0])
            if whole[1]:
                self._bent.inc(whole[1])
