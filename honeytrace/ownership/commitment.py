"""Committing to a key and its watermark before they are used.

    calibrate -> commit -> deposit the commitment -> a public random value appears -> bind -> serve -> verify

The commitment is a hash of everything that the test rests on and of nothing that it reveals. What is
deposited in time cannot be exchanged later. The beacon, a public random value that nobody could know at the
deposit, takes part
in the draw of the targets: keys and triggers can then not be chosen for their targets, however many are
    tried.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import honeytrace
from honeytrace.files import read_limited, write_private
from honeytrace.ownership import canonical
from honeytrace.ownership.sequential import RULES, Rule

if TYPE_CHECKING:
    from torch import nn

    from honeytrace.watermark.key import SecretKey
    from honeytrace.watermark.watermark import Watermark

T = TypeVar("T")

FORMAT = "honeytrace-commitment"
BEACON_FORMAT = "honeytrace-beacon"
VERSION = 1
_MOST_BYTES = 1 << 20
"""Largest file that is read; one of ten thousand groups has 60,000."""


@dataclass(frozen=True, kw_only=True)
class Commitment:
    """What the owner binds to; nothing in it is secret. `digest` is what has to be deposited.

    Attributes:
        key: `SecretKey.commitment`.
        watermark: `Watermark.digest()`: rule, bank, every trigger, candidate and reference answer.
        model: fingerprint of the protected model's weights.
        candidates: how many classes each group's target is drawn from, in the order of the groups.
        alpha, rule: the false-claim probability and the test that a verification will use.
        honeytrace: version of the library.
        time: UTC, the owner's own word; the depositary's date is the one that counts.
    """

    key: str
    watermark: str
    model: str
    candidates: tuple[int, ...]
    alpha: float
    rule: Rule
    honeytrace: str
    time: str

    @classmethod
    def make(
        cls,
        watermark: Watermark,
        key: SecretKey,
        model: nn.Module,
        *,
        alpha: float = 1e-3,
        rule: Rule = "exact",
    ) -> Commitment:
        """Commit to a watermark that is not bound to a beacon yet.

        Raises:
            TypeError, ValueError: the key is not the watermark's; alpha is not in (0, 1); the rule is
                unknown; the watermark is bound already, and a commitment made now would come too late.
        """
        from honeytrace.cache import model_digest

        watermark.opened(key)
        if watermark.beacon is not None:
            raise ValueError("the watermark is bound to a beacon already: a commitment has to come before")
        now = datetime.datetime.now(datetime.timezone.utc)
        return cls._of(
            {
                "key": key.commitment,
                "watermark": watermark.digest(),
                "model": model_digest(model),
                "candidates": [len(group.candidates) for group in watermark.groups],
                "alpha": alpha,
                "rule": rule,
                "honeytrace": honeytrace.__version__,
                "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the commitment, 64 hexadecimal digits."""
        return hashlib.sha256(canonical.line(self._fields()).encode("ascii")).hexdigest()

    def to_bytes(self) -> bytes:
        """The file that `save` writes."""
        content = {"format": FORMAT, "version": VERSION, "commitment": self._fields(), "digest": self.digest}
        return canonical.page(content)

    @classmethod
    def from_bytes(cls, content: bytes) -> Commitment:
        """Raises ValueError, which says what is wrong."""
        found = _read(content, FORMAT, {"commitment", "digest"})
        commitment = cls._of(found["commitment"])
        if commitment.digest != found["digest"]:
            raise ValueError("its digest is not that of its content")
        return commitment

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the commitment, whole or not at all.

        Raises:
            FileExistsError: there is a file of that name; OSError: it cannot be written.
        """
        write_private(path, self.to_bytes(), overwrite=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Commitment:
        """Raises FileNotFoundError, or ValueError for what is no whole commitment."""
        return _load(path, cls.from_bytes)

    def _fields(self) -> dict[str, Any]:
        return {**asdict(self), "candidates": list(self.candidates)}

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Commitment:
        if not isinstance(fields, dict) or set(fields) != set(cls.__dataclass_fields__):
            raise ValueError("its fields are not those of a commitment")
        for name in ("key", "watermark", "model"):
            if not isinstance(fields[name], str) or not re.fullmatch("[0-9a-f]{64}", fields[name]):
                raise ValueError(f"{name} must have 64 hexadecimal digits")
        sizes = fields["candidates"]
        if (
            not isinstance(sizes, list)
            or not sizes
            or not all(type(size) is int and size > 0 for size in sizes)
        ):
            raise ValueError("candidates must be counts, one a group")
        if type(fields["alpha"]) is not float or not 0 < fields["alpha"] < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {fields['alpha']!r}")
        if fields["rule"] not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {fields['rule']!r}")
        if not isinstance(fields["honeytrace"], str) or not isinstance(fields["time"], str):
            raise ValueError("honeytrace and time must be texts")
        return cls(**{**fields, "candidates": tuple(sizes)})


@dataclass(frozen=True, kw_only=True)
class Beacon:
    """A public random value that became known after a commitment.

    Attributes:
        commitment: digest of the commitment it is bound to.
        value: the value, exactly as published.
        source: where it can be looked up, and when it was published.
    """

    commitment: str
    value: str
    source: str

    def to_bytes(self) -> bytes:
        """The file that `save` writes."""
        return canonical.page({"format": BEACON_FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Beacon:
        """Raises ValueError, which says what is wrong."""
        found = _read(content, BEACON_FORMAT, set(cls.__dataclass_fields__))
        if not all(isinstance(text, str) for text in found.values()):
            raise ValueError("its fields must be texts")
        return cls(**found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all. Raises FileExistsError, OSError."""
        write_private(path, self.to_bytes(), overwrite=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Beacon:
        """Raises FileNotFoundError, or ValueError for what is no whole beacon record."""
        return _load(path, cls.from_bytes)


def bind(
    watermark: Watermark, key: SecretKey, commitment: Commitment, value: str, source: str = ""
) -> tuple[Watermark, Beacon]:
    """The watermark with its targets drawn from key and beacon, and the record of it. Serve this one only.

    Raises:
        TypeError, ValueError: the commitment is not to this key and watermark, or as `Watermark.bind`.
    """
    if commitment.key != key.commitment:
        raise ValueError("the commitment is to another key")
    if commitment.watermark != watermark.digest():
        raise ValueError("the commitment is to another watermark")
    bound = watermark.bind(key, value)
    return bound, Beacon(commitment=commitment.digest, value=value, source=source)


def _read(content: bytes, expected: str, names: set[str]) -> dict[str, Any]:
    found = canonical.read_page(content)
    if not isinstance(found, dict) or found.get("format") != expected:
        raise ValueError(f"is no {expected}")
    if found.get("version") != VERSION:
        raise ValueError(f"has another format version than {VERSION}")
    rest = {name: value for name, value in found.items() if name not in ("format", "version")}
    if set(rest) != names:
        raise ValueError("has other fields than it should")
    return rest


def _load(path: str | os.PathLike[str], parse: Callable[[bytes], T]) -> T:
    try:
        return parse(read_limited(path, _MOST_BYTES))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
