"""What a machine does to a program: it is killed, the disk is full, it forks, and it speaks Turkish."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from worlds import KEY, blobs, marked

from honeytrace import cli
from honeytrace.files import read_limited, write_private
from honeytrace.ownership import verify
from honeytrace.ownership.commitment import Commitment, bind
from honeytrace.ownership.journal import Journal
from honeytrace.ownership.ladder import most_questions
from honeytrace.watermark import Watermark

TESTS = Path(__file__).parent
posix = pytest.mark.skipif(os.name != "posix", reason="forks, and limits as POSIX systems do")


def python(code: str, *, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# killed, and on a full disk ----------


@posix
@pytest.mark.slow
def test_killed_at_any_step_everything_is_old_or_new_and_goes_on():
    """tests/faults.py looks at every file after every kill; what it could not bear it raises."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "faults.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert set(found) == {"calibrate", "key", "extract", "evaluate", "verify", "evidence"}
    full = f"OSError: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'PLACE/"
    for name, one in found.items():
        assert one["steps"] >= 4, name
        assert sum(one["killed"].values()) >= 4, name
        # One error, which names the file that was to be written and none that nobody has heard of.
        assert one["errors"], name
        assert all(told.startswith(full) and ".honeytrace-" not in told for told in one["errors"]), one[
            "errors"
        ]


@posix
def test_a_real_limit_on_files_is_one_line_that_names_the_file(tmp_path):
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
from honeytrace.cli import main
main(["key", {str(tmp_path / "owner.key")!r}])
"""
    done = python(code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == f"Error: {tmp_path / 'owner.key'}: {os.strerror(errno.EFBIG)}"
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_place_that_cannot_be_written(tmp_path):
    """Root may write anywhere but to /proc; everybody else is kept out of a directory of mode 0500."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o500)
    if os.geteuid() == 0:
        place = Path("/proc/self/fd")
        if not place.is_dir():
            pytest.skip("root, and no /proc")
    done = CliRunner().invoke(cli.main, ["key", str(place / "owner.key")])
    assert done.exit_code == 2
    told = done.stderr.strip().splitlines()
    assert len(told) == 1
    assert str(place) in told[0]
    assert ".honeytrace-" not in told[0]


@posix
def test_a_reader_that_leaves_is_no_verdict(tmp_path):
    """As in `honeytrace verify ... | head`: not exit code 1, which says that nothing is claimed."""
    read, write = os.pipe()
    os.close(read)
    code = f"from honeytrace.cli import main; main(['key', {str(tmp_path / 'owner.key')!r}])"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


@posix
@pytest.mark.parametrize("content", [b"my thesis, on one line", b'{"other": 1}', b"\xff\xfe"])
def test_a_journal_never_cuts_off_what_somebody_else_wrote(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="this is no journal"):
        Journal(blobs().model, path)
    assert path.read_bytes() == content


def test_a_journal_cut_off_in_its_first_line_is_begun_again(tmp_path):
    Journal(blobs().model, tmp_path / "journal", name="x").close()
    whole = (tmp_path / "journal").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "journal").write_bytes(whole[:length])
        Journal(blobs().model, tmp_path / "journal", name="x").close()
        assert (tmp_path / "journal").read_bytes() == whole


def test_no_more_is_read_than_a_file_may_have(tmp_path):
    write_private(tmp_path / "file", b"12345", overwrite=False)
    assert read_limited(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than the 4 bytes"):
        read_limited(tmp_path / "file", 4)
    if os.name == "posix":  # a file with a hole: it takes no room and claims a terabyte
        with open(tmp_path / "huge", "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match="larger than"):
            read_limited(tmp_path / "huge", 1 << 20)


# processes and threads ----------


def answers(served: torch.nn.Module) -> bytes:
    with torch.no_grad():
        return served(blobs().test[0][:300]).numpy().tobytes()


@posix
def test_a_forked_child_answers_as_its_parent(threads):
    """After the core's threads and torch's have been at work, as in a server that forks its workers."""
    threads(2)
    served = marked().protect(blobs().model)
    expected = answers(served)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork; the core's begin again
        os.write(write, b"same" if answers(served) == expected else b"other")
        os._exit(0)
    os.close(write)
    said = os.read(read, 10)
    os.waitpid(child, 0)
    assert said == b"same"


def test_threads_and_tasks_get_the_answers_of_one(threads):
    threads(1)
    served = marked().protect(blobs().model)
    expected = answers(served)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: answers(served), range(16))) == {expected}

    async def ask() -> list[bytes]:
        return await asyncio.gather(*(asyncio.to_thread(answers, served) for _ in range(8)))

    assert set(asyncio.run(ask())) == {expected}
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda _: verify(served, marked(), KEY).to_dict(), range(4)))
    assert all(verdict == verdicts[0] for verdict in verdicts)


