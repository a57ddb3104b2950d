"""Honeytrace: a plug-and-play watermark for the answers of a classifier, and the proof that a copy stole it.

Importing this package is cheap: it compiles nothing, starts no thread, needs no GPU and does not import
torch. Every public name is resolved when it is first used, through the table below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from honeytrace import baselines as baselines
    from honeytrace import data as data
    from honeytrace import doctor as doctor
    from honeytrace import evaluation as evaluation
    from honeytrace import extraction as extraction
    from honeytrace import models as models
    from honeytrace import numpy as numpy
    from honeytrace import ops as ops
    from honeytrace import records as records
    from honeytrace import removal as removal
    from honeytrace import serving as serving
    from honeytrace import training as training
    from honeytrace.ops import reference as reference
    from honeytrace.ownership.verdict import Verdict as Verdict
    from honeytrace.ownership.verify import verify as verify
    from honeytrace.rehearsal import rehearse as rehearse
    from honeytrace.rule import WatermarkRule as WatermarkRule
    from honeytrace.watermark.calibration import calibrate as calibrate
    from honeytrace.watermark.key import SecretKey as SecretKey
    from honeytrace.watermark.watermark import Watermark as Watermark

__version__ = "0.1.0"


def _refuse_sub_interpreter() -> None:
    # torch and the compiled core, imported in a sub-interpreter, wait for a lock for ever and say nothing.
    for name in ("_interpreters", "_xxsubinterpreters"):  # as it is called since Python 3.13, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "honeytrace cannot be imported in a sub-interpreter, for torch cannot: use the main "
                "interpreter (mod_wsgi: WSGIApplicationGroup %{GLOBAL}) or another process"
            )
        return


_refuse_sub_interpreter()

# Public name -> (module, attribute in it); an attribute of None means the module itself. A new public name is
# one line here and one line under TYPE_CHECKING above.
_LAZY: dict[str, tuple[str, str | None]] = {
    "SecretKey": ("honeytrace.watermark.key", "SecretKey"),
    "Verdict": ("honeytrace.ownership.verdict", "Verdict"),
    "Watermark": ("honeytrace.watermark.watermark", "Watermark"),
    "WatermarkRule": ("honeytrace.rule", "WatermarkRule"),
    "baselines": ("honeytrace.baselines", None),
    "calibrate": ("honeytrace.watermark.calibration", "calibrate"),
    "data": ("honeytrace.data", None),
    "doctor": ("honeytrace.doctor", None),
    "evaluation": ("honeytrace.evaluation", None),
    "extraction": ("honeytrace.extraction", None),
    "models": ("honeytrace.models", None),
    "numpy": ("honeytrace.numpy", None),
    "ops": ("honeytrace.ops", None),
    "records": ("honeytrace.records", None),
    "reference": ("honeytrace.ops.reference", None),
    "removal": ("honeytrace.removal", None),
    "rehearse": ("honeytrace.rehearsal", "rehearse"),
    "serving": ("honeytrace.serving", None),
    "training": ("honeytrace.training", None),
    "verify": ("honeytrace.ownership.verify", "verify"),
}

__all__ = [
    "SecretKey",
    "Verdict",
    "Watermark",
    "WatermarkRule",
    "__version__",
    "baselines",
    "calibrate",
    "data",
    "doctor",
    "evaluation",
    "extraction",
    "models",
    "numpy",
    "ops",
    "records",
    "reference",
    "rehearse",
    "removal",
    "serving",
    "training",
    "verify",
]


def __getattr__(name: str) -> Any:
    try:
        module_name, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'honeytrace' has no attribute {name!r}") from None
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value  # the next access is an ordinary attribute look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
