"""What must not be read anywhere, in every form in which it might be written."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator

from honeytrace.watermark import SecretKey, Watermark


def secrets(watermark: Watermark, key: SecretKey) -> dict[str, str]:
    """As Python and torch print it: name -> text."""
    found = {"key": key._secret.hex(), "key as list": str(list(key._secret))[1:-1]}
    found["key as bytes"] = repr(key._secret)[2:-1]
    found["key in base64"] = base64.b64encode(key._secret).decode().rstrip("=")
    for purpose in ("flips", "verification order"):
        seed = key.seed(purpose)
        for name, form in (("decimal", str(seed)), ("hex", f"{seed:x}"), ("signed", str(seed - 2**64))):
            found[f"seed {purpose} {name}"] = form
    for name, tensor in watermark._plain()[0].items():
        if name.startswith("reference") or not tensor.is_floating_point():
            continue
        values = [float(v) for v in tensor.flatten()[:400]]
        for i, (v, w) in enumerate(itertools.pairwise(values)):
            found[f"{name} {i}, printed by torch"] = f"{v:.4f}, {w: .4f}"
            found[f"{name} {i} and the next"] = f"{v!r},{w!r}"
            if len(repr(v)) > 7:  # shorter ones stand in any text
                found[f"{name} {i}"] = repr(v)
    return found


def found_in(text: str, watermark: Watermark, key: SecretKey) -> list[str]:
    """The names of the secrets in a text."""
    return [name for name, form in secrets(watermark, key).items() if form in text]


def _binary(watermark: Watermark, key: SecretKey) -> Iterator[tuple[str, bytes]]:
    yield "key", key._secret
    yield "the key's first half", key._secret[:16]
    yield "the key's second half", key._secret[16:]
    for purpose in ("flips", "verification order"):
        yield f"seed {purpose}, little-endian", key.seed(purpose).to_bytes(8, "little")
        yield f"seed {purpose}, big-endian", key.seed(purpose).to_bytes(8, "big")
    tensors = watermark._plain()[0]
    for name in ("bank", "target_logits", "planes"):
        rows = tensors[name].reshape(-1, tensors[name].shape[-1])
        for i, row in enumerate(rows[:64]):
            yield f"{name}, row {i}", row.numpy().tobytes()[:40]
    for name, tensor in tensors.items():
        if name.startswith("triggers"):
            yield name, tensor[0].numpy().tobytes()[:40]


def found_among_scores(content: bytes, watermark: Watermark, key: SecretKey) -> list[str]:
    """As `found_in_bytes`, for a text with thousands of scores: one number is alike by chance there, two in a
    row are not."""
    names = found_in_bytes(content.replace(b", ", b","), watermark, key)
    return [name for name in names if not re.fullmatch(r"[\w.]+ \d+", name)]


def found_in_bytes(content: bytes, watermark: Watermark, key: SecretKey) -> list[str]:
    """The names of the secrets in a file or a message: as bytes, and as text."""
    found = [name for name, form in _binary(watermark, key) if form in content]
    return found + found_in(content.decode("latin-1"), watermark, key)