@pytest.mark.slow
def test_a_spawned_process_answers_as_its_parent(tmp_path, threads):
    threads(1)
    marked().save(tmp_path / "mark")
    torch.save(blobs().model.state_dict(), tmp_path / "weights")
    torch.save(blobs().test[0][:300], tmp_path / "inputs")
    code = f"""
import multiprocessing, sys, torch

def work(place):
    import honeytrace
    from worlds import mlp
    model = mlp()
    model.load_state_dict(torch.load(place + "/weights"))
    served = honeytrace.Watermark.load(place + "/mark").protect(model.eval())
    with torch.no_grad():
        return served(torch.load(place + "/inputs")).numpy().tobytes()

if __name__ == "__main__":
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sys.stdout.buffer.write(pool.apply(work, ({str(tmp_path)!r},)))
"""
    (tmp_path / "spawns.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "spawns.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stdout == answers(marked().protect(blobs().model))


# interpreters and locales ----------


def test_a_sub_interpreter_is_told_so():
    """torch and pybind11 hang there without a word, so `import honeytrace` speaks before them."""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    code = f"""
import {name} as interpreters
other = interpreters.create()
told = "import honeytrace"
try:
    failed = interpreters.run_string(other, told)
    print(getattr(failed, "msg", failed))
except Exception as error:
    print(error)
"""
    assert "cannot be imported in a sub-interpreter" in python(code, timeout=60).stdout


LOCALES = {
    "c": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    "turkish": {"LC_ALL": "tr_TR.UTF-8"},  # i without a dot, and a comma for the decimal point
    "german": {"LC_ALL": "de_DE.UTF-8"},
}


@pytest.mark.parametrize("name", LOCALES)
def test_an_odd_locale_changes_nothing(name, tmp_path):
    marked().save(tmp_path / "mark")
    code = f"""
import locale
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    print("missing")
    raise SystemExit
import torch, honeytrace
from honeytrace.cli import main
from worlds import KEY, mlp
watermark = honeytrace.Watermark.load({str(tmp_path / "mark")!r})
verdict = honeytrace.verify(mlp().eval(), watermark, KEY)
print(watermark.summary)
print(verdict)
KEY.save({str(tmp_path / "owner.key")!r})
assert honeytrace.SecretKey.load({str(tmp_path / "owner.key")!r}) == KEY
watermark.save({str(tmp_path / "again")!r})
main(["doctor"])
"""
    done = python(code, PYTHONUTF8="0", PYTHONIOENCODING="", **LOCALES[name])
    if done.stdout.strip() == "missing":
        pytest.skip(f"this machine has no locale {LOCALES[name]['LC_ALL']}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(marked().summary) in done.stdout
    assert "p-value" in done.stdout
    assert (tmp_path / "again").read_bytes() == (tmp_path / "mark").read_bytes()


# versions ----------

KEPT = TESTS / "data" / "watermark-v1.honeytrace"


def test_a_file_of_the_first_format_is_still_read():
    """Written by version 0.1.0 with format 1. Whoever changes the format keeps this file and this test."""
    watermark = Watermark.load(KEPT)
    watermark.opened(KEY)
    assert watermark.digest() == "897187a765484c8a9feb078c7e2bf3c42146f7a9d77879798508563a538da3d5"
    served = watermark.protect(blobs().model)
    assert verify(served, watermark, KEY).claim
    assert not verify(blobs().model, watermark, KEY).claim


def test_roads_of_a_file_of_the_first_format_are_asked():
    """Its groups have roads from one trigger each."""
    watermark = Watermark.load(KEPT)
    assert {group.ends.shape[:2] for group in watermark.groups} == {(1, 2)}
    one_start = most_questions(1, 8)

    def suspect(inputs: torch.Tensor) -> torch.Tensor:
        return torch.tensor([hashlib.sha256(row.numpy().tobytes()).digest()[0] % 10 for row in inputs])

    verdict = verify(suspect, watermark, KEY, answers="labels", stop_at_claim=False)
    assert verdict.queries_total == one_start * len(watermark.groups)
    assert all(2 * 8 <= group.queries <= one_start for group in verdict.groups)


def test_a_file_of_the_first_format_is_the_one_committed_to(tmp_path):
    """A deposit made then still fits, and what is saved again is the same file."""
    watermark = Watermark.load(KEPT)
    watermark.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == KEPT.read_bytes()
    deposit = Commitment(
        key=KEY.commitment,
        watermark="897187a765484c8a9feb078c7e2bf3c42146f7a9d77879798508563a538da3d5",
        model="0" * 64,
        candidates=(8,) * 5,
        alpha=1e-3,
        rule="exact",
        honeytrace="0.1.0",
        time="2026-01-01T00:00:00Z",
    )
    assert deposit.digest == "9ed1e8c5c9386cc374788850661ccdda5d7b8f8738936d17ae707bd67f3b521f"
    bound, beacon = bind(watermark, KEY, deposit, "a value that appeared later")
    assert beacon.commitment == deposit.digest
    bound.save(tmp_path / "bound")
    assert Watermark.load(tmp_path / "bound").digest() == deposit.watermark
