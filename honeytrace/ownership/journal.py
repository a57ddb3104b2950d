"""A suspect whose answers are kept as they come, so that nothing is asked twice after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from honeytrace.files import naming
from honeytrace.ownership import canonical
from honeytrace.ownership.suspect import Suspect, ask, quiet
from honeytrace.ownership.transcript import question_digest, read_answer, spell


class Journal:
    """Asks a suspect only what it has not answered yet, and writes every answer down at once.

    The file holds one JSON line for each answer: SHA-256 of the question, and the answer. It names no
    trigger. A line that was cut off by a crash is ignored and written again. Give the same file and the same
    suspect to go on.

    Args:
        suspect: any suspect.
        path: the journal; made where there is none (mode 0600).
        name: names the suspect; a journal begun with another name is refused. Not written down itself.

    Attributes:
        remembered: answers that came from the file or were given before.
        asked: questions put to the suspect by this object.

    Raises:
        ValueError: the file is no journal; it is left as it was.
        OSError: it cannot be read or written.
    """

    def __init__(self, suspect: Suspect, path: str | os.PathLike[str], *, name: str = "") -> None:
        self._suspect = suspect
        self._known: dict[str, Any] = {}
        self.asked = 0
        self.remembered = 0
        head = {"journal": hashlib.sha256(name.encode("utf-8")).hexdigest()}
        self._path = Path(path)
        with naming(path):
            self._file = _open(self._path, head, self._known)

    def __call__(self, inputs: Tensor) -> npt.NDArray[np.generic]:
        digests = [question_digest(question) for question in inputs]
        fresh: dict[str, int] = {}
        for place, digest in enumerate(digests):
            if digest not in self._known:
                fresh.setdefault(digest, place)
        self.remembered += len(digests) - len(fresh)
        if fresh:
            with quiet(self._suspect):
                said = ask(self._suspect, inputs[torch.tensor(list(fresh.values()))])
            self.asked += len(fresh)
            answers = {digest: spell(np.asarray(row)) for digest, row in zip(fresh, said, strict=True)}
            with naming(self._path):
                for digest, answer in answers.items():
                    self._file.write(canonical.line({"question": digest, "answer": answer}) + "\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            self._known.update(answers)
        return np.asarray([read_answer(self._known[digest]) for digest in digests])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path, head: dict[str, str], known: dict[str, Any]) -> TextIO:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(handle, "r+", encoding="ascii", errors="replace", newline="\n")
    whole = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith("\n"):
            # Cut off while it was written; the answer is asked for again. A file that begins with something
            # else than our first line is somebody's, and nothing of it is cut off.
            if number == 1 and not (canonical.line(head) + "\n").startswith(line):
                file.close()
                raise ValueError(f"{path}, line 1: this is no journal of a verification")
            break
        try:
            content = json.loads(line)
            if number == 1 and set(content) == {"journal"}:
                if content != head:
                    file.close()
                    raise _AnotherSuspect(f"{path} is the journal of another suspect")
                whole += len(line.encode("ascii", errors="replace"))
                continue
            if (
                number == 1
                or set(content) != {"question", "answer"}
                or not isinstance(content["question"], str)
            ):
                raise ValueError
            read_answer(content["answer"])
        except _AnotherSuspect:
            raise
        except (ValueError, TypeError, RecursionError):
            file.close()
            raise ValueError(f"{path}, line {number}: this is no journal of a verification") from None
        known[content["question"]] = content["answer"]
        whole += len(line.encode("ascii", errors="replace"))
    file.seek(whole)
    file.truncate()
    if whole == 0:
        file.write(canonical.line(head) + "\n")
        file.flush()
    return file


class _AnotherSuspect(ValueError):
    pass
