"""Writing files that are either the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_private(path: str | os.PathLike[str], content: bytes | memoryview, *, overwrite: bool) -> None:
    """Write a file with mode 0600, whole or not at all.

    Give secret content as a memoryview: its repr shows nothing, so that a crash report that lists local
    variables does not either.

    Raises:
        FileExistsError: the name is taken and overwrite is False.
        OSError: it cannot be written; an older file of that name is untouched then.
    """
    path = Path(path)
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
