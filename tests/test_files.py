"""Files are written whole or not at all, and for nobody else to read."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from honeytrace.files import locked, write_private


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("content", [b"", b"abc", memoryview(b"abc"), bytes(100_000)])
def test_writes_the_bytes(tmp_path, content, overwrite):
    path = tmp_path / "file"
    write_private(path, content, overwrite=overwrite)
    assert path.read_bytes() == bytes(content)
    assert names(tmp_path) == ["file"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_overwrites_only_when_asked_for(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with pytest.raises(FileExistsError):
        write_private(path, b"new", overwrite=False)
    assert path.read_bytes() == b"old"
    write_private(str(path), b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "os.fdopen"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_on_the_way_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        write_private(path, b"new", overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    happened = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (happened.append("sync"), sync(handle)))
    monkeypatch.setattr("os.replace", lambda a, b: (happened.append("name"), replace(a, b)))
    write_private(path, b"new", overwrite=True)
    assert happened == ["sync", "name"]


def test_an_interruption_right_after_the_rename_is_told_as_such(tmp_path, monkeypatch):
    replace = os.replace

    def then_stop(a, b):
        replace(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", then_stop)
    with pytest.raises(KeyboardInterrupt):
        write_private(tmp_path / "file", b"new", overwrite=True)
    assert names(tmp_path) == ["file"]


def test_names_as_long_as_the_system_allows(tmp_path):
    write_private(tmp_path / ("n" * 255), b"x", overwrite=False)
    assert names(tmp_path) == ["n" * 255]


def test_no_folder_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_private(tmp_path / "nowhere" / "file", b"x", overwrite=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        write_private(folder, b"x", overwrite=True)
    assert names(tmp_path) == ["folder"]


def test_one_is_in_the_lock_at_a_time_and_nothing_stays(tmp_path):
    inside, most = [], []

    def enter() -> None:
        for _ in range(50):
            with locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200
    assert max(most) == 1
    assert names(tmp_path) == []
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="there is no lock")
def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import sys, time; from honeytrace.files import locked\n"
        "with locked(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        waited = threading.Event()

        def wait() -> None:
            with locked(path):
                waited.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not waited.wait(0.3)
        holder.send_signal(signal.SIGKILL)
        assert waited.wait(10)
        thread.join()
