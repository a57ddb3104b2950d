"""What a server takes and gives: JSON over HTTP, checked before the model sees it.

    POST {"inputs": [[...], ...]}   ->   {"scores": [[...], ...]} or {"labels": [...]}

This is the format that `honeytrace.ownership.http_suspect` speaks, so `verify` can ask a served model. A
request that is not one is refused with a status of 4xx and one sentence; the sentence names sizes, types and
places, and repeats no value.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from honeytrace.rule import check_integer, check_number

Answers = Literal["probabilities", "logits", "labels"]
ANSWERS: tuple[Answers, ...] = ("probabilities", "logits", "labels")

_BYTES_OF_A_NUMBER = 26
"""A float32 as JSON writes it, with comma and space: -1.1754943508222875e-38 is the longest."""

_MOST_BYTES = 64 << 20


class Refusal(Exception):
    """A request that is not answered: an HTTP status and one sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask of a server.

    Args:
        rows: most inputs in a request, >= 1. Default 256.
        bytes: most bytes of a request's body; None (default): what `rows` inputs can need, 64 MiB at most.
        waiting: most inputs that wait for the model, >= 1; a request beyond that is told to come again
            (status 503 with Retry-After). Default 1024.
        seconds: for a request's body to arrive in, > 0. Default 30.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    rows: int = 256
    bytes: int | None = None
    waiting: int = 1024
    seconds: float = 30.0

    def __post_init__(self) -> None:
        check_integer("rows", self.rows, 1, 1 << 20)
        if self.bytes is not None:
            check_integer("bytes", self.bytes, 1, 1 << 31)
        check_integer("waiting", self.waiting, 1, 1 << 20)
        check_number("seconds", self.seconds, 0.0, above=True)


class Protocol:
    """Requests of one model: their shape and limits. Knows no model and no watermark.

    Args:
        input_shape: shape of one input, without the batch: (channels, height, width), (features,), ...
        dtype: what the model takes, a floating-point or integer type. Default float32.
        answers: "probabilities" (default), "logits" or "labels": what `write` is given.
        limits: default `Limits()`.

    Attributes:
        most_bytes: of a request's body.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        answers: Answers = "probabilities",
        limits: Limits | None = None,
    ) -> None:
        if answers not in ANSWERS:
            raise ValueError(f"answers must be one of {', '.join(map(repr, ANSWERS))}, got {answers!r}")
        self.input_shape = tuple(check_integer("input_shape", n, 1, 1 << 31) for n in input_shape)
        if not self.input_shape:
            raise ValueError("input_shape must have at least one dimension, got ()")
        self.dtype, self.answers, self.limits = dtype, answers, limits or Limits()
        needed = self.limits.rows * math.prod(self.input_shape) * _BYTES_OF_A_NUMBER + 1024
        self.most_bytes = min(needed, _MOST_BYTES) if self.limits.bytes is None else self.limits.bytes

    def read(self, body: bytes, content_type: str | None) -> Tensor:
        """A request's body -> inputs [n, *input_shape], 1 <= n <= limits.rows, finite.

        Raises:
            Refusal: 415 no JSON by its content type, 413 too large, 400 no JSON, 422 JSON of another form.
        """
        kind = (content_type or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "the content type must be application/json")
        if len(body) > self.most_bytes:
            self.refuse_size()
        try:
            request = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            raise Refusal(400, "the body is not valid JSON") from None
        if not isinstance(request, dict) or set(request) != {"inputs"}:
            raise Refusal(422, 'the body must be an object with the one field "inputs"')
        return self.check(request["inputs"])

    def refuse_size(self) -> NoReturn:
        """The refusal of a body beyond `most_bytes`, for those who notice before all of it has come."""
        raise Refusal(413, f"the body must have at most {self.most_bytes} bytes")

    def check(self, inputs: Any) -> Tensor:
        """Nested lists of numbers or an array -> inputs [n, *input_shape], as the model takes them.

        Raises:
            Refusal: 422, what they are not.
        """
        wanted = f"inputs must have the shape [n, {', '.join(map(str, self.input_shape))}] with n >= 1"
        if not isinstance(inputs, (list, np.ndarray)):
            raise Refusal(422, f"{wanted}, got no list")
        if len(inputs) > self.limits.rows:
            raise Refusal(422, f"at most {self.limits.rows} inputs are answered at once, got {len(inputs)}")
        if isinstance(inputs, list) and _holds_bool(inputs):
            raise Refusal(422, "inputs must be numbers, got true or false")
        try:
            array = np.asarray(inputs)
        except (ValueError, RecursionError):  # lists of unequal lengths, or deeper than arrays go
            raise Refusal(422, f"{wanted}, got lists of unequal lengths or depths") from None
        if array.shape[1:] != self.input_shape or len(array) == 0:
            raise Refusal(422, f"{wanted}, got [{', '.join(map(str, array.shape))}]")
        if array.dtype.kind not in "iuf":
            raise Refusal(422, "inputs must be numbers that float64 can hold")
        return self._as_tensor(array)

    def _as_tensor(self, array: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
        if self.dtype.is_floating_point:
            # Before the conversion: it rounds what lies a little beyond the range into it.
            if not (np.abs(array) <= np.finfo(np.float32).max).all():
                raise Refusal(422, "inputs must be finite in float32")
            return torch.from_numpy(array.astype(np.float32)).to(self.dtype)
        limits = torch.iinfo(self.dtype)
        whole = np.isfinite(array).all() and (array == np.floor(array)).all()
        if not whole or array.min() < limits.min or array.max() > limits.max:
            raise Refusal(422, f"inputs must be whole numbers from {limits.min} to {limits.max}")
        return torch.from_numpy(array.astype(np.int64)).to(self.dtype)

    def zeros(self) -> Tensor:
        """One input of zeros, to try a model on."""
        return torch.zeros(1, *self.input_shape, dtype=self.dtype)

    def write(self, answers: Tensor) -> dict[str, Any]:
        """Scores [n, C], or labels [n], as a JSON value. A float32 comes out whole: JSON rounds nothing."""
        return {"labels" if answers.dim() == 1 else "scores": answers.tolist()}

    def request_schema(self) -> dict[str, Any]:
        """The JSON schema of a request."""
        number: dict[str, Any] = {"type": "number" if self.dtype.is_floating_point else "integer"}
        if self.dtype.is_floating_point:
            largest = float(torch.finfo(torch.float32).max)
            number |= {"minimum": -largest, "maximum": largest}
        else:
            limits = torch.iinfo(self.dtype)
            number |= {"minimum": limits.min, "maximum": limits.max}
        schema: dict[str, Any] = number
        for size in reversed(self.input_shape):
            schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": self.limits.rows}
        return {
            "type": "object",
            "properties": {"inputs": schema},
            "required": ["inputs"],
            "additionalProperties": False,
        }

    def response_schema(self) -> dict[str, Any]:
        """The JSON schema of a response with status 200."""
        name, one = "scores", {"type": "array", "items": {"type": "number"}, "minItems": 1}
        if self.answers == "labels":
            name, one = "labels", {"type": "integer", "minimum": 0}
        answers = {"type": "array", "items": one, "minItems": 1, "maxItems": self.limits.rows}
        return {
            "type": "object",
            "properties": {name: answers},
            "required": [name],
            "additionalProperties": False,
        }


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _holds_bool(nested: list[Any]) -> bool:
    """Whether true or false stands among the numbers, which NumPy would read as 1 and 0."""
    level = [nested]
    while level:
        kinds = set().union(*(map(type, part) for part in level))
        if bool in kinds:
            return True
        level = [part for above in level for part in above if type(part) is list]
    return False
