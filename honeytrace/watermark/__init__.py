"""The watermark: key, triggers, calibration, the protected model, and the file they are kept in."""

from honeytrace.watermark.artifact import ArtifactError
from honeytrace.watermark.calibration import calibrate
from honeytrace.watermark.groups import TriggerGroup, draw_target
from honeytrace.watermark.key import SecretKey
from honeytrace.watermark.masks import Mask, draw_mask
from honeytrace.watermark.summary import GroupSummary, Summary
from honeytrace.watermark.watermark import Watermark

__all__ = [
    "ArtifactError",
    "GroupSummary",
    "Mask",
    "SecretKey",
    "Summary",
    "TriggerGroup",
    "Watermark",
    "calibrate",
    "draw_mask",
    "draw_target",
]
