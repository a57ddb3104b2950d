"""The watermark: key, triggers, calibration, the protected model, and the file they are kept in.

Names are resolved when they are first used: reading a file needs no torch (`honeytrace.numpy`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# No name may be that of a module in this package: importing the module would put itself in the name's place.
_MODULES = {
    "ArtifactError": "artifact",
    "GroupSummary": "summary",
    "Mask": "masks",
    "SecretKey": "key",
    "Summary": "summary",
    "TriggerGroup": "groups",
    "Watermark": "watermark",
    "calibrate": "calibration",
    "draw_mask": "masks",
    "draw_target": "groups",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
