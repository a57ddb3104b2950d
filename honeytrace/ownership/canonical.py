"""JSON with one spelling: equal values are equal bytes, and anything else is refused when it is read."""

from __future__ import annotations

import json
from typing import Any


def line(value: Any) -> str:
    """One line, keys sorted, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def page(value: Any) -> bytes:
    """For people: indented, keys sorted, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=True) + "\n").encode(
        "ascii"
    )


def read_page(content: bytes) -> Any:
    """What `page` wrote.

    Raises:
        ValueError: it is no JSON, or not in the spelling of `page`.
    """
    try:
        value = json.loads(content.decode("ascii"), parse_constant=_no_constant)
        again = page(value)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"is no JSON of Honeytrace ({type(error).__name__})") from None
    if again != content:
        raise ValueError("is JSON, but not spelled as Honeytrace spells it: it was changed by hand")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
