"""The watermark's step over NumPy arrays, for models that run without PyTorch: ONNX Runtime, TorchScript, ...

    marker = honeytrace.numpy.Marker.load("model.honeytrace")
    features, logits = session.run(["features", "logits"], {"input": x})
    answer = marker.mark(features, logits).logits

The same compiled core as `honeytrace.ops.watermark`, and the same bits. Torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from honeytrace.rule import WatermarkRule, check_integer, check_rule, core_rule
from honeytrace.watermark import artifact
from honeytrace.watermark.artifact import ArtifactError

try:
    from honeytrace import _C
except ImportError:
    raise ImportError(
        "honeytrace.numpy is the compiled core over NumPy arrays, and this installation has no honeytrace._C"
    ) from None

Array = npt.NDArray[Any]

_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
_NO_PICKLE = "a Marker is not pickled, for the pickle would hold the trigger bank; load its file instead"


class MarkedAnswers(NamedTuple):
    """What `Marker.mark` gives: logits [B, C] in the dtype given, similarity [B, G] float32, group [B] int64,
    flipped [B] bool; as `honeytrace.ops.WatermarkOutput`."""

    logits: Array
    similarity: Array
    group: Array
    flipped: Array


class Marker:
    """The watermark of a model: features and logits in, marked logits out. As secret as the key.

    Args:
        bank: float32 [G, M, D], finite: rows of features of the trigger groups.
        target_logits: float32 [G, C], finite.
        planes: float32 [P, D], 1 <= P <= 64, finite.
        rule: see `WatermarkRule`; k at most M, offset and scale one number or G.
        seed: 64 bits of the secret key, 0 <= seed < 2^64.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or range; none is shown.
    """

    def __init__(
        self, bank: Array, target_logits: Array, planes: Array, *, rule: WatermarkRule, seed: int
    ) -> None:
        bank = _constant("bank", bank, 3, "[G, M, D]")
        groups, size, width = bank.shape
        self._targets = _constant("target_logits", target_logits, 2, "[G, C]")
        self._planes = _constant("planes", planes, 2, "[P, D]")
        if len(self._targets) != groups:
            raise ValueError(f"target_logits must have G={groups} rows as bank has, got {len(self._targets)}")
        if self._planes.shape[1] != width or len(self._planes) > 64:
            raise ValueError(
                f"planes must have shape [P, {width}] with P <= 64, got {list(self._planes.shape)}"
            )
        check_rule(rule)
        rule.check_groups(groups)
        if rule.k > size:
            raise ValueError(f"k must be at most the number of bank rows M={size}, got k={rule.k}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError("seed must be an int of 64 bits, 0 <= seed < 2^64")  # it is not shown
        self.rule, self._seed = rule, seed
        self._sizes = groups, size, width
        self._offset, self._scale = (
            np.array(values if len(values) == groups else values * groups, np.float32)
            for values in (rule.offsets, rule.scales)
        )
        self._numbers = core_rule(rule.mixing_numbers)
        self._packed = np.empty(_C.packed_size(groups, size, width), np.float32)
        self._norms = np.empty((groups, -(-size // _C.LANES) * _C.LANES), np.float32)
        _C.pack_bank(bank.ctypes.data, groups, size, width, self._packed.ctypes.data, self._norms.ctypes.data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Marker:
        """Read a file that `honeytrace.Watermark.save` wrote. Runs no code.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: it is damaged, foreign, or of another format version.
        """
        try:
            return cls._of(*artifact.read(path, "np"))
        except ArtifactError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            # Not its text, and no local variable: they may hold the flip seed, and crash reports list them.
            kind = type(error).__name__
        raise ArtifactError(f"{path} is damaged: a field is missing or of a wrong kind ({kind})")

    @classmethod
    def _of(cls, arrays: Mapping[str, Array], fields: Mapping[str, Any]) -> Marker:
        if not re.fullmatch("[0-9a-f]{16}", fields["seed"]):
            raise ValueError
        return cls(
            arrays["bank"],
            arrays["target_logits"],
            arrays["planes"],
            rule=WatermarkRule.from_dict(fields["rule"]),
            seed=int(fields["seed"], 16),
        )

    def mark(
        self, features: Array, logits: Array, *, threads: int = 1, constant_time: bool = False
    ) -> MarkedAnswers:
        """Distance, similarity, hash and mixing in one call of the compiled core, which releases the GIL.

        Args:
            features: [B, D] and logits [B, C], float32 or float16; B may be 0.
            threads: that share the batch, >= 1. Default 1. The answers do not depend on it.
            constant_time: as `honeytrace.ops.watermark`. Default False.

        Rows that are not finite, or far from every group, come back bit for bit.

        Raises:
            TypeError: no arrays, or of another dtype.
            ValueError: another shape.
        """
        groups, size, width = self._sizes
        classes = self._targets.shape[1]
        features, logits = _rows("features", features, width, "D"), _rows("logits", logits, classes, "C")
        if len(features) != len(logits):
            raise ValueError(f"logits must have B={len(features)} rows as features has, got {len(logits)}")
        threads = check_integer("threads", threads, 1, 1 << 16)
        batch = len(features)
        out = MarkedAnswers(
            np.empty((batch, classes), logits.dtype),
            np.empty((batch, groups), np.float32),
            np.empty(batch, np.int64),
            np.empty(batch, np.bool_),
        )
        _C.watermark(
            features.ctypes.data,
            _DTYPES[features.dtype],
            batch,
            width,
            features.strides[0] // features.itemsize,
            logits.ctypes.data,
            _DTYPES[logits.dtype],
            classes,
            logits.strides[0] // logits.itemsize,
            self._packed.ctypes.data,
            self._norms.ctypes.data,
            groups,
            size,
            self._targets.ctypes.data,
            self._planes.ctypes.data,
            len(self._planes),
            self.rule.k,
            self.rule.metric_code,
            self.rule.exponent,
            self._offset.ctypes.data,
            self._scale.ctypes.data,
            self.rule.confidence_weight,
            self._numbers,
            self._seed,
            out.logits.ctypes.data,
            out.similarity.ctypes.data,
            out.group.ctypes.data,
            out.flipped.ctypes.data,
            threads,
            constant_time,
        )
        return out

    def __repr__(self) -> str:
        groups, size, width = self._sizes
        return f"Marker(groups={groups}, size={size}, features={width}, classes={self._targets.shape[1]})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(_NO_PICKLE)


def _constant(name: str, value: object, dimensions: int, shape: str) -> Array:
    """A copy, so that a later change of the array does not reach what was checked."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a float32 array {shape}, got {kind}")
    if value.ndim != dimensions or 0 in value.shape:
        raise ValueError(f"{name} must have shape {shape} without empty dimensions, got {list(value.shape)}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    held: Array = value.copy(order="C")
    return held


def _rows(name: str, value: object, columns: int, letter: str) -> Array:
    """[B, columns] with adjacent columns; rows may be any distance apart."""
    if not isinstance(value, np.ndarray) or value.dtype not in _DTYPES:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be an array [B, {letter}] of float32 or float16, got {kind}")
    if value.ndim != 2 or value.shape[1] != columns:
        raise ValueError(
            f"{name} must have shape [B, {letter}] with {letter}={columns}, got {list(value.shape)}"
        )
    adjacent = value.strides[1] == value.itemsize and value.strides[0] >= 0
    return value if adjacent and value.strides[0] % value.itemsize == 0 else np.ascontiguousarray(value)
