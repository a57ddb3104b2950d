"""Files that are either the old one or the new one, never half of it, and files of a limited size."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_private(path: str | os.PathLike[str], content: bytes | memoryview, *, overwrite: bool) -> None:
    """Write a file with mode 0600, whole or not at all.

    Give secret content as a memoryview: its repr shows nothing, so that a crash report that lists local
    variables does not either.

    Raises:
        FileExistsError: the name is taken and overwrite is False.
        OSError: it cannot be written; an older file of that name is untouched then. It names `path`.
    """
    path = Path(path)
    with naming(path):
        _write(path, content, overwrite)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError in here names `path`: a full disk names no file at all, and other faults often a temporary
    one, which says nothing to anybody."""
    told: OSError | None = None
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        told = OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path))
    if told is not None:
        raise told


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Only one process at a time is in here with this `path`, a file that is made and removed again.

    The lock ends with its process, however that ends. Where the system or the file system has no such locks
    (Windows, some network file systems) nothing is locked: it is for work that may be done twice, in vain.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever had the lock before may have removed the file: then another one of that name counts.
            if _is_still(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def _is_still(handle: int, path: str | os.PathLike[str]) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def read_limited(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file, at most `most` of them.

    Raises:
        ValueError: the file is larger.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"is larger than the {most:,} bytes such a file may have")
        return file.read(size)  # a size that is given is memory that is taken: not `most`


def _write(path: Path, content: bytes | memoryview, overwrite: bool) -> None:
    # mkstemp creates with mode 0600, so the content is at no moment readable by others.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".honeytrace-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # fails if the name is taken, also by somebody else a moment ago
            os.unlink(temporary)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # it may have got its name already
            os.unlink(temporary)
        raise
