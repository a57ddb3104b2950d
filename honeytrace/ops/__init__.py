"""The watermark's operations on tensors: `torch.ops.honeytrace.*` behind checked Python functions.

Each op has its file here (schema, fake, gradient, checks), its twin in `honeytrace.ops.reference`, and its
kernels behind `honeytrace.ops.registry`.
"""

from honeytrace.ops.bank import Bank
from honeytrace.ops.compose import compose
from honeytrace.ops.feature_distance import feature_distance
from honeytrace.ops.reference import WatermarkOutput
from honeytrace.ops.sign_hash import sign_hash
from honeytrace.ops.watermark import watermark
from honeytrace.ops.watermark_mix import watermark_mix

__all__ = [
    "Bank",
    "WatermarkOutput",
    "compose",
    "feature_distance",
    "sign_hash",
    "watermark",
    "watermark_mix",
]
