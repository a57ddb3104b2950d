"""Results as plain values, for experiment trackers and data frames.

Everything that a user is given to keep has `to_dict()`: JSON-able, with nothing secret in it. Trackers want
one flat dictionary of numbers, data frames a list of them:

    mlflow.log_metrics(records.numbers(verdict, prefix="verdict."))
    wandb.config.update(records.flat(watermark.summary))
    pandas.DataFrame(records.rows(verdicts))
    pandas.DataFrame(records.rows(verdict.groups))

Neither of them is needed here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Scalar = str | int | float | bool | None


def plain(result: object) -> dict[str, Any]:
    """The dictionary of a result: `to_dict()`, a dataclass's fields, or a mapping's items.

    Raises:
        TypeError: it is none of these.
    """
    method = None if isinstance(result, type) else getattr(result, "to_dict", None)
    if callable(method):
        found: Any = method()
    elif isinstance(result, Mapping):
        found = dict(result)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        found = dataclasses.asdict(result)
    else:
        raise TypeError(
            f"result must have to_dict(), be a dataclass or a mapping, got {type(result).__name__}"
        )
    return {str(name): value for name, value in found.items()}


def flat(result: object, *, prefix: str = "") -> dict[str, Scalar]:
    """One level of scalars: a nested dictionary's names are joined by dots; a list becomes JSON text, or is
    left out where it holds dictionaries (see `rows`).

    Args:
        result: as `plain`.
        prefix: put before every name.

    Raises:
        TypeError: as `plain`; or a value that is no JSON.
    """
    out: dict[str, Scalar] = {}
    for name, value in plain(result).items():
        if isinstance(value, Mapping):
            out |= flat(value, prefix=f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            if not any(isinstance(entry, (Mapping, list, tuple)) for entry in value):
                out[prefix + name] = json.dumps(list(value))
        elif value is None or isinstance(value, (str, int, float, bool)):
            out[prefix + name] = value
        else:
            raise TypeError(f"{prefix}{name} must be a JSON value, got {type(value).__name__}")
    return out


def numbers(result: object, *, prefix: str = "") -> dict[str, float]:
    """The finite numbers of `flat`, True as 1.0: what trackers take as metrics. Raises as `flat`."""
    found = {name: value for name, value in flat(result, prefix=prefix).items() if not isinstance(value, str)}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def rows(results: Iterable[object]) -> list[dict[str, Scalar]]:
    """One flat dictionary each, all with the same names (None where one has no such value), in the order in
    which the names first appear. Takes verdicts, costs, records of attacks, a verdict's or a summary's
    `groups`, results of an evaluation.

    Raises:
        TypeError: as `flat`.
    """
    found = [flat(result) for result in results]
    names = list(dict.fromkeys(name for row in found for name in row))
    return [{name: row.get(name) for name in names} for row in found]
