"""The owner's secret key and everything that is drawn from it.

One key of 32 bytes; each use draws from its own stream: HKDF-SHA256 (RFC 5869) gives the stream's key from
the secret and a purpose, ChaCha20 (RFC 8439) gives its bytes. Whoever sees one stream learns nothing about
another, and the draws are the same on every machine and with every version of NumPy and PyTorch, whose
generators promise no such thing.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from honeytrace.files import write_private

T = TypeVar("T")

KEY_BYTES = 32
_HEADER = b"honeytrace-key-v1\n"
_FILE_LIMIT = 1024
"""Bytes read of a key file; a whole one has 83."""


class SecretKey:
    """32 secret bytes. Never printed, logged or pickled; compared in constant time.

    Make one with `SecretKey.generate()`, keep it with `save` (file mode 0600), read it back with `load`.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        """Args: secret: exactly 32 bytes. Raises TypeError or ValueError (which never shows them)."""
        if not isinstance(secret, bytes):
            raise TypeError(f"secret must be bytes, got {type(secret).__name__}")
        if len(secret) != KEY_BYTES:
            raise ValueError(f"secret must be {KEY_BYTES} bytes, got {len(secret)}")
        self._secret = secret

    @classmethod
    def generate(cls) -> SecretKey:
        """A fresh key from the operating system's random source."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SecretKey:
        """Read a key file.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError: others than its owner may read it (POSIX).
            ValueError: it is no key file; the message does not show its content.
        """
        path = Path(path)
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise PermissionError(f"{path} may be read by others than its owner; run: chmod 600 {path}")
            secret = _parse(file.read(_FILE_LIMIT))
        if secret is None:
            raise ValueError(f"{path} is not a Honeytrace key file")
        return cls(secret)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a key file with mode 0600, whole or not at all.

        Raises:
            FileExistsError: the file exists and overwrite is False: a lost key is a lost claim.
            OSError: it cannot be written.
        """
        try:
            write_private(
                path, memoryview(_HEADER + self._secret.hex().encode("ascii") + b"\n"), overwrite=overwrite
            )
        except FileExistsError:
            raise FileExistsError(
                f"{path} exists; a lost key is a lost claim, so it is not overwritten"
            ) from None

    @property
    def identifier(self) -> str:
        """32 hexadecimal digits that name the key and do not reveal it (a one-way HKDF output)."""
        return self._derive("identifier", 16).hex()

    @property
    def commitment(self) -> str:
        """64 hexadecimal digits that bind to this key and do not reveal it: nobody can find a second key with
        the same ones (a 256-bit HKDF output; the identifier is too short for that)."""
        return self._derive("commitment", 32).hex()

    def opened(self) -> str:
        """The secret itself, 64 hexadecimal digits. For evidence that is given to others: the key is
        spent."""
        return self._secret.hex()

    def seed(self, purpose: str) -> int:
        """A 64-bit number for this purpose, in [0, 2^64). As secret as the key."""
        return int.from_bytes(self._derive(f"seed/{purpose}", 8), "little")

    def stream(self, purpose: str) -> KeyStream:
        """The endless stream of draws for this purpose, from its start."""
        return KeyStream(self._derive(f"stream/{purpose}", 32))

    def _derive(self, purpose: str, length: int) -> bytes:
        hkdf = HKDF(hashes.SHA256(), length, salt=b"honeytrace", info=b"v1/" + purpose.encode("utf-8"))
        return hkdf.derive(self._secret)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretKey) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.identifier)

    def __repr__(self) -> str:
        return "SecretKey(<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretKey is not pickled or copied; use save and load")


def _parse(content: bytes) -> bytes | None:
    """The 32 bytes in a key file's content; None if it is none.

    No exception leaves here: the frame holds the key.
    """
    if not content.startswith(_HEADER):
        return None
    try:
        secret = bytes.fromhex(content.removeprefix(_HEADER).strip().decode("ascii"))
    except ValueError:
        return None
    return secret if len(secret) == KEY_BYTES else None


class KeyStream:
    """Uniform draws from ChaCha20 bytes, by rejection: exact, not nearly uniform."""

    def __init__(self, stream_key: bytes) -> None:
        self._cipher: CipherContext = Cipher(
            algorithms.ChaCha20(stream_key, bytes(16)), mode=None
        ).encryptor()

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound). Raises ValueError for a bound outside 1..2^63."""
        if not 1 <= bound <= 1 << 63:
            raise ValueError(f"bound must be between 1 and 2^63, got {bound}")
        limit = (1 << 64) - (1 << 64) % bound  # largest multiple of bound: above it, draw again
        while True:
            value = int.from_bytes(self._bytes(8), "little")
            if value < limit:
                return value % bound

    def choice(self, items: Sequence[T]) -> T:
        """One of the items. Raises ValueError when there is none."""
        return items[self.below(len(items))]

    def permutation(self, n: int) -> list[int]:
        """0..n-1 in uniform random order (Fisher-Yates)."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    def signs(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] float32 of -1 and 1 with equal probability."""
        bits = torch.frombuffer(bytearray(self._bytes(rows * columns)), dtype=torch.uint8) & 1
        return (bits.to(torch.float32) * 2 - 1).reshape(rows, columns)

    def _bytes(self, n: int) -> bytes:
        return self._cipher.update(bytes(n))

    def __repr__(self) -> str:
        return "KeyStream(<hidden>)"
