"""Protected models behind the servers people use. One core, `Service`, and thin adapters around it:

    honeytrace.serving.http      FastAPI and uvicorn, one machine
    honeytrace.serving.litserve  LitServe, one machine
    honeytrace.serving.ray       Ray Serve, several machines

Each adapter needs the server it is for, and says so; this package alone needs none of them.
"""

from honeytrace.serving.metrics import Metrics, PrometheusMetrics
from honeytrace.serving.protocol import Limits, Protocol, Refusal
from honeytrace.serving.service import Service, ServiceSpec

__all__ = ["Limits", "Metrics", "PrometheusMetrics", "Protocol", "Refusal", "Service", "ServiceSpec"]
