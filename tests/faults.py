"""Dies at every step at which files are written: a process of its own for tests/test_faults.py, which reads
the JSON line it prints.

Everything is made once; then, for each scenario and each step, a fork does the work and is killed
(as by kill -9) just before the step, or in the middle of a write. What the fork leaves is looked at, and the
work is done again. In a second round the disk is full from that step on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

import test_evaluation
from worlds import KEY, blobs, marked, mlp

from honeytrace.evaluation import evaluate
from honeytrace.evaluation.store import Store, write_lines
from honeytrace.ownership.evidence import check, collect
from honeytrace.ownership.journal import Journal
from honeytrace.ownership.verify import verify
from honeytrace.userfiles import load_weights, save_weights
from honeytrace.watermark import SecretKey, Watermark

CHANGING = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "open")


class Steps:
    """Counts calls that change files; from one of them on the process is dead, or the disk full."""

    def __init__(self, at: int, act: Callable[[object], None]) -> None:
        self.count, self.at, self.act = 0, at, act

    def step(self, path: object = None) -> None:
        self.count += 1
        if 0 < self.at <= self.count:
            self.act(path)

    def install(self) -> None:
        for name in CHANGING:
            setattr(os, name, self._before(getattr(os, name)))
        fdopen = os.fdopen
        steps = self

        def opened(handle: int, *args: Any, **settings: Any) -> Any:
            file = fdopen(handle, *args, **settings)
            return Writer(file, steps)

        os.fdopen = opened

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **settings: Any) -> Any:
            if function.__name__ not in ("unlink", "rmdir"):  # a full disk lets go of files
                self.step(args[0] if isinstance(args[0], (str, os.PathLike)) else None)
            return function(*args, **settings)

        return counted


class Writer:
    """A file whose writes have a middle."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._steps.step()
        return half + int(self._file.write(content[half:]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Scenario(NamedTuple):
    """prepare makes the old state; work changes it; look gives "old" or "new", or raises."""

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    look: Callable[[Path], str]


def forked(
    work: Callable[[Path], None], place: Path, at: int, act: Callable[[object], None]
) -> tuple[int, str]:
    """Steps taken, and "done", "killed", or the text of the error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = "done"
        os.close(read)
        steps = Steps(at, act)
        steps.install()
        try:
            work(place)
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, f"{steps.count} {told}".encode())
        os._exit(0)
    os.close(write)
    said = b""
    while chunk := os.read(read, 65536):
        said += chunk
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return at, "killed"
    count, _, told = said.decode().partition(" ")
    return int(count), told


def die(path: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(path: object) -> None:
    # As the system tells it: calls that are given a name tell it, writes do not.
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([os.fspath(path)] if path is not None else []))


def scenarios() -> dict[str, Scenario]:
    first, second = marked(), marked().bind(KEY, "another")
    old_key, new_key = SecretKey(bytes(32)), SecretKey(bytes([1]) * 32)
    old_model, new_model = blobs().model, mlp()
    suspect = marked().protect(blobs().model)
    plan = test_evaluation.plan().narrowed("ours", "top1", None)
    cells = list(plan.cells())

    def outcome(verdict: Any) -> tuple[Any, ...]:
        # Not every bit: the suspect's own last bits depend on how many it is asked about at a time.
        ranks = [(record.index, record.target_rank) for record in verdict.groups]
        return verdict.claim, verdict.queries, ranks, f"{verdict.p_value:.6g}"

    expected = outcome(verify(suspect, first, KEY, batch_size=64))

    def same_weights(path: Path, model: torch.nn.Module) -> bool:
        read = mlp()
        load_weights(read, path)
        return all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))

    def which(old: bool, new: bool) -> str:
        assert old != new, "neither the old nor the new one"
        return "old" if old else "new"

    def look_at_mark(place: Path) -> str:
        beacon = Watermark.load(place / "mark").beacon
        return which(beacon is None, beacon == "another")

    def look_at_key(place: Path) -> str:
        if not (place / "key").exists():
            return "old"
        return which(SecretKey.load(place / "key") == old_key, SecretKey.load(place / "key") == new_key)

    def evaluation(place: Path) -> None:
        write_lines(evaluate(plan, place, run=test_evaluation.figures), place / "cells.jsonl")

    def look_at_evaluation(place: Path) -> str:
        finished = 0
        for path in (place / "cells").glob("*.json"):
            json.loads(path.read_text())
            finished += 1
        assert finished == len(Store(place).all(cells)), "a cell on disk is not whole"
        written = place / "cells.jsonl"
        if not written.exists():
            return "old"
        assert len(written.read_text().splitlines()) == finished == len(cells)
        return "new"

    def verification(place: Path) -> None:
        journal = Journal(suspect, place / "journal", name="suspect")
        verdict = verify(journal, first, KEY, batch_size=64)
        journal.close()
        assert outcome(verdict) == expected
        (place / "asked").write_text(f"{journal.asked} {journal.remembered}")

    def look_at_journal(place: Path) -> str:
        if (place / "asked").exists():
            return "new"
        path = place / "journal"
        if path.exists():
            lines = path.read_text().split("\n")
            for line in lines[:-1]:
                json.loads(line)
        return "old"

    def write_evidence(place: Path) -> None:
        collect(suspect, first, KEY).write(place / "evidence")

    def look_at_evidence(place: Path) -> str:
        if not (place / "evidence").exists():
            return "old"
        assert not check(place / "evidence").problems
        return "new"

    return {
        "calibrate": Scenario(
            lambda place: first.save(place / "mark"), lambda place: second.save(place / "mark"), look_at_mark
        ),
        "key": Scenario(lambda place: None, lambda place: new_key.save(place / "key"), look_at_key),
        "extract": Scenario(
            lambda place: save_weights(old_model, place / "copy"),
            lambda place: save_weights(new_model, place / "copy"),
            lambda place: which(
                same_weights(place / "copy", old_model), same_weights(place / "copy", new_model)
            ),
        ),
        "evaluate": Scenario(lambda place: None, evaluation, look_at_evaluation),
        "verify": Scenario(lambda place: None, verification, look_at_journal),
        "evidence": Scenario(lambda place: None, write_evidence, look_at_evidence),
    }


def main() -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, scenario in scenarios().items():
            killed: dict[str, int] = {"old": 0, "new": 0}
            errors: set[str] = set()
            place = Path(directory) / name

            def begin(place: Path = place, scenario: Scenario = scenario) -> None:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                scenario.prepare(place)

            begin()
            total, told = forked(scenario.work, place, 0, die)
            assert told == "done", told
            assert scenario.look(place) == "new"
            for at in range(1, total + 1, 1 + total // 20):
                begin()
                _, told = forked(scenario.work, place, at, die)
                assert told == "killed", (name, at, told)
                killed[scenario.look(place)] += 1
                _, told = forked(scenario.work, place, 0, die)  # again, on what the dead one left
                if name not in ("key", "evidence") or "exists" not in told:
                    assert told == "done", (name, at, told)
                assert scenario.look(place) == "new"
            for at in range(1, total + 1, 1 + total // 12):
                begin()
                _, told = forked(scenario.work, place, at, full)
                if told != "done":
                    errors.add(told.replace(str(place), "PLACE"))
                scenario.look(place)
            report[name] = {"steps": total, "killed": killed, "errors": sorted(errors)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
