"""A suspect behind an HTTP API, asked politely: in batches, not too fast, again after a failure, never twice.

Standard library only. What the API wants and gives is told by two functions; the defaults speak plain
JSON:

    POST {"inputs": [[...], ...]}   ->   {"scores": [[...], ...]}, or {"labels": [...]}, or a bare list
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[Tensor], bytes]
"""Inputs float32 [n, ...] or int64 [n, T] -> the body of a request."""

Decode = Callable[[bytes, int], Any]
"""Body of a response, number of inputs n -> scores [n, C], labels [n], or n top-k answers (see `top_k`)."""

_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOST_BYTES = 64 << 20
_LONGEST_WAIT = 60.0


class SuspectUnreachable(ConnectionError):
    """The API did not give an answer after all tries, or refused. Says what to do; names no trigger."""


def json_request(inputs: Tensor) -> bytes:
    """{"inputs": nested lists}."""
    return json.dumps({"inputs": inputs.tolist()}).encode("utf-8")


def json_response(body: bytes, count: int) -> Any:
    """The list in a JSON response, bare or under scores, probabilities, logits, labels or predictions.

    Raises:
        ValueError: there is none.
    """
    found = json.loads(body.decode("utf-8"))
    if isinstance(found, dict):
        for name in ("scores", "probabilities", "logits", "labels", "predictions"):
            if name in found:
                found = found[name]
                break
    if not isinstance(found, list):
        raise ValueError("the response holds no list of answers")
    return found


def top_k(answers: Any, num_classes: int) -> Tensor:
    """Top-k answers as scores [n, C].

    Args:
        answers: for each input a list of (class, probability) pairs, a mapping from class to probability, or
            a list of classes, best first.
        num_classes: C.

    What is left of the probability is shared equally by the classes that were not named. Ranked classes
    without probabilities count 1/2, 1/4, ... A fixed rule that knows no target, so that the test stays exact.

    Raises:
        ValueError: a class is none, or named twice.
    """
    rows = torch.zeros(len(answers), num_classes, dtype=torch.float64)
    for row, answer in zip(rows, answers, strict=True):
        pairs = list(answer.items()) if isinstance(answer, Mapping) else list(answer)
        if not all(isinstance(pair, (tuple, list)) for pair in pairs):
            pairs = [(label, 0.5 ** (rank + 1)) for rank, label in enumerate(pairs)]
        named = [int(label) for label, _ in pairs]
        if len(set(named)) != len(named) or not all(0 <= label < num_classes for label in named):
            raise ValueError(f"top-k answers must name different classes in [0, C) with C={num_classes}")
        given = [max(0.0, float(value)) if math.isfinite(float(value)) else 0.0 for _, value in pairs]
        others = num_classes - len(named)
        row[:] = max(0.0, 1 - sum(given)) / others if others else 0.0
        for label, value in zip(named, given, strict=True):
            row[label] = value
    return rows


class HttpSuspect:
    """A callable from inputs to answers that asks an HTTP API.

    Args:
        url: http or https.
        encode, decode: the API's format. Default: JSON, see above.
        headers: sent with each request, for example an authorization. Never shown in an error.
        batch_size: most inputs in a request, >= 1. Default 32.
        per_second: most requests a second; None: no limit.
        timeout: seconds for each request. Default 30.
        tries: how often a request is sent before giving up, >= 1. Default 5. Refused connections, timeouts,
            broken responses and the statuses 408, 425, 429 and 500 to 504 are tried again after 0.5, 1,
            2, ... seconds, or after what Retry-After says; any other status is final.
        labels_from_scores: answer with the API's best class only.
        top_k_classes: C where the API gives top-k answers, which are then read by `top_k`.

    Wrap it in a `Journal` to keep answers over an interruption. An answer that was lost on the way is asked
    for again: what an API that saw a request twice makes of it is not known here.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        encode: Encode = json_request,
        decode: Decode = json_response,
        headers: Mapping[str, str] | None = None,
        batch_size: int = 32,
        per_second: float | None = None,
        timeout: float = 30.0,
        tries: int = 5,
        labels_from_scores: bool = False,
        top_k_classes: int | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError("url must begin with http:// or https:// and name a host")
        for name, value in (("batch_size", batch_size), ("tries", tries)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout must be above 0, got {timeout}")
        if per_second is not None and not (math.isfinite(per_second) and per_second > 0):
            raise ValueError(f"per_second must be above 0 or None, got {per_second}")
        self._url = url
        self._encode, self._decode = encode, decode
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._batch_size, self._timeout, self._tries = batch_size, timeout, tries
        self._pause = 0.0 if per_second is None else 1 / per_second
        self._labels_from_scores, self._top_k_classes = labels_from_scores, top_k_classes
        self._next = 0.0
        self.requests = 0

    def __repr__(self) -> str:
        return f"HttpSuspect({urlsplit(self._url).hostname})"

    def __call__(self, inputs: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
        parts = [self._ask(batch) for batch in torch.split(inputs, self._batch_size)]
        if len({part.ndim for part in parts}) > 1:
            raise ValueError("the API changed between scores and labels")
        return np.concatenate(parts)

    def _ask(self, batch: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
        body, why = self._encode(batch), "it was not tried"
        for attempt in range(self._tries):
            wait = min(0.5 * 2**attempt, _LONGEST_WAIT)
            try:
                answers = self._decode(self._send(body), len(batch))
                return self._read(answers, len(batch))
            except urllib.error.HTTPError as error:
                error.close()
                why = f"status {error.code}"
                if error.code not in _TEMPORARY:
                    break
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                why = type(reason).__name__
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                why = f"a response that cannot be read ({type(error).__name__})"
            if attempt + 1 < self._tries:
                time.sleep(wait)
        raise SuspectUnreachable(
            f"{urlsplit(self._url).hostname} gave no answer to a request of {len(batch)} inputs: {why}. "
            "Answers so far are kept where a journal is; run the same command again to go on"
        )

    def _send(self, body: bytes) -> bytes:
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + self._pause
        self.requests += 1
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        with _opener.open(request, timeout=self._timeout) as response:
            content: bytes = response.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError("a response of this size is not read")
        return content

    def _read(self, answers: Any, count: int) -> np.ndarray[Any, np.dtype[Any]]:
        if self._top_k_classes is not None:
            answers = top_k(answers, self._top_k_classes)
        rows = np.asarray(answers)
        if rows.dtype.kind not in "fiu" or rows.ndim not in (1, 2) or len(rows) != count:
            raise ValueError("the response does not hold one answer for each input")
        if self._labels_from_scores and rows.ndim == 2:
            rows = rows.argmax(axis=1)
        return rows


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Triggers go where the user said, and nowhere else."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _retry_after(given: str | None, otherwise: float) -> float:
    try:
        seconds = float(given) if given is not None else otherwise
    except ValueError:
        return otherwise  # a date; the doubling wait does as well
    return min(seconds, _LONGEST_WAIT) if math.isfinite(seconds) and seconds >= 0 else otherwise
